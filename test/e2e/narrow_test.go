//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

// cutAfter is the latest at which a connection ends that a narrowed policy would not let in any more.
const cutAfter = 10 * time.Second

// held is one connection to the server that a caller keeps busy.
type held struct {
	caller
	name  string
	letGo func()

	mu    sync.Mutex
	lines int
	ended time.Time
	how   string
}

func hold(t *testing.T, from caller, at placement, address string) *held {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	h := &held{caller: from, name: fmt.Sprintf("%s, %s, %s", from.app, at.name, address), letGo: cancel}
	cmd := k8s.Command(ctx, "exec", "-n", from.namespace, pod(t, from.namespace, from.app, at.node).Name, "--", "toolbox", "hold", address)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	t.Cleanup(func() { cancel(); <-read; _ = cmd.Wait() })
	go func() {
		defer close(read)
		for answers := bufio.NewScanner(out); answers.Scan(); {
			h.mu.Lock()
			if end, over := strings.CutPrefix(answers.Text(), "end "); over {
				when, how, _ := strings.Cut(end, " ")
				at, _ := strconv.ParseInt(when, 10, 64) // by the clock that all nodes share
				h.ended, h.how = time.Unix(0, at), how
			} else {
				h.lines++
			}
			h.mu.Unlock()
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.ended.IsZero() {
			h.ended, h.how = time.Now(), gone
		}
	}()
	return h
}

// gone: what held the connection ended, and did not say how the connection did.
const gone = "the caller is gone"

// state is how many lines came back, and how the connection ended; empty: it lives.
func (h *held) state() (lines int, ended time.Time, how string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lines, h.ended, h.how
}

// holdAll holds a connection of every caller, from both nodes, by every address, and waits until all of them are in use.
func holdAll(t *testing.T, callers ...caller) []*held {
	t.Helper()
	var all []*held
	for _, from := range callers {
		for _, at := range placements {
			for _, address := range []string{"server.mesh:9000", pod(t, "mesh", "server", "n1").IPs[0] + ":9000"} {
				all = append(all, hold(t, from, at, address))
			}
		}
	}
	until(t, time.Minute, "every connection to be in use", func() (bool, string) {
		for _, h := range all {
			if lines, _, how := h.state(); lines < 3 || how != "" {
				return false, fmt.Sprintf("%s: %d lines, %s", h.name, lines, how)
			}
		}
		return true, ""
	})
	return all
}

// cuts applies a manifest after which the connections of one caller are not allowed any more. They end in time, and the
// object is not Programmed before.
func cuts(t *testing.T, all []*held, unwanted caller, kind, name, manifest string) {
	t.Helper()
	if err := k8s.Apply(t.Context(), manifest); err != nil {
		t.Fatal(err)
	}
	applied := time.Now()
	alive := func() (names []string) {
		for _, h := range all {
			if _, _, how := h.state(); h.caller == unwanted && how == "" {
				names = append(names, h.name)
			}
		}
		return names
	}
	if err := kube.Until(t.Context(), time.Minute, kind+" "+name+" to be programmed", nil, func(context.Context) (bool, string) {
		return isProgrammed(t, "mesh", kind, name)
	}); err != nil {
		t.Error(err)
	}
	programmed := time.Now()
	until(t, time.Minute, "the connections to end", func() (bool, string) { return len(alive()) == 0, fmt.Sprint(alive()) })
	for _, h := range all {
		if _, ended, how := h.state(); h.caller == unwanted {
			if how == gone {
				t.Errorf("%s: %s: nobody knows when the connection ended", h.name, how)
			}
			t.Logf("%s: cut after %v: %s", h.name, ended.Sub(applied).Round(10*time.Millisecond), how)
			if how != gone && ended.After(programmed) {
				t.Errorf("%s: ended %v after %s %s was Programmed", h.name, ended.Sub(programmed), kind, name)
			}
			if ended.Sub(applied) > cutAfter {
				t.Errorf("%s: lived on for %v, want at most %v", h.name, ended.Sub(applied), cutAfter)
			}
		}
	}
}

// liveOn waits long enough for a cut that comes late to be seen, beyond cutAfter at one line in 100 ms.
func liveOn(t *testing.T, all []*held, of caller) {
	t.Helper()
	before := map[*held]int{}
	for _, h := range all {
		before[h], _, _ = h.state()
	}
	until(t, 2*time.Minute, "the other connections to live on", func() (bool, string) {
		for _, h := range all {
			if h.caller != of {
				continue
			}
			lines, _, how := h.state()
			if how != "" {
				t.Fatalf("%s: ended: %s", h.name, how)
			}
			if lines-before[h] < 120 {
				return false, fmt.Sprintf("%s: %d lines since", h.name, lines-before[h])
			}
		}
		return true, ""
	})
}

// TestNarrowing: §9, connections that a narrower policy would not let in are cut. Raw TCP of callers that are still allowed
// came through the same chain and goes with them (docs/LIMITS.md); their new connections live on.
func TestNarrowing(t *testing.T) {
	alone(t, "mesh")
	for _, c := range []struct{ name, to string }{{"the whole pod", ""}, {"one port", ", to: [{ports: [9000]}]"}} {
		t.Run(c.name, func(t *testing.T) {
			apply(t, manifest([]string{"action: Allow, rules: [{" + byClient + c.to + "}, {" + byOther + c.to + "}]"}))
			programmed(t, "accesspolicy", "case-0")
			all := holdAll(t, client, other)
			cuts(t, all, other, "accesspolicy", "case-0", manifest([]string{"action: Allow, rules: [{" + byClient + c.to + "}]"}))
			liveOn(t, holdAll(t, client), client)
		})
	}
}

// TestStrictCuts: §1.9, what came in without identity does not outlive the change to Strict.
func TestStrictCuts(t *testing.T) {
	alone(t, "mesh")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := k8s.Delete(ctx, strictMesh); err != nil {
			t.Error(err)
		}
	})
	// What the test before this one set is over when this is programmed.
	if err := k8s.Apply(t.Context(), strings.ReplaceAll(strictMesh, "Strict", "Permissive")); err != nil {
		t.Fatal(err)
	}
	programmed(t, "authenticationpolicy", "strict")
	all := holdAll(t, client, stranger)
	cuts(t, all, stranger, "authenticationpolicy", "strict", strictMesh)
	liveOn(t, all, client)
}
