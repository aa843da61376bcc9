package main

import (
	"context"
	"net"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
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
