package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

// steeringRoutes lists the routes to the steering ranges.
func (p *pod) steeringRoutes() (found []netlink.Route) {
	p.t.Helper()
	p.must(func() error {
		for _, steer := range []netip.Prefix{names.SteerIPv4, names.SteerIPv6} {
			family := netlink.FAMILY_V6
			if steer.Addr().Is4() {
				family = netlink.FAMILY_V4
			}
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: ipNet(steer.String())}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
			if err != nil {
				return err
			}
			found = append(found, routes...)
		}
		return nil
	})
	return found
}

func lifeGate(t *testing.T) {
	w := newWorld(t)
	w.services()
	p := w.pod("a", podIPv4, podIPv6)
	p.serve("app", 8080)
	stranger := w.pod("x", strangerIPv4, strangerIPv6)
	stranger.serve("stranger", 8080)
	closed := func() {
		t.Helper()
		for _, to := range appAddresses {
			w.counts("drop_gated", func() { wantBy(t, stranger, to, "ECONNREFUSED") })
		}
		for _, to := range []string{serviceIPv4, serviceIPv6, strangerIPv4 + ":8080", "127.0.0.1:8080"} {
			w.counts("refused_gated", func() { wantBy(t, p, to, "EPERM") })
		}
	}
	for range 2 { // again changes nothing
		w.ok(w.redirect.Gate(p.description()))
		closed()
	}
	w.ok(w.redirect.Enrol(p.description()))
	closed()
	w.listen(w.envoy, p, 0)
	w.ok(w.redirect.Capture(p.uid, true, false))
	closed()
	state, err := w.redirect.Verify(p.uid)
	if err != nil || !state.Gated || state.Captured() || len(state.Drift) > 0 {
		t.Errorf("verify: %+v, %v", state, err)
	}
	w.ok(w.redirect.Capture(p.uid, true, true))
	p.reaches(t, serviceIPv4)
	relayed(t, stranger, appAddresses[0])
	w.ok(w.redirect.Gate(p.description())) // an enrolled pod stays as it is
	p.reaches(t, serviceIPv4)

	unwanted := w.pod("b", peerIPv4, peerIPv6)
	unwanted.serve("app", 8080)
	w.ok(w.redirect.Gate(unwanted.description()))
	wantBy(t, stranger, peerIPv4+":8080", "ECONNREFUSED")
	w.ok(w.redirect.Withdraw(unwanted.uid))
	wantBy(t, stranger, peerIPv4+":8080", "app")
	untouched(t, w, unwanted)
}

func lifeRefusals(t *testing.T) {
	w := newWorld(t)
	first := w.enrolled("a", podIPv4, podIPv6)
	p := w.pod("b", peerIPv4, peerIPv6)
	change := func(f func(*redirect.Pod)) redirect.Pod {
		d := p.description()
		f(&d)
		return d
	}
	for _, c := range []struct {
		what string
		pod  redirect.Pod
		is   error
		says string
	}{
		{"a netns that is gone", change(func(d *redirect.Pod) { d.NetnsPath += "-gone" }), redirect.ErrNetnsGone, ""},
		{"a file that is no netns", change(func(d *redirect.Pod) { d.NetnsPath = "/proc/self/exe" }), redirect.ErrNetnsGone, ""},
		{"another netns at the path", change(func(d *redirect.Pod) { d.Cookie = 1 }), redirect.ErrNetnsGone, "cookie"},
		{"another pod's netns", change(func(d *redirect.Pod) { d.NetnsPath = first.path }), nil, "belongs to pod " + first.uid},
		{"no address", change(func(d *redirect.Pod) { d.Addresses = nil }), nil, "address"},
		{"a loopback address", change(func(d *redirect.Pod) { d.Addresses = []netip.Addr{netip.MustParseAddr("127.0.0.1")} }), nil, "127.0.0.1"},
		{"an address that is not there", change(func(d *redirect.Pod) { d.Addresses = []netip.Addr{netip.MustParseAddr("10.99.1.77")} }), nil, "10.99.1.77"},
		{"no uid", change(func(d *redirect.Pod) { d.UID = "" }), nil, "uid"},
		{"a uid too long", change(func(d *redirect.Pod) { d.UID = strings.Repeat("u", 64) }), nil, "63 bytes"},
	} {
		err := w.redirect.Enrol(c.pod)
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("enrol %s: %v", c.what, err)
		}
	}
	st, err := p.socket(unix.AF_INET6, 0, bound("[::]:15006"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(st.fd, 1); err != nil {
		t.Fatal(err)
	}
	if err := w.redirect.Enrol(p.description()); err == nil || !strings.Contains(err.Error(), "15006") {
		t.Errorf("enrol a pod that listens on a proxy port: %v", err)
	}
	st.close()
	untouched(t, w, p)
	for what, err := range map[string]error{
		"Capture": w.redirect.Capture(p.uid, true, true), "SetMode": w.redirect.SetMode(p.uid, redirect.Mode{}), "Flip": w.redirect.Flip(p.uid, 0),
	} {
		if !errors.Is(err, redirect.ErrUnknownPod) {
			t.Errorf("%s of an unknown pod: %v", what, err)
		}
	}
	w.ok(w.redirect.Withdraw(p.uid))
	if state, err := w.redirect.Verify(first.uid); err != nil || !state.Captured() {
		t.Errorf("the pod that is enrolled: %+v, %v", state, err)
	}
}

func lifeFlip(t *testing.T) {
	w, p, stranger := serving(t)
	// A generation that listens on the other row of ports takes nothing over.
	wrong := order{Do: "listen", Netns: p.path, Port: names.ListenPort(names.PortOutHTTP, 1), By: "wrong row"}
	w.envoy.must(wrong)
	p.reaches(t, serviceIPv4)
	wrong.Do = "unlisten"
	w.envoy.must(wrong)

	next := newHand(t, w.root, w.name+"-envoy-1")
	w.ok(w.redirect.AttachProxy(1, next.cgroup))
	if err := w.redirect.Flip(p.uid, 1); err == nil {
		t.Error("flipped to a generation that does not listen")
	}
	w.listen(next, p, 1)

	// Load while the generations change places: every connection reaches one of them.
	stop := make(chan struct{})
	var load sync.WaitGroup
	defer load.Wait()
	end := sync.OnceFunc(func() { close(stop) })
	defer end()
	for _, c := range []struct {
		from *pod
		to   string
	}{{p, serviceIPv4}, {p, serviceIPv6}, {stranger, appAddresses[0]}, {stranger, appAddresses[1]}} {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				st, err := c.from.dial(c.to)
				if err == nil {
					_, err = st.greeting()
					st.reset()
				}
				if err != nil {
					t.Errorf("dial %s during a flip: %v", c.to, err)
					return
				}
			}
		})
	}
	for i := range uint32(100) {
		generation := (i + 1) % 2
		w.ok(w.redirect.Flip(p.uid, generation))
		if _, g := p.reaches(t, serviceIPv4); g.Generation != generation {
			t.Fatalf("flipped to %d: generation %d accepts what the app dials", generation, g.Generation)
		}
		if _, g, err := stranger.greeted(appAddresses[1]); err != nil || g.Generation != generation {
			t.Fatalf("flipped to %d: generation %d accepts what others dial, %v", generation, g.Generation, err)
		}
	}
	end()
	load.Wait()
	w.ok(w.redirect.Flip(p.uid, 1))
	kept, _ := p.reaches(t, serviceIPv4)
	w.envoy.kill()
	w.ok(w.redirect.DetachProxy(0))
	if err := kept.write("still\n"); err != nil {
		t.Error(err)
	}
	if line, err := kept.readLine(); err != nil || line != "still" {
		t.Errorf("the new generation's connection after the old one left: %q, %v", line, err)
	}
	relayed(t, stranger, appAddresses[0])
	// A hand outside every attached cgroup cannot listen in the old one's place.
	thief := newHand(t, w.root, w.name+"-thief")
	if r := thief.do(order{Do: "listen", Netns: p.path, Port: names.PortOutHTTP, By: "thief"}); r.Error != "EPERM" {
		t.Errorf("a stranger listens on the old generation's port: %q", r.Error)
	}
}

// lifeUnderLoad dials without pause while the pod enters and leaves the mesh: every connection is served, by the app
// itself or by Envoy, and both do get some.
func lifeUnderLoad(t *testing.T) {
	w := newWorld(t)
	w.services()
	p := w.pod("a", podIPv4, podIPv6)
	p.serve("plain", 8080)
	server := w.pod("y", "10.96.0.1", "fd10::1") // the service's address is a plain server's too
	server.serve("plain", 80)
	stranger := w.pod("x", strangerIPv4, strangerIPv6)

	stop := make(chan struct{})
	var load sync.WaitGroup
	defer load.Wait()
	end := sync.OnceFunc(func() { close(stop) })
	defer end()
	var mu sync.Mutex
	served := map[string]int{}
	for _, c := range []struct {
		from *pod
		to   string
	}{{p, serviceIPv4}, {p, serviceIPv6}, {stranger, appAddresses[0]}, {stranger, appAddresses[1]}} {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				st, err := c.from.dial(c.to)
				var g greeting
				if err == nil {
					g, err = st.greeting()
					if got := st.peer().String(); err == nil && got != c.to {
						err = errors.New("getpeername says " + got)
					}
					st.close()
				}
				if err != nil {
					t.Errorf("dial %s on the way in or out: %v", c.to, err)
					return
				}
				mu.Lock()
				served[c.to+" "+g.By]++
				mu.Unlock()
			}
		})
	}
	// reached waits until every address was served by the one wanted, anew.
	reached := func(want func(to string) string) {
		t.Helper()
		mu.Lock()
		clear(served)
		mu.Unlock()
		eventually(t, "connections of every kind", func() error {
			mu.Lock()
			defer mu.Unlock()
			for _, to := range []string{serviceIPv4, serviceIPv6, appAddresses[0], appAddresses[1]} {
				if served[to+" "+want(to)] == 0 {
					return fmt.Errorf("none of %s to %s", want(to), to)
				}
			}
			return nil
		})
	}
	byEnvoy := func(to string) string {
		if to == serviceIPv4 || to == serviceIPv6 {
			return "out"
		}
		return "in"
	}
	plain := func(string) string { return "plain" }
	for cycle := range 20 {
		w.ok(w.redirect.Enrol(p.description()))
		if cycle == 0 {
			w.listen(w.envoy, p, 0)
		}
		w.ok(w.redirect.Capture(p.uid, true, false))
		w.ok(w.redirect.Capture(p.uid, true, true))
		reached(byEnvoy)
		w.ok(w.redirect.Capture(p.uid, true, false))
		w.ok(w.redirect.Capture(p.uid, false, false))
		reached(plain)
		w.ok(w.redirect.Withdraw(p.uid))
		if cycle%10 == 9 { // to the last trace; Envoy still listens when the pod comes back
			w.withdrawn(p)
		}
	}
	end()
	load.Wait()
}

func lifeEnvoyKilled(t *testing.T) {
	w, p, stranger := serving(t)
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true}))
	st, _ := p.reaches(t, serviceIPv4)
	if _, g, err := stranger.greeted(appAddresses[0]); err != nil || g.By != "in" {
		t.Fatal(g.By, err)
	}
	w.envoy.kill()
	if line, err := st.readLine(); err == nil {
		t.Errorf("the connection of the killed Envoy says %q", line)
	}
	eventually(t, "closed", func() error {
		if got := p.by(serviceIPv4) + " " + stranger.by(appAddresses[0]); got != "ECONNREFUSED ECONNREFUSED" {
			return errors.New(got)
		}
		return nil
	})
	stranger.reset()
	w.settled(p)
	// The new Envoy's cgroup has the same name, remade.
	w.ok(os.Remove(w.envoy.cgroup))
	w.envoy = newHand(t, w.root, filepath.Base(w.envoy.cgroup))
	w.ok(w.redirect.AttachProxy(0, w.envoy.cgroup))
	w.listen(w.envoy, p, 0)
	p.reaches(t, serviceIPv4)
	relayed(t, stranger, appAddresses[0])
}

func lifeAgentRestart(t *testing.T) {
	w, p, stranger := serving(t)
	w.ok(w.redirect.SetMode(p.uid, redirect.Mode{Strict: true, ServerFirst: []uint16{9090}}))
	kept, g := p.reaches(t, serviceIPv4)
	w.ok(w.redirect.Close())
	// Nobody is there, and everything goes on.
	p.reaches(t, otherIPv6)
	relayed(t, stranger, appAddresses[0])

	w.load()
	if err := kept.write("still\n"); err != nil {
		t.Error(err)
	}
	if line, err := kept.readLine(); err != nil || line != "still" {
		t.Errorf("the connection of before: %q, %v", line, err)
	}
	pods, err := w.redirect.Pods()
	if want := p.description(); err != nil || len(pods) != 1 || pods[0].UID != want.UID || pods[0].Sandbox != want.Sandbox || pods[0].NetnsPath != want.NetnsPath || len(pods[0].Addresses) != 2 {
		t.Errorf("pods: %+v, %v", pods, err)
	}
	state, err := w.redirect.Verify(p.uid)
	if err != nil || !state.Captured() || !state.Strict || state.Outgoing != 2 || len(state.Listeners) != 3 {
		t.Errorf("verify: %+v, %v", state, err)
	}
	w.services() // the same again: the steering address stays
	if _, after := p.reaches(t, serviceIPv4); after.Local != g.Local {
		t.Errorf("steered to %s, before the restart to %s", after.Local, g.Local)
	}
	if _, err := w.redirect.SetServices(nil); err != nil {
		t.Error(err)
	}
	if _, err := p.dial(serviceIPv4); err == nil {
		t.Error("a service that was taken out is captured")
	}
	w.ok(w.redirect.Enrol(p.description()))
	w.ok(w.redirect.AttachProxy(0, w.envoy.cgroup))
	w.services()
	p.reaches(t, serviceIPv4)
}

func lifeWithdraw(t *testing.T) {
	w, p, stranger := serving(t)
	p.sysctl("ipv4/ip_local_reserved_ports", "8000-8009,15000-15019,30000") // some of its own, after it was enrolled
	var kept []*stream
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		st, _ := p.reaches(t, to)
		kept = append(kept, st)
	}
	w.ok(w.redirect.Capture(p.uid, true, false))
	w.ok(w.redirect.Capture(p.uid, false, false))
	wantBy(t, stranger, appAddresses[0], "app")
	w.ok(w.redirect.Withdraw(p.uid))
	if _, err := w.redirect.Verify(p.uid); !errors.Is(err, redirect.ErrUnknownPod) {
		t.Errorf("verify: %v", err)
	}
	if pods, err := w.redirect.Pods(); err != nil || len(pods) > 0 {
		t.Errorf("pods: %v, %v", pods, err)
	}
	if _, err := w.redirect.Sweep(time.Hour); err != nil {
		t.Error(err)
	}
	for _, st := range kept {
		if err := st.write("still\n"); err != nil {
			t.Error(err)
		}
		if line, err := st.readLine(); err != nil || line != "still" {
			t.Errorf("a connection after Withdraw: %q, %v", line, err)
		}
		if got := st.peer().String(); got != serviceIPv4 && got != serviceIPv6 {
			t.Errorf("getpeername after Withdraw says %s", got)
		}
	}
	wantBy(t, stranger, appAddresses[1], "app")
	w.ok(w.redirect.Enrol(p.description())) // it may come back meanwhile
	w.ok(w.redirect.Capture(p.uid, true, true))
	p.reaches(t, serviceIPv4)
	p.reset()
	stranger.reset()
	w.ok(w.redirect.Withdraw(p.uid))
	eventually(t, "the end of the last connection", func() error {
		if _, err := w.redirect.Sweep(time.Hour); err != nil {
			return err
		}
		if routes := p.steeringRoutes(); len(routes) > 0 {
			return errors.New("the routes are left")
		}
		return nil
	})
	if got := p.readSysctl("ipv4/ip_local_reserved_ports"); got != "8000-8009,30000" {
		t.Errorf("reserved ports are %s", got)
	}
	p.sysctl("ipv4/ip_local_reserved_ports", "\n")
	w.unlistenQuietly(p)
	untouched(t, w, p)
}

// lifeReservedPorts enrols a pod that keeps some of the proxy ports for itself by sysctl.
func lifeReservedPorts(t *testing.T) {
	w := newWorld(t)
	p := w.pod("a", podIPv4, podIPv6)
	const own = "8000-8009,14999-15001,15006,15019-15020"
	p.sysctl("ipv4/ip_local_reserved_ports", own)
	for range 2 {
		w.ok(w.redirect.Enrol(p.description()))
		if got := p.readSysctl("ipv4/ip_local_reserved_ports"); got != "8000-8009,14999-15020" {
			t.Errorf("reserved ports are %s", got)
		}
	}
	w.ok(w.redirect.Close()) // another agent withdraws it
	w.load()
	w.ok(w.redirect.Enrol(p.description()))
	w.ok(w.redirect.Withdraw(p.uid))
	if got := p.readSysctl("ipv4/ip_local_reserved_ports"); got != own {
		t.Errorf("reserved ports are %s, before %s", got, own)
	}
}

// unlistenQuietly closes the listeners of a pod that the instance no longer knows.
func (w *world) unlistenQuietly(p *pod) {
	for _, port := range []uint16{names.PortOutHTTP, names.PortIn, names.PortInFirst} {
		w.envoy.must(order{Do: "unlisten", Netns: p.path, Port: port})
	}
}

func lifeNewSandbox(t *testing.T) {
	w, p, _ := serving(t)
	again := w.pod("b", peerIPv4, peerIPv6)
	again.uid = p.uid
	d := again.description()
	d.Sandbox = "another"
	w.ok(w.redirect.Enrol(d))
	state, err := w.redirect.Verify(p.uid)
	if err != nil || state.Pod.Sandbox != "another" || state.Captured() || len(state.Drift) > 0 {
		t.Errorf("verify: %+v, %v", state, err)
	}
	if routes := p.steeringRoutes(); len(routes) > 0 {
		t.Errorf("the old sandbox keeps %v", routes)
	}
	w.listen(w.envoy, again, 0)
	w.ok(w.redirect.Capture(p.uid, true, true))
	again.reaches(t, serviceIPv4)

	again.destroy() // the netns ends with its last user: the stand-in's listeners hold it
	state, err = w.redirect.Verify(p.uid)
	if err != nil || state.Captured() {
		t.Errorf("verify without a netns: %+v, %v", state, err)
	}
	w.ok(w.redirect.Withdraw(p.uid))
}
