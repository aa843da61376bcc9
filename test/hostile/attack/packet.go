package attack

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// link is a pod's network device.
type link string

const outside link = "eth0"

func (l link) device() (*net.Interface, error) { return net.InterfaceByName(string(l)) }

func (l link) index() int {
	device, err := l.device()
	if err != nil {
		return 0
	}
	return device.Index
}

const (
	etherIPv4, etherARP, etherIPv6 = 0x0800, 0x0806, 0x86dd
	protocolTCP, protocolICMPv6    = 6, 58
)

// etherIP is the kind of frame that carries an address's family.
func etherIP(a netip.Addr) uint16 {
	if a.Is6() {
		return etherIPv6
	}
	return etherIPv4
}

// packet is a TCP packet.
type packet struct {
	from, to netip.AddrPort
	Segment
	payload []byte
}

// sum is the checksum of the Internet protocols over parts.
func sum(parts ...[]byte) uint16 {
	var total uint32
	for _, b := range parts {
		for i := 0; i+1 < len(b); i += 2 {
			total += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		if len(b)%2 == 1 {
			total += uint32(b[len(b)-1]) << 8
		}
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return ^uint16(total)
}

// pseudo is the part of the IP head that TCP's and ICMPv6's checksums cover.
func pseudo(from, to netip.Addr, protocol byte, length int) []byte {
	b := append(from.AsSlice(), to.AsSlice()...)
	if from.Is4() {
		return append(b, 0, protocol, byte(length>>8), byte(length))
	}
	return append(b, 0, 0, byte(length>>8), byte(length), 0, 0, 0, protocol)
}

// network is the IP head before so many bytes.
func network(from, to netip.Addr, protocol, hops byte, length int) []byte {
	if from.Is4() {
		b := []byte{0x45, 0, byte((20 + length) >> 8), byte(20 + length), 0x57, 0x46, 0x40, 0, hops, protocol, 0, 0}
		b = append(append(b, from.AsSlice()...), to.AsSlice()...)
		binary.BigEndian.PutUint16(b[10:], sum(b))
		return b
	}
	b := []byte{0x60, 0, 0, 0, byte(length >> 8), byte(length), protocol, hops}
	return append(append(b, from.AsSlice()...), to.AsSlice()...)
}

// bytes is the packet from its IP head on.
func (p packet) bytes() []byte {
	b := make([]byte, 20, 20+len(p.payload))
	binary.BigEndian.PutUint16(b[0:], p.from.Port())
	binary.BigEndian.PutUint16(b[2:], p.to.Port())
	binary.BigEndian.PutUint32(b[4:], p.Seq)
	binary.BigEndian.PutUint32(b[8:], p.Ack)
	b[12], b[13] = 5<<4, p.Flags
	binary.BigEndian.PutUint16(b[14:], 0xffff) // the window
	b = append(b, p.payload...)
	binary.BigEndian.PutUint16(b[16:], sum(pseudo(p.from.Addr(), p.to.Addr(), protocolTCP, len(b)), b))
	return append(network(p.from.Addr(), p.to.Addr(), protocolTCP, 64, len(b)), b...)
}

// readPacket takes a TCP packet apart, from its IP head on.
func readPacket(b []byte) (p packet, ok bool) {
	var from, to netip.Addr
	switch {
	case len(b) >= 40 && b[0]>>4 == 4 && b[9] == protocolTCP:
		length := min(int(binary.BigEndian.Uint16(b[2:])), len(b))
		from, to = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		head := int(b[0]&15) * 4
		if head > length {
			return p, false
		}
		b = b[head:length]
	case len(b) >= 60 && b[0]>>4 == 6 && b[6] == protocolTCP:
		length := min(40+int(binary.BigEndian.Uint16(b[4:])), len(b))
		from, to = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		b = b[40:length]
	default:
		return p, false
	}
	if len(b) < 20 || int(b[12]>>4)*4 > len(b) {
		return p, false
	}
	p.from, p.to = netip.AddrPortFrom(from, binary.BigEndian.Uint16(b[0:])), netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[2:]))
	p.Seq, p.Ack, p.Flags = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:]), b[13]
	p.payload = b[int(b[12]>>4)*4:]
	return p, true
}

// ends are the addresses that forged packets have.
func (a Attempt) ends() (from, to netip.AddrPort, err error) {
	if from, err = netip.ParseAddrPort(a.From); err == nil {
		to, err = netip.ParseAddrPort(a.To)
	}
	return from, to, at("resolve", err)
}

// inject sends packets with forged heads and waits for no answer.
func inject(a Attempt, o *Outcome) error {
	from, to, err := a.ends()
	if err != nil {
		return err
	}
	p := packet{from: from, to: to, payload: a.Send}
	if a.Segment != nil {
		p.Segment = *a.Segment
	}
	domain := unix.AF_INET
	if to.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return at("socket", err)
	}
	defer unix.Close(fd)
	o.Counts = map[string]int{}
	for range max(a.Count, 1) {
		err := unix.Sendto(fd, p.bytes(), 0, sockaddr(netip.AddrPortFrom(to.Addr(), 0), domain == unix.AF_INET6))
		if err != nil {
			return at("write", err)
		}
		o.Counts["sent"]++
	}
	return nil
}

// wire is a packet socket: every frame of a device, or of all.
type wire struct {
	fd   int
	own  net.HardwareAddr
	link int
}

func listen(l link, all bool) (*wire, error) {
	device, err := l.device()
	if err != nil {
		return nil, at("socket", err)
	}
	const every = 0x0300 // ETH_P_ALL as the network writes it
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, every)
	if err != nil {
		return nil, at("socket", err)
	}
	w := &wire{fd, device.HardwareAddr, device.Index}
	bound := &unix.SockaddrLinklayer{Protocol: every, Ifindex: device.Index}
	if all {
		bound.Ifindex = 0
	}
	if err := unix.Bind(fd, bound); err != nil {
		w.close()
		return nil, at("bind", err)
	}
	if !all { // what is sent to groups of neighbours that the pod has not joined
		err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &unix.PacketMreq{Ifindex: int32(device.Index), Type: unix.PACKET_MR_ALLMULTI})
		if err != nil {
			w.close()
			return nil, at("option", err)
		}
	}
	return w, nil
}

func (w *wire) close() { unix.Close(w.fd) }

// send puts a frame on the wire.
func (w *wire) send(to net.HardwareAddr, kind uint16, content []byte) error {
	frame := append(append([]byte{}, to...), w.own...)
	frame = append(binary.BigEndian.AppendUint16(frame, kind), content...)
	err := unix.Sendto(w.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: w.link, Halen: 6, Addr: [8]byte(append(append([]byte{}, to...), 0, 0))})
	return at("write", err)
}

// next returns the next frame, nil at the end of the time.
func (w *wire) next(end time.Time) ([]byte, error) {
	buffer := make([]byte, 70000)
	for {
		left := time.Until(end)
		if left <= 0 {
			return nil, nil
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if errors.Is(err, unix.EINTR) || err == nil && n == 0 {
			continue
		}
		if err != nil {
			return nil, at("read", os.NewSyscallError("poll", err))
		}
		n, from, err := unix.Recvfrom(w.fd, buffer, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, at("read", err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING || n < 14 {
			continue
		}
		return buffer[:n], nil
	}
}

// sniff looks for Send in every frame of every device, for the time.
func sniff(a Attempt, o *Outcome) error {
	w, err := listen(outside, true)
	if err != nil {
		return err
	}
	defer w.close()
	o.Counts = map[string]int{}
	for end := time.Now().Add(a.limit()); ; {
		frame, err := w.next(end)
		if err != nil || frame == nil {
			return err
		}
		o.Counts["frames"]++
		if bytesContain(frame, a.Send) {
			o.Counts["matches"]++
		}
	}
}
