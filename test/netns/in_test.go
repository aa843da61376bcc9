package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

// serving makes a world with a captured pod, whose app "app" listens on 8080 and 9090, and a pod outside the mesh.
func serving(t *testing.T, settings ...func(*redirect.Config)) (*world, *pod, *pod) {
	t.Helper()
	w, p := capturing(t, settings...)
	p.serve("app", 8080)
	p.serve("app", 9090)
	return w, p, w.pod("x", strangerIPv4, strangerIPv6)
}

var appAddresses = []string{podIPv4 + ":8080", "[" + podIPv6 + "]:8080"}

// relayed fails unless dialling reaches Envoy's inbound listener and by its local leg the app. The client speaks first.
func relayed(t *testing.T, from *pod, to string) {
	t.Helper()
	st, err := from.dial(to)
	if err != nil {
		t.Errorf("dial %s: %v", to, err)
		return
	}
	defer st.close()
	if err := st.write("relay\n"); err != nil {
		t.Error(err)
	}
	g, err := st.greeting()
	if err != nil || g.By != "in" || g.Original.String() != to {
		t.Errorf("dialled %s: accepted by %q for %s, %v", to, g.By, g.Original, err)
		return
	}
	app, err := st.greeting()
	if err != nil || app.By != "app" || unmap(app.Local).String() != to {
		t.Errorf("relayed to %s: greeted by %q at %s, %v", to, app.By, app.Local, err)
	}
	if got, want := unmap(app.Peer).Addr(), st.local().Addr(); got != want || app.Accepted != app.Peer {
		t.Errorf("relayed to %s: the app sees %s, at accept %s, not %s", to, app.Peer, app.Accepted, want)
	}
}

// by dials and names who greets, or the error.
func (p *pod) by(to string, options ...option) string {
	_, g, err := p.greeted(to, options...)
	if err != nil {
		return errorName(err)
	}
	return g.By
}

func wantBy(t *testing.T, p *pod, to, want string, options ...option) {
	t.Helper()
	if got := p.by(to, options...); got != want {
		t.Errorf("dialled %s: %s, want %s", to, got, want)
	}
}

func inReachesEnvoy(t *testing.T) {
	w, p, stranger := serving(t)
	peer := w.enrolled("b", peerIPv4, peerIPv6)
	for _, to := range appAddresses {
		relayed(t, stranger, to)
		relayed(t, peer, to)
		relayed(t, p, to) // the pod's own address too: no address exempts
	}
	wantBy(t, stranger, podIPv4+":7070", "in") // Envoy decides about ports without an app
	wantBy(t, p, "127.0.0.1:8080", "app")
	wantBy(t, p, "[::1]:8080", "app")
	if w.counter("local_leg") != 6 {
		t.Errorf("%d local legs, want 6", w.counter("local_leg"))
	}
}

func inEveryAddress(t *testing.T) {
	w, p, stranger := serving(t)
	wire(t, p.space, stranger.space, "second", "second", func(l netlink.Link) error {
		return errors.Join(address(l, "10.77.0.1/24"), address(l, "fd66::1/64"))
	}, func(l netlink.Link) error {
		return errors.Join(address(l, "10.77.0.9/24"), address(l, "fd66::9/64"))
	})
	for range 2 { // the second time after Enrol took the new addresses in
		for _, to := range []string{"10.77.0.1:8080", "[fd66::1]:8080"} {
			wantBy(t, stranger, to, "in")
		}
		linkLocal := ""
		eventually(t, "a link-local address", func() error { // the kernel gives it once it has noticed the carrier
			return p.run(func() error {
				link, err := netlink.LinkByName("second")
				if err != nil {
					return err
				}
				addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
				for _, a := range addrs {
					if a.IP.IsLinkLocalUnicast() {
						linkLocal = a.IP.String()
						return nil
					}
				}
				return errors.Join(err, errors.New("there is none"))
			})
		})
		stranger.must(func() error {
			link, err := net.InterfaceByName("second")
			if err == nil {
				linkLocal = fmt.Sprintf("[%s%%%d]:8080", linkLocal, link.Index)
			}
			return err
		})
		wantBy(t, stranger, linkLocal, "in")
		w.ok(w.redirect.Enrol(p.description()))
	}
	relayed(t, stranger, "10.77.0.1:8080")
	relayed(t, stranger, "[fd66::1]:8080")
}

func inSynCookies(t *testing.T) {
	w, p, stranger := serving(t)
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
	p.sysctl("ipv4/tcp_syncookies", "2")
	before := p.cookiesReceived()
	for range 5 {
		for _, to := range appAddresses {
			relayed(t, stranger, to)
		}
	}
	if n := p.cookiesReceived() - before; n != 20 { // the local legs' too
		t.Errorf("%d connections came by a SYN cookie, not 20", n)
	}
	w.envoy.must(order{Do: "unlisten", Netns: p.path, Port: names.PortIn})
	w.envoy.must(order{Do: "listen", Netns: p.path, Port: names.PortIn, By: "in", Backlog: 1, Deaf: true})
	for range 6 {
		st, err := stranger.socket(unix.AF_INET, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer st.close()
		if err := errors.Join(unix.SetNonblock(st.fd, true), ignore(unix.Connect(st.fd, sockaddr(netip.MustParseAddrPort(appAddresses[0]), false)), unix.EINPROGRESS)); err != nil {
			t.Fatal(err)
		}
	}
	w.envoy.must(order{Do: "accept", Netns: p.path, Port: names.PortIn})
	// The six compete for the two places, and a cookie that finds none is forgotten: only a client that speaks is heard later.
	relayed(t, stranger, appAddresses[0])
}

func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}

func inStrictWithoutEnvoy(t *testing.T) {
	w, p, stranger := serving(t)
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
	w.unlisten(w.envoy, p, 0)
	for _, to := range appAddresses {
		w.counts("drop_no_listener", func() { wantBy(t, stranger, to, "ECONNREFUSED") })
		wantBy(t, p, to, "ECONNREFUSED")
	}
	wantBy(t, p, "127.0.0.1:8080", "app")
}

func inPermissiveWithoutEnvoy(t *testing.T) {
	w, p, stranger := serving(t)
	peer := w.pod("b", peerIPv4, peerIPv6)
	if _, err := w.redirect.SetAddresses(peer.addresses); err != nil {
		t.Fatal(err)
	}
	w.unlisten(w.envoy, p, 0)
	for _, to := range appAddresses {
		w.counts("in_plain", func() { wantBy(t, stranger, to, "app") })
		wantBy(t, peer, to, "ECONNREFUSED")
	}
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
	wantBy(t, stranger, appAddresses[0], "ECONNREFUSED")
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{}))
	wantBy(t, stranger, appAddresses[0], "app")
}

// inAbandoned: weft is gone from the node, agent and Envoys, and was not told to go.
func inAbandoned(t *testing.T) {
	w, p, stranger := serving(t)
	peer := w.pod("b", peerIPv4, peerIPv6)
	if _, err := w.redirect.SetAddresses(peer.addresses); err != nil {
		t.Fatal(err)
	}
	w.ok(w.redirect.Alive())
	for _, to := range appAddresses {
		wantBy(t, peer, to, "in")
	}
	w.unlisten(w.envoy, p, 0)
	for _, to := range appAddresses {
		wantBy(t, peer, to, "ECONNREFUSED")
	}
	w.silent()
	for _, to := range appAddresses {
		w.counts("in_plain", func() { wantBy(t, peer, to, "app") })
	}
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
	for _, to := range appAddresses {
		w.counts("drop_no_listener", func() { wantBy(t, peer, to, "ECONNREFUSED") })
		wantBy(t, stranger, to, "ECONNREFUSED")
	}
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{}))
	w.ok(w.redirect.Alive()) // an agent is back
	wantBy(t, peer, appAddresses[0], "ECONNREFUSED")
}

func inServerFirst(t *testing.T) {
	w, p, stranger := serving(t)
	peer := w.pod("b", peerIPv4, peerIPv6)
	if _, err := w.redirect.SetAddresses(peer.addresses); err != nil {
		t.Fatal(err)
	}
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{ServerFirst: []uint16{9090}}))
	for to, want := range map[string]string{podIPv4 + ":9090": "in-first", "[" + podIPv6 + "]:9090": "in-first", podIPv4 + ":8080": "in"} {
		wantBy(t, stranger, to, want)
		wantBy(t, peer, to, "in")
	}
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{ServerFirst: []uint16{9090}, Strict: true}))
	wantBy(t, stranger, podIPv4+":9090", "in")
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{}))
	wantBy(t, stranger, podIPv4+":9090", "in")
}

func inProxyPortsDialled(t *testing.T) {
	w, p, stranger := serving(t)
	for _, port := range []uint16{names.PortFirst, names.PortOutHTTP, names.PortIn, names.PortInFirst, names.PortLast} {
		for _, host := range []string{podIPv4, podIPv6} {
			to := netip.AddrPortFrom(netip.MustParseAddr(host), port).String()
			w.counts("drop_proxy_port", func() { wantBy(t, stranger, to, "ECONNREFUSED") })
		}
		for _, host := range []string{"127.0.0.1", "127.5.0.1", "127.64.0.1", "0.0.0.0", podIPv4, "::1", "::", podIPv6, "fd77:5eed::1"} {
			to := netip.AddrPortFrom(netip.MustParseAddr(host), port).String()
			w.counts("refused_proxy_port", func() { wantBy(t, p, to, "EPERM") })
		}
	}
	st, err := p.socket(unix.AF_INET6, 0)
	if err != nil {
		t.Fatal(err)
	}
	wantErrno(t, st.connectOrClose("127.0.0.1:15006"), unix.EPERM, "dial a proxy port by a mapped address")
	wantBy(t, p, "127.0.0.1:15020", "ECONNREFUSED") // no proxy port: nothing listens
}

func inProxyPortsBound(t *testing.T) {
	w, p, _ := serving(t)
	bind := func(domain int, at string, options ...option) error {
		st, err := p.socket(domain, 0, append(options, bound(at))...)
		if err == nil {
			defer st.close()
			err = unix.Listen(st.fd, 1)
		}
		return err
	}
	reuse := intOption(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	for _, port := range []uint16{names.PortIn, names.PortFirst, names.PortLast} {
		for _, host := range []string{"0.0.0.0", "127.0.0.1", podIPv4, "::", "::1", podIPv6} {
			at := netip.AddrPortFrom(netip.MustParseAddr(host), port)
			w.counts("refused_bind", func() { wantErrno(t, bind(domainOf(at), at.String(), reuse), unix.EPERM, "bind "+at.String()) })
		}
		wantErrno(t, bind(unix.AF_INET6, fmt.Sprintf("127.0.0.1:%d", port), reuse), unix.EPERM, "bind a mapped address")
	}
	for _, at := range []string{"0.0.0.0:14999", "[::]:15020"} {
		if err := bind(domainOf(netip.MustParseAddrPort(at)), at); err != nil {
			t.Errorf("bind %s: %v", at, err)
		}
	}
	// Ports that the kernel chooses: none is left.
	p.sysctl("ipv4/ip_local_port_range", "15000 15019")
	defer p.sysctl("ipv4/ip_local_port_range", "32768 60999")
	if err := bind(unix.AF_INET, "127.9.9.9:0"); err == nil {
		t.Error("the kernel chose a proxy port for bind")
	}
	st, err := p.socket(unix.AF_INET, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer st.close()
	if err := unix.Listen(st.fd, 1); err == nil {
		t.Errorf("the kernel chose proxy port %s for listen", st.local())
	}
	p.must(func() error { // datagrams are none of ours
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Bind(fd, &unix.SockaddrInet4{Port: names.PortIn})
	})
}

func inSteeringAddresses(t *testing.T) {
	w, p, stranger := serving(t)
	wantBy(t, p, "[fd77:5eed::1]:8080", "ECONNREFUSED")
	wantBy(t, p, "127.64.0.1:8080", "app") // the app's own loopback, as before
	// From outside: the node routes the range to the pod.
	w.node.must(func() error {
		link, err := netlink.LinkByName("va")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet("fd77:5eed::/64"), Gw: net.ParseIP(podIPv6), Flags: int(netlink.FLAG_ONLINK)})
	})
	for _, port := range []uint16{8080, names.PortOutHTTP} {
		w.counts("drop_no_handover", func() { wantBy(t, stranger, fmt.Sprintf("[fd77:5eed::1]:%d", port), "ECONNREFUSED") })
	}
}

func inTags(t *testing.T) {
	w, p, stranger := serving(t)
	stranger.serve("stranger", 8080)
	const none, local, outbound = 0, names.TagLocalLeg, names.TagOutboundLeg
	for _, c := range []struct {
		from *space
		to   string
		tag  int
		want string
	}{
		{p.space, podIPv4 + ":8080", local, "app"},
		{p.space, "[" + podIPv6 + "]:8080", local, "app"},
		{p.space, podIPv4 + ":8080", none, "EPERM"}, // it would come back for ever
		{p.space, "[" + podIPv6 + "]:8080", none, "EPERM"},
		{p.space, podIPv4 + ":8080", outbound, "in"},
		{p.space, "[" + podIPv6 + "]:8080", outbound, "in"},
		{p.space, strangerIPv4 + ":8080", local, "EPERM"},
		{p.space, strangerIPv4 + ":8080", outbound, "stranger"},
		{p.space, strangerIPv4 + ":8080", none, "stranger"},
		{p.space, "127.0.0.1:8080", local, "EPERM"},
		{p.space, "127.0.0.1:8080", outbound, "EPERM"},
		{p.space, "127.0.0.1:8080", none, "EPERM"},
		{p.space, "[::1]:8080", outbound, "EPERM"},
		{p.space, "[fd77:5eed::1]:8080", outbound, "EPERM"},
		{p.space, podIPv4 + ":15006", local, "EPERM"},
		{p.space, podIPv4 + ":15006", outbound, "EPERM"},
		{p.space, serviceIPv4, outbound, "never captured"},
		{stranger.space, podIPv4 + ":8080", none, "EPERM"}, // not a pod of ours: nothing to reach from there
		{w.node, podIPv4 + ":8080", outbound, "EPERM"},
	} {
		if c.want == "never captured" {
			// No such host: what matters is that Envoy's own connection is not handed to Envoy.
			before := w.counter("out_captured")
			stranger.must(func() error {
				lo, err := netlink.LinkByName("lo")
				if err != nil {
					return err
				}
				return address(lo, "10.96.0.1/32")
			})
			w.node.must(func() error {
				link, err := netlink.LinkByName("vx")
				if err != nil {
					return err
				}
				return route(link, "10.96.0.1/32", "")
			})
			stranger.serve("stranger", 80)
			if r := w.envoy.dial(c.from, c.to, c.tag); r.Greeting.By != "stranger" || w.counter("out_captured") != before {
				t.Errorf("Envoy dialled a service: greeted by %q (%s)", r.Greeting.By, r.Error)
			}
			continue
		}
		r := w.envoy.dial(c.from, c.to, c.tag)
		got := r.Greeting.By
		if r.Error != "" {
			got = r.Error
		}
		if got != c.want {
			t.Errorf("Envoy dialled %s with tag %d: %s, want %s", c.to, c.tag, got, c.want)
		}
	}
	_, err := p.socket(unix.AF_INET, 0, tagged(local)...)
	wantErrno(t, err, unix.ENOPROTOOPT, "an app sets the tag")
	st, g, err := stranger.greeted(podIPv4 + ":8080")
	if err != nil || g.By != "in" {
		t.Fatal(g.By, err)
	}
	_, err = originalDestination(st.fd, st.local())
	if err == nil {
		t.Error("an app was told an original destination")
	}
}
