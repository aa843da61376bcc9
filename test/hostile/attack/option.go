package attack

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
)

// Not in x/sys/unix.
const (
	protocolMPTCP      = 262
	ipBindNoPort       = 24
	ipLocalPortRange   = 51
	ipOptions          = 4
	originalDst        = 80
	looseSourceRouting = 0x83
)

// intOptions are the socket options that take a number.
var intOptions = map[string]struct{ level, name, value int }{
	"transparent4": {unix.SOL_IP, unix.IP_TRANSPARENT, 1},
	"transparent6": {unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1},
	"freebind4":    {unix.SOL_IP, unix.IP_FREEBIND, 1},
	"freebind6":    {unix.SOL_IPV6, unix.IPV6_FREEBIND, 1},
	"mark":         {unix.SOL_SOCKET, unix.SO_MARK, names.SocketOptionLevel},
	"priority":     {unix.SOL_SOCKET, unix.SO_PRIORITY, 7},
	"tag-local":    {names.SocketOptionLevel, 1, names.TagLocalLeg << 16},
	"tag-outbound": {names.SocketOptionLevel, 1, names.TagOutboundLeg << 16},
	"reuseaddr":    {unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
	"reuseport":    {unix.SOL_SOCKET, unix.SO_REUSEPORT, 1},
	"no-port":      {unix.SOL_IP, ipBindNoPort, 1},
	"proxy-range":  {unix.SOL_IP, ipLocalPortRange, 15000 | 15019<<16},
	"repair":       {unix.SOL_TCP, unix.TCP_REPAIR, 1},
	"v6only":       {unix.SOL_IPV6, unix.IPV6_V6ONLY, 1},
}

// apply sets an option; "mptcp" and "fastopen" are the dialler's own.
func apply(fd int, option, to string) error {
	name, value, _ := strings.Cut(option, "=")
	if o, ok := intOptions[name]; ok {
		return unix.SetsockoptInt(fd, o.level, o.name, o.value)
	}
	switch name {
	case "mptcp", "fastopen", "urgent":
		return nil
	case "device":
		return unix.BindToDevice(fd, value)
	case "source-route":
		return sourceRoute(fd, value, to)
	}
	return fmt.Errorf("there is no option %q", option)
}

// sourceRoute asks every router to send by way of an address.
func sourceRoute(fd int, by, to string) error {
	via, err := netip.ParseAddr(by)
	if err != nil {
		return err
	}
	end, err := netip.ParseAddrPort(to)
	if err != nil {
		return err
	}
	list := append([]byte{looseSourceRouting, 11, 4}, via.AsSlice()...)
	list = append(append(list, end.Addr().AsSlice()...), 0)
	return unix.SetsockoptString(fd, unix.SOL_IP, ipOptions, string(list))
}

func sockaddr(at netip.AddrPort, six bool) unix.Sockaddr {
	if at.Addr().Is4() && !six {
		return &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	}
	sa := &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
	if at.Addr().Is6() && at.Addr().IsLinkLocalUnicast() {
		sa.ZoneId = uint32(outside.index())
	}
	return sa
}
