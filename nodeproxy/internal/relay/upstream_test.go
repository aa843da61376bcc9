package relay_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/relay/relaytest"
)

// TestIndexIsAppliedInOrder: one change of a type is in force before the next is begun, and holds up no other type.
func TestIndexIsAppliedInOrder(t *testing.T) {
	controller := relaytest.NewController(t)
	var mu sync.Mutex
	var applied []string
	running := 0
	release := make(chan struct{})
	var upstream *relay.Upstream
	cache := relay.NewCache(relay.Config{Want: func(k relay.Key, wanted bool) { upstream.Want(k, wanted) }, Log: slog.New(slog.DiscardHandler)})
	upstream = relay.NewUpstream(relay.UpstreamConfig{
		Connect: controller.Connect, Node: "n1", Cache: cache, Log: slog.New(slog.DiscardHandler),
		Apply: func(ctx context.Context, typeURL string) error {
			if typeURL != relay.TypeWorkload {
				return nil
			}
			mu.Lock()
			running++
			if running > 1 {
				t.Error("two changes of one type are put into force at once")
			}
			mu.Unlock()
			select {
			case <-release:
			case <-ctx.Done():
			}
			mu.Lock()
			defer mu.Unlock()
			running--
			applied = append(applied, fmt.Sprint(len(upstream.Captured())))
			return nil
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go upstream.Run(ctx)
	until(t, "the agent is connected", func() bool { open, _ := controller.Connected(); return open }, nil)
	var nonces []string
	for i := range 3 {
		name := fmt.Sprint(i)
		nonces = append(nonces, controller.Send(t, relay.TypeWorkload, map[string]proto.Message{name: &meshv1.Workload{Uid: name, Mtls: true, Addresses: [][]byte{{10, 1, 0, byte(i)}}}}))
	}
	other := controller.Send(t, relay.TypeMesh, map[string]proto.Message{"mesh": &meshv1.Mesh{TrustDomain: "cluster.local"}})
	until(t, "the other type is in force", func() bool { _, ok := controller.Answer(other); return ok }, nil)
	for _, nonce := range nonces {
		if _, ok := controller.Answer(nonce); ok {
			t.Error("a change is answered before it is in force")
		}
	}
	for _, nonce := range nonces {
		release <- struct{}{}
		until(t, "the next change is in force", func() bool { _, ok := controller.Answer(nonce); return ok }, nil)
	}
	// A change sees at least what it is about.
	if len(applied) != 3 || !slices.IsSorted(applied) || applied[2] != "3" {
		t.Errorf("in force with %v workloads", applied)
	}
	select {
	case <-upstream.Synced():
		t.Error("synced before every type has come")
	default:
	}
	for _, typeURL := range []string{relay.TypeNamespace, relay.TypeService, relay.TypeLocalPod} {
		controller.Send(t, typeURL, nil)
	}
	select {
	case <-upstream.Synced():
	case <-time.After(patience):
		t.Error("not synced though every type has come")
	}
}

// TestSecretsByName: an SVID that comes is waited for, any other name is refused, and one that goes is forgotten in silence.
func TestSecretsByName(t *testing.T) {
	const known, coming, unknown = "spiffe://known", "spiffe://coming", "spiffe://unknown"
	cache := relay.NewCache(relay.Config{Want: func(relay.Key, bool) {}, Coming: func(name string) bool { return name == coming }, Log: slog.New(slog.DiscardHandler)})
	cache.Prime()
	give := func(id string) {
		chain, key := newSVID(t, id)
		if _, err := cache.Set(id, lds.TLSCertificateSecret(id, chain, key)); err != nil {
			t.Fatal(err)
		}
	}
	give(known)
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	(&relay.Service{Cache: cache}).Register(server)
	go server.Serve(listener) // ends with Stop
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := secretservice.NewSecretDiscoveryServiceClient(conn).DeltaSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	expect := func(given, removed []string) {
		t.Helper()
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, x := range r.Resources {
			got = append(got, x.Name)
		}
		if !slices.Equal(got, given) || !slices.Equal(r.RemovedResources, removed) {
			t.Errorf("given %v, refused %v, want %v and %v", got, r.RemovedResources, given, removed)
		}
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: relay.TypeSecret, ResponseNonce: r.Nonce}); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: relay.TypeSecret, ResourceNamesSubscribe: []string{known, coming, unknown}}); err != nil {
		t.Fatal(err)
	}
	expect([]string{known}, []string{unknown})
	cache.Delete(relay.Key{TypeURL: relay.TypeSecret, Name: known})
	give(coming)
	expect([]string{coming}, nil)
	give(known) // another one
	expect([]string{known}, nil)
}

// TestSeenIsKept: what a replica of the controller called its state the next one is told, by the next agent too.
func TestSeenIsKept(t *testing.T) {
	controller := relaytest.NewController(t)
	start := func(kept []relay.Resource) (*relay.Upstream, context.CancelFunc) {
		var upstream *relay.Upstream
		cache := relay.NewCache(relay.Config{Want: func(k relay.Key, wanted bool) { upstream.Want(k, wanted) }, Log: slog.New(slog.DiscardHandler)})
		upstream = relay.NewUpstream(relay.UpstreamConfig{
			Connect: controller.Connect, Node: "n1", Cache: cache, Log: slog.New(slog.DiscardHandler), Apply: func(context.Context, string) error { return nil },
		})
		upstream.Restore(kept)
		ctx, cancel := context.WithCancel(context.Background())
		t.Cleanup(cancel)
		go upstream.Run(ctx)
		return upstream, cancel
	}
	opened := func(streams int) {
		t.Helper()
		until(t, "the agent is connected", func() bool { open, n := controller.Connected(); return open && n == streams }, nil)
	}
	give := func(state string, m *meshv1.Mesh) {
		t.Helper()
		controller.Call(state)
		nonce := controller.Send(t, relay.TypeMesh, map[string]proto.Message{"mesh": m})
		until(t, "the response is answered", func() bool { _, ok := controller.Answer(nonce); return ok }, nil)
	}
	upstream, stop := start(nil)
	opened(1)
	if controller.Seen() != "" {
		t.Errorf("a new agent has seen %q", controller.Seen())
	}
	give("7.1 pods=5", &meshv1.Mesh{TrustDomain: "cluster.local"})
	give("7.2 pods=6", &meshv1.Mesh{TrustDomain: "cluster.local"})
	controller.Cut()
	opened(2)
	if controller.Seen() != "7.2 pods=6" {
		t.Errorf("the next replica is told %q", controller.Seen())
	}
	kept, err := upstream.Index()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(kept, func(r relay.Resource) bool {
		return r.Key.TypeURL == relay.TypeSeen && r.Body.TypeUrl == relay.TypeSeen
	}) {
		t.Errorf("kept without it: %v", kept)
	}
	stop()
	until(t, "the agent is gone", func() bool { open, _ := controller.Connected(); return !open }, nil)
	start(kept)
	opened(3)
	if controller.Seen() != "7.2 pods=6" {
		t.Errorf("the next agent says %q", controller.Seen())
	}
}
