package envoy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Names within the run folder.
const (
	// SupervisorSocket tells the agent Envoy's State.
	SupervisorSocket = "supervisor.sock"
	// AgentSocket is the agent's ADS and SDS for Envoy.
	AgentSocket = "agent.sock"
	adminSocket = "admin.sock"
)

// Config of a Supervisor.
type Config struct {
	// Binary is Envoy's path, Launcher this program's.
	Binary, Launcher string
	// RunDir is a private folder for the sockets.
	RunDir string
	// NodeID names the node, PodUID the pod that the supervisor runs in.
	NodeID, PodUID string
	// CgroupRoot is where the node's cgroup v2 is mounted in this container; SelfCgroup this container's own view of the
	// cgroup file system.
	CgroupRoot, SelfCgroup string
	Concurrency            int
	// DrainTimeout is how long a stopping Envoy waits for its connections.
	DrainTimeout time.Duration
	// UID and GID that Envoy runs as; the folder's sockets belong to the group.
	UID, GID int
	LogLevel string
	Log      *slog.Logger
}

// Pace of restarts: at once while failures are rare, slower when Envoy dies again and again.
const (
	quickRestarts = 5
	within        = time.Minute
	slowest       = 5 * time.Second
	readyPoll     = 10 * time.Millisecond
)

// Supervisor keeps one Envoy running.
type Supervisor struct {
	config Config
	board  *board
	cgroup string
	// Deaths within the last minute.
	deaths []time.Time
	// kept are Envoy's listening sockets, which outlive it; brokers send them into a pair of sockets.
	kept keptListeners
	sent *os.File
}

// New makes a Supervisor; Run starts it.
func New(c Config) *Supervisor { return &Supervisor{config: c, board: newBoard()} }

// Run keeps Envoy running until ctx ends, then lets it drain.
func (s *Supervisor) Run(ctx context.Context) error {
	c := s.config
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return fmt.Errorf("read own cgroup: %w", err)
	}
	if err := makeFolder(c.RunDir, 0, c.GID); err != nil {
		return err
	}
	unlock, err := Lock(ctx, filepath.Join(c.RunDir, "supervisor.lock"), func() {
		c.Log.Info("another supervisor has the node, waiting for it to go")
	})
	if err != nil {
		return fmt.Errorf("take the node: %w", err)
	}
	defer unlock()
	path := ownCgroup(string(self), filepath.Clean(c.CgroupRoot), c.SelfCgroup, c.NodeID, c.PodUID)
	if s.cgroup, err = makeCgroup(c.CgroupRoot, path); err != nil {
		return err
	}
	defer removeCgroup(c.CgroupRoot, path)
	// The admin socket is for Envoy's group, and root without CAP_DAC_OVERRIDE is like anybody.
	if err := syscall.Setgroups([]int{c.GID}); err != nil {
		return fmt.Errorf("join Envoy's group: %w", err)
	}
	// Envoy makes its admin socket in a folder of its own; nothing else is writable for it.
	if err := makeFolder(c.envoyFolder(), c.UID, c.GID); err != nil {
		return err
	}
	defer s.clear()
	socket := filepath.Join(c.RunDir, SupervisorSocket)
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("listen for the agent: %w", err)
	}
	defer l.Close() // which removes its file, and not that of the next supervisor
	if err := os.Chmod(socket, 0o600); err != nil {
		return fmt.Errorf("protect %s: %w", socket, err)
	}
	telling, stopTelling := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTelling()
	s.board.set(func(st *State) { st.Cgroup, st.UID = path, c.UID })
	go s.board.serve(telling, l)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a socket for Envoy's listeners: %w", err)
	}
	if s.kept.own, err = ownNetns(); err != nil {
		return fmt.Errorf("ask for the container's network namespace: %w", err)
	}
	limit := unix.NsecToTimeval(int64(time.Second)) // an Envoy with many pods listens on all at once
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		return fmt.Errorf("limit the wait for the supervisor: %w", err)
	}
	s.sent = os.NewFile(uintptr(pair[0]), "listening")
	got, taken := os.NewFile(uintptr(pair[1]), "listening"), make(chan struct{})
	current := func() int { st, _ := s.board.get(); return st.PID }
	go func() { defer close(taken); s.kept.take(got, current) }()
	go s.kept.tend(telling, current)
	defer func() { _ = s.sent.Close(); <-taken; _ = got.Close() }()
	// Envoy dies with the thread that started it, so that thread stays.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for ctx.Err() == nil {
		exit := s.once(ctx)
		if ctx.Err() != nil {
			break
		}
		s.board.set(func(st *State) { st.PID, st.Live, st.Exit = 0, false, exit; st.Restarts++ })
		wait := s.backOff(time.Now())
		c.Log.Error("Envoy ended, starting it again", "exit", exit, "wait", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// clear leaves nothing in the run folder, which other containers share.
func (s *Supervisor) clear() {
	c := s.config
	// What Envoy owns becomes its own first, as in makeFolder.
	err := errors.Join(os.Chown(c.envoyFolder(), 0, 0), os.RemoveAll(c.envoyFolder()), os.Remove(c.bootstrapFile()), forgetNamespaces(c.RunDir))
	if err != nil {
		c.Log.Warn("the run folder is not cleared", "error", err)
	}
}

func (c Config) envoyFolder() string   { return filepath.Join(c.RunDir, "envoy") }
func (c Config) bootstrapFile() string { return filepath.Join(c.RunDir, "envoy.json") }

// makeFolder makes a folder that its owner and Envoy's group alone may enter; kubelet makes the run folder open to all.
func makeFolder(path string, uid, gid int) error {
	if err := os.MkdirAll(path, 0o750); err != nil {
		return fmt.Errorf("make folder for sockets: %w", err)
	}
	// The supervisor may change owners but not other owners' modes: one that Envoy owns since before becomes its own first.
	if err := os.Chown(path, 0, gid); err != nil {
		return fmt.Errorf("take folder for sockets: %w", err)
	}
	if err := os.Chmod(path, 0o750); err != nil {
		return fmt.Errorf("close folder for sockets: %w", err)
	}
	if err := os.Chown(path, uid, gid); err != nil {
		return fmt.Errorf("give folder for sockets to Envoy's group: %w", err)
	}
	return nil
}

// backOff is nothing for the first deaths within a minute, then doubles.
func (s *Supervisor) backOff(now time.Time) time.Duration {
	recent := s.deaths[:0]
	for _, d := range s.deaths {
		if now.Sub(d) < within {
			recent = append(recent, d)
		}
	}
	s.deaths = append(recent, now)
	if len(s.deaths) <= quickRestarts {
		return 0
	}
	return min(100*time.Millisecond<<min(len(s.deaths)-quickRestarts, 8), slowest)
}

// once runs one Envoy to its end and says how that was.
func (s *Supervisor) once(ctx context.Context) string {
	cmd, err := s.command()
	if err != nil {
		return err.Error()
	}
	out, err := cmd.StderrPipe()
	if err != nil {
		return fmt.Sprintf("start Envoy: %v", err)
	}
	cmd.Stdout = os.Stdout // access log
	logged := make(chan struct{})
	go func() { defer close(logged); s.forward(out) }()
	envoy, err := s.start(cmd)
	if err != nil {
		if cmd.Process == nil {
			_ = out.Close()
		}
		<-logged
		if cmd.Process != nil {
			err = errors.Join(err, cmd.Wait())
		}
		return fmt.Sprintf("start Envoy: %v", err)
	}
	defer envoy.close()
	s.config.Log.Info("Envoy started", "pid", cmd.Process.Pid)
	s.board.set(func(st *State) { st.PID, st.Live = cmd.Process.Pid, false })
	ended := make(chan struct{})
	alive, cancel := context.WithCancel(context.Background())
	defer cancel()
	go s.awaitReady(alive, cmd.Process.Pid)
	brokered := make(chan struct{})
	go func() { defer close(brokered); s.broker(alive, envoy, cmd.Process) }()
	go func() {
		select {
		case <-ended:
		case <-ctx.Done():
			s.drain(cmd, ended)
		}
	}()
	<-logged
	err = cmd.Wait()
	close(ended)
	cancel()
	<-brokered
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

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
		cmd.Env = []string{brokerCgroup + "=" + s.cgroup, brokerNamespaces + "=" + filepath.Join(s.config.RunDir, namespacesFile), "GODEBUG=asyncpreemptoff=1"}
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
	admin := filepath.Join(c.envoyFolder(), adminSocket)
	_ = os.Remove(admin)
	text, err := Bootstrap(BootstrapConfig{NodeID: c.NodeID, AdminSocket: admin, AgentSocket: filepath.Join(c.RunDir, AgentSocket), MemoryLimit: memoryLimit(c.SelfCgroup)})
	if err != nil {
		return nil, err
	}
	file := c.bootstrapFile()
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

// longestLine is what is kept of a line of Envoy's log.
const longestLine = 64 << 10

// forward writes Envoy's log, level and logger apart. It reads until Envoy ends, whatever the lines are like: Envoy would
// block on a pipe that nobody empties.
func (s *Supervisor) forward(out io.Reader) {
	levels := map[string]slog.Level{"trace": slog.LevelDebug, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "error": slog.LevelError, "critical": slog.LevelError}
	r := bufio.NewReaderSize(out, longestLine)
	for {
		raw, long, err := r.ReadLine()
		line := string(raw)
		for long && err == nil { // the rest is not kept
			_, long, err = r.ReadLine()
		}
		f := strings.SplitN(line, " ", 3)
		level, known := levels[f[0]]
		switch {
		case line == "":
		case known && len(f) == 3:
			s.config.Log.Log(context.Background(), level, "envoy", "logger", f[1], "text", f[2])
		default:
			s.config.Log.Warn("envoy", "text", line)
		}
		if err != nil {
			return
		}
	}
}

// admin is a client of Envoy's admin socket.
func (s *Supervisor) admin() *http.Client {
	path := filepath.Join(s.config.envoyFolder(), adminSocket)
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
}

func (s *Supervisor) awaitReady(ctx context.Context, pid int) {
	client := s.admin()
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r, err := client.Get("http://envoy/ready")
		if err != nil {
			continue
		}
		_ = r.Body.Close()
		if r.StatusCode == http.StatusOK {
			s.config.Log.Info("Envoy is live")
			s.board.set(func(st *State) {
				if st.PID == pid { // else it has died since
					st.Live = true
				}
			})
			return
		}
	}
}

// drain lets connections end: HTTP ones get a hint to go with each response, new ones are still served, for pods that are
// captured have no other way. Then there is no more patience.
func (s *Supervisor) drain(cmd *exec.Cmd, ended <-chan struct{}) {
	s.config.Log.Info("Envoy drains", "timeout", s.config.DrainTimeout)
	r, err := s.admin().Post("http://envoy/healthcheck/fail", "", nil)
	if err != nil {
		s.config.Log.Warn("Envoy's connections are not told to go", "error", err)
	} else {
		_ = r.Body.Close()
	}
	select {
	case <-ended:
		return
	case <-time.After(s.config.DrainTimeout):
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.config.Log.Warn("stop Envoy", "error", err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		_ = cmd.Process.Kill()
	}
}
