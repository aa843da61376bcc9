package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

func limits(l redirect.Limits) func(*redirect.Config) {
	return func(c *redirect.Config) { c.Limits = l }
}

// hanging starts a connect that stays on its way, with a stuck Envoy.
func (p *pod) hanging(to string) (*stream, error) {
	st, err := p.socket(domainOf(netip.MustParseAddrPort(to)), 0)
	if err != nil {
		return nil, err
	}
	err = unix.SetNonblock(st.fd, true)
	if err == nil {
		err = unix.Connect(st.fd, sockaddr(netip.MustParseAddrPort(to), false))
	}
	if err != unix.EINPROGRESS {
		st.close()
		return nil, err
	}
	return st, nil
}

func fullHandovers(t *testing.T) {
	w, p := capturing(t, limits(redirect.Limits{Handovers: 4}))
	w.stuck(p)
	var waiting []*stream
	for i := range 4 {
		st, err := p.hanging(serviceIPv4)
		if err != nil {
			t.Fatalf("connection %d of 4: %v", i+1, err)
		}
		defer st.close()
		waiting = append(waiting, st)
	}
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		w.counts("out_refused_full", func() {
			_, err := p.dial(to)
			wantErrno(t, err, unix.EAGAIN, "dial "+to+" with the map full")
		})
	}
	waiting[0].reset()
	var next *stream
	eventually(t, "after one left", func() (err error) {
		next, err = p.hanging(serviceIPv6)
		return err
	})
	defer next.close()
	w.envoy.must(order{Do: "accept", Netns: p.path, Port: names.PortOutHTTP})
	for _, st := range waiting[1:] {
		if err := errors.Join(st.waitConnected(), unix.SetNonblock(st.fd, false)); err != nil {
			t.Fatal(err)
		}
		g, err := st.greeting()
		wantOut(t, g, err, serviceIPv4)
	}
	p.reaches(t, otherIPv4)
}

// fillBetweenHooks has the map of hand-overs full after the connect hook found room and before sockops uses it: another
// program at the same hook does it, which runs after ours. It returns the map.
func (w *world) fillBetweenHooks(p *pod) *ebpf.Map {
	w.t.Helper()
	handovers := w.pinnedMap("handovers")
	cookie, err := strconv.ParseInt(w.cookie(p), 10, 64)
	w.ok(err)
	for kind, attach := range map[string]ebpf.AttachType{"connect4": ebpf.AttachCGroupInet4Connect, "connect6": ebpf.AttachCGroupInet6Connect} {
		filler, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: attach, License: "GPL", Instructions: fill(handovers, cookie)})
		w.ok(err)
		w.t.Cleanup(func() { filler.Close() })
		l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroupBase, Attach: attach, Program: filler})
		if err != nil {
			w.t.Fatalf("attach after %s: %v", kind, err)
		}
		w.t.Cleanup(func() { l.Close() })
	}
	return handovers
}

func fullBetweenHooks(t *testing.T) {
	w, p, stranger := serving(t, limits(redirect.Limits{Handovers: 1}))
	handovers := w.fillBetweenHooks(p)
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		w.counts("out_lost_full", func() { wantBy(t, p, to, "ECONNREFUSED") })
		w.emptied(handovers)
	}
	for _, to := range appAddresses {
		wantBy(t, p, to, "in") // no local leg was lost yet
		w.emptied(handovers)
		accepted := w.counter("in_assigned")
		w.counts("out_lost_full", func() {
			if r := w.envoy.dial(p.space, to, names.TagLocalLeg); r.Error != "ECONNREFUSED" {
				t.Errorf("a local leg to %s without a hand-over: greeted by %q, %s", to, r.Greeting.By, r.Error)
			}
		})
		w.emptied(handovers)
		if n := w.counter("in_assigned") - accepted; n != 0 {
			t.Errorf("a local leg to %s without a hand-over came back to Envoy %d times", to, n)
		}
		wantBy(t, stranger, to, "in") // others are not refused meanwhile
		if to == appAddresses[0] {
			w.counts("drop_no_handover", func() { wantBy(t, p, to, "ECONNREFUSED") })
			w.emptied(handovers)
			w.emptied(w.pinnedMap("lost_legs")) // as time does
		}
	}
}

// fill is a connect program that puts an entry of nobody into the map of hand-overs at every connect in the netns.
func fill(handovers *ebpf.Map, cookie int64) asm.Instructions {
	key, value := int16(handovers.KeySize()), int16(handovers.ValueSize())
	program := asm.Instructions{
		asm.FnGetNetnsCookie.Call(),
		asm.LoadImm(asm.R1, cookie, asm.DWord),
		asm.JNE.Reg(asm.R0, asm.R1, "pass"),
	}
	for offset := -key - value; offset < 0; offset += 4 {
		program = append(program, asm.StoreImm(asm.RFP, offset, 0, asm.Word))
	}
	return append(program,
		asm.StoreMem(asm.RFP, -key, asm.R0, asm.DWord), // struct tuple begins with the netns
		asm.LoadMapPtr(asm.R1, handovers.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -int32(key)),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, -int32(key+value)),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
		asm.Return(),
	)
}

func fullConnections(t *testing.T) {
	w, p := capturing(t, limits(redirect.Limits{ConnectionsPerPod: 3}))
	other := w.enrolled("b", peerIPv4, peerIPv6)
	var first *stream
	for _, to := range []string{serviceIPv4, serviceIPv6, otherIPv4} {
		first, _ = p.reaches(t, to)
	}
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		w.counts("out_refused_limit", func() {
			_, err := p.dial(to)
			wantErrno(t, err, unix.EAGAIN, "dial "+to+" at the limit")
		})
	}
	other.reaches(t, serviceIPv4)
	state, err := w.redirect.Verify(p.uid)
	if err != nil || state.Outgoing != 3 || state.RefusedOutgoing != 2 {
		t.Errorf("%d outgoing, %d refused, %v", state.Outgoing, state.RefusedOutgoing, err)
	}
	if err := first.unconnect(); err != nil {
		t.Fatal(err)
	}
	p.reaches(t, serviceIPv4)
	p.reset()
	w.settled(p)
	for range 2 {
		p.reaches(t, serviceIPv4)
		p.reaches(t, serviceIPv6)
		p.reset()
		w.settled(p)
	}
}

func fullIncoming(t *testing.T) {
	w, p, stranger := serving(t, limits(redirect.Limits{ConnectionsPerPod: 3}))
	for _, to := range []string{appAddresses[0], appAddresses[1], appAddresses[0]} {
		if _, g, err := stranger.greeted(to); err != nil || g.By != "in" {
			t.Fatal(g.By, err)
		}
	}
	for _, to := range appAddresses {
		w.counts("in_refused_limit", func() { wantBy(t, stranger, to, "ECONNREFUSED") })
	}
	p.reaches(t, serviceIPv4) // the limits are each direction's own
	stranger.reset()
	w.settled(p)
	wantBy(t, stranger, appAddresses[0], "in")
}

func fullServices(t *testing.T) {
	w := newWorld(t, limits(redirect.Limits{Services: 3, Addresses: 2}))
	p := w.enrolled("a", podIPv4, podIPv6)
	services := make([]redirect.Service, 5)
	for i := range services {
		services[i] = redirect.Service{Addr: netip.MustParseAddrPort(fmt.Sprintf("10.96.0.%d:80", i+1)), Class: redirect.ClassHTTP}
	}
	refused, err := w.redirect.SetServices(services)
	if err != nil || len(refused) != 2 || refused[0].Addr != services[3].Addr || refused[1].Addr != services[4].Addr || refused[0].Reason == "" {
		t.Fatal(refused, err)
	}
	for _, s := range services[:3] {
		p.reaches(t, s.Addr.String())
	}
	// Room is made before it is taken.
	refused, err = w.redirect.SetServices(services[2:])
	if err != nil || len(refused) != 0 {
		t.Fatal(refused, err)
	}
	for _, s := range services[2:] {
		p.reaches(t, s.Addr.String())
	}
	refused, err = w.redirect.SetServices([]redirect.Service{
		{Addr: netip.MustParseAddrPort("127.0.0.1:80"), Class: redirect.ClassHTTP},
		{Addr: netip.MustParseAddrPort("[fe80::1]:80"), Class: redirect.ClassHTTP},
		{Addr: netip.MustParseAddrPort("10.96.0.1:0"), Class: redirect.ClassHTTP},
		{Addr: netip.MustParseAddrPort("10.96.0.1:80"), Class: 80},
		{Addr: netip.MustParseAddrPort("[::ffff:10.96.0.9]:80"), Class: redirect.ClassTCP},
		{Addr: netip.MustParseAddrPort("10.96.0.9:80"), Class: redirect.ClassHTTP},
	})
	if err != nil || len(refused) != 5 {
		t.Error("bad services:", refused, err)
	}
	p.reaches(t, "10.96.0.9:80")
}

func fullAddresses(t *testing.T) {
	w := newWorld(t, limits(redirect.Limits{Services: 3, Addresses: 2}))
	p := w.enrolled("a", podIPv4, podIPv6)
	var addresses []netip.Addr
	for _, a := range []string{"10.99.7.1", "fd99::7:1", "10.99.7.2", "127.0.0.1"} {
		addresses = append(addresses, netip.MustParseAddr(a))
	}
	refused, err := w.redirect.SetAddresses(addresses)
	if err != nil || len(refused) != 2 || refused[0] != addresses[2] || refused[1] != addresses[3] {
		t.Fatal(refused, err)
	}
	p.reaches(t, "10.99.7.1:1")
	p.reaches(t, "[fd99::7:1]:65535")
	refused, err = w.redirect.SetAddresses(addresses[1:3])
	if err != nil || len(refused) != 0 {
		t.Fatal(refused, err)
	}
	p.reaches(t, "10.99.7.2:1")
}

func fullPods(t *testing.T) {
	w := newWorld(t, limits(redirect.Limits{Pods: 1}))
	w.services()
	first := w.enrolled("a", podIPv4, podIPv6)
	second := w.pod("b", peerIPv4, peerIPv6)
	for what, f := range map[string]func(redirect.Pod) error{"enrol": w.redirect.Enrol, "gate": w.redirect.Gate} {
		if err := f(second.description()); !errors.Is(err, redirect.ErrPodsFull) {
			t.Errorf("%s a second pod: %v", what, err)
		}
	}
	untouched(t, w, second)
	first.reaches(t, serviceIPv4)
	first.reset()
	w.settled(first)
	w.withdrawn(first)
	w.enrol(second)
	second.reaches(t, serviceIPv4)
}

func fullOthers(t *testing.T) {
	w, p := capturing(t, limits(redirect.Limits{Pods: 1})) // 16 own addresses, probes and server-first ports; 8 listeners
	ports := make([]uint16, 17)
	for i := range ports {
		ports[i] = uint16(1000 + i)
	}
	for _, c := range []struct {
		what string
		err  error
	}{
		{"probes", w.redirect.SetMode(p.uid, redirect.Mode{Probes: ports})},
		{"server_first", w.redirect.SetMode(p.uid, redirect.Mode{ServerFirst: ports})},
	} {
		if !errors.Is(c.err, redirect.ErrFull) || !strings.Contains(c.err.Error(), c.what) {
			t.Errorf("too many %s: %v", c.what, c.err)
		}
	}
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Probes: ports[:8], ServerFirst: ports[:16]}))

	addAddresses := func(p *pod) {
		p.must(func() error {
			link, err := netlink.LinkByName("eth0")
			for i := range 16 {
				if err == nil {
					err = address(link, fmt.Sprintf("10.77.0.%d/32", i+1))
				}
			}
			return err
		})
	}
	addAddresses(p)
	if err := w.redirect.Enrol(p.description()); !errors.Is(err, redirect.ErrFull) || !strings.Contains(err.Error(), "own") {
		t.Errorf("too many addresses: %v", err)
	}
	state, err := w.redirect.Verify(p.uid)
	if err != nil || state.Captured() {
		t.Errorf("with addresses that do not fit: %+v, %v", state, err)
	}
	p.reaches(t, serviceIPv4) // captured as before, and the drift says what is not
	p.reset()
	w.settled(p)
	w.withdrawn(p)
	w.unlistenQuietly(p)
	if err := w.redirect.Enrol(p.description()); !errors.Is(err, redirect.ErrFull) {
		t.Errorf("enrol with too many addresses: %v", err)
	}
	untouched(t, w, p)

	q := w.enrolled("b", peerIPv4, peerIPv6)
	for generation := uint32(1); generation < 3; generation++ {
		if generation == 2 {
			w.unlistenQuietly(q)
		}
		h := newHand(t, w.root, unique("envoy"))
		w.ok(w.redirect.AttachProxy(generation, h.cgroup))
		w.listen(h, q, generation)
		w.ok(w.redirect.Flip(q.uid, generation))
		q.reaches(t, serviceIPv4)
	}
	for i := range uint32(64) {
		h, err := os.MkdirTemp(w.root, "many-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(h) })
		if err = w.redirect.AttachProxy(3+i, h); err != nil {
			if i != 61 || !errors.Is(err, redirect.ErrFull) {
				t.Errorf("Envoy %d: %v", i+3, err)
			}
			if _, err := os.Stat(filepath.Join(w.pins, "proxies", strconv.Itoa(int(3+i)))); !os.IsNotExist(err) {
				t.Error("an Envoy that did not fit is left half attached")
			}
			break
		} else if i == 63 {
			t.Error("67 Envoys fit")
		}
	}
	q.reaches(t, serviceIPv4)
}

// fullListeners lets others fill the map of listeners, which Envoy's cannot: of the 8 a pod two generations take three
// each, and the others have no port.
func fullListeners(t *testing.T) {
	w := newWorld(t, limits(redirect.Limits{Pods: 1}))
	w.services()
	p := w.pod("a", podIPv4, podIPv6)
	w.ok(w.redirect.Enrol(p.description()))
	st, err := p.socket(unix.AF_INET6, 0, bound("[::]:7777"))
	w.ok(err)
	defer st.close()
	w.ok(unix.Listen(st.fd, 1))
	listeners := w.pinnedMap("listeners")
	foreign := make([][]byte, listeners.MaxEntries())
	for i := range foreign {
		foreign[i] = make([]byte, listeners.KeySize())
		foreign[i][15] = byte(i + 1)
		w.ok(listeners.Put(foreign[i], uint64(st.fd)))
	}
	listen := order{Do: "listen", Netns: p.path, Port: names.PortOutHTTP, By: "out"}
	w.counts("listener_failed", func() { w.envoy.must(listen) })
	if found, err := w.redirect.Listening(p.uid); err != nil || len(found) != 0 {
		t.Errorf("listeners that do not fit: %+v, %v", found, err)
	}
	w.ok(w.redirect.Capture(p.uid, true, true))
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		wantBy(t, p, to, "ECONNREFUSED")
	}
	if err := w.redirect.Flip(p.uid, 0); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("flip to listeners that do not fit: %v", err)
	}
	for _, key := range foreign {
		w.ok(listeners.Delete(key))
	}
	listen.Do = "unlisten"
	w.envoy.must(listen)
	w.counts("listener_added", func() { w.listen(w.envoy, p, 0) })
	p.reaches(t, serviceIPv4)
	p.reaches(t, serviceIPv6)

	// A socket that no socket map takes.
	w.unlisten(w.envoy, p, 0)
	w.counts("listener_failed", func() {
		listen.Do, listen.Multipath = "listen", true
		w.envoy.must(listen)
	})
}

// fullServiceIDs lets others fill the map of steering ids, which has room for every service and address.
func fullServiceIDs(t *testing.T) {
	w := newWorld(t, limits(redirect.Limits{Services: 3, Addresses: 2}))
	p := w.enrolled("a", podIPv4, podIPv6)
	ids := w.pinnedMap("service_ids")
	for i := range ids.MaxEntries() {
		w.ok(ids.Put(1000+i, make([]byte, ids.ValueSize())))
	}
	service := []redirect.Service{{Addr: netip.MustParseAddrPort(serviceIPv4), Class: redirect.ClassHTTP}}
	if refused, err := w.redirect.SetServices(service); err != nil || len(refused) != 1 {
		t.Errorf("a service without room for its id: %v, %v", refused, err)
	}
	address := []netip.Addr{netip.MustParseAddr(peerIPv6)}
	if refused, err := w.redirect.SetAddresses(address); err != nil || len(refused) != 1 {
		t.Errorf("an address without room for its id: %v, %v", refused, err)
	}
	if _, err := p.dial(serviceIPv4); err == nil {
		t.Error("a service without room for its id is captured")
	}
	w.sweep() // takes out what is nobody's
	if n := w.entries("service_ids"); n != 0 {
		t.Errorf("%d steering ids are nobody's", n)
	}
	refused, err := w.redirect.SetServices(service)
	if err != nil || len(refused) != 0 {
		t.Errorf("with room: %v, %v", refused, err)
	}
	if left, err := w.redirect.SetAddresses(address); err != nil || len(left) != 0 {
		t.Errorf("with room: %v, %v", left, err)
	}
	p.reaches(t, serviceIPv4)
	p.reaches(t, "["+peerIPv6+"]:1")
}

// untouched fails if the instance left anything in the pod's netns or knows it.
func untouched(t *testing.T, w *world, p *pod) {
	t.Helper()
	if ports := p.readSysctl("ipv4/ip_local_reserved_ports"); ports != "" {
		t.Errorf("ports %s are reserved", ports)
	}
	if routes := p.steeringRoutes(); len(routes) > 0 {
		t.Errorf("routes are left: %v", routes)
	}
	if _, err := w.redirect.Verify(p.uid); !errors.Is(err, redirect.ErrUnknownPod) {
		t.Errorf("verify: %v", err)
	}
	eventually(t, "bind a proxy port", func() error {
		st, err := p.socket(unix.AF_INET6, 0, bound("[::]:15006"))
		if err == nil {
			st.close()
		}
		return err
	})
}
