package cluster

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/weftmesh/weft/test/cluster/cgroups"
	"golang.org/x/sys/unix"
)

// nodePath is PATH inside a machine: the cluster's own programs first, then the system's.
const nodePath = binFolder + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Times of pid 1.
const (
	restartDelay = time.Second      // between the end of a unit and its next start
	unitGrace    = 15 * time.Second // from SIGTERM to SIGKILL for one unit
	restGrace    = 3 * time.Second  // the same for everything else, the pods
)

// Init is the command CommandInit: pid 1 of a machine. It lays the machine's mounts, reports "ready" on descriptor 3,
// waits for a line on descriptor 4 (the network is there), keeps the units running and reaps orphans until SIGTERM.
func Init(file string) error {
	m, err := readMachine(file)
	if err != nil {
		return err
	}
	report, start := os.NewFile(3, "report"), os.NewFile(4, "go")
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)
	logs, err := os.Open(m.Logs)
	if err != nil {
		return fmt.Errorf("open the folder of logs: %w", err)
	}
	if err := layMounts(m); err != nil {
		return err
	}
	if err := splitGroups(m); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(m.Name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	for name, value := range m.Sysctls {
		if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl %s: %w", name, err)
		}
	}
	raiseLimits()
	if _, err := report.WriteString("ready\n"); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	report.Close()
	if n, err := start.Read(make([]byte, 1)); n != 1 {
		return fmt.Errorf("wait for the network: whoever started this machine is gone: %w", err)
	}
	start.Close()
	s := &supervisor{machine: m, logs: int(logs.Fd()), running: map[int]string{}, changed: make(chan struct{}, 1)}
	return s.run()
}

// layMounts gives the machine its own view of the file system. The order matters: what is bound is opened before
// anything is laid over it, and /run comes last because the layers' upper folders lie under it.
func layMounts(m machine) error {
	sources := make([]int, len(m.Binds))
	for i, b := range m.Binds {
		source := b.Source
		if !filepath.IsAbs(source) {
			source = filepath.Join(m.Folder, source)
		}
		fd, err := unix.Open(source, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s to show it in the machine: %w", source, err)
		}
		sources[i] = fd
	}
	steps := []func() error{
		func() error { return mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return mount("proc", "/proc", "proc", 0, "") },
		func() error { return unmount("/sys") },
		func() error { return mount("sysfs", "/sys", "sysfs", 0, "") },
		func() error { return mountGroups(m.Layout) },
		func() error { return mount("bpf", "/sys/fs/bpf", "bpf", 0, "") },
		func() error { return mount("tmpfs", "/run", "tmpfs", 0, "mode=755") },
		layOverlays,
		func() error { return bindAll(m.Binds, sources) },
		func() error { return writeFiles(m.Files) },
		func() error { return maskSysctls(m.Masks) },
		func() error { return mount("tmpfs", "/run", "tmpfs", 0, "mode=755") },
		func() error { return os.MkdirAll("/run/lock", 0o1777) },
		func() error { return mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s at %s (%s): %w", kind, target, options, err)
	}
	return nil
}

func unmount(target string) error {
	if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// mountGroups shows the machine's own control groups as the roots.
func mountGroups(layout cgroups.Layout) error {
	for _, m := range layout.Mounts() {
		if err := os.MkdirAll(m.Target, 0o755); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
		if err := mount(m.Type, m.Target, m.Type, 0, m.Options); err != nil {
			return err
		}
		for _, link := range m.Links {
			if err := os.Symlink(filepath.Base(m.Target), filepath.Join(filepath.Dir(m.Target), link)); err != nil {
				return fmt.Errorf("link a control group's second name: %w", err)
			}
		}
	}
	return nil
}

// layOverlays lays an empty layer over the folders in which a node's programs make folders of their own, so that none
// appears on the machine.
func layOverlays() error {
	for _, target := range []string{"/etc", "/opt", "/var/lib", "/var/log"} {
		base := filepath.Join("/run/layers", strings.ReplaceAll(target, "/", "_"))
		for _, folder := range []string{"upper", "work"} {
			if err := os.MkdirAll(filepath.Join(base, folder), 0o755); err != nil {
				return fmt.Errorf("make a layer's folder: %w", err)
			}
		}
		if err := mount("overlay", target, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", target, base, base)); err != nil {
			return err
		}
	}
	return nil
}

func bindAll(binds []bind, sources []int) error {
	for i, b := range binds {
		source := fmt.Sprintf("/proc/self/fd/%d", sources[i])
		if err := os.MkdirAll(b.Target, 0o755); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
		if err := mount(source, b.Target, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		if b.ReadOnly {
			if err := mount("", b.Target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
				return err
			}
		}
		unix.Close(sources[i])
	}
	return nil
}

func writeFiles(files map[string]string) error {
	for name, content := range files {
		// A symbolic link (/etc/resolv.conf often is one) would lead out of the layer.
		_ = os.Remove(name)
		if err := writeFile(name, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func maskSysctls(masks map[string]string) error {
	for name, content := range masks {
		file := filepath.Join("/run/masks", strings.ReplaceAll(name, "/", "."))
		if err := writeFile(file, []byte(content+"\n"), 0o644); err != nil {
			return err
		}
		if err := mount(file, filepath.Join("/proc/sys", name), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// splitGroups moves pid 1 into the group "init" and makes one for each unit: BPF programs and tests tell kubelet,
// containerd and the rest apart by it. On a pure v2 machine a group with processes cannot hand controllers down, so
// the move comes first.
func splitGroups(m machine) error {
	root := m.Layout.InsideV2()
	names := []string{"init"}
	for _, u := range m.Units {
		names = append(names, u.Name)
	}
	for _, name := range names {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			return fmt.Errorf("make control group: %w", err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "init", "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("enter control group init: %w", err)
	}
	if !m.Layout.PureV2() {
		return nil
	}
	// The program that started pid 1 may still be ending in the group.
	var err error
	for range 100 {
		if _, err = cgroups.EnableControllers(root); !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// raiseLimits lets the units open as many files as the machine permits; a failure leaves the limit as it was.
func raiseLimits() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
}

// supervisor keeps the units of a machine running.
type supervisor struct {
	machine machine
	// logs is a descriptor of the folder of logs.
	logs int
	// changed is written to when a unit ended.
	changed chan struct{}

	mu       sync.Mutex
	running  map[int]string // pid to unit name
	stopping bool
}

func (s *supervisor) run() error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGTERM, unix.SIGCHLD)
	signal.Ignore(unix.SIGINT, unix.SIGHUP, unix.SIGPIPE)
	go func() {
		for _, u := range s.machine.Units {
			s.start(u)
		}
	}()
	var ending sync.Once
	for received := range signals {
		if received == unix.SIGCHLD {
			s.reap()
			continue
		}
		go ending.Do(func() {
			s.stop()
			os.Exit(0)
		})
	}
	return nil
}

// start starts a unit once what it waits for exists.
func (s *supervisor) start(u unit) {
	for u.WaitFor != "" {
		if _, err := os.Stat(u.WaitFor); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return
	}
	pid, err := s.fork(u)
	if err != nil {
		slog.Error("unit did not start", "unit", u.Name, "error", err)
		time.AfterFunc(restartDelay, func() { s.start(u) })
		return
	}
	s.running[pid] = u.Name
	slog.Info("unit started", "unit", u.Name, "pid", pid)
}

func (s *supervisor) fork(u unit) (int, error) {
	group, err := unix.Open(filepath.Join(s.machine.Layout.InsideV2(), u.Name), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open control group: %w", err)
	}
	defer unix.Close(group)
	log, err := unix.Openat(s.logs, s.machine.Name+"-"+u.Name+".log", unix.O_CREAT|unix.O_APPEND|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return 0, fmt.Errorf("open log: %w", err)
	}
	defer unix.Close(log)
	empty, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open /dev/null: %w", err)
	}
	defer unix.Close(empty)
	return syscall.ForkExec(u.Argv[0], u.Argv, &syscall.ProcAttr{
		Dir:   "/",
		Env:   append(os.Environ(), u.Env...),
		Files: []uintptr{uintptr(empty), uintptr(log), uintptr(log)},
		Sys:   &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: group},
	})
}

// reap collects every child that ended and plans the next start of a unit.
func (s *supervisor) reap() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		name, known := s.running[pid]
		if !known {
			continue
		}
		delete(s.running, pid)
		select {
		case s.changed <- struct{}{}:
		default:
		}
		if s.stopping {
			continue
		}
		reason := fmt.Sprintf("exit status %d", status.ExitStatus())
		if status.Signaled() {
			reason = status.Signal().String()
		}
		slog.Warn("unit ended", "unit", name, "reason", reason)
		for _, u := range s.machine.Units {
			if u.Name == name {
				time.AfterFunc(restartDelay, func() { s.start(u) })
			}
		}
	}
}

// stop ends the units in reverse order of their start, then every other process. It is called once.
func (s *supervisor) stop() {
	s.mu.Lock()
	s.stopping = true
	names := maps.Clone(s.running)
	s.mu.Unlock()
	order := map[string]int{}
	for i, u := range s.machine.Units {
		order[u.Name] = i
	}
	pids := slices.Collect(maps.Keys(names))
	slices.SortFunc(pids, func(a, b int) int { return order[names[b]] - order[names[a]] })
	for _, pid := range pids {
		s.end(pid)
	}
	_ = unix.Kill(-1, unix.SIGTERM)
	deadline := time.Now().Add(restGrace)
	for time.Now().Before(deadline) {
		if unix.Kill(-1, 0) == unix.ESRCH {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	_ = unix.Kill(-1, unix.SIGKILL)
}

// end asks one unit to end and makes it after unitGrace.
func (s *supervisor) end(pid int) {
	_ = unix.Kill(pid, unix.SIGTERM)
	timeout := time.After(unitGrace)
	for {
		s.mu.Lock()
		_, running := s.running[pid]
		s.mu.Unlock()
		if !running {
			return
		}
		select {
		case <-s.changed:
		case <-timeout:
			_ = unix.Kill(pid, unix.SIGKILL)
			timeout = nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}
