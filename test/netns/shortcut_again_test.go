package netns

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

const (
	repairOff   = -1 // TCP_REPAIR_OFF_NO_WP of linux/tcp.h
	repairRecvQ = 1
	repairSendQ = 2
)

// sequences returns the numbers of the next bytes that the socket sends and receives.
func (st *stream) sequences() (send, receive uint32, err error) {
	if err := unix.SetsockoptInt(st.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
		return 0, 0, err
	}
	numbers := map[int]int{}
	for _, queue := range []int{repairSendQ, repairRecvQ} {
		if err := unix.SetsockoptInt(st.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
			return 0, 0, err
		}
		if numbers[queue], err = unix.GetsockoptInt(st.fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ); err != nil {
			return 0, 0, err
		}
	}
	return uint32(numbers[repairSendQ]), uint32(numbers[repairRecvQ]), unix.SetsockoptInt(st.fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, repairOff)
}

func sum(b []byte) (n uint32) {
	for ; len(b) > 1; b = b[2:] {
		n += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		n += uint32(b[0]) << 8
	}
	return n
}

// inject sends a segment as if the connection's IPv4 socket had, from its namespace.
func (p *pod) inject(from *stream, sequence, ack uint32, payload []byte) error {
	local, remote := unmap(from.local()), unmap(from.peer())
	segment := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(segment, local.Port())
	binary.BigEndian.PutUint16(segment[2:], remote.Port())
	binary.BigEndian.PutUint32(segment[4:], sequence)
	binary.BigEndian.PutUint32(segment[8:], ack)
	segment[12], segment[13] = 5<<4, 0x18 // five words, PSH and ACK
	binary.BigEndian.PutUint16(segment[14:], 1000)
	segment = append(segment, payload...)
	source, destination := local.Addr().As4(), remote.Addr().As4()
	check := sum(source[:]) + sum(destination[:]) + unix.IPPROTO_TCP + uint32(len(segment)) + sum(segment)
	for check > 0xffff {
		check = check&0xffff + check>>16
	}
	binary.BigEndian.PutUint16(segment[16:], ^uint16(check))
	return p.run(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: source}); err != nil {
			return err
		}
		return unix.Sendto(fd, segment, 0, &unix.SockaddrInet4{Addr: destination})
	})
}

// shortcutAgain: a segment whose first bytes have come before, as TCP makes them when segments overtake each other. The
// kernel hands it to stream_verdict whole; the reader gets every byte once.
func shortcutAgain(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	const old, fresh = 70000, 1000 // what came before, and what is new; a segment carries up to 60,000
	for _, c := range []struct {
		name  string
		ours  bool
		again int
	}{{"a little", true, 72}, {"a lot", true, 50000}, {"a little, with another program", false, 72}} {
		if !c.ours {
			joined := w.pinnedMap("joined")
			w.ok(link.RawAttachProgram(link.RawAttachProgramOptions{Target: joined.FD(), Attach: ebpf.AttachSkSKBStreamVerdict,
				Program: passing(t, ebpf.AttachSkSKBStreamVerdict)}))
		}
		l := w.inLeg(p, podIPv4)
		w.ok(w.redirect.SetShortcut(p.uid, false))
		w.ok(l.proxy.send(0, old, random()))
		w.ok(l.app.receive(0, old, random()))
		send, receive, err := l.proxy.sequences()
		w.ok(err)
		trimmed := w.counter("shortcut_trimmed_bytes")
		w.ok(p.inject(l.proxy, send-uint32(c.again), receive, patternAt(old-c.again, c.again+fresh)))
		w.ok(poll(l.app.fd, unix.POLLIN))
		n, _ := l.app.unread(t)
		err = l.app.receive(old, fresh, random())
		if c.ours && (err != nil || n != fresh) {
			t.Errorf("%s: %d bytes wait, not %d: %v", c.name, n, fresh, err)
		}
		if moved := w.counter("shortcut_trimmed_bytes") - trimmed; c.ours && moved != uint64(c.again) {
			t.Errorf("%s: %d bytes were taken off, not %d", c.name, moved, c.again)
		}
		if !c.ours && (err == nil || n != c.again+fresh) {
			t.Errorf("%s: %d bytes wait, %v: the kernel takes off what came before, the hook need not", c.name, n, err)
		}
		w.ok(w.redirect.SetShortcut(p.uid, true))
		l.app.close()
		l.proxy.close()
	}
	if n := w.counter("shortcut_trim_failed"); n > 0 {
		t.Errorf("%d segments were not trimmed", n)
	}
}
