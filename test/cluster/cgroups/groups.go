package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Create makes the group in every hierarchy, parents included. group is relative, "weft0a1b2c/n1". A v1 cpuset group
// inherits its parent's CPUs and memory nodes, without which no process may enter it. On a pure v2 machine the
// controllers of the parents are enabled for it; Create returns those that had to be enabled at the mount's root, for
// Disable to undo.
func (l Layout) Create(group string) (enabled []string, err error) {
	for _, hierarchy := range l.V1 {
		if err := os.MkdirAll(filepath.Join(hierarchy.MountPoint, group), 0o755); err != nil {
			return nil, fmt.Errorf("make control group: %w", err)
		}
		if strings.Contains(","+hierarchy.Options+",", ",cpuset,") {
			if err := inheritCPUSet(hierarchy.MountPoint, group); err != nil {
				return nil, err
			}
		}
	}
	if err := os.MkdirAll(filepath.Join(l.V2.MountPoint, group), 0o755); err != nil {
		return nil, fmt.Errorf("make control group: %w", err)
	}
	if !l.PureV2() {
		return nil, nil
	}
	parts := strings.Split(group, "/")
	for depth := range parts {
		parent := filepath.Join(append([]string{l.V2.MountPoint}, parts[:depth]...)...)
		added, err := EnableControllers(parent)
		if err != nil {
			return nil, err
		}
		if depth == 0 {
			enabled = added
		}
	}
	return enabled, nil
}

func inheritCPUSet(mountPoint, group string) error {
	parent := mountPoint
	for _, part := range strings.Split(group, "/") {
		child := filepath.Join(parent, part)
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(parent, file))
			if err != nil {
				return fmt.Errorf("read the CPUs a new control group may use: %w", err)
			}
			if err := os.WriteFile(filepath.Join(child, file), value, 0); err != nil {
				return fmt.Errorf("let a new control group use its parent's CPUs: %w", err)
			}
		}
		parent = child
	}
	return nil
}

// EnableControllers enables every controller that folder has for its children and returns those it had to add.
func EnableControllers(folder string) ([]string, error) {
	available, err := words(filepath.Join(folder, "cgroup.controllers"))
	if err != nil {
		return nil, fmt.Errorf("read the controllers of a control group: %w", err)
	}
	active, err := words(filepath.Join(folder, "cgroup.subtree_control"))
	if err != nil {
		return nil, fmt.Errorf("read the active controllers of a control group: %w", err)
	}
	var added []string
	for _, controller := range available {
		if contains(active, controller) {
			continue
		}
		err := os.WriteFile(filepath.Join(folder, "cgroup.subtree_control"), []byte("+"+controller), 0)
		if errors.Is(err, unix.EBUSY) {
			return added, fmt.Errorf("enable controller %s below %s: the group holds processes of its own: in a container, move them into a child group first: %w", controller, folder, err)
		}
		if err != nil {
			return added, fmt.Errorf("enable controller %s below %s: %w", controller, folder, err)
		}
		added = append(added, controller)
	}
	return added, nil
}

// Disable switches controllers off at the root of the cgroup2 mount again. One that something else uses by now stays.
func (l Layout) Disable(controllers []string) {
	for _, controller := range controllers {
		_ = os.WriteFile(filepath.Join(l.V2.MountPoint, "cgroup.subtree_control"), []byte("-"+controller), 0)
	}
}

// Lock waits until no other process that locks it, too, switches controllers at the root of the cgroup2 mount.
func (l Layout) Lock() (release func(), err error) {
	root, err := os.Open(l.V2.MountPoint)
	if err != nil {
		return nil, fmt.Errorf("lock control groups: %w", err)
	}
	if err := unix.Flock(int(root.Fd()), unix.LOCK_EX); err != nil {
		_ = root.Close()
		return nil, fmt.Errorf("lock control groups: %w", err)
	}
	return func() { _ = root.Close() }, nil
}

// V2Path is the group's folder in the cgroup2 hierarchy.
func (l Layout) V2Path(group string) string { return filepath.Join(l.V2.MountPoint, group) }

// EnterV1 moves the calling process into the group in every v1 hierarchy.
func (l Layout) EnterV1(group string) error {
	for _, hierarchy := range l.V1 {
		if err := os.WriteFile(filepath.Join(hierarchy.MountPoint, group, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter control group: %w", err)
		}
	}
	return nil
}

// Processes lists the processes in the group and below it, in any hierarchy, sorted. A group that does not exist has none.
func (l Layout) Processes(group string) []int {
	seen := map[int]bool{}
	for _, hierarchy := range append([]Hierarchy{l.V2}, l.V1...) {
		walk(filepath.Join(hierarchy.MountPoint, group), func(folder string) {
			lines, _ := words(filepath.Join(folder, "cgroup.procs"))
			for _, line := range lines {
				if pid, err := strconv.Atoi(line); err == nil && pid > 0 { // 0: in a pid namespace that this one cannot see
					seen[pid] = true
				}
			}
		})
	}
	pids := make([]int, 0, len(seen))
	for pid := range seen {
		pids = append(pids, pid)
	}
	sort.Ints(pids)
	return pids
}

// Exists says whether the group is there in any hierarchy.
func (l Layout) Exists(group string) bool {
	for _, hierarchy := range append([]Hierarchy{l.V2}, l.V1...) {
		if _, err := os.Stat(filepath.Join(hierarchy.MountPoint, group)); err == nil {
			return true
		}
	}
	return false
}

// Kill ends every process of the group at once and waits until all are gone, timeout at the longest.
func (l Layout) Kill(group string, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		err := os.WriteFile(filepath.Join(l.V2.MountPoint, group, "cgroup.kill"), []byte("1"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("kill control group %s: %w", group, err)
		}
		left := l.Processes(group)
		if len(left) == 0 {
			return nil
		}
		for _, pid := range left {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("kill control group %s: processes %v still run after %s", group, left, timeout)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Remove deletes the group and all below it in every hierarchy. No process may be left in it; a group whose last
// process has just died stays busy for a moment, which Remove waits out until timeout.
func (l Layout) Remove(group string, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for _, hierarchy := range append([]Hierarchy{l.V2}, l.V1...) {
		top := filepath.Join(hierarchy.MountPoint, group)
		for {
			var folders []string
			walk(top, func(folder string) { folders = append(folders, folder) })
			var failed error
			for i := len(folders) - 1; i >= 0; i-- {
				if err := unix.Rmdir(folders[i]); err != nil && !errors.Is(err, unix.ENOENT) {
					failed = fmt.Errorf("remove control group %s: %w", folders[i], err)
				}
			}
			if failed == nil {
				break
			}
			if time.Now().After(deadline) {
				return failed
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}

// walk calls visit for top and every folder below it, parents first.
func walk(top string, visit func(folder string)) {
	_ = filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			visit(path)
		}
		return nil
	})
}

func words(file string) ([]string, error) {
	content, err := os.ReadFile(file)
	return strings.Fields(string(content)), err
}

func contains(list []string, word string) bool {
	for _, have := range list {
		if have == word {
			return true
		}
	}
	return false
}
