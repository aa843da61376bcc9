package cgroups

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestParseRecorded(t *testing.T) {
	for _, test := range []struct {
		file, v2, layout, inside string
		v1, readOnly, mounts     []string
		err                      error
	}{
		{file: "debian12-hybrid-v1-apart.txt", v2: "/sys/fs/cgroup/unified", layout: "hybrid", inside: "/sys/fs/cgroup/unified",
			v1: []string{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids", "none,name=systemd"},
			mounts: []string{"tmpfs /sys/fs/cgroup", "cgroup /sys/fs/cgroup/blkio", "cgroup /sys/fs/cgroup/cpu", "cgroup /sys/fs/cgroup/cpuacct", "cgroup /sys/fs/cgroup/cpuset",
				"cgroup /sys/fs/cgroup/devices", "cgroup /sys/fs/cgroup/freezer", "cgroup /sys/fs/cgroup/memory", "cgroup /sys/fs/cgroup/pids", "cgroup /sys/fs/cgroup/systemd", "cgroup2 /sys/fs/cgroup/unified"}},
		{file: "debian12-systemd-hybrid.txt", v2: "/sys/fs/cgroup/unified", layout: "hybrid", inside: "/sys/fs/cgroup/unified",
			v1: []string{"cpu,cpuacct", "cpuset", "memory", "net_cls,net_prio", "pids", "none,name=systemd"},
			mounts: []string{"tmpfs /sys/fs/cgroup", "cgroup /sys/fs/cgroup/cpu,cpuacct cpu cpuacct", "cgroup /sys/fs/cgroup/cpuset", "cgroup /sys/fs/cgroup/memory",
				"cgroup /sys/fs/cgroup/net_cls,net_prio net_cls net_prio", "cgroup /sys/fs/cgroup/pids", "cgroup /sys/fs/cgroup/systemd", "cgroup2 /sys/fs/cgroup/unified"}},
		{file: "debian12-systemd-v2.txt", v2: "/sys/fs/cgroup", layout: "pure v2", inside: "/sys/fs/cgroup", mounts: []string{"cgroup2 /sys/fs/cgroup"}},
		{file: "ubuntu2404-cilium-v2.txt", v2: "/sys/fs/cgroup", layout: "pure v2", inside: "/sys/fs/cgroup", mounts: []string{"cgroup2 /sys/fs/cgroup"}},
		{file: "container-unprivileged-v2.txt", v2: "/sys/fs/cgroup", layout: "pure v2", inside: "/sys/fs/cgroup", readOnly: []string{"/sys/fs/cgroup"}, mounts: []string{"cgroup2 /sys/fs/cgroup"}},
		{file: "container-privileged-on-hybrid.txt", v2: "/mnt/with blank", layout: "hybrid", inside: "/sys/fs/cgroup/unified",
			v1: []string{"cpu,cpuacct", "cpuset", "memory", "pids", "none,name=systemd"},
			mounts: []string{"tmpfs /sys/fs/cgroup", "cgroup /sys/fs/cgroup/cpu,cpuacct cpu cpuacct", "cgroup /sys/fs/cgroup/cpuset", "cgroup /sys/fs/cgroup/memory",
				"cgroup /sys/fs/cgroup/pids", "cgroup /sys/fs/cgroup/systemd", "cgroup2 /sys/fs/cgroup/unified"}},
		{file: "v1-alone.txt", err: ErrNoV2},
	} {
		t.Run(test.file, func(t *testing.T) {
			file, err := os.Open(filepath.Join("testdata", test.file))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			layout, err := Parse(file)
			if !errors.Is(err, test.err) {
				t.Fatalf("got error %v, want %v", err, test.err)
			}
			if err != nil {
				return
			}
			if layout.V2.MountPoint != test.v2 || layout.String() != test.layout || layout.InsideV2() != test.inside {
				t.Errorf("got %s with cgroup2 at %s, %s inside; want %s, %s, %s", layout, layout.V2.MountPoint, layout.InsideV2(), test.layout, test.v2, test.inside)
			}
			var v1, mounts []string
			for _, hierarchy := range layout.V1 {
				v1 = append(v1, hierarchy.Options)
			}
			for _, mount := range layout.Mounts() {
				mounts = append(mounts, strings.Join(append([]string{mount.Type, mount.Target}, mount.Links...), " "))
			}
			if !slices.Equal(v1, test.v1) {
				t.Errorf("v1 hierarchies: got %q, want %q", v1, test.v1)
			}
			if !slices.Equal(mounts, test.mounts) {
				t.Errorf("mounts inside: got %q, want %q", mounts, test.mounts)
			}
			if got := layout.ReadOnly(); !slices.Equal(got, test.readOnly) {
				t.Errorf("read-only: got %q, want %q", got, test.readOnly)
			}
		})
	}
}

// layouts are this machine's own and, to run the other code path in this kernel, its cgroup2 mount alone.
func layouts(t *testing.T) map[string]Layout {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make control groups")
	}
	own, err := Read()
	if err != nil {
		t.Fatal(err)
	}
	if readOnly := own.ReadOnly(); len(readOnly) > 0 {
		t.Skipf("control groups are read-only here: %v", readOnly)
	}
	// Another package's tests switch controllers of the root, too.
	release, err := own.Lock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return map[string]Layout{"as mounted": own, "cgroup2 alone": {V2: own.V2}}
}

func TestCreateKillRemove(t *testing.T) {
	for name, layout := range layouts(t) {
		t.Run(name, func(t *testing.T) {
			const group = "weftcgroupstest"
			read := func(file string) string {
				content, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				return strings.TrimSpace(string(content))
			}
			active := read(layout.V2Path("cgroup.subtree_control"))
			enabled, err := layout.Create(group + "/child")
			t.Cleanup(func() { _ = layout.Remove(group, time.Minute) })
			if err != nil {
				t.Fatal(err)
			}
			if layout.PureV2() {
				if got, want := read(layout.V2Path(group+"/child/cgroup.controllers")), read(layout.V2Path("cgroup.controllers")); got != want {
					t.Errorf("controllers of the new group: got %q, want all of %q", got, want)
				}
			}
			folder, err := os.Open(layout.V2Path(group + "/child"))
			if err != nil {
				t.Fatal(err)
			}
			defer folder.Close()
			sleeper := exec.Command("sleep", "600")
			sleeper.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(folder.Fd())}
			if err := sleeper.Start(); err != nil {
				t.Fatal(err)
			}
			for _, hierarchy := range layout.V1 {
				if err := os.WriteFile(filepath.Join(hierarchy.MountPoint, group, "child", "cgroup.procs"), []byte(pid(sleeper)), 0); err != nil {
					t.Errorf("enter %s: %v", hierarchy.MountPoint, err)
				}
			}
			if got := layout.Processes(group); !slices.Equal(got, []int{sleeper.Process.Pid}) {
				t.Errorf("processes: got %v, want %d", got, sleeper.Process.Pid)
			}
			if err := layout.Remove(group, 50*time.Millisecond); err == nil {
				t.Error("remove a group with a process: want an error")
			}
			go func() { _ = sleeper.Wait() }()
			if err := layout.Kill(group, time.Minute); err != nil {
				t.Error(err)
			}
			if err := layout.Remove(group, time.Minute); err != nil {
				t.Error(err)
			}
			if layout.Exists(group) {
				t.Error("the group exists after Remove")
			}
			if err := errors.Join(layout.Kill(group, time.Minute), layout.Remove(group, time.Minute)); err != nil {
				t.Errorf("kill and remove a group that is gone: %v", err)
			}
			layout.Disable(enabled)
			if got := read(layout.V2Path("cgroup.subtree_control")); got != active {
				t.Errorf("active controllers of the root after Disable: got %q, want %q", got, active)
			}
		})
	}
}

func pid(command *exec.Cmd) string { return strconv.Itoa(command.Process.Pid) }
