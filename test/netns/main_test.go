package netns

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	roleVariable    = "WEFT_NETNS_ROLE"
	cgroupVariable  = "WEFT_NETNS_CGROUP"
	scratchVariable = "WEFT_NETNS_SCRATCH"
	cgroupPrefix    = "weft-netns-"
)

// TestMain runs as three kinds of process: the outer one makes the cgroup and cleans up, the tests run as its child,
// and hands (see hand_test.go) are children of that.
func TestMain(m *testing.M) {
	switch role := os.Getenv(roleVariable); role {
	case "":
		os.Exit(outer()) // the deferred clean-up has run by then
	case "tests":
		if err := enterTests(); err != nil {
			fmt.Fprintln(os.Stderr, "netns tests:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	case "hand":
		runHand()
	default:
		fmt.Fprintln(os.Stderr, "netns tests: unknown role", role)
		os.Exit(2)
	}
}

// outer starts the tests in a cgroup and mount namespace of their own and removes what they leave.
func outer() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "netns tests: run as root: they make network namespaces and load BPF programs")
		return 1
	}
	mount, err := findCgroup2()
	if err != nil {
		fmt.Fprintln(os.Stderr, "netns tests:", err)
		return 1
	}
	removeStale(mount)
	base := filepath.Join(mount, cgroupPrefix+strconv.Itoa(os.Getpid()))
	if err := os.MkdirAll(filepath.Join(base, "apps"), 0o755); err != nil {
		fmt.Fprintln(os.Stderr, "netns tests: make cgroup:", err)
		return 1
	}
	defer removeCgroup(base)
	apps, err := os.Open(filepath.Join(base, "apps"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "netns tests: open cgroup:", err)
		return 1
	}
	defer apps.Close()
	if err := os.MkdirAll(os.TempDir(), 0o1777); err != nil {
		fmt.Fprintln(os.Stderr, "netns tests:", err)
		return 1
	}
	scratch, err := os.MkdirTemp("", cgroupPrefix)
	if err != nil {
		fmt.Fprintln(os.Stderr, "netns tests:", err)
		return 1
	}
	defer os.Remove(scratch) // what is mounted on it ends with the tests
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleVariable+"=tests", cgroupVariable+"="+base, scratchVariable+"="+scratch)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, UseCgroupFD: true, CgroupFD: int(apps.Fd()), Pdeathsig: unix.SIGKILL}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "netns tests: start again in a mount namespace:", err)
		return 1
	}
	return 0
}

// scratch is the tests' own directory; scratch/bpf is their bpffs and scratch/netns holds their namespaces. cgroupBase
// is their cgroup, where the hooks attach; the tests themselves, as apps, run in its child "apps".
var (
	scratch    = os.Getenv(scratchVariable)
	cgroupBase = os.Getenv(cgroupVariable)
)

// enterTests makes the mounts that only this process and its children see.
func enterTests() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount scratch directory: %w", err)
	}
	for _, dir := range []string{"bpf", "netns"} {
		if err := os.Mkdir(filepath.Join(scratch, dir), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("bpf", filepath.Join(scratch, "bpf"), "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount bpffs: %w", err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}

func findCgroup2() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		before, after, _ := strings.Cut(s.Text(), " - ")
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

// removeCgroup ends every process in the cgroup, which only holds the tests' own, and removes it.
func removeCgroup(dir string) {
	_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	deadline := time.Now().Add(10 * time.Second)
	for {
		children, _ := filepath.Glob(filepath.Join(dir, "*", ""))
		for _, child := range children {
			if info, err := os.Stat(child); err == nil && info.IsDir() {
				removeTree(child)
			}
		}
		if err := os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return
		} else if time.Now().After(deadline) {
			fmt.Fprintln(os.Stderr, "netns tests: remove cgroup:", err)
			return
		}
		time.Sleep(10 * time.Millisecond) // processes that were killed take a moment to leave
	}
}

func removeTree(dir string) {
	children, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, child := range children {
		if info, err := os.Stat(child); err == nil && info.IsDir() {
			removeTree(child)
		}
	}
	_ = os.Remove(dir)
}
