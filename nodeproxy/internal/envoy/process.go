package envoy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// running is what is kept of an Envoy while it runs.
type running struct {
	// notifications is the listener of its filter, pidfd the process, ledger its brokers'.
	notifications, pidfd, ledger *os.File
}

func (r *running) close() {
	for _, f := range []*os.File{r.notifications, r.pidfd, r.ledger} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// handOverLimit is how long a process may take from its start until it hands its notifications over, before it is Envoy.
const handOverLimit = 10 * time.Second

// start starts Envoy and takes the listener of its notifications. A process that does not hand it over is ended.
func (s *Supervisor) start(cmd *exec.Cmd) (r *running, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket for its notifications: %w", err)
	}
	mine, its := os.NewFile(uintptr(pair[0]), "launch"), os.NewFile(uintptr(pair[1]), "launch")
	defer mine.Close()
	defer its.Close()
	limit := unix.NsecToTimeval(int64(handOverLimit))
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return nil, fmt.Errorf("limit the wait for its notifications: %w", err)
	}
	pidfd := -1
	cmd.ExtraFiles, cmd.SysProcAttr.PidFD = []*os.File{its}, &pidfd
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	made := &running{}
	defer func() {
		if err != nil {
			made.close()
			_ = cmd.Process.Kill()
		}
	}()
	if pidfd < 0 {
		return nil, errors.New("the kernel gave no pidfd")
	}
	made.pidfd = os.NewFile(uintptr(pidfd), "envoy")
	_ = its.Close() // else the end of the process would not end the wait
	_, notifications, err := receiveFD(pair[0])
	if errors.Is(err, io.EOF) {
		return nil, errors.New("it ended before it was Envoy: its log says why")
	}
	if err != nil {
		return nil, fmt.Errorf("take its notifications: %w", err)
	}
	made.notifications = os.NewFile(uintptr(notifications), "notifications")
	probe, err := unix.PidfdGetfd(pidfd, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("take a descriptor of Envoy's: %w; the container needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope must be below 3", err)
	}
	_ = unix.Close(probe)
	made.ledger, err = newLedger()
	return made, err
}

// Pace of brokers: the next one at once, and slower while they die at once. Envoy waits meanwhile; an Envoy that gets none is ended.
const (
	brokerPause = 10 * time.Millisecond
	brokerLives = 100 * time.Millisecond
	brokerTries = 10
)

// broker keeps a broker running for an Envoy until ctx ends.
func (s *Supervisor) broker(ctx context.Context, r *running, envoy *os.Process) {
	for tries := 0; ctx.Err() == nil; tries++ {
		cmd := exec.CommandContext(ctx, s.config.Launcher, "envoy-broker")
		// A signal of Go's own between two steps of an answer would cost a system call more.
		cmd.Env = []string{brokerCgroup + "=" + s.cgroup, brokerNamespaces + "=" + filepath.Join(s.folder(), namespacesFile), "GODEBUG=asyncpreemptoff=1"}
		cmd.ExtraFiles = []*os.File{r.notifications, r.pidfd, r.ledger, s.sent}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Stderr = os.Stderr
		began := time.Now()
		err := cmd.Run()
		if time.Since(began) > brokerLives {
			tries = 0
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(brokerPause << min(tries, 7)):
		}
		if tries >= brokerTries {
			s.config.Log.Error("Envoy's brokers do not live, ending Envoy", "exit", err)
			_ = envoy.Kill()
			return
		}
		s.config.Log.Error("Envoy's broker ended, starting another", "exit", err)
	}
}

func (s *Supervisor) command() (*exec.Cmd, error) {
	c := s.config
	admin := filepath.Join(s.envoyFolder(), adminSocket)
	_ = os.Remove(admin)
	text, err := Bootstrap(BootstrapConfig{NodeID: c.NodeID, Generation: s.generation, AdminSocket: admin, AgentSocket: filepath.Join(c.RunDir, AgentSocket), MemoryLimit: memoryLimit(c.SelfCgroup)})
	if err != nil {
		return nil, err
	}
	file := s.bootstrapFile()
	if err := os.WriteFile(file, text, 0o640); err != nil {
		return nil, fmt.Errorf("write bootstrap: %w", err)
	}
	if err := os.Chown(file, 0, c.GID); err != nil {
		return nil, fmt.Errorf("give bootstrap to Envoy's group: %w", err)
	}
	launch, err := json.Marshal(Launch{
		Path: c.Binary, UID: c.UID, GID: c.GID, Groups: []int{c.GID}, Cgroup: s.cgroup,
		Args: []string{"--config-path", file, "--disable-hot-restart", "--concurrency", strconv.Itoa(c.Concurrency), "--log-level", c.LogLevel,
			"--log-format", "%l %n %v", "--file-flush-interval-msec", "1000", "--drain-time-s", strconv.Itoa(int(DrainTime.Seconds())), "--drain-strategy", "immediate"},
	})
	if err != nil {
		return nil, fmt.Errorf("describe launch: %w", err)
	}
	cmd := exec.Command(c.Launcher, "envoy-exec")
	cmd.Env = []string{LaunchVariable + "=" + string(launch)}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd, nil
}
