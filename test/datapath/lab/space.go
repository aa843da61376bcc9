package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// space is a network namespace.
type space struct {
	path string
	file *os.File
}

func newSpace(dir, name string) (*space, error) {
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, err
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends in its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	s := &space{path: path, file: file}
	return s, s.run(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
}

// close lets the namespace go once nobody else is in it.
func (s *space) close() {
	s.file.Close()
	_ = unix.Unmount(s.path, unix.MNT_DETACH)
	_ = os.Remove(s.path)
}

// run calls f on a thread in the namespace.
func (s *space) run(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func (s *space) sysctl(name, value string) error {
	return s.run(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
}

// dial connects from inside the namespace.
func (s *space) dial(ctx context.Context, address string) (conn net.Conn, err error) {
	err = s.run(func() error {
		conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, "tcp", address)
		return err
	})
	return conn, err
}

// listen listens inside the namespace, on all addresses.
func (s *space) listen(port uint16) (listener net.Listener, err error) {
	err = s.run(func() error {
		listener, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		return err
	})
	return listener, err
}

func ipNet(prefix string) *net.IPNet {
	p := netip.MustParsePrefix(prefix)
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// address adds an address that is usable at once.
func address(link netlink.Link, prefix string) error {
	addr := &netlink.Addr{IPNet: ipNet(prefix)}
	if addr.IP.To4() == nil {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add address %s: %w", prefix, err)
	}
	return nil
}

func route(link netlink.Link, to, via string) error {
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(to)}
	if via != "" {
		r.Gw = net.ParseIP(via)
	} else if !strings.Contains(to, ":") {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := netlink.RouteAdd(r); err != nil {
		return fmt.Errorf("add route to %s: %w", to, err)
	}
	return nil
}

// end is one side of a cable: addresses to add and routes ("to" or "to via gateway").
type end struct {
	space     *space
	link      string
	addresses []string
	routes    [][2]string
}

// wire joins two namespaces by a veth pair.
func wire(a, b end) error {
	err := a.space.run(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: a.link}, PeerName: b.link, PeerNamespace: netlink.NsFd(int(b.space.file.Fd()))})
	})
	if err != nil {
		return fmt.Errorf("make cable %s: %w", a.link, err)
	}
	for _, e := range []end{a, b} {
		if err := e.space.sysctl("ipv6/conf/"+e.link+"/accept_dad", "0"); err != nil {
			return err
		}
		err := e.space.run(func() error {
			link, err := netlink.LinkByName(e.link)
			if err != nil {
				return err
			}
			return netlink.LinkSetUp(link)
		})
		if err != nil {
			return err
		}
	}
	for _, e := range []end{a, b} {
		err := e.space.run(func() error {
			link, err := netlink.LinkByName(e.link)
			if err != nil {
				return err
			}
			for _, prefix := range e.addresses {
				if err := address(link, prefix); err != nil {
					return err
				}
			}
			for _, r := range e.routes {
				if err := route(link, r[0], r[1]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
