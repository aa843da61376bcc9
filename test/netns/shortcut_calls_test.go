package netns

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

func random() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// passing is a program that passes whatever it sees.
func passing(t *testing.T, attach ebpf.AttachType) *ebpf.Program {
	t.Helper()
	kind := ebpf.SkMsg
	if attach == ebpf.AttachSkSKBStreamVerdict {
		kind = ebpf.SkSKB
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: kind, AttachType: attach, License: "GPL", Name: "passing",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R1, 0), asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return program
}

// copyOf is take that leaves the hand what it has.
func (h *hand) copyOf(file int) *stream {
	h.t.Helper()
	pid, err := unix.PidfdOpen(h.cmd.Process.Pid, 0)
	if err != nil {
		h.t.Fatal("open hand:", err)
	}
	defer unix.Close(pid)
	fd, err := unix.PidfdGetfd(pid, file, 0)
	if err != nil {
		h.t.Fatal("copy the hand's connection:", err)
	}
	return &stream{fd}
}

// shortcutCalls: FIONREAD, MSG_PEEK, MSG_WAITALL and edge-triggered epoll work as by TCP, on bytes of both ways.
func shortcutCalls(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	bothEnds(t, w, p, func(l leg, from, to *stream) {
		offset := w.primed(l)
		epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		w.ok(err)
		defer unix.Close(epoll)
		w.ok(unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, to.fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(to.fd)}))
		edge := func(what string) {
			t.Helper()
			events := make([]unix.EpollEvent, 1)
			deadline := time.Now().Add(patience)
			for {
				n, err := unix.EpollWait(epoll, events, int(time.Until(deadline).Milliseconds()))
				if err == unix.EINTR {
					continue
				}
				if err != nil || n != 1 {
					t.Fatalf("%s: no edge at %s: %d, %v", l.name, what, n, err)
				}
				return
			}
		}
		w.ok(from.send(offset, 1000, random())) // past TCP
		edge("bytes of the short circuit")
		w.ok(w.redirect.SetShortcut(p.uid, false))
		w.ok(from.send(offset+1000, 1000, random())) // by TCP
		edge("bytes of TCP behind them")
		eventually(t, "FIONREAD", func() error {
			if n, memory := to.unread(t); n != 2000 || memory < 2000 {
				return fmt.Errorf("%d of 2000 bytes, %d of memory", n, memory)
			}
			return nil
		})
		b := make([]byte, 2000)
		n, _, err := unix.Recvfrom(to.fd, b[:1500], unix.MSG_PEEK)
		wantOutcome(t, l.name+", MSG_PEEK", n, err, 1500)
		w.ok(to.receive(offset, 500, random()))
		w.ok(to.receive(offset+500, 1500, random()))
		w.ok(w.redirect.SetShortcut(p.uid, true))

		offset += 2000
		waiting := make(chan any, 1)
		go func() {
			n, err := receiveAll(to, 2000)
			waiting <- outcome(n, err)
		}()
		w.ok(from.send(offset, 1000, random()))
		w.ok(w.redirect.SetShortcut(p.uid, false))
		w.ok(from.send(offset+1000, 1000, random()))
		w.ok(w.redirect.SetShortcut(p.uid, true))
		if got := <-waiting; got != 2000 {
			t.Errorf("%s: MSG_WAITALL of 2000: %v", l.name, got)
		}
	})
}

// receiveAll is recv(2) with MSG_WAITALL, going on after what signals left short.
func receiveAll(st *stream, n int) (int, error) {
	b := make([]byte, n)
	for got := 0; ; {
		m, _, err := unix.Recvfrom(st.fd, b[got:], unix.MSG_WAITALL)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if got += max(m, 0); err != nil || m == 0 || got == n {
			return got, err
		}
	}
}

// shortcutSplice: splice(2) finds nothing on a socket that has joined, whatever waits there.
func shortcutSplice(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	bothEnds(t, w, p, func(l leg, from, to *stream) {
		offset := w.primed(l)
		var pipe [2]int
		w.ok(unix.Pipe2(pipe[:], unix.O_CLOEXEC))
		defer unix.Close(pipe[0])
		defer unix.Close(pipe[1])
		w.ok(unix.SetNonblock(to.fd, true))
		for _, on := range []bool{true, false} {
			w.ok(w.redirect.SetShortcut(p.uid, on))
			w.ok(from.send(offset, 1000, random()))
			w.ok(poll(to.fd, unix.POLLIN))
			n, err := unix.Splice(to.fd, nil, pipe[1], nil, 1000, unix.SPLICE_F_NONBLOCK)
			wantOutcome(t, l.name+", splice", int(n), err, "EAGAIN")
			w.ok(to.receive(offset, 1000, random()))
			offset += 1000
		}
		w.ok(w.redirect.SetShortcut(p.uid, true))
	})
}

// shortcutSignal: a blocking read that a signal with SA_RESTART interrupts returns EAGAIN; by TCP it goes on.
func shortcutSignal(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	bothEnds(t, w, p, func(l leg, from, to *stream) {
		offset := w.primed(l)
		thread, result := make(chan int), make(chan any)
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			thread <- unix.Gettid()
			n, _, err := unix.Recvfrom(to.fd, make([]byte, 1), 0)
			result <- outcome(n, err)
		}()
		tid := <-thread
		got := any(nil)
		for got == nil { // SIGURG is Go's own, with SA_RESTART; the thread may not be reading yet
			w.ok(unix.Tgkill(unix.Getpid(), tid, unix.SIGURG))
			select {
			case got = <-result:
			case <-time.After(time.Millisecond):
			}
		}
		if got != "EAGAIN" {
			t.Errorf("%s: a read that a signal interrupts: %v", l.name, got)
		}
		w.ok(from.send(offset, 1000, random()))
		w.ok(to.receive(offset, 1000, random()))
	})
}

// shortcutMultipath: Go's servers listen with MPTCP; what they accept from Envoy is plain TCP, joins, and stays usable.
func shortcutMultipath(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	for _, address := range []string{podIPv4, podIPv6} {
		server, err := p.socket(unix.AF_INET6, protocolMPTCP, intOption(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0), bound("[::]:0"))
		w.ok(err)
		l := w.inLegTo(p, server, address)
		server.close()
		want := l.proxy.peer()
		if got := unmap(l.app.local()); got != unmap(want) {
			t.Errorf("the app's socket says that it is %s, and its peer that it is %s", got, want)
		}
		w.ok(l.bothWays(w.primed(l), 4<<20))
	}
}

// shortcutZerocopy: the kernel never tells that it is done with what was sent by MSG_ZEROCOPY; by TCP it does.
func shortcutZerocopy(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	switched(t, w, p, func(l leg, from, to *stream, offset int, on bool) {
		w.ok(unix.SetsockoptInt(from.fd, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1))
		n, err := unix.SendmsgN(from.fd, patternAt(offset, 20000), nil, nil, unix.MSG_ZEROCOPY)
		wantOutcome(t, l.name+", MSG_ZEROCOPY", n, err, 20000)
		w.ok(to.receive(offset, 20000, random()))
		told := func() error {
			_, _, _, _, err := unix.Recvmsg(from.fd, nil, make([]byte, 512), unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			return err
		}
		if !on {
			eventually(t, l.name+", by TCP, the end of MSG_ZEROCOPY", told)
			return
		}
		w.ok(to.send(0, 1000, random())) // whatever TCP had to say it has said by now
		w.ok(from.receive(0, 1000, random()))
		wantErrno(t, told(), unix.EAGAIN, l.name+", the end of MSG_ZEROCOPY")
	})
}
