package serve

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"syscall"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// spent is the processor time that this process has used: on a machine that is shared, the clock tells little.
func spent() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkPush measures one changed endpoint for 1,000 nodes that use it, from the snapshot to the answers taken; gRPC and
// the network are not in it.
func BenchmarkPush(b *testing.B) {
	const nodes = 1000
	s := New(Config{Log: slog.New(slog.DiscardHandler)})
	key1 := ir.PortKey{Service: ir.Key{Namespace: "shop", Name: "web"}, Port: 80}
	snapshot := func(n int) *ir.Snapshot {
		e := &ir.Endpoint{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 80), Transport: ir.Plain, Ready: true}
		return &ir.Snapshot{Services: map[ir.Key]*ir.Service{key1.Service: {Key: key1.Service, Ports: []*ir.ServicePort{{Key: key1, Class: ir.ClassHTTP, Protocol: ir.HTTP1, Endpoints: []*ir.Endpoint{e}}}}}}
	}
	s.set(snapshot(0))
	var streams []*stream
	for i := range nodes {
		st := newStream(s, fmt.Sprint(i))
		s.add(st)
		st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeEndpoints, ResourceNamesSubscribe: []string{"svc/shop/web/80"}})
		st.responses()
		streams = append(streams, st)
	}
	n := 0
	start := spent()
	for b.Loop() {
		n++
		s.set(snapshot(n))
		for _, st := range streams {
			l := st.responses()
			if len(l) != 1 {
				b.Fatalf("%d responses", len(l))
			}
			st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: l[0].TypeUrl, ResponseNonce: l[0].Nonce})
		}
	}
	b.ReportMetric(float64(spent()-start)/float64(b.N)/nodes, "cpu-ns/node")
}

// BenchmarkPushIndex measures one pod whose mTLS changed for 1,000 nodes that follow the whole index of 10,000 pods, from the
// snapshot to the answers taken.
func BenchmarkPushIndex(b *testing.B) {
	const nodes, each = 1000, 10
	s := New(Config{Log: slog.New(slog.DiscardHandler)})
	pods := map[string]*ir.Pod{}
	for i := range nodes * each {
		uid := fmt.Sprintf("00000000-0000-0000-0000-%012d", i)
		pods[uid] = &ir.Pod{UID: uid, Key: ir.Key{Namespace: "shop", Name: uid}, Node: fmt.Sprint(i % nodes), Goal: ir.Enforced, Stage: ir.Enforced, MTLS: true,
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})}, SPIFFEID: "spiffe://cluster.local/ns/shop/sa/default"}
	}
	snapshot := func(n int) *ir.Snapshot {
		next := &ir.Snapshot{Pods: maps.Clone(pods)}
		uid := fmt.Sprintf("00000000-0000-0000-0000-%012d", n%(nodes*each))
		pod := *pods[uid]
		pod.MTLS = !pod.MTLS
		next.Pods[uid], pods = &pod, next.Pods
		return next
	}
	s.set(&ir.Snapshot{Pods: pods})
	var streams []*stream
	for i := range nodes {
		streams = append(streams, still(s, fmt.Sprint(i)))
	}
	n := 0
	used := time.Duration(0)
	b.ReportAllocs()
	for b.Loop() {
		n++
		next := snapshot(n)
		start := spent()
		s.set(next)
		sent := 0
		for _, st := range streams {
			l := st.responses()
			sent += len(l)
			answer(st, l)
		}
		if sent != nodes { // the workload, for each
			b.Fatalf("%d responses", sent)
		}
		used += spent() - start
	}
	b.ReportMetric(float64(used)/float64(b.N)/nodes, "cpu-ns/node")
}
