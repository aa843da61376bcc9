// Package lab is weft's data path without Kubernetes: nodes and pods as network namespaces, the real hooks, one real
// Envoy per node, a throw-away CA, and the resources that the controller and the agent would build. Two nodes share the
// kernel, each with its own instance of the hooks.
package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	cgroupVariable  = "WEFT_LAB_CGROUP"
	scratchVariable = "WEFT_LAB_SCRATCH"
	cgroupPrefix    = "weft-lab-"
)

// Enter runs a program where a Lab can be made: as a child in a cgroup and a mount namespace of its own. All that the
// program leaves goes with them. It returns the exit code.
func Enter(run func() int) int {
	var err error
	if os.Getenv(cgroupVariable) == "" {
		var code int
		if code, err = outer(); err == nil {
			return code
		}
	} else if err = inner(); err == nil {
		return run()
	}
	fmt.Fprintln(os.Stderr, "lab:", err)
	return 1
}

func outer() (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("run as root: network namespaces are made and BPF programs are loaded")
	}
	mount, err := findCgroup2()
	if err != nil {
		return 0, err
	}
	removeStale(mount)
	base := filepath.Join(mount, cgroupPrefix+strconv.Itoa(os.Getpid()))
	apps := filepath.Join(base, "apps")
	if err := os.MkdirAll(apps, 0o755); err != nil {
		return 0, fmt.Errorf("make cgroup: %w", err)
	}
	defer removeCgroup(base)
	dir, err := os.Open(apps)
	if err != nil {
		return 0, fmt.Errorf("open cgroup: %w", err)
	}
	defer dir.Close()
	scratch, err := os.MkdirTemp("", cgroupPrefix)
	if err != nil {
		return 0, err
	}
	defer os.Remove(scratch) // what is mounted on it ends with the child
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), cgroupVariable+"="+base, scratchVariable+"="+scratch)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: unix.SIGKILL}
	err = cmd.Run()
	if ctx.Err() != nil {
		removeCgroup(base)
		fmt.Fprintln(os.Stderr, "\ninterrupted: what was made is removed")
		return 130, nil
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	return 0, err
}

// inner makes the mounts that only this process and its children see.
func inner() error {
	scratch := os.Getenv(scratchVariable)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount scratch directory: %w", err)
	}
	for _, dir := range []string{"bpf", "netns", "envoy", "bin"} {
		if err := os.Mkdir(filepath.Join(scratch, dir), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("bpf", filepath.Join(scratch, "bpf"), "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount bpffs: %w", err)
	}
	return nil
}

func findCgroup2() (string, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		before, after, _ := strings.Cut(lines.Text(), " - ")
		if fields := strings.Fields(before); strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 {
			return fields[4], nil
		}
	}
	return "", errors.New("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

// removeStale removes the cgroups of earlier runs that were killed.
func removeStale(mount string) {
	dirs, _ := filepath.Glob(filepath.Join(mount, cgroupPrefix+"*"))
	for _, dir := range dirs {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix))
		if err == nil && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			removeCgroup(dir)
		}
	}
}

// removeCgroup ends what is left in the cgroup, all of it the lab's own, and removes it.
func removeCgroup(dir string) {
	_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := removeTree(dir)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			fmt.Fprintln(os.Stderr, "lab: remove cgroup:", err)
			return
		}
		time.Sleep(10 * time.Millisecond) // processes that were killed take a moment to leave
	}
}

// removeTree removes a cgroup with those inside it, as far as they are empty.
func removeTree(dir string) error {
	children, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, child := range children {
		if info, err := os.Stat(child); err == nil && info.IsDir() {
			_ = removeTree(child)
		}
	}
	return os.Remove(dir)
}
