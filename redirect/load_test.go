package redirect

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// absent is the number of a helper that no kernel has.
const absent = asm.BuiltinFunc(99999)

// lacking is the object of a version whose connect6 calls a helper that this kernel lacks.
func lacking() (*ebpf.CollectionSpec, error) {
	spec, err := loadWeft()
	if err == nil {
		spec.Programs[weftProgConnect6].Instructions = asm.Instructions{absent.Call(), asm.Mov.Imm(asm.R0, 1), asm.Return()}
	}
	return spec, err
}

// The kernel itself refuses a program: the error names what it lacks, and hooks, pins and links are as they were, on a
// node without weft and on one whose links another version made.
func TestLoadOnAKernelWithoutAFeatureChangesNothing(t *testing.T) {
	kept := kernelFeatures
	t.Cleanup(func() { kernelFeatures = kept })
	kernelFeatures = append(kept[:len(kept):len(kept)], feature{"a helper of the future", "99.0", func() error {
		return features.HaveProgramHelper(ebpf.CGroupSockAddr, absent)
	}})
	cfg := Config{CgroupRoot: testCgroup(t), PinDir: filepath.Join(testBPFFS(t), "weft"), BootID: "first"}

	refused := func(cfg Config) {
		t.Helper()
		before := nodeState(t, cfg)
		r, err := loadObject(cfg, lacking)
		if err == nil {
			r.Close()
			t.Fatal("loaded with a helper that the kernel lacks")
		}
		for _, want := range []string{"lacks a helper of the future", "Linux 99.0", MinimumKernel} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %q", err, want)
			}
		}
		if !errors.Is(err, ErrUnsupported) {
			t.Errorf("%v is not ErrUnsupported", err)
		}
		if after := nodeState(t, cfg); !maps.Equal(before, after) {
			t.Errorf("before the failed load: %v\nafter it: %v", before, after)
		}
	}
	refused(cfg)

	r, err := Load(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Release(cfg.PinDir, true); err != nil {
			t.Error(err)
		}
	})
	other, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	l, err := link.LoadPinnedLink(r.pins.hook(weftProgConnect4), nil)
	if err == nil {
		err = errors.Join(l.Update(other), l.Close())
	}
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	refused(cfg)
	cfg.BootID = "second" // what another boot left is given up by a load that works alone
	refused(cfg)
}

// nodeState lists what weft can change on a node: pins, with what they hold, and the programs at the cgroup.
func nodeState(t *testing.T, cfg Config) map[string]string {
	t.Helper()
	state := map[string]string{}
	err := filepath.WalkDir(cfg.PinDir, func(path string, entry os.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		if entry.IsDir() {
			state[path] = "directory"
			return nil
		}
		if a, err := openAttachment(path); err == nil {
			state[path] = fmt.Sprintf("program %d at %d", a.program, a.id)
			return a.link.Close()
		}
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return err
		}
		defer m.Close()
		info, err := m.Info()
		if err == nil {
			id, _ := info.ID()
			state[path] = fmt.Sprintf("map %d", id)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(cfg.CgroupRoot)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	spec, err := loadWeft()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range rootHooks {
		attached, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: spec.Programs[name].AttachType})
		if err != nil {
			t.Fatal(err)
		}
		state[name] = fmt.Sprint(attached.Programs)
	}
	return state
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root loads programs; test/kernels runs this as root")
	}
}

// testCgroup makes a cgroup below the cgroup2 mount.
func testCgroup(t *testing.T) string {
	t.Helper()
	needRoot(t)
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		before, after, _ := strings.Cut(s.Text(), " - ")
		if fields := strings.Fields(before); strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 {
			dir, err := os.MkdirTemp(fields[4], "weft-load-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.Remove(dir) })
			return dir
		}
	}
	t.Fatal("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup")
	return ""
}

// testBPFFS mounts a bpffs.
func testBPFFS(t *testing.T) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatal("mount bpffs:", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}
