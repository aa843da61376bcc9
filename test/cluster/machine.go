package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/weftmesh/weft/test/cluster/cgroups"
	"golang.org/x/sys/unix"
)

// machine describes one set of namespaces with a pid 1 of its own: a node or the control plane.
type machine struct {
	// Name is also the host name.
	Name string
	// Group is the machine's control group, relative to every hierarchy.
	Group string
	// Folder holds what outlives a reboot; Logs the units' output.
	Folder, Logs string
	Layout       cgroups.Layout
	// Binds are mounted in order.
	Binds []bind
	// Sysctls are set by path below /proc/sys; all of them belong to the machine's own network namespace.
	Sysctls map[string]string
	// Masks are files laid over entries of /proc/sys that the whole kernel shares: the machine's programs read and
	// write the mask, so that nothing outside changes.
	Masks map[string]string
	// Files are written into the machine's own layers over /etc, /opt, /var/lib and /var/log, gone with a reboot.
	Files map[string]string
	// Units are started in order, and started again when they end.
	Units []unit
}

// bind shows Source at Target inside the machine.
type bind struct {
	// Source is absolute, or relative to the machine's folder.
	Source, Target string
	ReadOnly       bool `json:",omitempty"`
}

// unit is one program that pid 1 keeps running, in a control group of its own named like it.
type unit struct {
	Name string
	Argv []string
	// Env is added to the environment of pid 1.
	Env []string `json:",omitempty"`
	// WaitFor is a path that must exist before the unit is started.
	WaitFor string `json:",omitempty"`
}

// Names of the hidden commands by which the program starts itself inside a machine.
const (
	CommandStage = "machine-stage"
	CommandInit  = "machine-init"
)

// machineTimeout bounds the start of a machine's pid 1, which takes some 50 ms.
const machineTimeout = 30 * time.Second

// startMachine starts pid 1 of a machine, calls connect with its pid to lay its network, then lets it start its units.
// If anything fails nothing of the machine is left running.
func (s *state) startMachine(ctx context.Context, m machine, connect func(pid int) error) (pid int, err error) {
	enabled, err := s.Layout.Create(m.Group)
	if err != nil {
		return 0, err
	}
	if len(enabled) > 0 {
		s.Controllers = union(s.Controllers, enabled)
		if err := s.save(); err != nil {
			return 0, err
		}
	}
	file := filepath.Join(m.Folder, "machine.json")
	if err := writeJSON(file, m); err != nil {
		return 0, err
	}
	group, err := os.Open(s.Layout.V2Path(m.Group))
	if err != nil {
		return 0, fmt.Errorf("open control group: %w", err)
	}
	defer group.Close()
	log, err := os.OpenFile(filepath.Join(m.Logs, m.Name+"-init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	reportRead, reportWrite, err := os.Pipe()
	if err != nil {
		return 0, fmt.Errorf("make pipe: %w", err)
	}
	defer reportRead.Close()
	goRead, goWrite, err := os.Pipe()
	if err != nil {
		reportWrite.Close()
		return 0, fmt.Errorf("make pipe: %w", err)
	}
	defer goWrite.Close()

	stage := exec.Command(s.program(), CommandStage, file)
	stage.Stdout, stage.Stderr = log, log
	stage.ExtraFiles = []*os.File{reportWrite, goRead}
	// Born in the group: from its first instruction on, cluster-down finds it there.
	stage.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Setsid: true}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Layout.Kill(m.Group, machineTimeout), s.Layout.Remove(m.Group, machineTimeout))
		}
	}()
	err = stage.Start()
	reportWrite.Close()
	goRead.Close()
	if err != nil {
		return 0, fmt.Errorf("start machine %s: %w", m.Name, err)
	}
	go func() { _ = stage.Wait() }()

	if err := reportRead.SetReadDeadline(time.Now().Add(machineTimeout)); err != nil {
		return 0, fmt.Errorf("start machine %s: %w", m.Name, err)
	}
	answer, readErr := bufio.NewReader(reportRead).ReadString('\n')
	if strings.TrimSpace(answer) != "ready" {
		return 0, fmt.Errorf("start machine %s: its pid 1 did not get ready (%q, %v): see %s", m.Name, strings.TrimSpace(answer), readErr, log.Name())
	}
	if pid, err = s.initPID(m.Name); err != nil {
		return 0, err
	}
	if err := connect(pid); err != nil {
		return 0, err
	}
	if _, err := goWrite.WriteString("go\n"); err != nil {
		return 0, fmt.Errorf("let machine %s start its programs: %w", m.Name, err)
	}
	return pid, ctx.Err()
}

// program is the binary that acts as pid 1.
func (c Config) program() string { return c.path("bin", "cluster") }

// initPID finds a machine's pid 1, as the whole machine sees it, through its control group.
func (s *state) initPID(name string) (int, error) {
	raw, err := os.ReadFile(filepath.Join(s.Layout.V2Path(s.group(name)), "init", "cgroup.procs"))
	if err != nil {
		return 0, fmt.Errorf("find pid 1 of %s: it does not run: %w", name, err)
	}
	pids := strings.Fields(string(raw))
	if len(pids) != 1 {
		return 0, fmt.Errorf("find pid 1 of %s: its control group holds %d processes, want 1", name, len(pids))
	}
	return strconv.Atoi(pids[0])
}

// stopMachine ends a machine: politely by SIGTERM to its pid 1, which ends its units in reverse order and then the
// rest, or at once as a power cut would. The namespaces, mounts and links go with the last process.
func (s *state) stopMachine(ctx context.Context, name string, hard bool) error {
	group := s.group(name)
	if pid, err := s.initPID(name); err == nil && !hard {
		if err := unix.Kill(pid, unix.SIGTERM); err == nil {
			waiting, cancel := context.WithTimeout(ctx, gracefulTimeout)
			_ = poll(waiting, func() (bool, error) { return len(s.Layout.Processes(group)) == 0, nil })
			cancel()
		}
	}
	if err := s.Layout.Kill(group, machineTimeout); err != nil {
		return err
	}
	return s.Layout.Remove(group, machineTimeout)
}

// gracefulTimeout bounds a polite stop; etcd takes 5 s.
const gracefulTimeout = 40 * time.Second

// Stage is the command CommandStage: already in the machine's v2 control group, it enters those of v1 and starts the
// machine's pid 1 in new namespaces; only a process inside the groups makes a cgroup namespace with them as its root.
func Stage(file string) error {
	m, err := readMachine(file)
	if err != nil {
		return err
	}
	if err := m.Layout.EnterV1(m.Group); err != nil {
		return err
	}
	pid1 := exec.Command("/proc/self/exe", CommandInit, file)
	pid1.Args[0] = "cluster"
	pid1.Stdout, pid1.Stderr = os.Stdout, os.Stderr
	pid1.ExtraFiles = []*os.File{os.NewFile(3, "report"), os.NewFile(4, "go")}
	pid1.Env = []string{"PATH=" + nodePath, "HOME=/root"}
	pid1.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP,
		Setsid:     true,
	}
	if err := pid1.Start(); err != nil {
		return fmt.Errorf("start pid 1 of %s: %w", m.Name, err)
	}
	return nil
}

func readMachine(file string) (machine, error) {
	var m machine
	raw, err := os.ReadFile(file)
	if err != nil {
		return m, fmt.Errorf("read the machine's description: %w", err)
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("read the machine's description %s: %w", file, err)
	}
	return m, nil
}

// poll calls done every 50 ms until it says so, fails, or ctx ends.
func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := done()
		if err != nil || ok {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
