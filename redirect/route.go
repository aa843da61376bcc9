package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
)

// steeringRoute is the local route that makes a steering range deliverable in a pod's netns and gives its connections
// the pod's address as source. All functions here act on the netns of the calling thread.
func steeringRoute(source netip.Addr) (*netlink.Route, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find lo: %w", err)
	}
	steer, scope := names.SteerIPv4, netlink.SCOPE_HOST
	if source.Is6() {
		steer, scope = names.SteerIPv6, netlink.SCOPE_UNIVERSE
	}
	return &netlink.Route{
		LinkIndex: lo.Attrs().Index,
		Table:     unix.RT_TABLE_LOCAL,
		Type:      unix.RTN_LOCAL,
		Scope:     scope,
		Dst:       &net.IPNet{IP: steer.Addr().AsSlice(), Mask: net.CIDRMask(steer.Bits(), steer.Addr().BitLen())},
		Src:       source.AsSlice(),
	}, nil
}

func family(addr netip.Addr) int {
	if addr.Is6() {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// dumps is how often a list is asked for that changes while the kernel writes it.
const dumps = 10

// whole asks the kernel for a list until nothing changed while it was written: else entries may be missing from it.
func whole[T any](list func() (T, error)) (all T, err error) {
	for range dumps {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// steeringRoutes lists the routes to the steering range of source's family.
func steeringRoutes(want *netlink.Route, source netip.Addr) ([]netlink.Route, error) {
	all, err := whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family(source), &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: want.Dst}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes to %s: %w", want.Dst, err)
	}
	return all, nil
}

func hasSteeringRoute(source netip.Addr) (bool, error) {
	want, err := steeringRoute(source)
	if err != nil {
		return false, err
	}
	routes, err := steeringRoutes(want, source)
	return len(routes) == 1 && routes[0].Src.Equal(want.Src) && routes[0].LinkIndex == want.LinkIndex, err
}

func addSteeringRoute(source netip.Addr) error {
	if right, err := hasSteeringRoute(source); right || err != nil {
		return err
	}
	if err := deleteSteeringRoute(source); err != nil {
		return err
	}
	route, err := steeringRoute(source)
	if err != nil {
		return err
	}
	if err := netlink.RouteAdd(route); err != nil {
		return fmt.Errorf("add local route to %s from %s (is the address in this namespace, and lo up?): %w", route.Dst, source, err)
	}
	return nil
}

// deleteSteeringRoute removes every route to the range; none is no error.
func deleteSteeringRoute(source netip.Addr) error {
	want, err := steeringRoute(source)
	if err != nil {
		return err
	}
	routes, err := steeringRoutes(want, source)
	if err != nil {
		return err
	}
	for i := range routes {
		if err := netlink.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete local route to %s: %w", want.Dst, err)
		}
	}
	return nil
}

// localAddresses lists the non-loopback addresses of every interface.
func localAddresses() ([]netip.Addr, error) {
	list, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var addrs []netip.Addr
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok && !addr.Unmap().IsLoopback() {
			addrs = append(addrs, canonical(addr))
		}
	}
	return addrs, nil
}
