package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
)

// stuck makes Envoy's outbound listener deaf with its backlog full: further SYNs are dropped.
func (w *world) stuck(p *pod) {
	w.t.Helper()
	// A cookie would let a client believe that it is connected, with or without a mesh.
	p.sysctl("ipv4/tcp_syncookies", "0")
	w.unlisten(w.envoy, p, 0)
	w.envoy.must(order{Do: "listen", Netns: p.path, Port: names.PortOutHTTP, By: "out", Sockets: 1, Backlog: 1, Deaf: true})
	for range 2 { // a backlog of 1 takes two
		st, err := p.dial(serviceIPv4)
		if err != nil {
			w.t.Fatal("fill the backlog:", err)
		}
		w.t.Cleanup(st.close)
	}
}

func outClosedEarly(t *testing.T) {
	w, p := capturing(t)
	w.stuck(p)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		st, err := p.socket(domainOf(netip.MustParseAddrPort(to)), 0, bound(unspecified(to, 6666)))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.SetNonblock(st.fd, true); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(st.fd, sockaddr(netip.MustParseAddrPort(to), false)); err != unix.EINPROGRESS {
			t.Fatalf("connect: %v", err)
		}
		w.counts("closed_before_accept", func() { st.reset() })
	}
	w.envoy.must(order{Do: "accept", Netns: p.path, Port: names.PortOutHTTP})
	// The next connection from the same port is judged anew.
	p.reaches(t, otherIPv4, bound("0.0.0.0:6666"))
	p.reaches(t, otherIPv6, bound("[::]:6666"))

	// A client that closes after the handshake, before accept(2).
	w.envoy.must(order{Do: "unlisten", Netns: p.path, Port: names.PortOutHTTP})
	w.envoy.must(order{Do: "listen", Netns: p.path, Port: names.PortOutHTTP, By: "out", Deaf: true})
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		st, err := p.dial(to)
		if err != nil {
			t.Fatal(err)
		}
		st.reset()
		if st, err = p.dial(to); err != nil {
			t.Fatal(err)
		}
		st.close()
	}
	w.envoy.must(order{Do: "accept", Netns: p.path, Port: names.PortOutHTTP})
	p.reaches(t, otherIPv4)
	if n := w.entries("handovers"); n > 0 {
		t.Errorf("%d hand-overs are left", n)
	}
}

// outOtherContainer: what waits at the listeners of an Envoy that died with its container belongs to that one's cgroup, and the next
// one learns all the same where it was meant for.
func outOtherContainer(t *testing.T) {
	w, p := capturing(t)
	w.envoy.must(order{Do: "unlisten", Netns: p.path, Port: names.PortOutHTTP})
	w.envoy.must(order{Do: "listen", Netns: p.path, Port: names.PortOutHTTP, By: "out", Deaf: true})
	var waiting []*stream
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		st, err := p.dial(to)
		if err != nil {
			t.Fatal(err)
		}
		waiting = append(waiting, st)
	}
	next := newHand(t, cgroupBase, unique("next"))
	w.ok(w.redirect.AttachProxy(0, next.cgroup))
	w.envoy.must(order{Do: "accept", Netns: p.path, Port: names.PortOutHTTP})
	for i, to := range []string{serviceIPv4, serviceIPv6} {
		if g, err := waiting[i].greeting(); err != nil || g.Original.String() != to {
			t.Errorf("dialled %s before the container was another: %+v, %v", to, g, err)
		}
	}
	if s, err := w.redirect.Verify(p.uid); err != nil || len(s.Drift) > 0 {
		t.Errorf("drift %v, %v", s.Drift, err)
	}
	w.ok(w.redirect.DetachProxy(0))
	if left, err := os.ReadDir(filepath.Join(w.pins, "proxies")); err != nil || len(left) > 0 {
		t.Errorf("left of an Envoy: %v, %v", left, err)
	}
}

func unspecified(to string, port uint16) string {
	if netip.MustParseAddrPort(to).Addr().Is4() {
		return fmt.Sprintf("0.0.0.0:%d", port)
	}
	return fmt.Sprintf("[::]:%d", port)
}

func outSynCookies(t *testing.T) {
	_, p := capturing(t)
	p.sysctl("ipv4/tcp_syncookies", "2")
	before := p.cookiesReceived()
	for range 5 {
		for _, to := range []string{serviceIPv4, otherIPv4, serviceIPv6, otherIPv6} {
			p.reaches(t, to)
		}
	}
	if n := p.cookiesReceived() - before; n != 20 {
		t.Errorf("%d connections came by a SYN cookie, not 20", n)
	}
}

func outFullBacklog(t *testing.T) {
	w, p := capturing(t)
	w.stuck(p)
	targets := []string{serviceIPv4, otherIPv4, serviceIPv6, otherIPv6}
	results := make(chan error, len(targets))
	var waiting []*stream
	for _, to := range targets {
		st, err := p.socket(domainOf(netip.MustParseAddrPort(to)), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer st.close()
		if err := unix.SetNonblock(st.fd, true); err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(st.fd, sockaddr(netip.MustParseAddrPort(to), false)); err != unix.EINPROGRESS {
			t.Fatalf("connect: %v", err)
		}
		waiting = append(waiting, st)
	}
	for i, st := range waiting {
		eventually(t, "a SYN that is dropped, and sent again", st.retransmitted)
		to := targets[i]
		go func() {
			err := st.waitConnected()
			if err == nil {
				err = unix.SetNonblock(st.fd, false)
			}
			if err != nil {
				results <- err
				return
			}
			g, err := st.greeting()
			if err == nil && g.Original.String() != to {
				err = fmt.Errorf("dialled %s: accepted for %s", to, g.Original)
			}
			results <- err
		}()
	}
	w.envoy.must(order{Do: "accept", Netns: p.path, Port: names.PortOutHTTP})
	for range targets {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// deafen makes the socket lose every packet that arrives, until hear. No firewall is needed.
func (st *stream) deafen() error {
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}
	return unix.SetsockoptSockFprog(st.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop})
}

func (st *stream) hear() error {
	return unix.SetsockoptInt(st.fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
}

// retransmitted reports whether the socket sent its SYN again.
func (st *stream) retransmitted() error {
	info, err := unix.GetsockoptTCPInfo(st.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err == nil && info.Total_retrans == 0 {
		err = errors.New("the SYN was sent once")
	}
	return err
}

func outLostSynAck(t *testing.T) {
	_, p := capturing(t)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		st, err := p.socket(domainOf(netip.MustParseAddrPort(to)), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer st.close()
		lostSynAck(t, st, to)
		g, err := st.greeting()
		wantOut(t, g, err, to)
	}
}

// lostSynAck connects the socket, whose first SYN-ACK is lost.
func lostSynAck(t *testing.T, st *stream, to string) {
	t.Helper()
	if err := errors.Join(st.deafen(), unix.SetNonblock(st.fd, true)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(st.fd, sockaddr(netip.MustParseAddrPort(to), false)); err != unix.EINPROGRESS {
		t.Fatalf("connect: %v", err)
	}
	eventually(t, "a retransmission", st.retransmitted)
	if err := errors.Join(st.hear(), st.waitConnected(), unix.SetNonblock(st.fd, false)); err != nil {
		t.Fatal("after the SYN-ACK was lost:", err)
	}
}
