package envoy

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// superviseAlone is a supervisor in a process of its own.
func superviseAlone(config string) error {
	var c Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	c.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return New(c).Run(ctx)
}

// apart runs the supervisor in a process of its own.
func (b *bench) apart(t *testing.T) *exec.Cmd {
	t.Helper()
	c := b.config
	c.Log = nil
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(b.config.Launcher, "supervise", string(text))
	cmd.Stderr, cmd.Stdout = b.log, b.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// TestKilledSupervisorRefusesNobody: Envoy ends with its supervisor, and what comes until the next one serves waits: the agent holds
// what Envoy listened on. The next supervisor of the pod comes back to the same generation.
func TestKilledSupervisorRefusesNobody(t *testing.T) {
	b := prepare(t, func(c *Config) { c.PodUID = "mine" })
	const generation = 1
	if err := os.MkdirAll(b.config.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	b.serve(t)
	other, err := TryLock(locks(b.config.RunDir)[0]) // another supervisor has the first
	if err != nil || other == nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go Watch(ctx, b.config.RunDir, generation, b.states.add)
	kept := make(chan struct{})
	go func() { defer close(kept); KeepListeners(ctx, b.config.RunDir, generation) }()
	supervisor := b.apart(t)
	defer func() {
		_ = supervisor.Process.Kill() // where the test ended before it did
		_ = supervisor.Wait()
		if t.Failed() {
			t.Logf("log:\n%s", b.log)
		}
	}()
	last := b.live(t, 0)
	other()
	s := newSpace(t)
	command(t, "ip", "netns", "exec", filepath.Base(s.path), "sh", "-c", "echo 1 >/proc/sys/net/ipv4/tcp_migrate_req")
	const at, to = 20001, 20002
	s.relayed(t, b, at, to)
	until(t, patience, "the listener answers in its namespace", func() bool { return s.get(at) == "" })
	const clients, kills = 4, 3
	load := s.ask(t, at, clients)
	for range kills {
		before := load.asked.Load()
		until(t, patience, "requests", func() bool { return load.asked.Load() > before+20 })
		if err := supervisor.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = supervisor.Wait()
		supervisor = b.apart(t)
		last = b.live(t, last.PID)
		if last.Generation != generation {
			t.Fatalf("the next supervisor has generation %d", last.Generation)
		}
	}
	before := load.asked.Load()
	until(t, patience, "requests", func() bool { return load.asked.Load() > before+20 })
	problems := load.stop()
	t.Logf("%d supervisors killed: %d requests, %d failed: %v", kills, load.asked.Load(), len(problems), problems)
	for _, p := range problems {
		if strings.Contains(p, "refused") || strings.Contains(p, "Timeout") || strings.Contains(p, "twice") {
			t.Error(p)
		}
	}
	if len(problems) > kills*clients {
		t.Errorf("%d requests failed, want those alone that an Envoy had: %v", len(problems), problems)
	}
	alone := func() bool {
		out, err := exec.Command("ip", "netns", "exec", filepath.Base(s.path), "ss", "-Hltn", "sport = "+fmt.Sprint(":", at)).Output()
		return err == nil && strings.Count(string(out), "\n") == 1
	}
	until(t, patience, "the killed ones' sockets to be closed", alone)
	cancel()
	<-kept
	if !alone() {
		t.Error("the agent's end closed what Envoy listens on")
	}

	// One that is told to end leaves nothing, to an agent either.
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	go KeepListeners(ctx, b.config.RunDir, generation)
	if err := supervisor.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := supervisor.Wait(); err != nil {
		t.Errorf("the supervisor ended with %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(b.config.RunDir, "*-[01]*")); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
	until(t, patience, "no socket to be left", func() bool {
		out, err := exec.Command("ip", "netns", "exec", filepath.Base(s.path), "ss", "-Hltn").Output()
		return err == nil && len(out) == 0
	})
}

// TestNobodyWaitsForEver: the agent lets go of what Envoy listened on when the supervisor has not come back for a while: connections
// would wait for nobody.
func TestNobodyWaitsForEver(t *testing.T) {
	const gone, back = 1, 2
	l := keptListeners{kept: []duplicate{{fd: -1, inode: 1, envoy: gone}}}
	died := time.Now()
	for _, c := range []struct {
		session int
		after   time.Duration
		kept    int
	}{{gone, 0, 1}, {gone, time.Hour, 1}, {back, time.Hour, 1}, {back, time.Hour + supervisorBack, 1}, {back, time.Hour + supervisorBack + time.Second, 0}} {
		if l.expire(c.session, died.Add(c.after), supervisorBack); len(l.kept) != c.kept {
			t.Errorf("%s on, session %d: %d sockets are kept, want %d", c.after, c.session, len(l.kept), c.kept)
		}
	}
}
