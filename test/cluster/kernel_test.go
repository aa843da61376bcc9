package cluster

import (
	"compress/gzip"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weftmesh/weft/redirect"
)

// fakeModprobe puts a modprobe first in PATH that knows the given modules and writes what it is asked to do into a
// file, whose content the returned function gives.
func fakeModprobe(t *testing.T, known ...string) func() string {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf(`#!/bin/sh
[ "$1" = --dry-run ] || echo "$@" >>%s/calls
for last; do :; done
case " %s " in *" $last "*) exit 0 ;; esac
echo "no module $last" >&2
exit 1
`, dir, strings.Join(known, " "))
	if err := os.WriteFile(filepath.Join(dir, "modprobe"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() string {
		calls, _ := os.ReadFile(filepath.Join(dir, "calls"))
		return strings.TrimSpace(string(calls))
	}
}

// fakeKernel is a kernel whose files are given.
func fakeKernel(t *testing.T, files map[string]string) kernel {
	t.Helper()
	k := kernel{root: t.TempDir(), release: "6.1.0-18-amd64"}
	for name, content := range files {
		if err := writeFile(k.root+name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

func packed(t *testing.T, text string) string {
	t.Helper()
	var out strings.Builder
	w := gzip.NewWriter(&out)
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestKernelFeatures(t *testing.T) {
	veth := kernelFeatures[slices.IndexFunc(kernelFeatures, func(f kernelFeature) bool { return f.Module == "veth" })]
	overlay := kernelFeatures[0]
	for _, test := range []struct {
		name    string
		files   map[string]string
		modules []string
		feature kernelFeature
		want    bool
	}{
		{"a loaded module", map[string]string{"/sys/module/veth/refcnt": "0", "/proc/config.gz": packed(t, "")}, nil, veth, true},
		{"a module that can be loaded", map[string]string{"/proc/config.gz": packed(t, "CONFIG_VETH=m\n")}, []string{"veth"}, veth, true},
		{"a module whose file is missing", map[string]string{"/proc/config.gz": packed(t, "CONFIG_VETH=m\n")}, nil, veth, false},
		{"built in", map[string]string{"/proc/config.gz": packed(t, "CONFIG_VETH=y\n")}, nil, veth, true},
		{"built in, by the distribution's file", map[string]string{"/boot/config-6.1.0-18-amd64": "# kernel\nCONFIG_VETH=y\n"}, nil, veth, true},
		{"not built", map[string]string{"/boot/config-6.1.0-18-amd64": "# CONFIG_VETH is not set\n"}, nil, veth, false},
		{"a kernel that hides its configuration", nil, nil, veth, true},
		{"a file system that shows", map[string]string{"/proc/filesystems": "nodev\toverlay\n"}, nil, overlay, true},
		{"a file system that does not show", map[string]string{"/proc/filesystems": "nodev\tproc\n"}, nil, overlay, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			asked := fakeModprobe(t, test.modules...)
			if got := fakeKernel(t, test.files).has(t.Context(), test.feature); got != test.want {
				t.Errorf("has %s: got %v, want %v", test.feature.What, got, test.want)
			}
			if calls := asked(); calls != "" {
				t.Errorf("the check changed the kernel: modprobe %s", calls)
			}
		})
	}
}

// Everything that is missing is listed at once, each with its remedy, and nothing is loaded.
func TestKernelListsAll(t *testing.T) {
	asked := fakeModprobe(t)
	k := fakeKernel(t, map[string]string{
		"/proc/filesystems":                            "nodev\tproc\nnodev\tbpf\n",
		"/proc/sys/net/ipv6/conf/all/disable_ipv6":     "1\n",
		"/proc/sys/net/ipv6/conf/all/forwarding":       "0\n",
		"/boot/config-5.10.0":                          "CONFIG_VETH=y\n",
		"/proc/sys/net/netfilter/nf_conntrack_max":     "1\n",
		"/proc/sys/net/bridge/bridge-nf-call-iptables": "1\n",
	})
	k.release = "5.10.0"
	text := list(k.check(context.Background())).Error()
	for _, want := range []string{"Linux " + redirect.MinimumKernel + ": this is 5.10.0", "CONFIG_OVERLAY_FS", "CONFIG_BRIDGE)", "CONFIG_NF_TABLES", "run modprobe nf_tables", "IPv6: it is switched off", "cgroup2"} {
		if !strings.Contains(text, want) {
			t.Errorf("the list lacks %q:\n%s", want, text)
		}
	}
	if problems, remedies := strings.Count(text, "\n  - "), strings.Count(text, "\n    remedy: "); problems < 6 || problems != remedies {
		t.Errorf("%d problems with %d remedies:\n%s", problems, remedies, text)
	}
	for _, wrong := range []string{"CONFIG_VETH", "CONFIG_NF_CONNTRACK", "CONFIG_BRIDGE_NETFILTER", "CONFIG_BPF_SYSCALL"} {
		if strings.Contains(text, wrong) {
			t.Errorf("the list has %s, which is there:\n%s", wrong, text)
		}
	}
	if calls := asked(); calls != "" {
		t.Errorf("the check changed the kernel: modprobe %s", calls)
	}
}

// Up loads the modules that do not show, in their order; down unloads those, last first.
func TestModules(t *testing.T) {
	asked := fakeModprobe(t, "veth", "bridge", "br_netfilter", "overlay")
	k := fakeKernel(t, map[string]string{"/proc/filesystems": "nodev\toverlay\n", "/sys/module/veth/refcnt": "0"})
	modules := k.absentModules(t.Context())
	if want := []string{"bridge", "br_netfilter"}; !slices.Equal(modules, want) {
		t.Fatalf("absent modules: got %v, want %v", modules, want)
	}
	if err := loadModules(t.Context(), modules); err != nil {
		t.Fatal(err)
	}
	unloadModules(t.Context(), modules)
	const remove = "--remove --remove-holders --quiet "
	if got, want := asked(), "bridge\nbr_netfilter\n"+remove+"br_netfilter\n"+remove+"bridge"; got != want {
		t.Errorf("modprobe was asked %q, want %q", got, want)
	}
	if err := loadModules(t.Context(), []string{"nosuch"}); err == nil || !strings.Contains(err.Error(), "no module nosuch") {
		t.Errorf("load a module that is not there: got %v, want modprobe's words", err)
	}
}
