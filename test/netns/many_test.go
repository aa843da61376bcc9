package netns

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

// outMany holds 40,200 connections in one pod, 20,100 of each family to three services, from 16,080 source ports: to one
// destination they would not do. -test.short makes it a hundredth of both. The hard limit of open files is 20,000: three
// processes dial and three accept.
func outMany(t *testing.T) {
	const hands = 3
	count := 40200
	if testing.Short() {
		count /= 100
	}
	ports := count * 2 / 5
	w := newWorld(t, limits(redirect.Limits{ConnectionsPerPod: 65536}))
	p := w.pod("a", podIPv4, podIPv6)
	var services []redirect.Service
	var targets []string
	for i := range 3 {
		for _, at := range []string{fmt.Sprintf("10.96.0.%d:80", i+1), fmt.Sprintf("[fd10::%d]:80", i+1)} {
			services = append(services, redirect.Service{Addr: netip.MustParseAddrPort(at), Class: redirect.ClassHTTP})
			targets = append(targets, at)
		}
	}
	if refused, err := w.redirect.SetServices(services); err != nil || len(refused) > 0 {
		t.Fatal(refused, err)
	}
	p.sysctl("ipv4/ip_local_port_range", fmt.Sprintf("20000 %d", 20000+ports-1)) // of both families
	w.ok(w.redirect.Enrol(p.description()))
	// Envoy's workers, here processes of one cgroup whose sockets form one group.
	workers := []*hand{w.envoy}
	for len(workers) < hands {
		workers = append(workers, newHand(t, w.root, w.name+"-envoy"))
	}
	for _, h := range workers {
		h.must(order{Do: "listen", Netns: p.path, Port: names.PortOutHTTP, By: "out", Hold: true})
	}
	w.ok(w.redirect.Capture(p.uid, false, true))

	started := time.Now()
	var herds sync.WaitGroup
	clients := make([]*hand, hands)
	for i := range clients {
		clients[i] = newHand(t, w.root, unique("client"))
	}
	for _, h := range clients {
		herds.Go(func() {
			r, err := h.try(order{Do: "herd", Netns: p.path, Targets: targets, Count: count / hands})
			if err != nil || r.Error != "" || r.Wrong > 0 {
				t.Errorf("%d of %d connections went wrong, %s %v", r.Wrong, count/hands, r.Error, err)
			}
		})
	}
	herds.Wait()
	state, err := w.redirect.Verify(p.uid)
	if err != nil || state.Outgoing != uint64(count) {
		t.Errorf("%d connections are counted, not %d, %v", state.Outgoing, count, err)
	}
	t.Logf("%d connections in %v", count, time.Since(started).Round(time.Millisecond))
	if n := w.entries("handovers"); n != 0 {
		t.Errorf("%d hand-overs are left", n)
	}
	for _, h := range clients {
		h.must(order{Do: "disband"})
	}
	w.settled(p)
}
