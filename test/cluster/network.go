package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The control plane's network namespace holds a bridge that joins all nodes; a veth pair joins the machine to it. The
// namespaces belong to their machine's pid 1 alone, so links and routes go when it ends.
const (
	bridgeName = "br0"
	uplinkName = "host0" // the control plane's end of the pair to the machine
	nodeLink   = "eth0"  // a node's end of its pair to the bridge
)

// aliasPrefix begins the alias of the machine's link; the clone's path follows. The alias tells any other clone whose
// cluster runs, even if its files are gone.
const aliasPrefix = "weft cluster of "

// connectControlPlane lays the bridge, joins the machine to it and routes the pods' ranges, there and here.
func (c Config) connectControlPlane(pid int) error {
	inside, closeInside, err := handleAt(pid)
	if err != nil {
		return err
	}
	defer closeInside()
	if err := linkUp(inside, "lo"); err != nil {
		return err
	}
	v4, v6 := c.controlPlane()
	// A bridge without an address of its own takes the lowest of its ports: when that node goes, all others would ask for half
	// a minute where there is nobody any more.
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName, HardwareAddr: append(net.HardwareAddr{2, 0}, v4.AsSlice()...)}}
	if err := inside.LinkAdd(bridge); err != nil {
		return fmt.Errorf("make the bridge between the nodes: %w", err)
	}
	if err := c.addresses(inside, bridge, v4, v6); err != nil {
		return err
	}
	if err := c.connectMachine(inside, bridge, pid); err != nil {
		return err
	}
	return c.podRoutes(inside, bridge, 0)
}

// connectMachine joins the machine itself to the bridge.
func (c Config) connectMachine(inside *netlink.Handle, bridge netlink.Link, pid int) error {
	here, err := netlink.NewHandle()
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer here.Close()
	if old, err := here.LinkByName(c.linkName()); err == nil {
		_ = here.LinkDel(old)
	}
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: c.linkName()}, PeerName: uplinkName, PeerNamespace: netlink.NsPid(pid)}
	if err := here.LinkAdd(pair); err != nil {
		return fmt.Errorf("make the link into the cluster: %w", err)
	}
	if err := here.LinkSetAlias(pair, aliasPrefix+c.Dir); err != nil {
		return fmt.Errorf("name the link into the cluster: %w", err)
	}
	if err := attach(inside, uplinkName, bridge); err != nil {
		return err
	}
	v4, v6 := c.machine()
	if err := c.addresses(here, pair, v4, v6); err != nil {
		return err
	}
	return c.podRoutes(here, pair, 0)
}

// connectNode joins node n to the bridge. A pair left by the node's former life is removed first.
func (c Config) connectNode(n, controlPlanePID, pid int) error {
	middle, closeMiddle, err := handleAt(controlPlanePID)
	if err != nil {
		return err
	}
	defer closeMiddle()
	inside, closeInside, err := handleAt(pid)
	if err != nil {
		return err
	}
	defer closeInside()
	if old, err := middle.LinkByName(nodeName(n)); err == nil {
		_ = middle.LinkDel(old)
	}
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: nodeName(n)}, PeerName: nodeLink, PeerNamespace: netlink.NsPid(pid), PeerHardwareAddr: c.hardwareAddress(n)}
	if err := middle.LinkAdd(pair); err != nil {
		return fmt.Errorf("make the link of %s: %w", nodeName(n), err)
	}
	bridge, err := middle.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find the bridge between the nodes: %w", err)
	}
	if err := attach(middle, nodeName(n), bridge); err != nil {
		return err
	}
	if err := linkUp(inside, "lo"); err != nil {
		return err
	}
	link, err := inside.LinkByName(nodeLink)
	if err != nil {
		return fmt.Errorf("find %s of %s: %w", nodeLink, nodeName(n), err)
	}
	v4, v6 := c.node(n)
	if err := c.addresses(inside, link, v4, v6); err != nil {
		return err
	}
	gateway4, gateway6 := c.controlPlane()
	for destination, gateway := range map[string]netip.Addr{"0.0.0.0/0": gateway4, "::/0": gateway6} {
		if err := route(inside, link, netip.MustParsePrefix(destination), gateway); err != nil {
			return err
		}
	}
	return c.podRoutes(inside, link, n)
}

// hardwareAddress is the same before and after a reboot, as a real node's is: its neighbours have it in their caches.
func (c Config) hardwareAddress(n int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 'w', 'e', 'f', byte(c.Slot), byte(n)}
}

// podRoutes routes every node's pods to their node, except those of node self.
func (c Config) podRoutes(handle *netlink.Handle, link netlink.Link, self int) error {
	for n := 1; n <= c.Nodes; n++ {
		if n == self {
			continue
		}
		range4, range6 := c.podRange(n)
		node4, node6 := c.node(n)
		if err := route(handle, link, range4, node4); err != nil {
			return err
		}
		if err := route(handle, link, range6, node6); err != nil {
			return err
		}
	}
	return nil
}

func route(handle *netlink.Handle, link netlink.Link, destination netip.Prefix, gateway netip.Addr) error {
	err := handle.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(destination), Gw: gateway.AsSlice()})
	if err != nil {
		return fmt.Errorf("route %s via %s: %w", destination, gateway, err)
	}
	return nil
}

// addresses gives a link its addresses in the node network and sets it up. IPv6 is usable at once: no duplicate
// address detection.
func (c Config) addresses(handle *netlink.Handle, link netlink.Link, v4, v6 netip.Addr) error {
	net4, net6 := c.nodeNet()
	for _, address := range []netip.Prefix{netip.PrefixFrom(v4, net4.Bits()), netip.PrefixFrom(v6, net6.Bits())} {
		add := &netlink.Addr{IPNet: &net.IPNet{IP: address.Addr().AsSlice(), Mask: net.CIDRMask(address.Bits(), address.Addr().BitLen())}}
		if address.Addr().Is6() {
			add.Flags = unix.IFA_F_NODAD
		}
		if err := handle.AddrAdd(link, add); err != nil {
			return fmt.Errorf("add address %s to %s: %w", address, link.Attrs().Name, err)
		}
	}
	if err := handle.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", link.Attrs().Name, err)
	}
	return nil
}

func attach(handle *netlink.Handle, name string, bridge netlink.Link) error {
	link, err := handle.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := handle.LinkSetMaster(link, bridge); err != nil {
		return fmt.Errorf("attach %s to the bridge: %w", name, err)
	}
	return linkUp(handle, name)
}

func linkUp(handle *netlink.Handle, name string) error {
	link, err := handle.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := handle.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Masked().Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// handleAt opens netlink in the network namespace of a process.
func handleAt(pid int) (*netlink.Handle, func(), error) {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, nil, fmt.Errorf("open the network of process %d: %w", pid, err)
	}
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return nil, nil, fmt.Errorf("open netlink in the network of process %d: %w", pid, err)
	}
	return handle, func() { handle.Close(); ns.Close() }, nil
}

// disconnectMachine removes the machine's link into the cluster and waits until the kernel has removed it and its routes.
func (c Config) disconnectMachine(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := poll(ctx, func() (bool, error) {
		link, err := netlink.LinkByName(c.linkName())
		if isNotFound(err) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return false, err
		}
		return false, nil
	})
	if err != nil {
		return fmt.Errorf("remove link %s: %w", c.linkName(), err)
	}
	return nil
}

func isNotFound(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound)
}

// neighbour is another clone's cluster on this machine.
type neighbour struct {
	// Dir is the clone it was started from.
	Dir  string
	Link netlink.Link
}

// neighbours finds the clusters of other clones by their links' aliases.
func (c Config) neighbours() ([]neighbour, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the machine's links: %w", err)
	}
	var out []neighbour
	for _, link := range links {
		dir, ok := strings.CutPrefix(link.Attrs().Alias, aliasPrefix)
		if ok && dir != c.Dir {
			out = append(out, neighbour{Dir: dir, Link: link})
		}
	}
	return out, nil
}

// occupied finds routes of the machine that overlap the cluster's address ranges, apart from its own link's.
func (c Config) occupied() ([]string, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the machine's routes: %w", err)
	}
	node4, node6 := c.nodeNet()
	pod4, pod6 := c.podNet()
	service4, service6 := c.serviceNet()
	var out []string
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		address, ok := netip.AddrFromSlice(r.Dst.IP)
		bits, _ := r.Dst.Mask.Size()
		if !ok || bits == 0 {
			continue
		}
		link, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil || link.Attrs().Name == c.linkName() {
			continue
		}
		taken := netip.PrefixFrom(address.Unmap(), bits)
		for _, own := range []netip.Prefix{node4, node6, pod4, pod6, service4, service6} {
			if own.Overlaps(taken) {
				out = append(out, fmt.Sprintf("%s (by %s on link %s)", own, taken, link.Attrs().Name))
			}
		}
	}
	return out, nil
}
