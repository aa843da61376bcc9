package netns

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/redirect"
)

func lifeBoot(t *testing.T) {
	boot := func(id string) func(*redirect.Config) {
		return func(c *redirect.Config) { c.BootID = id }
	}
	w, p := capturing(t, boot("first"))
	p.reaches(t, serviceIPv4)
	w.ok(w.redirect.Close())
	w.load(boot("first"))
	p.reaches(t, serviceIPv4)
	p.reset()
	w.ok(w.redirect.Close())
	// One that fails gives nothing up.
	cfg := redirect.Config{CgroupRoot: cgroupBase, PinDir: w.pins, BootID: "second", KubeletCgroup: cgroupBase, NodeNetns: scratch + "/missing"}
	if r, err := redirect.Load(cfg); err == nil {
		r.Close()
		t.Fatal("loaded with a node's netns that is missing")
	}
	p.reaches(t, serviceIPv4)
	p.reset()
	w.load(boot("second"))
	if pods, err := w.redirect.Pods(); err != nil || len(pods) > 0 {
		t.Errorf("pods of another boot: %v, %v", pods, err)
	}
	w.unlistenQuietly(p)
	untouched(t, w, p)
}

func lifeLoadFails(t *testing.T) {
	w, p := capturing(t)
	missing := filepath.Join(scratch, "bpf", w.name+"-missing")
	for _, c := range []struct {
		what, says string
		cfg        redirect.Config
	}{
		{"a cgroup root that is no cgroup", "not on a cgroup2", redirect.Config{CgroupRoot: scratch, PinDir: missing}},
		{"a cgroup root that is missing", "no such file", redirect.Config{CgroupRoot: filepath.Join(cgroupBase, "missing"), PinDir: missing}},
		{"pins on no bpffs", "not on a bpffs", redirect.Config{CgroupRoot: cgroupBase, PinDir: filepath.Join(scratch, "pins")}},
		{"a relative path", "absolute", redirect.Config{CgroupRoot: cgroupBase, PinDir: "pins"}},
		{"the node without kubelet", "KubeletCgroup", redirect.Config{CgroupRoot: cgroupBase, PinDir: missing, NodeNetns: w.node.path}},
		{"a node's netns that is missing", "gone", redirect.Config{CgroupRoot: cgroupBase, PinDir: missing, KubeletCgroup: cgroupBase, NodeNetns: scratch + "/missing"}},
		{"a boot id too long", "boot id", redirect.Config{CgroupRoot: cgroupBase, PinDir: missing, BootID: strings.Repeat("b", 64)}},
		{"too many services", "steering", redirect.Config{CgroupRoot: cgroupBase, PinDir: missing, Limits: redirect.Limits{Services: 1 << 21}}},
	} {
		r, err := redirect.Load(c.cfg)
		if err == nil {
			r.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("load with %s: %v", c.what, err)
		}
		if _, err := os.Stat(missing); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("load with %s left %s", c.what, missing)
		}
	}
	exclusive := filepath.Join(cgroupBase, unique("exclusive"))
	w.ok(os.Mkdir(exclusive, 0o755))
	t.Cleanup(func() { _ = os.Remove(exclusive) })
	dir, err := os.Open(exclusive)
	w.ok(err)
	defer dir.Close()
	w.ok(link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: int(dir.Fd()), Attach: ebpf.AttachCGroupInet6Connect, Program: foreign(t, ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect),
	}))
	r, err := redirect.Load(redirect.Config{CgroupRoot: exclusive, PinDir: missing})
	if err == nil {
		r.Close()
	}
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "connect6") || !strings.Contains(err.Error(), "bpftool cgroup tree") {
		t.Errorf("load where somebody has connect6 for himself: %v", err)
	}
	if _, err := os.Stat(missing); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("load where somebody has connect6 for himself left %s", missing)
	}

	// A link that cannot be pinned, half-way through: what was attached before it goes again.
	w.ok(os.MkdirAll(filepath.Join(missing, "hooks", "connect6"), 0o700))
	if r, err := redirect.Load(redirect.Config{CgroupRoot: cgroupBase, PinDir: missing}); err == nil {
		r.Close()
		t.Error("loaded although a pin's place is taken")
	}
	w.ok(os.Remove(filepath.Join(missing, "hooks", "connect6")))
	left, err := os.ReadDir(filepath.Join(missing, "hooks"))
	if err != nil || len(left) > 0 {
		t.Errorf("a failed load left %v, %v", left, err)
	}
	w.ok(os.RemoveAll(missing))
	p.reaches(t, serviceIPv4) // the instance beside it never noticed
	p.reaches(t, serviceIPv6)
}

// lifeLoadUndone lets Load fail after it has replaced programs: the links get back what they had.
func lifeLoadUndone(t *testing.T) {
	w, p := capturing(t)
	hooks := w.hooksOf(p)
	before := map[string]ebpf.ProgramID{}
	for name, h := range hooks {
		w.supplanted(h)
		before[name] = w.program(h.pin...)
	}
	w.ok(w.redirect.Close())
	w.ok(os.Remove(filepath.Join(w.pins, "hooks", "connect6")))
	for what, obstacle := range map[string]string{
		"at the cgroup root, after connect4":      filepath.Join(w.pins, "hooks", "connect6"),
		"at an Envoy, after the pods and another": filepath.Join(w.pins, "proxies", "9", "proxy_socket_ops"),
	} {
		w.ok(os.MkdirAll(obstacle, 0o700))
		if r, err := redirect.Load(redirect.Config{CgroupRoot: cgroupBase, PinDir: w.pins}); err == nil {
			r.Close()
			t.Fatalf("%s: loaded although a pin's place is taken", what)
		}
		for name, h := range hooks {
			if got := w.program(h.pin...); got != before[name] {
				t.Errorf("%s: %s runs program %d after a failed load, before it %d", what, name, got, before[name])
			}
		}
		w.ok(os.Remove(obstacle))
	}
	w.ok(os.Remove(filepath.Join(w.pins, "proxies", "9")))
	w.load()
	for name, h := range hooks {
		if w.program(h.pin...) == before[name] {
			t.Errorf("%s still runs the program of others", name)
		}
	}
	p.reaches(t, serviceIPv4)
	p.reaches(t, serviceIPv6)
}
