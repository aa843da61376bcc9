package status

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/barrier"
	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// api is an API server that takes every status.
type api struct {
	client.SubResourceWriter
	start time.Time

	mu     sync.Mutex
	writes []string // "<when> <object>: <Programmed's or Enrolled's status and reason>"
	refuse int
}

// toStatus is a client of it.
type toStatus struct {
	client.Client
	to *api
}

func (c toStatus) Status() client.SubResourceWriter { return c.to }

func (a *api) Patch(_ context.Context, o client.Object, p client.Patch, _ ...client.SubResourcePatchOption) error {
	body, err := p.Data(o)
	if err != nil {
		return err
	}
	var content struct {
		Metadata struct{ UID, ResourceVersion string }
		Status   struct{ Conditions []metav1.Condition }
	}
	if err := json.Unmarshal(body, &content); err != nil {
		return err
	}
	if _, pod := o.(*corev1.Pod); content.Metadata.UID == "" || !pod && content.Metadata.ResourceVersion == "" {
		return fmt.Errorf("metadata %+v names no object as it was read", content.Metadata)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refuse > 0 {
		a.refuse--
		return fmt.Errorf("the API server is away")
	}
	for _, c := range content.Status.Conditions {
		if c.Type == "Programmed" || c.Type == names.ConditionEnrolled {
			a.writes = append(a.writes, fmt.Sprintf("%s %s: %s %s", time.Since(a.start), o.GetName(), c.Status, c.Reason))
		}
	}
	return nil
}

func (a *api) said() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return strings.Join(a.writes, ", ")
}

func (a *api) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.writes)
}

// show lets the watch see what an object's status is.
func show(p *engine.Picture, name, status, reason string) {
	c := metav1.Condition{Type: "Programmed", Status: metav1.ConditionStatus(status), Reason: reason, ObservedGeneration: 2}
	for _, a := range p.Input.AccessPolicies {
		if a.Name == name {
			want := newView(p).targets()[0].conditions
			a.Status.Conditions = slices.Clone(want)
			a.Status.Conditions[1].Status, a.Status.Conditions[1].Reason = c.Status, c.Reason
		}
	}
}

// TestWriting runs a Writer on a clock of its own.
func TestWriting(t *testing.T) {
	behind := func(p *engine.Picture) *engine.Picture {
		q := *p
		q.Nodes.Open = map[serve.Resource][]string{{TypeURL: xds.TypeLocalPod, Name: "n1/p1"}: {"n1"}}
		return &q
	}
	start := func(t *testing.T) (*api, *Writer, func(time.Duration)) {
		a := &api{start: time.Now()}
		w := New(Config{Client: toStatus{to: a}, Log: slog.New(slog.DiscardHandler)})
		go w.Run(t.Context())
		return a, w, func(d time.Duration) { time.Sleep(d); synctest.Wait() }
	}
	t.Run("what is acknowledged in a moment is never Pending", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, w, pass := start(t)
			p := policyPicture()
			w.Take(*behind(p))
			pass(200 * time.Millisecond)
			w.Take(*p)
			pass(time.Minute)
			if got := a.said(); !strings.HasPrefix(got, "200ms a: True Programmed") || strings.Contains(got, "Pending") {
				t.Error(got)
			}
		})
	})
	t.Run("what takes longer says so, and is True as soon as it may be written again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, w, pass := start(t)
			p := policyPicture()
			w.Take(*behind(p))
			pass(400 * time.Millisecond)
			done := *p
			done.Input.AccessPolicies = slices.Clone(p.Input.AccessPolicies)
			copied := *p.Input.AccessPolicies[0]
			done.Input.AccessPolicies[0] = &copied
			show(&done, "a", "False", "Pending")
			for range 5 { // whatever else happens does not put it off
				w.Take(done)
				pass(100 * time.Millisecond)
			}
			pass(time.Second)
			if got := a.said(); got != "300ms a: False Pending, 1.3s a: True Programmed" {
				t.Error(got)
			}
		})
	})
	t.Run("a write that fails comes again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, w, pass := start(t)
			a.refuse = 1
			w.Take(*policyPicture())
			pass(retry)
			if got := a.said(); got != "2s a: True Programmed" {
				t.Error(got)
			}
		})
	})
	t.Run("many objects are written 20 a second", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, w, pass := start(t)
			p := policyPicture()
			one := p.Input.AccessPolicies[0]
			p.Input.AccessPolicies = nil
			for i := range 60 {
				n := one.DeepCopy()
				n.Name = fmt.Sprint("a", i)
				p.Input.AccessPolicies = append(p.Input.AccessPolicies, n)
			}
			w.Take(*p)
			pass(time.Millisecond)
			first := a.count()
			pass(1900 * time.Millisecond) // before any is written a second time
			if all := a.count(); all < 55 || first > perSecond+1 {
				t.Errorf("%d at once, %d after 1.9 s", first, all)
			}
		})
	})
	t.Run("a pod's step is written at once, a silent node's word is waited for", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, w, pass := start(t)
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", UID: types.UID("u")}}
			pod.Status.Conditions = []corev1.PodCondition{{Type: names.ConditionEnrolled, Status: corev1.ConditionTrue}}
			p := &engine.Picture{Input: resolve.Input{Pods: []*corev1.Pod{pod}}, Nodes: connectedTo("n1"),
				Snapshot: &ir.Snapshot{Pods: map[string]*ir.Pod{"u": {UID: "u", Key: ir.Key{Namespace: "shop", Name: "p"}, Node: "n1", Goal: ir.Enforced, Stage: ir.Enforced}}}}
			w.Take(*p)
			pass(time.Second)
			reported := *p
			reported.Reports = barrier.Reports{"n1": {"u": {State: meshv1.PodState_POD_STATE_PREPARING}}}
			w.Take(reported)
			pass(time.Millisecond)
			w.Take(*p)
			pass(patience[notReported])
			if got := a.said(); got != "1s p: False Pending, 6.001s p: Unknown NotReported" {
				t.Error(got)
			}
		})
	})
}

type ads = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// node is the ADS stream of a node's agent, to be read and answered by the test.
func node(t *testing.T, conn *grpc.ClientConn, name string) ads {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(metadata.AppendToOutgoingContext(ctx, "node", name))
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// TestProgressOfRealStreams follows a route through five nodes that use it, over gRPC.
func TestProgressOfRealStreams(t *testing.T) {
	server := serve.New(serve.Config{Log: slog.New(slog.DiscardHandler)})
	listener := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(g, &serve.Service{Server: server, Peer: func(ctx context.Context) (string, error) {
		return metadata.ValueFromIncomingContext(ctx, "node")[0], nil
	}})
	go func() { _ = g.Serve(listener) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })

	key := ir.PortKey{Service: ir.Key{Namespace: "shop", Name: "web"}, Port: 80}
	snapshot := func(status uint32) *ir.Snapshot {
		return &ir.Snapshot{Services: map[ir.Key]*ir.Service{key.Service: {Key: key.Service, Ports: []*ir.ServicePort{{Key: key, Class: ir.ClassHTTP, Routes: []*ir.Route{{Redirect: &ir.Redirect{Hostname: fmt.Sprint("host-", status), Status: 302}}}}}}}}
	}
	kind := gwv1.Kind("Service")
	programmed := func() string {
		p := &engine.Picture{Snapshot: snapshot(0), Nodes: server.State()}
		return say(newView(p).routed(resolve.Ref{Kind: "HTTPRoute", Namespace: "shop", Name: "r"}, gwv1.ParentReference{Kind: &kind, Name: "web"}, 1))
	}
	becomes := func(what, want string) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); programmed() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %s, want %s", what, programmed(), want)
			}
		}
	}
	// take acknowledges responses up to one of a type.
	take := func(s ads, typeURL string) *discovery.DeltaDiscoveryResponse {
		for {
			r, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if r.TypeUrl == typeURL {
				return r
			}
			if err := s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}); err != nil {
				t.Fatal(err)
			}
		}
	}
	acknowledge := func(s ads, r *discovery.DeltaDiscoveryResponse) {
		if err := s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}); err != nil {
			t.Fatal(err)
		}
	}

	server.Set(serve.Version{Snapshot: snapshot(500)})
	route := names.Route("shop", "web", 80)
	var nodes []ads
	for i := range 6 { // the sixth does not use the route
		s := node(t, conn, fmt.Sprint("n", i+1))
		for _, typeURL := range []string{xds.TypeMesh, xds.TypeNamespace, xds.TypeService, xds.TypeWorkload, xds.TypeLocalPod} {
			if err := s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}}); err != nil {
				t.Fatal(err)
			}
			acknowledge(s, take(s, typeURL))
		}
		nodes = append(nodes, s)
	}
	becomes("nobody has called the service", "True NoConsumers no node has anything to do with it")
	for _, s := range nodes[:5] {
		if err := s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeRoute, ResourceNamesSubscribe: []string{route}}); err != nil {
			t.Fatal(err)
		}
		acknowledge(s, take(s, xds.TypeRoute))
	}
	becomes("five nodes use it", "True Programmed 5/5 nodes")

	server.Set(serve.Version{Snapshot: snapshot(501)})
	var answers []*discovery.DeltaDiscoveryResponse
	for _, s := range nodes[:5] {
		answers = append(answers, take(s, xds.TypeRoute))
	}
	becomes("none has answered", "False Pending 0/5 nodes; waiting for n1, n2, n3 and 2 more")
	for i := range 3 {
		acknowledge(nodes[i], answers[i])
	}
	becomes("three have", "False Pending 3/5 nodes; waiting for n4, n5")
	acknowledge(nodes[3], answers[3])
	if err := nodes[4].CloseSend(); err != nil {
		t.Fatal(err)
	}
	becomes("the fifth loses its stream", "False Pending 4/5 nodes; waiting for n5 (away)")
}
