package envoy

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/api/names"
)

// another runs a supervisor beside the bench's, on the same run folder.
func (b *bench) another(t *testing.T, pod string, generation uint32) *bench {
	t.Helper()
	n := &bench{config: b.config, cache: b.cache, log: &journal{}, states: &states{}}
	n.config.PodUID, n.config.Log = pod, newLog(n.log)
	n.supervise(t, generation)
	return n
}

// greets gives a generation of Envoy a listener of its own.
func (b *bench) greets(t *testing.T, generation uint32) (port uint32) {
	t.Helper()
	port = freePort(t)
	l := greeter(t, port, nil)
	l.Name = names.Listener("in", fmt.Sprint("pod-of-", generation), "sandbox", generation)
	b.set(t, l.Name, l)
	return port
}

// TestEnvoyIsReplaced: two Envoys serve side by side, each its own listeners. The first one ends when its last connection does, and
// only then is there room for a third.
func TestEnvoyIsReplaced(t *testing.T) {
	b := start(t, func(c *Config) { c.DrainTimeout = 5 * time.Minute })
	was := b.live(t, 0)
	old := b.greets(t, 0)
	until(t, patience, "the first Envoy answers", func() bool { return answers(old) })
	next := b.another(t, "next", 1)
	now := next.live(t, 0)
	if now.Generation != 1 || now.Pod != "next" || now.Cgroup == was.Cgroup || was.Generation != 0 {
		t.Errorf("states %+v and %+v", was, now)
	}
	ours := b.greets(t, 1)
	until(t, patience, "the second Envoy answers", func() bool { return answers(ours) })

	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", old))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	third := b.another(t, "third", 0)
	ended := make(chan error, 1)
	go func() { ended <- b.stop() }()
	until(t, patience, "the first Envoy drains", func() bool { return b.states.last().PID != 0 && strings.Contains(b.log.String(), "Envoy drains") })
	select {
	case err := <-ended:
		t.Fatalf("the first Envoy ended with a connection open: %v", err)
	case <-time.After(drainIdle + 2*drainPoll):
	}
	if third.states.last().Pod == "third" {
		t.Error("a third Envoy runs beside two")
	}
	// The connection is served, and told to go.
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || r.StatusCode != http.StatusOK || !r.Close {
		t.Fatalf("a draining Envoy answers %+v, %v", r, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if strings.Contains(b.log.String(), "connections open") {
		t.Errorf("the first Envoy took its patience to the end: %s", b.log)
	}
	if s := third.live(t, was.PID); s.Generation != 0 || s.Pod != "third" {
		t.Errorf("state of the third: %+v", s)
	}
	if !answers(ours) || next.states.last().PID != now.PID {
		t.Error("the second Envoy does not serve any more")
	}
}

// TestNamespacesAreForBoth generations, as far as there are supervisors.
func TestNamespacesAreForBoth(t *testing.T) {
	dir := t.TempDir()
	if err := AllowNamespaces(dir, []uint64{3, 1}); err != nil {
		t.Errorf("without a supervisor: %v", err)
	}
	for g := range uint32(names.Generations) {
		if err := os.Mkdir(folderOf(dir, g), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := AllowNamespaces(dir, []uint64{3, 1}); err != nil {
		t.Error(err)
	}
	for g := range uint32(names.Generations) {
		if text, err := os.ReadFile(filepath.Join(folderOf(dir, g), namespacesFile)); err != nil || string(text) != "1\n3\n" {
			t.Errorf("generation %d: %q, %v", g, text, err)
		}
	}
}
