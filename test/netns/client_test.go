package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

// relay reaches the app through Envoy and returns its greeting; the connection stays open until reset.
func (p *pod) relay(to string) (greeting, error) {
	st, _, err := p.greeted(to)
	if err != nil {
		return greeting{}, err
	}
	if err := st.write("relay\n"); err != nil {
		return greeting{}, err
	}
	return st.greeting()
}

// wantClient fails unless the app at to sees the client, by accept as by getpeername.
func wantClient(t *testing.T, from *pod, to, client string) {
	t.Helper()
	app, err := from.relay(to)
	if err != nil || app.By != "app" {
		t.Errorf("relayed to %s: greeted by %q, %v", to, app.By, err)
		return
	}
	if got := unmap(app.Peer).Addr().String(); got != client || app.Accepted != app.Peer {
		t.Errorf("relayed to %s: the app sees %s, at accept %s, not %s", to, app.Peer, app.Accepted, client)
	}
}

// serveIn is serve on one family's wildcard, or by MPTCP.
func (p *pod) serveIn(domain, protocol int, port uint16) {
	p.t.Helper()
	at := map[int]string{unix.AF_INET: "0.0.0.0", unix.AF_INET6: "::"}[domain]
	st, err := p.socket(domain, protocol, bound(netip.AddrPortFrom(netip.MustParseAddr(at), port).String()))
	if err == nil {
		err = unix.Listen(st.fd, 16)
	}
	if err != nil {
		p.t.Fatal("serve:", err)
	}
	l := &listener{order: order{By: "app", Netns: p.path, Port: port}, sockets: []int{st.fd}}
	l.accept()
	p.t.Cleanup(l.close)
}

func clientShown(t *testing.T) {
	w, p, stranger := serving(t)
	peer := w.enrolled("b", peerIPv4, peerIPv6)
	p.serveIn(unix.AF_INET, 0, 7001)
	p.serveIn(unix.AF_INET6, protocolMPTCP, 7002)
	for _, c := range []struct {
		from       *pod
		ipv4, ipv6 string
	}{{stranger, strangerIPv4, strangerIPv6}, {peer, peerIPv4, peerIPv6}, {p, podIPv4, podIPv6}} {
		for _, port := range []string{"8080", "7001", "7002"} {
			wantClient(t, c.from, podIPv4+":"+port, c.ipv4)
			if port != "7001" {
				wantClient(t, c.from, "["+podIPv6+"]:"+port, c.ipv6)
			}
		}
	}
	for _, host := range []string{"127.0.0.1", "[::1]"} { // not Envoy's: as ever
		_, g, err := p.greeted(host + ":8080")
		if err != nil || g.By != "app" || !unmap(g.Peer).Addr().IsLoopback() {
			t.Errorf("dialled %s: %q sees %s, %v", host, g.By, g.Peer, err)
		}
	}
	if n := w.counter("client_unknown"); n != 0 {
		t.Errorf("%d clients were not known", n)
	}
	if w.entries("handovers") != 0 {
		t.Errorf("%d hand-overs are left", w.entries("handovers"))
	}
	for _, from := range []*pod{stranger, peer, p} {
		from.reset()
	}
	w.noLegs(p)
}

// noLegs waits until the pod's count of local legs is zero.
func (w *world) noLegs(p *pod) {
	w.t.Helper()
	eventually(w.t, "no local leg", func() error {
		if n := w.legs(p); n != 0 {
			return fmt.Errorf("%d are open", n)
		}
		return nil
	})
}

func (w *world) legs(p *pod) (n uint64) {
	w.t.Helper()
	cookie, err := strconv.ParseUint(w.cookie(p), 10, 64)
	w.ok(err)
	w.ok(w.pinnedMap("legs").Lookup(cookie, &n))
	return n
}

func clientOwn(t *testing.T) {
	w, _, stranger := serving(t)
	both := func(ipv4, ipv6 string) {
		t.Helper()
		wantClient(t, stranger, appAddresses[0], ipv4)
		wantClient(t, stranger, appAddresses[1], ipv6)
	}
	both(strangerIPv4, strangerIPv6)
	w.ok(w.redirect.SetClientAddress(true))
	both(podIPv4, podIPv6)
	w.ok(w.redirect.Close())
	w.load() // an agent that starts, before it knows better
	both(podIPv4, podIPv6)
	w.ok(w.redirect.SetClientAddress(false))
	both(strangerIPv4, strangerIPv6)
}

func clientLegs(t *testing.T) {
	w, p, stranger := serving(t)
	peer := w.enrolled("b", peerIPv4, peerIPv6)
	for i, to := range appAddresses {
		legs := map[string]map[netip.AddrPort]bool{}
		for _, client := range []string{[]string{strangerIPv4, strangerIPv6}[i], []string{peerIPv4, peerIPv6}[i]} {
			legs[client] = map[netip.AddrPort]bool{}
			var from netip.Addr
			for range 50 {
				r := w.envoy.do(order{Do: "dial", Netns: p.path, To: to, Tag: names.TagLocalLeg, Client: netip.MustParseAddr(client), Keep: true})
				if r.Error != "" || unmap(r.Greeting.Peer).Addr().String() != client || unmap(r.Greeting.Peer).Port() != r.Local.Port() {
					t.Fatalf("%s to %s: %s, the app sees %s of %s", client, to, r.Error, r.Greeting.Peer, r.Local)
				}
				if from.IsValid() && r.Local.Addr() != from || !names.LegIPv4.Contains(r.Local.Addr()) && !names.LegIPv6.Contains(r.Local.Addr()) {
					t.Errorf("a leg of %s comes from %s, one before from %s", client, r.Local, from)
				}
				from = r.Local.Addr()
				legs[client][r.Greeting.Peer] = true
			}
			if len(legs[client]) != 50 {
				t.Errorf("50 connections of %s look like %d to the app", client, len(legs[client]))
			}
		}
	}
	if n := w.legs(p); n != 200 {
		t.Errorf("%d legs are counted, not 200", n)
	}
	if w.legs(peer) != 0 {
		t.Error("another pod's legs are counted")
	}
	w.envoy.must(order{Do: "disband"})
	w.noLegs(p)
	stranger.reset()
}

func clientLegAddresses(t *testing.T) {
	w, p, stranger := serving(t)
	freebind := intOption(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
	leg4, last4, leg6 := names.LegIPv4.Addr().Next(), netip.MustParseAddr("127.127.255.254"), names.LegIPv6.Addr().Next()
	for _, at := range []struct {
		domain int
		addr   netip.Addr
	}{{unix.AF_INET, leg4}, {unix.AF_INET, last4}, {unix.AF_INET6, leg4}, {unix.AF_INET6, leg6}} {
		for _, port := range []uint16{0, 7777} {
			w.counts("refused_leg_address", func() {
				options := []option{bound(netip.AddrPortFrom(at.addr, port).String())}
				if at.domain == unix.AF_INET6 {
					options = append([]option{freebind}, options...)
				}
				_, err := p.socket(at.domain, 0, options...)
				wantErrno(t, err, unix.EPERM, fmt.Sprintf("bind %s port %d", at.addr, port))
			})
			// Envoy's processes have no such address either, unless it is a leg's.
			if r := w.envoy.do(order{Do: "dial", Netns: p.path, To: appAddresses[0], Client: leg4}); r.Error != "EPERM" {
				t.Errorf("an untagged socket of Envoy's at %s: %q", leg4, r.Error)
			}
		}
		for _, port := range []uint16{8080, 7777} {
			w.counts("refused_leg_address", func() { wantBy(t, p, netip.AddrPortFrom(at.addr, port).String(), "EPERM") })
		}
	}
	// Outside the mesh they are what they were.
	st, err := stranger.socket(unix.AF_INET, 0, bound(netip.AddrPortFrom(leg4, 0).String()))
	w.ok(err)
	st.close()
	wantBy(t, p, "127.0.0.1:8080", "app", bound("127.100.0.1:0"))
}

func clientForged(t *testing.T) {
	w, p, stranger := serving(t)
	if _, err := p.socket(unix.AF_INET, 0, tagged(names.TagLocalLeg)...); errorName(err) != "ENOPROTOOPT" {
		t.Errorf("an app's tag: %v", err)
	}
	// An app may bind to what the kernel lets it bind to; the app that it dials sees the pod all the same.
	st, err := p.socket(unix.AF_INET, 0, intOption(unix.SOL_IP, unix.IP_FREEBIND, 1), bound(strangerIPv4+":0"))
	w.ok(err)
	st.close()
	// Of Envoy's own only what is tagged as a local leg speaks for a client.
	for tag, want := range map[int]string{0: "EADDRNOTAVAIL", names.TagOutboundLeg: "EADDRNOTAVAIL"} {
		r := w.envoy.do(order{Do: "dial", Netns: p.path, To: appAddresses[0], Tag: tag, Client: netip.MustParseAddr(strangerIPv4)})
		if r.Error != want {
			t.Errorf("bind to a client with tag %d: %q, want %s", tag, r.Error, want)
		}
	}
	// A leg that is bound to a client and dials another pod is refused like any leg.
	peer := w.enrolled("b", peerIPv4, peerIPv6)
	peer.serve("app", 8080)
	r := w.envoy.do(order{Do: "dial", Netns: p.path, To: peerIPv4 + ":8080", Tag: names.TagLocalLeg, Client: netip.MustParseAddr(strangerIPv4)})
	if r.Error != "EPERM" {
		t.Errorf("a local leg to another pod: %q", r.Error)
	}
	// A leg without a client after one with: nothing is left of it.
	if r := w.envoy.dial(p.space, appAddresses[0], names.TagLocalLeg); r.Error != "" || unmap(r.Greeting.Peer).Addr().String() != podIPv4 {
		t.Errorf("a leg without a client: %q, the app sees %s", r.Error, r.Greeting.Peer)
	}
	wantClient(t, stranger, appAddresses[0], strangerIPv4)
}

func clientLost(t *testing.T) {
	w, p, stranger := serving(t, limits(redirect.Limits{Handovers: 1}))
	handovers := w.fillBetweenHooks(p)
	for i, to := range appAddresses {
		accepted := w.counter("in_assigned")
		for range 3 {
			w.counts("drop_no_handover", func() {
				r := w.envoy.do(order{Do: "dial", Netns: p.path, To: to, Tag: names.TagLocalLeg, Client: netip.MustParseAddr([]string{strangerIPv4, strangerIPv6}[i])})
				if r.Error != "ECONNREFUSED" {
					t.Errorf("a local leg to %s without a hand-over: greeted by %q, %s", to, r.Greeting.By, r.Error)
				}
			})
			w.emptied(handovers)
		}
		if n := w.counter("in_assigned") - accepted; n != 0 {
			t.Errorf("a local leg to %s without a hand-over came back to Envoy %d times", to, n)
		}
		wantBy(t, p, to, "in") // its own dials are not taken for it
		w.emptied(handovers)
		wantBy(t, stranger, to, "in")
		w.emptied(handovers)
	}
	w.noLegs(p)
}

// clientUnknown takes away what the hooks noted on the app's socket, as if there had been no memory for it.
func clientUnknown(t *testing.T) {
	w, p, _ := serving(t)
	sockets := w.pinnedMap("sockets")
	for i, domain := range []int{unix.AF_INET, unix.AF_INET6, unix.AF_INET6} { // the last accepts IPv4-mapped
		client := []string{strangerIPv4, strangerIPv6, strangerIPv4}[i]
		own := []string{podIPv4, podIPv6, podIPv4}[i]
		st, err := p.socket(domain, 0, bound([]string{"0.0.0.0:7001", "[::]:7002", "[::]:7003"}[i]))
		w.ok(err)
		defer st.close()
		w.ok(unix.Listen(st.fd, 1))
		done := make(chan report)
		go func() {
			r, _ := w.envoy.try(order{Do: "dial", Netns: p.path, To: netip.AddrPortFrom(netip.MustParseAddr(own), uint16(7001+i)).String(), Tag: names.TagLocalLeg, Client: netip.MustParseAddr(client)})
			done <- r
		}()
		w.ok(poll(st.fd, unix.POLLIN))
		fd, _, err := unix.Accept4(st.fd, unix.SOCK_CLOEXEC)
		w.ok(err)
		conn := &stream{fd}
		defer conn.close()
		if got := unmap(conn.peer()).Addr().String(); got != client {
			t.Errorf("the app sees %s, not %s", got, client)
		}
		w.ok(sockets.Delete(int32(fd)))
		w.counts("client_unknown", func() {
			if got := unmap(conn.peer()).Addr().String(); got != own {
				t.Errorf("the app sees %s, not its pod's address %s", got, own)
			}
		})
		w.ok(conn.write("{}\n"))
		if r := <-done; r.Error != "" {
			t.Errorf("dial: %s", r.Error)
		}
	}
}

func clientLimit(t *testing.T) {
	w, p, _ := serving(t, limits(redirect.Limits{ConnectionsPerPod: 2}))
	leg := func(to string) error {
		r := w.envoy.do(order{Do: "dial", Netns: p.path, To: to, Tag: names.TagLocalLeg, Client: netip.MustParseAddr([]string{strangerIPv4, strangerIPv6}[map[string]int{appAddresses[0]: 0, appAddresses[1]: 1}[to]]), Keep: true})
		if r.Error != "" {
			return errors.New(r.Error)
		}
		return nil
	}
	for range 2 {
		for i := range 4 {
			w.ok(leg(appAddresses[i%2]))
		}
		for _, to := range appAddresses {
			w.counts("leg_refused_limit", func() {
				if err := leg(to); errorName(err) != "EAGAIN" {
					t.Errorf("a fifth leg to %s: %v", to, err)
				}
			})
		}
		w.envoy.must(order{Do: "disband"})
		w.noLegs(p)
	}
}
