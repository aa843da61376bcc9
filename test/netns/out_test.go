package netns

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

const (
	podIPv4, podIPv6           = "10.99.1.2", "fd99::1:2"
	peerIPv4, peerIPv6         = "10.99.1.3", "fd99::1:3"
	strangerIPv4, strangerIPv6 = "10.99.9.9", "fd99::9:9"
)

// capturing makes a world with services and one captured pod.
func capturing(t *testing.T, settings ...func(*redirect.Config)) (*world, *pod) {
	t.Helper()
	w := newWorld(t, settings...)
	w.services()
	return w, w.enrolled("a", podIPv4, podIPv6)
}

// reaches dials and fails unless Envoy accepts with the destination and the app sees what it dialled.
func (p *pod) reaches(t *testing.T, to string, options ...option) (*stream, greeting) {
	t.Helper()
	st, g, err := p.greeted(to, options...)
	wantOut(t, g, err, to)
	if got := st.peer(); unmap(got).String() != to {
		t.Errorf("dialled %s: getpeername says %s", to, got)
	}
	return st, g
}

func outReachesEnvoy(t *testing.T) {
	_, p := capturing(t)
	for to, source := range map[string]string{serviceIPv4: podIPv4, otherIPv4: podIPv4, autoIPv4: podIPv4, serviceIPv6: podIPv6, otherIPv6: podIPv6} {
		st, g := p.reaches(t, to)
		if got := st.local().Addr().String(); got != source {
			t.Errorf("dialled %s: the app's own address is %s, not the pod's", to, got)
		}
		if got := g.Peer.Addr().Unmap().String(); got != source {
			t.Errorf("dialled %s: Envoy sees %s, not the pod's address", to, got)
		}
		if err := st.write("hello\n"); err != nil {
			t.Fatal(err)
		}
		if line, err := st.readLine(); err != nil || line != "hello" {
			t.Errorf("dialled %s: echo is %q, %v", to, line, err)
		}
	}
}

func outMapped(t *testing.T) {
	_, p := capturing(t)
	st, err := p.socket(unix.AF_INET6, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	if err := st.connect(serviceIPv4); err != nil {
		t.Fatal(err)
	}
	g, err := st.greeting()
	wantOut(t, g, err, serviceIPv4)
	if got := st.peer().String(); got != "[::ffff:10.96.0.1]:80" {
		t.Errorf("getpeername says %s", got)
	}
}

func outIPv6Only(t *testing.T) {
	w := newWorld(t)
	w.services()
	p := w.enrolled("six", "", podIPv6)
	p.reaches(t, serviceIPv6)
	p.reaches(t, serviceIPv6, intOption(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
	if _, err := p.dial(serviceIPv4); err == nil {
		t.Error("a pod without IPv4 reached an IPv4 service")
	}
}

func outIPv4Only(t *testing.T) {
	w := newWorld(t)
	w.services()
	p := w.enrolled("four", podIPv4, "")
	p.reaches(t, serviceIPv4)
	_, err := p.dial(serviceIPv6)
	wantErrno(t, err, unix.ENETUNREACH, "dial an IPv6 service without IPv6")
}

func outLoopbackWithoutAddress(t *testing.T) {
	w := newWorld(t)
	w.services()
	p := w.pod("a", podIPv4, podIPv6)
	p.must(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.AddrDel(lo, &netlink.Addr{IPNet: ipNet("::1/128")})
	})
	w.enrol(p)
	p.reaches(t, serviceIPv4)
	p.reaches(t, serviceIPv6)
}

func outLoopbackWithoutIPv6(t *testing.T) {
	w := newWorld(t)
	w.services()
	p := w.pod("a", podIPv4, podIPv6)
	p.sysctl("ipv6/conf/lo/disable_ipv6", "1")
	w.enrol(p)
	st, _ := p.reaches(t, serviceIPv6)
	st.reset()
	p.reset()
	w.withdrawn(p)
	if got := p.readSysctl("ipv6/conf/lo/disable_ipv6"); got != "1" {
		t.Errorf("after Withdraw lo.disable_ipv6 is %s", got)
	}
}

func outFastOpen(t *testing.T) {
	_, p := capturing(t)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		at := netip.MustParseAddrPort(to)
		for _, onSYN := range []bool{false, true} { // the first time teaches the client the cookie
			wantEarly(t, onSYN, uninterrupted(t, "MSG_FASTOPEN", func() (*stream, error) {
				st, err := p.socket(domainOf(at), 0)
				if err != nil {
					return nil, err
				}
				return st, unix.Sendto(st.fd, []byte("early\n"), unix.MSG_FASTOPEN, sockaddr(at, false))
			}), to)
			wantEarly(t, true, uninterrupted(t, "TCP_FASTOPEN_CONNECT", func() (*stream, error) {
				st, err := p.dial(to, intOption(unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1))
				if err != nil {
					return nil, err
				}
				return st, st.write("early\n")
			}), to)
		}
	}
}

// uninterrupted sends on a new socket that connects by it, which blocks until the handshake ends. A signal of Go's
// scheduler in between leaves open what became of the data: then another socket begins anew.
func uninterrupted(t *testing.T, what string, send func() (*stream, error)) *stream {
	t.Helper()
	for {
		st, err := send()
		switch {
		case err == nil:
			return st
		case !errors.Is(err, unix.EINTR):
			t.Fatalf("%s: %v", what, err)
		case st != nil:
			st.close()
		}
	}
}

// wantEarly fails unless what was sent reached Envoy, with the SYN itself if onSYN.
func wantEarly(t *testing.T, onSYN bool, st *stream, to string) {
	t.Helper()
	defer st.close()
	info, err := unix.GetsockoptTCPInfo(st.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	const synData = 32 // TCPI_OPT_SYN_DATA: the SYN's data was acknowledged
	if err != nil || (info.Options&synData != 0) != onSYN {
		t.Errorf("dialled %s: the SYN's data was acknowledged: %t, want %t, %v", to, !onSYN, onSYN, err)
	}
	g, err := st.greeting()
	wantOut(t, g, err, to)
	if line, err := st.readLine(); err != nil || line != "early" {
		t.Errorf("dialled %s: echo is %q, %v", to, line, err)
	}
	if got := st.peer().String(); got != to {
		t.Errorf("dialled %s: getpeername says %s", to, got)
	}
}

const protocolMPTCP = 262

func outMultipath(t *testing.T) {
	w, p := capturing(t)
	if _, err := w.redirect.SetAddresses([]netip.Addr{netip.MustParseAddr(peerIPv4)}); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{serviceIPv4, serviceIPv6, peerIPv4 + ":8080"} {
		st, err := p.socket(domainOf(netip.MustParseAddrPort(to)), protocolMPTCP)
		if _, missing := os.Stat("/proc/sys/net/mptcp"); missing != nil {
			t.Skip("this kernel is built without MPTCP:", err)
		} else if err != nil {
			t.Fatal(err)
		}
		defer st.close()
		if err := st.connect(to); err != nil {
			t.Fatal(err)
		}
		g, err := st.greeting()
		wantOut(t, g, err, to)
		want := to
		if strings.HasPrefix(to, peerIPv4) {
			want = peerIPv4 + ":0" // a pod's address dialled by MPTCP: the port is not known
		}
		if got := st.peer().String(); got != want {
			t.Errorf("dialled %s: getpeername says %s, want %s", to, got, want)
		}
	}
	st, err := p.socket(unix.AF_INET, protocolMPTCP)
	if err != nil {
		t.Fatal(err)
	}
	wantErrno(t, st.connectOrClose("127.0.0.1:15006"), unix.EPERM, "dial a proxy port by MPTCP")
}

func outNonBlocking(t *testing.T) {
	_, p := capturing(t)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		at := netip.MustParseAddrPort(to)
		st, err := p.socket(domainOf(at), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer st.close()
		if err := unix.SetNonblock(st.fd, true); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(st.fd, sockaddr(at, false)); err != unix.EINPROGRESS {
			t.Errorf("first connect: %v, want EINPROGRESS", err)
		}
		if err := st.waitConnected(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(st.fd, sockaddr(at, false)); err != nil {
			t.Errorf("second connect, which reports success: %v", err)
		}
		if err := unix.Connect(st.fd, sockaddr(at, false)); err != unix.EISCONN {
			t.Errorf("third connect: %v, want EISCONN", err)
		}
		if err := unix.SetNonblock(st.fd, false); err != nil {
			t.Fatal(err)
		}
		g, err := st.greeting()
		wantOut(t, g, err, to)
		if got := st.peer().String(); got != to {
			t.Errorf("getpeername says %s", got)
		}
	}
}

func outAfterRefusal(t *testing.T) {
	w, p := capturing(t)
	for first, then := range map[string]string{"10.96.0.1:80": otherIPv4, "[fd10::1]:80": otherIPv6} {
		st, err := p.socket(domainOf(netip.MustParseAddrPort(first)), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer st.close()
		w.unlisten(w.envoy, p, 0)
		wantErrno(t, st.connect(first), unix.ECONNREFUSED, "dial "+first+" without Envoy")
		w.listen(w.envoy, p, 0)
		if err := st.connect(then); err != nil {
			t.Fatal(err)
		}
		g, err := st.greeting()
		wantOut(t, g, err, then)
		if got := st.peer().String(); got != then {
			t.Errorf("dialled %s: getpeername says %s", then, got)
		}
	}
}

func outUnspec(t *testing.T) {
	w, p := capturing(t)
	p.serve("loopback", 8080)
	for _, c := range []struct{ first, then, loopback string }{
		{serviceIPv4, otherIPv4, "127.0.0.1:8080"}, {serviceIPv6, otherIPv6, "[::1]:8080"},
	} {
		st, err := p.socket(domainOf(netip.MustParseAddrPort(c.first)), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer st.close()
		for _, to := range []string{c.first, c.then} {
			if err := st.connect(to); err != nil {
				t.Fatal(err)
			}
			g, err := st.greeting()
			wantOut(t, g, err, to)
			if got := st.peer().String(); got != to {
				t.Errorf("dialled %s: getpeername says %s", to, got)
			}
			if err := st.unconnect(); err != nil {
				t.Fatal("connect to AF_UNSPEC:", err)
			}
			if got := st.peer(); got.IsValid() {
				t.Errorf("unconnected: getpeername says %s", got)
			}
		}
		if err := st.connect(c.loopback); err != nil {
			t.Fatal(err)
		}
		if g, err := st.greeting(); err != nil || g.By != "loopback" {
			t.Errorf("loopback after a service: greeted by %q, %v", g.By, err)
		}
		if got := st.peer().String(); got != c.loopback {
			t.Errorf("loopback after a service: getpeername says %s", got)
		}
	}
	w.settled(p)
}

func outOneSourcePort(t *testing.T) {
	_, p := capturing(t)
	for _, c := range []struct{ from, to, and string }{
		{"0.0.0.0:5555", serviceIPv4, otherIPv4}, {podIPv4 + ":5556", serviceIPv4, otherIPv4},
		{"[::]:5557", serviceIPv6, otherIPv6}, {"[" + podIPv6 + "]:5558", serviceIPv6, otherIPv6},
	} {
		first, _ := p.reaches(t, c.to, bound(c.from))
		second, _ := p.reaches(t, c.and, bound(c.from))
		if first.local() != second.local() {
			t.Errorf("bound to %s: local addresses are %s and %s", c.from, first.local(), second.local())
		}
	}
}

func outSourceAddress(t *testing.T) {
	_, p := capturing(t)
	p.must(func() error {
		link := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "second"}}
		if err := netlink.LinkAdd(link); err != nil {
			// A kernel without the dummy module: lo does as well.
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return address(lo, "10.77.0.1/32")
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		return address(link, "10.77.0.1/24")
	})
	st, _ := p.reaches(t, serviceIPv4, bound("10.77.0.1:0"))
	if got := st.local().Addr().String(); got != "10.77.0.1" {
		t.Errorf("the app's own address is %s", got)
	}
	p.reaches(t, serviceIPv4, bound(podIPv4+":0"))
	p.reaches(t, serviceIPv6, bound("["+podIPv6+"]:0"))
}

func outDevice(t *testing.T) {
	w, p := capturing(t)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		w.counts("out_device_cleared", func() { p.reaches(t, to, toDevice("eth0")) })
	}
}

func outUntouched(t *testing.T) {
	w, p := capturing(t)
	stranger := w.pod("x", strangerIPv4, strangerIPv6)
	stranger.serve("stranger", 80)
	for _, to := range []string{strangerIPv4 + ":80", "[" + strangerIPv6 + "]:80"} {
		st, g, err := p.greeted(to)
		if err != nil || g.By != "stranger" || st.peer().String() != to {
			t.Errorf("dialled %s: greeted by %q, %v", to, g.By, err)
		}
	}
	// A service address at another port is no service.
	if _, err := p.dial("127.64.0.1:80"); errorName(err) != "ECONNREFUSED" {
		t.Errorf("the app's own loopback in the steering range: %v", err)
	}
}

func outUDP(t *testing.T) {
	_, p := capturing(t)
	p.must(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, sockaddr(netip.MustParseAddrPort(serviceIPv4), false)); err != nil {
			return err
		}
		sa, err := unix.Getpeername(fd)
		if err == nil && addrPort(sa).String() != serviceIPv4 {
			t.Errorf("getpeername says %s", addrPort(sa))
		}
		return err
	})
}

func outPodAddress(t *testing.T) {
	w, p := capturing(t)
	refused, err := w.redirect.SetAddresses([]netip.Addr{netip.MustParseAddr(peerIPv4), netip.MustParseAddr(peerIPv6)})
	if err != nil || len(refused) > 0 {
		t.Fatal(refused, err)
	}
	for _, to := range []string{peerIPv4 + ":8080", peerIPv4 + ":9090", "[" + peerIPv6 + "]:8080"} {
		if _, g := p.reaches(t, to); g.Local.Port() != names.PortOutPod {
			t.Errorf("dialled %s: steered to port %d", to, g.Local.Port())
		}
	}
	if _, err := w.redirect.SetAddresses(nil); err != nil {
		t.Fatal(err)
	}
	peer := w.pod("b", peerIPv4, peerIPv6)
	peer.serve("peer", 8080)
	if _, g, err := p.greeted(peerIPv4 + ":8080"); err != nil || g.By != "peer" {
		t.Errorf("after the pod left the mesh: greeted by %q, %v", g.By, err)
	}
}

func outClass(t *testing.T) {
	w, p := capturing(t)
	for to, port := range map[string]uint16{serviceIPv4: names.PortOutHTTP, otherIPv4: names.PortOutTCP, autoIPv4: names.PortOutAuto} {
		if _, g := p.reaches(t, to); g.Local.Port() != port || !names.SteerIPv4.Contains(g.Local.Addr().Unmap()) {
			t.Errorf("dialled %s: steered to %s, want port %d", to, g.Local, port)
		}
	}
	before, g := p.reaches(t, serviceIPv4)
	if _, err := w.redirect.SetServices([]redirect.Service{{Addr: netip.MustParseAddrPort(serviceIPv4), Class: redirect.ClassTCP}}); err != nil {
		t.Fatal(err)
	}
	_, after := p.reaches(t, serviceIPv4)
	if after.Local.Port() != names.PortOutTCP || after.Local.Addr() != g.Local.Addr() {
		t.Errorf("after the class changed: steered to %s, before to %s", after.Local, g.Local)
	}
	if err := before.write("still\n"); err != nil {
		t.Error("the connection of before:", err)
	}
}

func outNoListener(t *testing.T) {
	w, p := capturing(t)
	w.unlisten(w.envoy, p, 0)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		w.counts("drop_no_listener", func() {
			_, err := p.dial(to)
			wantErrno(t, err, unix.ECONNREFUSED, "dial "+to)
		})
	}
}

// outAbandoned is inAbandoned for what the pod dials.
func outAbandoned(t *testing.T) {
	w, p := capturing(t)
	server := w.pod("y", "10.96.0.1", "fd10::1") // the service's address is a plain server's too
	server.serve("plain", 80)
	w.ok(w.redirect.Alive())
	w.silent()
	for _, to := range []string{serviceIPv4, serviceIPv6} { // Envoy serves all the same
		if _, g := p.reaches(t, to); g.By == "plain" {
			t.Errorf("dialled %s: not captured, though Envoy listens", to)
		}
	}
	w.unlisten(w.envoy, p, 0)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		w.counts("out_plain", func() {
			if st, g, err := p.greeted(to); err != nil || g.By != "plain" || st.peer().String() != to {
				t.Errorf("dialled %s: greeted by %q, %v", to, g.By, err)
			}
		})
	}
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		_, err := p.dial(to)
		wantErrno(t, err, unix.ECONNREFUSED, "dial "+to+" from a Strict pod")
	}
}

func outForeignNetns(t *testing.T) {
	w, _ := capturing(t)
	stranger := w.pod("x", strangerIPv4, strangerIPv6)
	server := w.pod("y", "10.96.0.1", "fd10::1") // a service's address, here a plain server
	server.serve("plain", 80)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		if st, g, err := stranger.greeted(to); err != nil || g.By != "plain" || st.peer().String() != to {
			t.Errorf("dialled %s: greeted by %q, %v", to, g.By, err)
		}
	}
	if st, err := stranger.socket(unix.AF_INET, 0, bound("0.0.0.0:15006")); err != nil {
		t.Error("bind a proxy port where no Envoy is:", err)
	} else {
		st.close()
	}
	if _, err := os.Stat(w.pins); err != nil {
		t.Error(err)
	}
}
