package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/cluster/cgroups"
)

func TestSlotsDoNotOverlap(t *testing.T) {
	var seen []netip.Prefix
	for slot := 0; slot <= MaxSlot; slot++ {
		c := Config{Dir: "/clone", Nodes: MaxNodes, Slot: slot}
		node4, node6 := c.nodeNet()
		pod4, pod6 := c.podNet()
		service4, service6 := c.serviceNet()
		for _, own := range []netip.Prefix{node4, node6, pod4, pod6, service4, service6} {
			for _, other := range seen {
				if own.Overlaps(other) {
					t.Errorf("slot %d: %s overlaps %s", slot, own, other)
				}
			}
			seen = append(seen, own)
		}
		for n := 1; n <= MaxNodes; n++ {
			range4, range6 := c.podRange(n)
			v4, v6 := c.node(n)
			if !pod4.Overlaps(range4) || !pod6.Overlaps(range6) || !node4.Contains(v4) || !node6.Contains(v6) {
				t.Errorf("slot %d node %d: %s %s %s %s lie outside the slot's ranges", slot, n, range4, range6, v4, v6)
			}
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for name, c := range map[string]Config{"NODES": {Nodes: 0}, "4": {Nodes: MaxNodes + 1}, "SLOT": {Nodes: 1, Slot: MaxSlot + 1}} {
		if err := c.validate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%+v: got %v, want an error that names %s", c, err, name)
		}
	}
	if len(Config{Dir: "/a/b"}.linkName()) > 15 {
		t.Error("the link's name is longer than the kernel takes")
	}
	if a, b := (Config{Dir: "/a"}).Prefix(), (Config{Dir: "/b"}).Prefix(); a == b {
		t.Error("two clones have one prefix")
	}
}

func TestOpenWithoutCluster(t *testing.T) {
	_, err := Open(t.TempDir())
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "make cluster-up") {
		t.Errorf("got %v, want the remedy", err)
	}
}

// The chart is told where the nodes see cgroup v2, on every kind of machine; the values file must not say it for all.
func TestHostCgroup(t *testing.T) {
	for file, want := range map[string]string{"debian12-systemd-v2.txt": "/sys/fs/cgroup", "debian12-systemd-hybrid.txt": "/sys/fs/cgroup/unified"} {
		mountinfo, err := os.Open(filepath.Join("cgroups/testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		defer mountinfo.Close()
		layout, err := cgroups.Parse(mountinfo)
		if err != nil {
			t.Fatal(err)
		}
		s := &state{Config: Config{Dir: t.TempDir(), Nodes: 2}, Layout: layout}
		if got := s.cluster().HostCgroup; got != want {
			t.Errorf("%s: got %s, want %s", file, got, want)
		}
	}
	if values, err := os.ReadFile("values.yaml"); err != nil || regexp.MustCompile(`(?m)^host:`).Match(values) {
		t.Errorf("values.yaml sets host values for every machine: %v: %s", err, values)
	}
}

// Both preflights ask for the same memory and disk.
func TestNeeds(t *testing.T) {
	raw, err := os.ReadFile("../../hack/make/cluster.mk")
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%d %d,%d %d)", minimumMemory>>20, minimumDisk>>20, minimumToBuild>>20, minimumBuildDisk>>20)
	if !strings.Contains(string(raw), want) {
		t.Errorf("hack/make/cluster.mk lacks %q", want)
	}
}

// The packages that the preflight asks for are those that make deps installs.
func TestPackageList(t *testing.T) {
	raw, err := os.ReadFile("../../hack/packages/cluster.txt")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, p := range programs {
		want = append(want, p.Package)
	}
	slices.Sort(want)
	if got := strings.Fields(string(raw)); !slices.Equal(got, want) {
		t.Errorf("hack/packages/cluster.txt: got %v, want %v", got, want)
	}
}

func TestOlderThan(t *testing.T) {
	for _, test := range []struct {
		version, minimum string
		older            bool
	}{{"6.1.0-18-amd64", "5.14", false}, {"5.10.0", "5.14", true}, {"5.14.21", "5.14", false}, {"4.19", "5.14", true}, {"1.26.8", "1.26", false}, {"1.9", "1.26", true}, {"devel", "1.26", true}} {
		if got := olderThan(test.version, test.minimum); got != test.older {
			t.Errorf("%s older than %s: got %v", test.version, test.minimum, got)
		}
	}
}

func TestPKI(t *testing.T) {
	c := Config{Dir: t.TempDir(), Nodes: 2}
	if err := c.makePKI(); err != nil {
		t.Fatal(err)
	}
	read := func(name string) []byte {
		raw, err := os.ReadFile(c.path(name))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for _, test := range []struct{ ca, file, name, organization, address string }{
		{"ca", "cp/kubernetes/apiserver.crt", "kube-apiserver", "", "10.96.0.1"},
		{"ca", "cp/kubernetes/apiserver.crt", "kube-apiserver", "", "fd00:96::1"},
		{"ca", "n2/kubernetes/kubelet.crt", "system:node:n2", "system:nodes", "10.88.0.12"},
		{"ca", "cp/kubernetes/apiserver-kubelet.crt", "kube-apiserver-kubelet-client", "system:masters", ""},
		{"front-proxy-ca", "cp/kubernetes/front-proxy.crt", "front-proxy-client", "", ""},
		{"etcd-ca", "cp/kubernetes/etcd.crt", "etcd", "", "127.0.0.1"},
	} {
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(read("cp/kubernetes/" + test.ca + ".crt"))
		certificate := parse(t, read(test.file))
		if _, err := certificate.Verify(x509.VerifyOptions{Roots: roots, DNSName: test.address, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Errorf("%s by %s for %q: %v", test.file, test.ca, test.address, err)
		}
		if got := certificate.Subject; got.CommonName != test.name || strings.Join(got.Organization, "") != test.organization {
			t.Errorf("%s: subject %s, want %s of %q", test.file, got, test.name, test.organization)
		}
	}
	info, err := os.Stat(c.path("cp/kubernetes/ca.key"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the authority's key: mode %v, %v, want 0600", info.Mode(), err)
	}
	if _, err := os.Stat(c.path("n1/kubernetes/ca.key")); err == nil {
		t.Error("a node has the authority's key")
	}
	if _, err := c.newAPI(); err != nil {
		t.Errorf("the administrator's kubeconfig: %v", err)
	}
}

func parse(t *testing.T, raw []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(raw)
	if block == nil {
		t.Fatalf("not PEM: %.40q", raw)
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

func TestTarball(t *testing.T) {
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("binary"), 0o644); err != nil {
		t.Fatal(err)
	}
	i := image{Ref: "docker.io/weft/test:1", Entrypoint: []string{"/bin/program"}, Files: map[string]string{"bin/program": program}, Links: map[string]string{"var/run": "/run"}, Folders: []string{"tmp"}}
	first, err := i.tarball()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(program, time.Now(), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	second, err := i.tarball()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Error("the same files make different bytes")
	}
	outer := entries(t, first)
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(outer["manifest.json"], &manifest); err != nil || len(manifest) != 1 {
		t.Fatalf("manifest: %v, %v", manifest, err)
	}
	if got := manifest[0].RepoTags; !slices.Equal(got, []string{i.Ref}) {
		t.Errorf("names: got %v, want %s", got, i.Ref)
	}
	var config struct {
		Config struct{ Entrypoint []string }
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(outer[manifest[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	layer := outer[manifest[0].Layers[0]]
	if got := config.RootFS.DiffIDs; !slices.Equal(got, []string{"sha256:" + digest(layer)}) || !slices.Equal(config.Config.Entrypoint, i.Entrypoint) {
		t.Errorf("config: %+v does not fit the layer", config)
	}
	if inner := entries(t, layer); string(inner["bin/program"]) != "binary" || string(inner["var/run"]) != "-> /run" {
		t.Errorf("layer: got %q", inner)
	}
	i.Files["bin/missing"] = program + "-missing"
	if _, err := i.tarball(); err == nil {
		t.Error("an image of a file that does not exist: want an error")
	}
}

func entries(t *testing.T, raw []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if header.Typeflag == tar.TypeSymlink {
			content = []byte("-> " + header.Linkname)
		}
		out[header.Name] = content
	}
}

// Interrupted builds resume: what is in place is not built again, what was aborted is removed.
func TestBuildResumes(t *testing.T) {
	folder := t.TempDir()
	c := Config{Dir: "/clone"}
	all := artefacts()
	if got := c.missing(folder); got != len(all) {
		t.Errorf("missing in an empty cache: got %d, want %d", got, len(all))
	}
	containerd := all[slices.IndexFunc(all, func(a artefact) bool { return a.Name == "containerd" })]
	for i, program := range containerd.Programs {
		if containerd.done(folder) {
			t.Errorf("containerd counts as built with %d of %d programs", i, len(containerd.Programs))
		}
		if err := writeFile(filepath.Join(folder, containerd.Folder, program), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if got := c.missing(folder); got != len(all)-1 || !containerd.done(folder) {
		t.Errorf("missing after containerd was built: got %d, want %d", got, len(all)-1)
	}
	aborted := filepath.Join(folder, "build-etcd-1")
	if err := os.Mkdir(aborted, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := removeAborted(folder); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(aborted); err == nil || c.missing(folder) != len(all)-1 {
		t.Error("the aborted build is still there, or a finished one is gone")
	}
}

// A command that waits for the lock says who has it, and ends when it is interrupted.
func TestLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := lockFile(t.Context(), name, func(string) { t.Error("waits for a free lock") })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	want := fmt.Sprintf("process %d (%s", os.Getpid(), os.Args[0])
	asked := 0
	_, err = lockFile(ctx, name, func(holder string) {
		asked++
		if !strings.HasPrefix(holder, want) {
			t.Errorf("the holder is %q, want %q", holder, want)
		}
		cancel()
	})
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), want) || asked != 1 {
		t.Errorf("interrupted: got %v after %d messages, want the holder named once", err, asked)
	}
	unlock()
	again, err := lockFile(t.Context(), name, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// Two clusters end in any order; the last one restores what the first one changed.
func TestInherit(t *testing.T) {
	first := former{InotifyInstances: 128, Controllers: []string{"cpu", "io"}, Modules: []string{"bridge", "br_netfilter"}}
	second := former{Controllers: []string{"memory", "io"}}
	second.inherit(first)
	want := former{InotifyInstances: 128, Controllers: []string{"memory", "io", "cpu"}, Modules: []string{"bridge", "br_netfilter"}}
	if !reflect.DeepEqual(second, want) {
		t.Errorf("got %+v, want %+v", second, want)
	}
	own := former{InotifyInstances: 256}
	if own.inherit(first); own.InotifyInstances != 256 {
		t.Errorf("a former value of its own: got %d, want 256", own.InotifyInstances)
	}
	dir := t.TempDir()
	s := &state{Config: Config{Dir: dir, Nodes: 1}, Cache: "/cache", Stopped: []int{1}, former: want}
	if err := s.save(); err != nil {
		t.Fatal(err)
	}
	if got, err := loadState(dir); err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("saved and read again: got %+v, %v, want %+v", got, err, s)
	}
}

// The cache folder's name follows every recipe.
func TestCacheFolderFollowsRecipes(t *testing.T) {
	dir := t.TempDir()
	for _, part := range []string{"k8s", "etcd"} {
		if err := os.CopyFS(filepath.Join(dir, "test/cluster", part), os.DirFS(part)); err != nil {
			t.Fatal(err)
		}
	}
	c := Config{Dir: dir}
	first, err := c.cacheFolder()
	if err != nil {
		t.Fatal(err)
	}
	root, err := CacheRoot()
	if err != nil || filepath.Dir(first) != root {
		t.Errorf("got %s, %v, want it below %s", first, err, root)
	}
	if again, err := c.cacheFolder(); err != nil || again != first {
		t.Errorf("got %s, %v, then %s", first, err, again)
	}
	if err := os.WriteFile(filepath.Join(dir, "test/cluster/k8s/go.sum"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	if changed, err := c.cacheFolder(); err != nil || changed == first {
		t.Errorf("after a change of go.sum: got %s, %v, want another folder", changed, err)
	}
}
