package netns

import (
	"errors"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/redirect"
)

// outcome of a system call: how much, or which errno.
func outcome(n int, err error) any {
	if err != nil {
		return errorName(err)
	}
	return n
}

func wantOutcome(t *testing.T, what string, n int, err error, want any) {
	t.Helper()
	if got := outcome(n, err); got != want {
		t.Errorf("%s: %v, not %v", what, got, want)
	}
}

// read reads once, and again after a signal of Go's scheduler.
func (st *stream) read(b []byte) (int, error) {
	for {
		n, err := unix.Read(st.fd, b)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN {
			if err := poll(st.fd, unix.POLLIN); err != nil {
				return 0, err
			}
			continue
		}
		return n, err
	}
}

// bothEnds runs f on legs of both kinds and families, with either end as the one that writes first.
func bothEnds(t *testing.T, w *world, p *pod, f func(l leg, from, to *stream)) {
	t.Helper()
	for _, address := range []string{podIPv4, podIPv6} {
		service := map[string]string{podIPv4: serviceIPv4, podIPv6: serviceIPv6}[address]
		for _, makeLeg := range []func() leg{
			func() leg { return w.outLeg(p, service) }, func() leg { return w.inLeg(p, address) },
		} {
			for _, fromApp := range []bool{true, false} {
				l := makeLeg()
				if from, to := l.proxy, l.app; fromApp {
					f(l, to, from)
				} else {
					f(l, from, to)
				}
				l.app.close()
				l.proxy.close()
			}
		}
	}
}

// switched is bothEnds with the short circuit on, from the offset where its legs have joined, and off.
func switched(t *testing.T, w *world, p *pod, f func(l leg, from, to *stream, offset int, on bool)) {
	t.Helper()
	for _, on := range []bool{true, false} {
		w.ok(w.redirect.SetShortcut(p.uid, on))
		bothEnds(t, w, p, func(l leg, from, to *stream) {
			offset := 0
			if on {
				offset = w.primed(l)
			}
			f(l, from, to, offset, on)
		})
	}
}

// shortcutSlowReader fills a connection that nobody reads from. What waits by the short circuit is bounded; the rest is
// TCP's, which holds the writer back; and all of it comes in order.
func shortcutSlowReader(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	bothEnds(t, w, p, func(l leg, from, to *stream) {
		offset := w.primed(l)
		w.ok(unix.SetNonblock(from.fd, true))
		redirected, bound := w.counter("shortcut_redirected_bytes"), w.counter("shortcut_passed_bound_bytes")
		sent := 0
		for {
			n, err := unix.Write(from.fd, patternAt(offset+sent, 30000))
			if err == unix.EAGAIN {
				break
			} else if err != nil && err != unix.EINTR {
				t.Fatal(err)
			}
			sent += max(n, 0)
			if sent > 256<<20 {
				t.Fatalf("%s: %d bytes were taken that nobody reads", l.name, sent)
			}
		}
		waiting := w.counter("shortcut_redirected_bytes") - redirected
		if waiting > shortcutBound || waiting < shortcutBound/2 {
			t.Errorf("%s: %d bytes wait by the short circuit, the bound is %d", l.name, waiting, shortcutBound)
		}
		if w.counter("shortcut_passed_bound_bytes") == bound {
			t.Errorf("%s: nothing was passed to TCP for the bound", l.name)
		}
		if err := to.receive(offset, sent, random()); err != nil {
			t.Errorf("%s: %v", l.name, err)
		}
		before := w.counter("shortcut_redirected_bytes")
		w.ok(unix.SetNonblock(from.fd, false))
		offset += sent
		for w.counter("shortcut_redirected_bytes") == before { // it comes back once the reader has caught up
			if err := errors.Join(from.send(offset, 100, random()), to.receive(offset, 100, random())); err != nil {
				t.Fatal(err)
			}
			offset += 100
		}
	})
}

func shortcutHalfClose(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	bothEnds(t, w, p, func(l leg, from, to *stream) {
		offset := w.primed(l)
		w.ok(from.send(offset, 200000, random()))
		w.ok(unix.Shutdown(from.fd, unix.SHUT_WR))
		if err := to.receive(offset, 200000, random()); err != nil {
			t.Errorf("%s, before the end: %v", l.name, err)
		}
		n, err := to.read(make([]byte, 1))
		wantOutcome(t, l.name+", at the end", n, err, 0)
		before := w.counter("shortcut_redirected_bytes")
		w.ok(to.send(offset, 200000, random()))
		if w.counter("shortcut_redirected_bytes") == before {
			t.Errorf("%s: the other direction left the short circuit", l.name)
		}
		w.ok(unix.Shutdown(to.fd, unix.SHUT_WR))
		if err := from.receive(offset, 200000, random()); err != nil {
			t.Errorf("%s, the other direction: %v", l.name, err)
		}
		n, err = from.read(make([]byte, 1))
		wantOutcome(t, l.name+", at the other end", n, err, 0)
	})
}

// shortcutReset: what was sent before a reset can be read, then the reset shows, as by TCP.
func shortcutReset(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	switched(t, w, p, func(l leg, from, to *stream, offset int, on bool) {
		w.ok(from.send(offset, 1000, random()))
		w.ok(poll(to.fd, unix.POLLIN))
		from.reset()
		if err := to.receive(offset, 1000, random()); err != nil {
			t.Errorf("%s, short circuit %v, before the reset: %v", l.name, on, err)
		}
		n, err := to.read(make([]byte, 1))
		wantOutcome(t, l.name+", at the reset", n, err, "ECONNRESET")
	})
}

// shortcutClosedUnread: a reader that closes with unread bytes shows to its sender as an end, then as EPIPE, where the
// socket has joined; by TCP it is a reset.
func shortcutClosedUnread(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	switched(t, w, p, func(l leg, from, to *stream, offset int, on bool) {
		w.ok(from.send(offset, 1000, random()))
		w.ok(poll(to.fd, unix.POLLIN))
		to.close()
		n, err := from.read(make([]byte, 1))
		if !on {
			wantOutcome(t, l.name+", by TCP, read after the reader closed", n, err, "ECONNRESET")
			return
		}
		wantOutcome(t, l.name+", read after the reader closed", n, err, 0)
		w.ok(from.write("x")) // answered by a reset
		w.ok(poll(from.fd, unix.POLLHUP))
		n, err = unix.Write(from.fd, []byte("x"))
		wantOutcome(t, l.name+", write after the reader closed", n, err, "EPIPE")
	})
}

// shortcutKilled: Envoy dies with bytes of both directions on their way. The app reads all that Envoy had sent.
func shortcutKilled(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	var apps []*stream
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		app, file := w.heldLeg(p, to)
		copied := w.envoy.copyOf(file)
		offset := w.primed(leg{to, app, copied})
		w.ok(app.send(offset, 1000, random()))
		w.ok(copied.send(offset, 100000, random()))
		copied.close() // Envoy has the only one
		apps = append(apps, app)
		w.ok(app.receive(offset, 10, random()))
	}
	w.envoy.kill()
	for _, app := range apps {
		if err := app.receive(11, 99990, random()); err != nil {
			t.Error("what Envoy had sent:", err)
		}
		n, err := app.read(make([]byte, 1))
		if got := outcome(n, err); got != 0 && got != "ECONNRESET" {
			t.Errorf("after that: %v", got)
		}
		app.close()
	}
	w.leftBehind(t)
}

// shortcutRestart: an agent that starts again, and one that brings other programs, while bytes wait and flow.
func shortcutRestart(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	legs := w.everyLeg(p)
	offsets := make([]int, len(legs))
	for i, l := range legs {
		offsets[i] = w.primed(l)
		w.ok(l.app.send(offsets[i], 1000, random()))
		w.ok(l.proxy.send(offsets[i], 1000, random()))
	}
	// What another version leaves: programs that are not ours.
	joined := w.pinnedMap("joined")
	for _, attach := range []ebpf.AttachType{ebpf.AttachSkMsgVerdict, ebpf.AttachSkSKBStreamVerdict} {
		other := passing(t, attach)
		w.ok(link.RawAttachProgram(link.RawAttachProgramOptions{Target: joined.FD(), Program: other, Attach: attach}))
	}
	state, err := w.redirect.Verify(p.uid)
	if err != nil || len(state.Drift) != 2 {
		t.Errorf("with other programs: %q, %v", state.Drift, err)
	}
	done := make(chan error, 1)
	busy := legs[0]
	for i, l := range legs {
		if err := errors.Join(l.app.receive(offsets[i], 1000, random()), l.proxy.receive(offsets[i], 1000, random())); err != nil {
			t.Errorf("%s: %v", l.name, err)
		}
		offsets[i] += 1000
	}
	go func() { done <- busy.bothWays(offsets[0], 64<<20) }()
	for range 3 {
		w.ok(w.redirect.Close())
		w.load()
	}
	if err := <-done; err != nil {
		t.Error("while the agent started again:", err)
	}
	state, err = w.redirect.Verify(p.uid)
	if err != nil || !state.Shortcut || len(state.Drift) > 0 {
		t.Errorf("after the restart: short circuit %v, %q, %v", state.Shortcut, state.Drift, err)
	}
	for i, l := range append(legs[1:], w.everyLeg(p)...) { // old and new ones
		offset := 0
		if i < len(legs)-1 {
			offset = offsets[i+1]
			w.ok(l.bothWays(offset, 1<<20))
		} else {
			w.ok(l.bothWays(w.primed(l), 1<<20))
		}
	}
}

// shortcutDetached: the programs are taken off while bytes flow. Sockets that have joined keep theirs, new ones are on TCP.
func shortcutDetached(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	joined := w.pinnedMap("joined")
	l := w.outLeg(p, serviceIPv4)
	offset := w.primed(l)
	done := make(chan error, 1)
	go func() { done <- l.bothWays(offset, 64<<20) }()
	for _, attach := range []ebpf.AttachType{ebpf.AttachSkMsgVerdict, ebpf.AttachSkSKBStreamVerdict} {
		attached, err := link.QueryPrograms(link.QueryOptions{Target: joined.FD(), Attach: attach})
		if err != nil || len(attached.Programs) != 1 {
			t.Fatal(attached, err)
		}
		program, err := ebpf.NewProgramFromID(attached.Programs[0].ID)
		w.ok(err)
		err = link.RawDetachProgram(link.RawDetachProgramOptions{Target: joined.FD(), Program: program, Attach: attach})
		w.ok(errors.Join(err, program.Close()))
	}
	if err := <-done; err != nil {
		t.Error("while the programs were taken off:", err)
	}
	before := w.counter("shortcut_redirected_bytes")
	for _, l := range w.everyLeg(p) {
		if err := l.bothWays(0, 1<<20); err != nil {
			t.Error("without programs:", err)
		}
	}
	if w.counter("shortcut_redirected_bytes") != before {
		t.Error("new sockets are in the short circuit without its programs")
	}
	state, err := w.redirect.Verify(p.uid)
	if err != nil || len(state.Drift) != 2 || state.Captured() {
		t.Errorf("without programs: %q, %v", state.Drift, err)
	}
	w.sweep()
	if state, err = w.redirect.Verify(p.uid); err != nil || len(state.Drift) > 0 {
		t.Errorf("after the repair: %q, %v", state.Drift, err)
	}
	l = w.inLeg(p, podIPv6)
	w.ok(l.bothWays(w.primed(l), 1<<20))
}

// shortcutFull: sockets that find no room stay on TCP, both ends of their connection.
func shortcutFull(t *testing.T) {
	w, p := shortcutWorld(t, limits(redirect.Limits{ShortcutSockets: 2}))
	if w == nil {
		return
	}
	first := w.outLeg(p, serviceIPv4)
	offset := w.primed(first)
	redirected := w.counter("shortcut_redirected_bytes")
	for _, l := range w.everyLeg(p) {
		if err := l.bothWays(0, 1<<20); err != nil {
			t.Error(err)
		}
	}
	if w.counter("shortcut_full") < 10 {
		t.Errorf("%d sockets found no room", w.counter("shortcut_full"))
	}
	if w.counter("shortcut_redirected_bytes") != redirected {
		t.Error("a connection without room went past TCP")
	}
	w.ok(first.bothWays(offset, 1<<20))
}

// shortcutReleased: the pod is taken out, or the instance released, while bytes wait. None of them vanishes.
func shortcutReleased(t *testing.T) {
	for how, leave := range map[string]func(w *world, p *pod) error{
		"withdraw": func(w *world, p *pod) error { return w.redirect.Withdraw(p.uid) },
		"release":  func(w *world, p *pod) error { return redirect.Release(w.pins, true) },
		"switch":   func(w *world, p *pod) error { return w.redirect.SetShortcut(p.uid, false) },
	} {
		w, p := shortcutWorld(t)
		if w == nil {
			return
		}
		legs := w.everyLeg(p)
		offsets := make([]int, len(legs))
		for i, l := range legs {
			offsets[i] = w.primed(l)
			w.ok(l.app.send(offsets[i], 100000, random()))
			w.ok(l.proxy.send(offsets[i], 100000, random()))
		}
		w.ok(leave(w, p))
		if how == "release" {
			w.ok(w.redirect.Close())
		}
		runtime.GC() // nothing of this process holds maps
		for i, l := range legs {
			if err := errors.Join(l.app.receive(offsets[i], 100000, random()), l.proxy.receive(offsets[i], 100000, random())); err != nil {
				t.Errorf("%s, %s: %v", how, l.name, err)
			}
			if err := l.bothWays(offsets[i]+100000, 1<<20); err != nil {
				t.Errorf("%s, afterwards, %s: %v", how, l.name, err)
			}
			l.app.close()
			l.proxy.close()
		}
		if how == "release" {
			w.load() // for the end of the test
		}
	}
}
