package serve

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// door is a server behind a real connection.
type door struct {
	*testing.T
	server *Server
	hungUp chan struct{}
	conn   *grpc.ClientConn
}

func newDoor(t *testing.T, patience time.Duration) *door {
	t.Helper()
	d := &door{T: t, server: New(Config{Log: slog.New(slog.DiscardHandler), Patience: patience}), hungUp: make(chan struct{}, 10)}
	listener := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(g, &Service{
		Server: d.server, Peer: func(context.Context) (string, error) { return "n1", nil }, HangUp: func(context.Context) { d.hungUp <- struct{}{} },
	})
	go func() { _ = g.Serve(listener) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	d.conn = conn
	return d
}

// serve serves what was made of orders and of a newest pod.
func (d *door) serve(term, number, pods uint64) {
	kinds := epoch.Kinds{"pods": pods}
	d.server.Set(Version{Snapshot: &ir.Snapshot{}, Mark: epoch.Mark{Orders: epoch.Orders{Term: term, Number: number}, Made: kinds}, Number: number, Seen: kinds})
}

// ask opens a stream as an agent that holds a state; what it is given first comes on the channel.
func (d *door) ask(held string) (<-chan *discovery.DeltaDiscoveryResponse, <-chan error, ads) {
	d.Helper()
	ctx, cancel := context.WithTimeout(d.Context(), deadline)
	d.Cleanup(cancel)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(d.conn).DeltaAggregatedResources(metadata.AppendToOutgoingContext(ctx, epoch.Metadata, held))
	if err != nil {
		d.Fatal(err)
	}
	for typeURL := range wildcard {
		if stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}}) != nil {
			break // it is refused already: Recv tells why
		}
	}
	given, failed := make(chan *discovery.DeltaDiscoveryResponse, 100), make(chan error, 1)
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			given <- r
		}
	}()
	return given, failed, stream
}

func TestAnAgentIsGivenNothingOlder(t *testing.T) {
	t.Run("a replica that catches up serves then", func(t *testing.T) {
		d := newDoor(t, deadline)
		d.serve(5, 8, 90)
		given, failed, _ := d.ask("5.9 pods=95")
		d.serve(5, 9, 90) // the orders are there, a pod is missing
		select {
		case r := <-given:
			t.Fatalf("given %v", r)
		case err := <-failed:
			t.Fatal(err)
		case <-time.After(100 * time.Millisecond):
		}
		if d.server.Connected() != 0 {
			t.Error("it counts as connected, and is given nothing")
		}
		d.serve(5, 9, 96)
		if r := <-given; r.SystemVersionInfo != "5.9 pods=96" {
			t.Errorf("given a state called %q", r.SystemVersionInfo)
		}
	})
	t.Run("older orders are never given", func(t *testing.T) {
		d := newDoor(t, 10*time.Millisecond)
		d.serve(5, 8, 90)
		_, failed, _ := d.ask("5.9 pods=90")
		if err := <-failed; status.Code(err) != codes.Unavailable {
			t.Errorf("refused with %v", err)
		}
		<-d.hungUp
	})
	t.Run("older objects are, after a while", func(t *testing.T) {
		d := newDoor(t, 10*time.Millisecond)
		d.serve(5, 9, 90)
		given, _, _ := d.ask("5.9 pods=95")
		<-given
	})
	t.Run("what cannot be read is refused", func(t *testing.T) {
		d := newDoor(t, deadline)
		d.serve(1, 1, 1)
		_, failed, _ := d.ask("nonsense")
		if err := <-failed; status.Code(err) != codes.InvalidArgument {
			t.Errorf("refused with %v", err)
		}
	})
}

func TestASuspendedReplicaLetsItsAgentsGo(t *testing.T) {
	d := newDoor(t, deadline)
	d.serve(1, 1, 1)
	given, failed, _ := d.ask("")
	<-given
	d.server.Suspend(true)
	if err := <-failed; status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v", err)
	}
	<-d.hungUp
	if d.server.Ready() {
		t.Error("it is ready")
	}
	_, failed, _ = d.ask("")
	if err := <-failed; status.Code(err) != codes.Unavailable {
		t.Errorf("a new stream: %v", err)
	}
	d.server.Suspend(false)
	given, _, _ = d.ask("")
	<-given
}

// TestWhoHasAnsweredKnowsTheOrders: a change that comes to nothing for a node is told to it all the same, or another replica
// could take it back.
func TestWhoHasAnsweredKnowsTheOrders(t *testing.T) {
	s := quiet()
	serves := func(number, decided uint64) uint64 {
		return s.Set(Version{Snapshot: &ir.Snapshot{}, Mark: epoch.Mark{Orders: epoch.Orders{Term: 1, Number: decided}}, Number: number})
	}
	serves(1, 1)
	st := still(s, "n1")
	generation := serves(2, 2)
	if s.Answered() == generation {
		t.Error("it has answered orders that it has not been told of")
	}
	told := st.responses()
	if len(told) != 1 || told[0].TypeUrl != xds.TypeMesh || told[0].SystemVersionInfo != "1.2" || len(told[0].Resources)+len(told[0].RemovedResources) != 0 {
		t.Fatalf("told %v", told)
	}
	if s.Answered() == generation {
		t.Error("it has not answered yet")
	}
	answer(st, told)
	if s.Answered() != generation {
		t.Error("it has")
	}
	if generation = serves(3, 2); len(st.responses()) != 0 || s.Answered() != generation {
		t.Error("the same orders are told again")
	}
	s.Advance(epoch.Mark{Orders: epoch.Orders{Term: 1, Number: 4}}, 4)
	if answers, number := s.Answers(1); number != 4 || answers["n1"].Number >= 4 {
		t.Errorf("orders %d, answered %d", number, answers["n1"].Number)
	}
	answer(st, st.responses())
	if answers, _ := s.Answers(1); answers["n1"].Number != all {
		t.Errorf("answered %d", answers["n1"].Number)
	}
	if answers, number := s.Answers(2); number != 0 || answers["n1"].Number != 0 {
		t.Error("another leader's orders count as answered")
	}
}
