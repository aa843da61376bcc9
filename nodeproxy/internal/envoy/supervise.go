package envoy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
)

// Config of a Supervisor.
type Config struct {
	// Binary is Envoy's path, Launcher this program's.
	Binary, Launcher string
	// RunDir is a private folder for the sockets, shared with the node's agents and the supervisor of another generation.
	RunDir string
	// NodeID names the node, PodUID the pod that the supervisor runs in.
	NodeID, PodUID string
	// CgroupRoot is where the node's cgroup v2 is mounted in this container; SelfCgroup this container's own view of the
	// cgroup file system.
	CgroupRoot, SelfCgroup string
	Concurrency            int
	// DrainTimeout is how long a stopping Envoy waits for its connections at most.
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
	config     Config
	board      *board
	generation uint32
	cgroup     string
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
	paths := locks(c.RunDir)
	mine := s.before()
	paths[0], paths[mine] = paths[mine], paths[0] // first
	taken, unlock, err := Lock(ctx, func() { c.Log.Info("other supervisors have the node, waiting for one to go") }, paths...)
	if err != nil {
		return fmt.Errorf("take the node: %w", err)
	}
	defer unlock()
	s.generation = uint32(slices.Index(locks(c.RunDir), paths[taken]))
	path := ownCgroup(string(self), filepath.Clean(c.CgroupRoot), c.SelfCgroup, c.NodeID, c.PodUID)
	if s.cgroup, err = makeCgroup(c.CgroupRoot, path); err != nil {
		return err
	}
	defer removeCgroup(c.CgroupRoot, path)
	if err := s.makeFolders(); err != nil {
		return err
	}
	defer s.clear()
	l, err := s.listenFor(supervisorSocket, "unix")
	if err != nil {
		return err
	}
	defer l.Close()
	listeners, err := s.listenFor(listenersSocket, "unixpacket")
	if err != nil {
		return err
	}
	defer listeners.Close()
	telling, stopTelling := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTelling()
	s.board.set(func(st *State) { st.Generation, st.Pod, st.Cgroup, st.UID = s.generation, c.PodUID, path, c.UID })
	go s.board.serve(telling, l)
	go s.kept.share(telling, listeners)
	forget, err := s.keepListeners(telling)
	if err != nil {
		return err
	}
	defer forget()
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

// listenFor opens a socket for the agent, in the generation's folder. Its end removes its file, and not that of the next supervisor.
func (s *Supervisor) listenFor(name, network string) (*net.UnixListener, error) {
	path := filepath.Join(s.folder(), name)
	_ = os.Remove(path)
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		return nil, fmt.Errorf("listen for the agent: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protect %s: %w", path, err), l.Close())
	}
	return l, nil
}

// keepListeners takes duplicates of Envoy's listening sockets from brokers, and holds them until forget.
func (s *Supervisor) keepListeners(ctx context.Context) (forget func(), err error) {
	if s.kept.own, err = ownNetns(); err != nil {
		return nil, fmt.Errorf("ask for the container's network namespace: %w", err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket for Envoy's listeners: %w", err)
	}
	s.sent = os.NewFile(uintptr(pair[0]), "listening")
	got, taken := os.NewFile(uintptr(pair[1]), "listening"), make(chan struct{})
	limit := unix.NsecToTimeval(int64(time.Second)) // an Envoy with many pods listens on all at once
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		return nil, errors.Join(fmt.Errorf("limit the wait for the supervisor: %w", err), s.sent.Close(), got.Close())
	}
	current := func() int { st, _ := s.board.get(); return st.PID }
	go func() { defer close(taken); s.kept.take(got, current) }()
	go s.kept.tend(ctx, current)
	return func() { _ = s.sent.Close(); <-taken; _ = got.Close() }, nil
}

// locks are the lock files of the generations: who has one is that generation's supervisor.
func locks(runDir string) (paths []string) {
	for generation := range names.Generations {
		paths = append(paths, filepath.Join(runDir, fmt.Sprintf("supervisor-%d.lock", generation)))
	}
	return paths
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
