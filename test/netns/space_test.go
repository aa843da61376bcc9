package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// space is a network namespace that ends with the test.
type space struct {
	t    testing.TB
	path string
	file *os.File
}

var made atomic.Int32

// unique returns a name that nothing else of this run has.
func unique(name string) string { return fmt.Sprintf("%s-%d", name, made.Add(1)) }

func newSpace(t testing.TB, name string) *space {
	t.Helper()
	path := filepath.Join(scratch, "netns", unique(name))
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
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
		t.Fatal("make network namespace:", err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	s := &space{t: t, path: path, file: file}
	t.Cleanup(s.destroy)
	s.must(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return s
}

func (s *space) destroy() {
	s.file.Close()
	_ = unix.Unmount(s.path, unix.MNT_DETACH)
	_ = os.Remove(s.path)
}

// run calls f on a thread in the namespace.
func (s *space) run(f func() error) error { return inside(int(s.file.Fd()), f) }

func inside(fd int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func (s *space) must(f func() error) {
	s.t.Helper()
	if err := s.run(f); err != nil {
		s.t.Fatal(err)
	}
}

func (s *space) sysctl(name, value string) {
	s.t.Helper()
	s.must(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
}

func (s *space) readSysctl(name string) string {
	s.t.Helper()
	var value string
	s.must(func() error {
		b, err := os.ReadFile("/proc/sys/net/" + name)
		value = strings.TrimSpace(string(b))
		return err
	})
	return value
}

// cookiesReceived counts the connections that a SYN cookie opened in the namespace.
func (s *space) cookiesReceived() int {
	s.t.Helper()
	var lines [][]string
	s.must(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "TcpExt:") {
				lines = append(lines, strings.Fields(line))
			}
		}
		return err
	})
	for i, name := range lines[0] {
		if name == "SyncookiesRecv" {
			n, err := strconv.Atoi(lines[1][i])
			if err != nil {
				s.t.Fatal(err)
			}
			return n
		}
	}
	s.t.Fatal("the kernel does not count SYN cookies")
	return 0
}

// snmp6 reads one of the namespace's IPv6 counters.
func (s *space) snmp6(name string) (n int) {
	s.t.Helper()
	s.must(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/snmp6")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if fields := strings.Fields(line); fields[0] == name {
				n, err = strconv.Atoi(fields[1])
				return err
			}
		}
		return fmt.Errorf("the kernel does not count %s", name)
	})
	return n
}

func (s *space) inode() uint64 {
	var stat unix.Stat_t
	if err := unix.Fstat(int(s.file.Fd()), &stat); err != nil {
		s.t.Fatal(err)
	}
	return stat.Ino
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
	if addr.IP.To4() != nil {
		return nil
	}
	// The kernel adds the local route of an IPv6 address later, by a worker. Until then packets for it leave by the link.
	local := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: &net.IPNet{IP: addr.IP, Mask: net.CIDRMask(128, 128)}}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, local, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		if err == nil && len(routes) > 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for the local route of %s: %w", prefix, errors.Join(err, os.ErrDeadlineExceeded))
		}
	}
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

// wire joins two namespaces by a veth pair and runs the functions on the ends, which are up.
func wire(t testing.TB, a, b *space, aName, bName string, onA, onB func(netlink.Link) error) {
	t.Helper()
	a.must(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName, PeerNamespace: netlink.NsFd(int(b.file.Fd()))})
	})
	for _, end := range []struct {
		space *space
		name  string
		f     func(netlink.Link) error
	}{{b, bName, onB}, {a, aName, onA}} {
		end.space.sysctl("ipv6/conf/"+end.name+"/accept_dad", "0")
		end.space.must(func() error {
			link, err := netlink.LinkByName(end.name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(link); err != nil {
				return err
			}
			return nil
		})
	}
	for _, end := range []struct {
		space *space
		name  string
		f     func(netlink.Link) error
	}{{b, bName, onB}, {a, aName, onA}} {
		end.space.must(func() error {
			link, err := netlink.LinkByName(end.name)
			if err != nil {
				return err
			}
			return end.f(link)
		})
	}
}
