package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/grpc/test/bufconn"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// holding keeps every stream open for as long as its connection lives.
type holding struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
}

func (holding) DeltaAggregatedResources(s discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	<-s.Context().Done()
	return s.Context().Err()
}

// TestConnectionsEndWithTheirAttestation: an agent's stream is cut, and may be opened again.
func TestConnectionsEndWithTheirAttestation(t *testing.T) {
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(connections(400 * time.Millisecond)...)
	discovery.RegisterAggregatedDiscoveryServiceServer(server, holding{})
	go server.Serve(listener) // ends with Stop
	t.Cleanup(server.Stop)
	dials := make(chan struct{}, 100)
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		dials <- struct{}{}
		return listener.DialContext(ctx)
	}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 2 {
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ended with %v", err)
		}
	}
	if len(dials) < 2 {
		t.Errorf("%d connections for two streams that were cut", len(dials))
	}
}

// TestStrangersMayOnlyBootstrap: what else they ask is refused before a byte of it is read.
func TestStrangersMayOnlyBootstrap(t *testing.T) {
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.InTapHandle(admit))
	discovery.RegisterAggregatedDiscoveryServiceServer(server, holding{})
	meshv1.RegisterIdentityServer(server, meshv1.UnimplementedIdentityServer{})
	go server.Serve(listener) // ends with Stop
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("discovery: %v", err)
	}
	if _, err := meshv1.NewIdentityClient(conn).Sign(t.Context(), &meshv1.SignRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("sign: %v", err)
	}
	if _, err := meshv1.NewIdentityClient(conn).Bootstrap(t.Context(), &meshv1.BootstrapRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("bootstrap: %v", err)
	}
	verified := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{{}}}}}})
	if _, err := admit(verified, &tap.Info{FullMethodName: meshv1.Identity_Sign_FullMethodName}); err != nil {
		t.Errorf("an agent: %v", err)
	}
}
