package serve

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// deadline is far beyond what any of these takes.
const deadline = 30 * time.Second

type ads = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// connect serves s to a node over a real gRPC stream.
func connect(t *testing.T, s *Server, node string) (stream ads, hangUp func()) {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(g, &Service{Server: s, Peer: func(context.Context) (string, error) { return node, nil }, HangUp: func(context.Context) {}})
	go func() { _ = g.Serve(listener) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	t.Cleanup(cancel)
	stream, err = discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return stream, cancel
}

// join asks for every wildcard type but those that have been asked for, as agents do, and acknowledges the first responses.
func join(t *testing.T, s ads, before ...string) {
	t.Helper()
	for typeURL := range wildcard {
		if !slices.Contains(before, typeURL) {
			send(t, s, &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}})
		}
	}
	for range len(wildcard) - len(before) {
		ack(t, s, receive(t, s))
	}
}

func send(t *testing.T, s ads, r *discovery.DeltaDiscoveryRequest) {
	t.Helper()
	if err := s.Send(r); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, s ads) *discovery.DeltaDiscoveryResponse {
	t.Helper()
	r, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func ack(t *testing.T, s ads, r *discovery.DeltaDiscoveryResponse) {
	t.Helper()
	send(t, s, &discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
}

// eventually waits for a condition: the server takes an answer in its own time.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: ", what)
		}
	}
}

func namespaces(all ...string) *ir.Snapshot {
	s := &ir.Snapshot{Namespaces: map[string]*ir.Namespace{}}
	for _, n := range all {
		s.Namespaces[n] = &ir.Namespace{Name: n, Mode: ir.Permissive}
	}
	return s
}

func quiet() *Server { return New(Config{Log: slog.New(slog.DiscardHandler)}) }

func TestStream(t *testing.T) {
	s := quiet()
	s.set(namespaces("a", "b"))
	stream, hangUp := connect(t, s, "node-1")
	send(t, stream, &discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeNamespace, ResourceNamesSubscribe: []string{"*"}})
	first := receive(t, stream)
	if len(first.Resources) != 2 || first.TypeUrl != xds.TypeNamespace {
		t.Fatalf("subscribed to all namespaces, got %v", first)
	}
	if s.Answered() != 0 || len(s.State().Open[Resource{xds.TypeNamespace, "a"}]) != 1 {
		t.Errorf("answered before the node was: %+v", s.State())
	}
	ack(t, stream, first)
	eventually(t, "the ACK is taken", func() bool { return len(s.State().Open) == 0 })
	if s.Answered() != 0 || len(s.State().Joining) != 1 {
		t.Errorf("a node that has asked for namespaces alone counts as one that knows everything: %+v", s.State())
	}
	join(t, stream, xds.TypeNamespace)
	eventually(t, "all is answered", func() bool { return s.Answered() == 1 })

	// Only what changed is sent.
	generation := s.set(namespaces("a", "c"))
	second := receive(t, stream)
	if len(second.Resources) != 1 || second.Resources[0].Name != "c" || len(second.RemovedResources) != 1 || second.RemovedResources[0] != "b" {
		t.Errorf("b went and c came, got %v", second)
	}
	// A refusal is an answer, and it stands until the resource is taken.
	send(t, stream, &discovery.DeltaDiscoveryRequest{TypeUrl: second.TypeUrl, ResponseNonce: second.Nonce, ErrorDetail: &rpc.Status{Message: "no"}})
	eventually(t, "the refusal is known", func() bool { return len(s.State().Refusals) == 2 })
	if s.Answered() != generation {
		t.Error("a refusal holds up the others")
	}
	if r := s.State().Refusals[0]; r.Node != "node-1" || r.Text != "no" {
		t.Errorf("refusal %+v", r)
	}

	// An unknown name gets a resource that refuses, not silence.
	send(t, stream, &discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: []string{"svc/no/where/80"}})
	unknown := receive(t, stream)
	if len(unknown.Resources) != 1 || unknown.Resources[0].Name != "svc/no/where/80" {
		t.Errorf("an unknown cluster: %v", unknown)
	}
	ack(t, stream, unknown)

	// A node that has just gone is waited for.
	eventually(t, "all is answered", func() bool { return s.Answered() == generation })
	hangUp()
	eventually(t, "the node is away", func() bool { return len(s.State().Away) == 1 })
	if s.Answered() != 0 {
		t.Error("a node that has just gone does not hold anything up")
	}
	s.backdate("node-1", awayLimit)
	if s.Answered() != generation || len(s.State().Away) != 1 {
		t.Error("a node that is gone for good holds everything up")
	}
	s.backdate("node-1", awayShown)
	if len(s.State().Away) != 0 {
		t.Error("a node that is gone for good counts as one that will be back")
	}
}

// set serves a snapshot of no leader's.
func (s *Server) set(snapshot *ir.Snapshot) uint64 { return s.Set(Version{Snapshot: snapshot}) }

// backdate lets a node be away for longer.
func (s *Server) backdate(node string, by time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.away[node]
	a.since = time.Now().Add(-by)
	s.away[node] = a
}

func TestANewServerWaitsForTheNodesThatServed(t *testing.T) {
	s := quiet()
	s.Expect([]string{"node-1", "node-2"})
	generation := s.set(namespaces("a"))
	stream, _ := connect(t, s, "node-1")
	join(t, stream)
	eventually(t, "the first node knows everything", func() bool { return len(s.State().Nodes) == 1 && len(s.State().Behind) == 0 })
	if s.Answered() != 0 {
		t.Error("one of two nodes is back: that is not everybody")
	}
	other, _ := connect(t, s, "node-2")
	join(t, other)
	eventually(t, "both are back", func() bool { return s.Answered() == generation })
	s.Expect([]string{"node-1"})
	if s.Answered() != generation {
		t.Error("a node that is here is not waited for")
	}
}

// TestAnOlderChangeIsNotAnsweredBeforeItIsTaken: a change that waits while a newer one comes, or shares a response with
// one, still holds up its own generation.
func TestAnOlderChangeIsNotAnsweredBeforeItIsTaken(t *testing.T) {
	s := quiet()
	st := still(s, "node-1")
	changed := func(connections uint32, all ...string) uint64 {
		next := namespaces(all...)
		next.Mesh.ConnectionsPerPod = connections
		return s.set(next)
	}
	first := changed(1)
	changed(2)      // the same resource again
	changed(2, "a") // and another one
	if got := s.Answered(); got >= first {
		t.Errorf("nothing was sent, and %d is answered", got)
	}
	r := st.responses()
	if got := s.Answered(); got >= first || len(r) != 2 {
		t.Errorf("nothing was acknowledged, and %d is answered", got)
	}
	answer(st, r[:1])
	if got := s.Answered(); r[0].TypeUrl == xds.TypeMesh && got != first+1 {
		t.Errorf("the Mesh is acknowledged, the Namespace is not, and %d is answered", got)
	}
	answer(st, r[1:])
	if got := s.Answered(); got != s.generation {
		t.Errorf("all is acknowledged, and %d is answered", got)
	}
}

// TestWhoComesBackHasAnsweredNothing of what it has not been given again, however few generations ago it was made.
func TestWhoComesBackHasAnsweredNothing(t *testing.T) {
	s := quiet()
	s.set(namespaces("a"))
	st := newStream(s, "node-1")
	s.add(st)
	changed := namespaces("a")
	changed.Namespaces["a"].Mode = ir.Strict
	generation := s.set(changed)
	s.set(namespacesOf(changed, "b")) // later than what it misses
	for typeURL := range wildcard {
		st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: map[string]string{}})
	}
	st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeRoute, ResourceNamesSubscribe: []string{"route/shop/web/80"}, InitialResourceVersions: map[string]string{"route/shop/web/80": "old"}})
	if got := s.Answered(); got >= generation {
		t.Errorf("it has been given nothing, and %d is answered", got)
	}
	answer(st, st.responses())
	if got := s.Answered(); got != s.generation {
		t.Errorf("it has answered everything, and %d is answered", got)
	}
}

// namespacesOf is a snapshot with one namespace more.
func namespacesOf(before *ir.Snapshot, name string) *ir.Snapshot {
	next := namespaces(name)
	maps.Copy(next.Namespaces, before.Namespaces)
	return next
}

// still is a stream of a node that has asked for everything and answered the first responses, and acts no more by itself.
func still(s *Server, node string) *stream {
	st := newStream(s, node)
	s.add(st)
	for typeURL := range wildcard {
		st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}})
	}
	answer(st, st.responses())
	return st
}

func answer(st *stream, l []*discovery.DeltaDiscoveryResponse) {
	for _, r := range l {
		st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
	}
}

func TestARefusalNamesItsResources(t *testing.T) {
	s := quiet()
	s.set(namespaces())
	st := still(s, "node-1")
	for _, c := range []struct{ name, message, want string }{
		{"one of two is named", names.RefusedText("svc/shop/a/80", "bad TLS context"), "svc/shop/a/80: bad TLS context"},
		{"none is named", "cannot be read", "svc/shop/a/80: cannot be read, svc/shop/b/80: cannot be read"},
		{"another one is named", names.RefusedText("svc/shop/c/80", "bad"), "svc/shop/a/80: svc/shop/c/80: bad, svc/shop/b/80: svc/shop/c/80: bad"},
	} {
		st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: []string{"svc/shop/a/80", "svc/shop/b/80"}})
		r := st.responses()
		st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: r[0].TypeUrl, ResponseNonce: r[0].Nonce, ErrorDetail: &rpc.Status{Message: c.message}})
		var got []string
		for _, refusal := range s.State().Refusals {
			got = append(got, refusal.Name+": "+refusal.Text)
		}
		if text := strings.Join(got, ", "); text != c.want {
			t.Errorf("%s: %s, want %s", c.name, text, c.want)
		}
	}
}

func TestWhatIsRemovedIsForgotten(t *testing.T) {
	s := quiet()
	s.set(namespaces("a", "b"))
	st := still(s, "node-1")
	s.set(namespaces("a"))
	removal := st.responses()
	if len(removal) != 1 || len(removal[0].RemovedResources) != 1 {
		t.Fatalf("removal: %v", removal)
	}
	s.set(namespaces("a", "b")) // it comes back before the removal is acknowledged
	back := st.responses()
	answer(st, removal)
	if st.sent[Resource{xds.TypeNamespace, "b"}] == "" {
		t.Error("the ACK of a removal made the server forget what it sent after it")
	}
	answer(st, back)
	s.set(namespaces("a"))
	answer(st, st.responses())
	if _, kept := st.sent[Resource{xds.TypeNamespace, "b"}]; kept || len(s.index) != 2 { // the Mesh and a
		t.Errorf("sent %v, index of %d", st.sent, len(s.index))
	}
}

func TestStateTellsWhoUsesARoute(t *testing.T) {
	s := quiet()
	s.set(namespaces())
	route := names.Route("shop", "web", 80)
	one, other := still(s, "node-1"), still(s, "node-2")
	still(s, "node-3")
	users := func() string { return strings.Join(s.State().Routes[route], " ") }
	one.request(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeRoute, ResourceNamesSubscribe: []string{route}})
	other.request(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeRoute, ResourceNamesSubscribe: []string{route}})
	if users() != "node-1 node-2" {
		t.Errorf("used by %q", users())
	}
	if open := s.State().Open[Resource{xds.TypeRoute, route}]; len(open) != 2 {
		t.Errorf("not sent yet, open at %v", open)
	}
	answer(one, one.responses())
	if open := s.State().Open[Resource{xds.TypeRoute, route}]; len(open) != 1 || open[0] != "node-2" {
		t.Errorf("node-1 has it, open at %v", open)
	}
	s.remove(one)
	if users() != "node-1 node-2" {
		t.Errorf("node-1 lost its stream; used by %q", users())
	}
	other.request(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeRoute, ResourceNamesUnsubscribe: []string{route}})
	still(s, "node-1")
	if users() != "" {
		t.Errorf("nobody asked for it again; used by %q", users())
	}
}

func TestANodeGetsNoOtherNodesPods(t *testing.T) {
	s := quiet()
	s.set(&ir.Snapshot{Pods: map[string]*ir.Pod{"u1": {UID: "u1", Node: "node-1"}, "u2": {UID: "u2", Node: "node-2"}}})
	st := newStream(s, "node-1")
	s.add(st)
	st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeLocalPod, ResourceNamesSubscribe: []string{"*", "node-2/u2"},
		InitialResourceVersions: map[string]string{"node-2/u2": "guessed", "node-1/gone": "old"}})
	r := st.responses()
	if len(r) != 1 || len(r[0].Resources) != 1 || r[0].Resources[0].Name != "node-1/u1" || !slices.Equal(r[0].RemovedResources, []string{"node-1/gone"}) {
		t.Errorf("node-1 was given %v", r)
	}
}

func TestAnEndedStreamSubscribesToNothing(t *testing.T) {
	s := quiet()
	s.set(namespaces())
	st := still(s, "node-1")
	s.remove(st)
	st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeRoute, ResourceNamesSubscribe: []string{names.Route("shop", "web", 80)}})
	if len(s.named) != 0 || len(s.State().Routes) != 0 {
		t.Errorf("%d resources are kept for a stream that has ended", len(s.named))
	}
}

// TestChangesReachEverybody compares, after random changes, what a long-lived stream was sent with what a new server gives.
func TestChangesReachEverybody(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	snapshot := &ir.Snapshot{}
	s := quiet()
	s.set(snapshot)
	requests := []*discovery.DeltaDiscoveryRequest{
		{TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: []string{"svc/shop/web/80", "tcp/10.96.0.1:80", "pod/10.0.0.1"}},
		{TypeUrl: xds.TypeEndpoints, ResourceNamesSubscribe: []string{"svc/shop/web/80", "tcp/10.96.0.1:80"}},
		{TypeUrl: xds.TypeRoute, ResourceNamesSubscribe: []string{"route/shop/web/80"}},
		{TypeUrl: xds.TypeInboundPolicy, ResourceNamesSubscribe: []string{"p0", "p1"}},
	}
	held := map[Resource]string{}
	drain := func(st *stream, into map[Resource]string) {
		for l := st.responses(); len(l) > 0; l = st.responses() {
			for _, r := range l {
				for _, x := range r.Resources {
					into[Resource{r.TypeUrl, x.Name}] = x.Version
				}
				for _, name := range r.RemovedResources {
					delete(into, Resource{r.TypeUrl, name})
				}
			}
			answer(st, l)
		}
	}
	subscribed := func(s *Server) *stream {
		st := newStream(s, "n1")
		s.add(st)
		for typeURL := range wildcard {
			st.request(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}})
		}
		for _, r := range requests {
			st.request(r)
		}
		return st
	}
	st := subscribed(s)
	for i := range 500 {
		snapshot = change(rnd, snapshot)
		s.set(snapshot)
		if rnd.IntN(3) == 0 {
			continue // the stream is slow
		}
		drain(st, held)
		fresh, want := quiet(), map[Resource]string{}
		fresh.set(snapshot)
		drain(subscribed(fresh), want)
		if !maps.Equal(held, want) {
			t.Fatalf("after change %d the node holds %v, want %v", i, held, want)
		}
	}
}

// change makes another snapshot that keeps the pointers of what did not change, as resolve does.
func change(rnd *rand.Rand, old *ir.Snapshot) *ir.Snapshot {
	web, back := ir.Key{Namespace: "shop", Name: "web"}, ir.Key{Namespace: "shop", Name: "back"}
	next := &ir.Snapshot{Mesh: old.Mesh, Namespaces: clone(old.Namespaces), Services: clone(old.Services), Pods: clone(old.Pods), Policies: clone(old.Policies),
		Owners: map[netip.AddrPort]ir.PortKey{}, PodsByAddress: map[netip.Addr]string{}}
	switch rnd.IntN(5) {
	case 0:
		next.Mesh.ConnectionsPerPod = rnd.Uint32N(3)
	case 1:
		toggle(rnd, next.Namespaces, fmt.Sprint("ns", rnd.IntN(3)), func(name string) *ir.Namespace { return &ir.Namespace{Name: name, Enrol: rnd.IntN(2) == 0} })
	case 2:
		toggle(rnd, next.Policies, fmt.Sprint("p", rnd.IntN(2)), func(hash string) *ir.InboundPolicy { return &ir.InboundPolicy{Hash: hash} })
	case 3:
		uid := fmt.Sprint("u", rnd.IntN(3))
		node := map[string]string{"u0": "n1", "u1": "n1", "u2": "n2"}[uid]
		toggle(rnd, next.Pods, uid, func(uid string) *ir.Pod {
			return &ir.Pod{UID: uid, Node: node, Stage: ir.Stage(rnd.IntN(3)), SPIFFEID: "spiffe://x/" + uid, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
		})
	case 4:
		toggle(rnd, next.Services, web, func(ir.Key) *ir.Service {
			port := &ir.ServicePort{Key: ir.PortKey{Service: web, Port: 80}, Class: ir.ClassHTTP, Protocol: ir.Protocol(1 + rnd.IntN(2))}
			if rnd.IntN(2) == 0 {
				port.Routes = []*ir.Route{{Backends: []ir.Backend{{Weight: 1 + rnd.Uint32N(2), Port: ir.PortKey{Service: back, Port: 80}}}}}
			}
			port.Endpoints = []*ir.Endpoint{{Address: netip.MustParseAddrPort(fmt.Sprintf("10.0.0.%d:80", 1+rnd.IntN(3))), Transport: ir.Plain, Ready: true}}
			return &ir.Service{Key: web, Ports: []*ir.ServicePort{port}}
		})
	}
	if rnd.IntN(6) == 0 { // a route is also made of its backends' ports
		toggle(rnd, next.Services, back, func(ir.Key) *ir.Service {
			return &ir.Service{Key: back, Ports: []*ir.ServicePort{{Key: ir.PortKey{Service: back, Port: 80}, Affinity: time.Duration(rnd.IntN(2)) * time.Hour}}}
		})
	}
	if next.Services[web] != nil {
		next.Owners[netip.MustParseAddrPort("10.96.0.1:80")] = ir.PortKey{Service: web, Port: 80}
	}
	for _, uid := range slices.Sorted(maps.Keys(next.Pods)) {
		next.PodsByAddress[netip.MustParseAddr("10.0.0.1")] = uid
	}
	return next
}

func clone[K comparable, V any](m map[K]V) map[K]V {
	out := map[K]V{}
	maps.Copy(out, m)
	return out
}

// toggle removes one, or makes one anew.
func toggle[K comparable, V any](rnd *rand.Rand, m map[K]*V, k K, fresh func(K) *V) {
	if m[k] != nil && rnd.IntN(2) == 0 {
		delete(m, k)
		return
	}
	m[k] = fresh(k)
}
