package redirect

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
)

// The only file that converts between Go's values and the hooks' (bpf/types.h): addresses are four words in network
// order, IPv4 mapped into IPv6; ports are in host order.

func words(addr netip.Addr) (w [4]uint32) {
	b := addr.As16()
	for i := range w {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

// addrOf is the reverse of words; the zero words are no address.
func addrOf(w [4]uint32) netip.Addr {
	if w == [4]uint32{} {
		return netip.Addr{}
	}
	var b [16]byte
	for i := range w {
		binary.NativeEndian.PutUint32(b[4*i:], w[i])
	}
	return netip.AddrFrom16(b).Unmap()
}

func endpointOf(ap netip.AddrPort) weftEndpoint {
	return weftEndpoint{Addr: words(ap.Addr()), Port: ap.Port()}
}

func addrPortOf(e weftEndpoint) netip.AddrPort { return netip.AddrPortFrom(addrOf(e.Addr), e.Port) }

// text copies s into a fixed field, which keeps one byte of zero behind it.
func text(field []byte, name, s string) error {
	if len(s) >= len(field) {
		return fmt.Errorf("store %s %q: longer than %d bytes", name, s, len(field)-1)
	}
	clear(field[copy(field, s):])
	return nil
}

func textOf(field []byte) string {
	s, _, _ := bytes.Cut(field, []byte{0})
	return string(s)
}

// canonical returns addr as the maps know it: IPv4 unmapped, without zone.
func canonical(addr netip.Addr) netip.Addr { return addr.Unmap().WithZone("") }
