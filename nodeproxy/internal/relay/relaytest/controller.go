// Package relaytest is the controller's side of the agent's stream, for tests.
package relaytest

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

// Controller serves one agent by delta ADS. It sends what Send is told to, and records what it is asked and answered.
type Controller struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	listener *bufconn.Listener
	server   *grpc.Server
	identity *identity

	mu      sync.Mutex
	stream  discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	end     context.CancelFunc
	streams int
	asked   map[relay.Key]bool
	opening map[relay.Key]string
	answers map[string]string // by nonce: "" for an ACK
	nonce   int
	state   string // what responses call their state
	seen    string // what the agent called the state that it was given last
}

// NewController starts one; it ends with the test.
func NewController(t *testing.T) *Controller {
	c := &Controller{listener: bufconn.Listen(1 << 20), server: grpc.NewServer(), identity: newIdentity(), asked: map[relay.Key]bool{}, opening: map[relay.Key]string{}, answers: map[string]string{}}
	discovery.RegisterAggregatedDiscoveryServiceServer(c.server, c)
	meshv1.RegisterIdentityServer(c.server, c.identity)
	meshv1.RegisterReportsServer(c.server, c.identity)
	go c.server.Serve(c.listener) // ends with Stop
	t.Cleanup(c.server.Stop)
	return c
}

// Connect is the agent's way to it.
func (c *Controller) Connect(context.Context) (grpc.ClientConnInterface, error) {
	return grpc.NewClient("passthrough:///controller", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return c.listener.DialContext(ctx) }))
}

// DeltaAggregatedResources takes one agent's stream.
func (c *Controller) DeltaAggregatedResources(g discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	ctx, cancel := context.WithCancel(g.Context())
	defer cancel()
	c.mu.Lock()
	c.stream, c.end = g, cancel
	c.streams++
	c.opening = map[relay.Key]string{}
	if m, ok := metadata.FromIncomingContext(g.Context()); ok {
		c.seen = strings.Join(m.Get("weft-seen"), ",")
	}
	c.mu.Unlock()
	go func() {
		defer cancel()
		for {
			r, err := g.Recv()
			if err != nil {
				return
			}
			c.request(r)
		}
	}()
	<-ctx.Done()
	c.mu.Lock()
	if c.stream == g {
		c.stream = nil
	}
	c.mu.Unlock()
	return ctx.Err()
}

func (c *Controller) request(r *discovery.DeltaDiscoveryRequest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range r.ResourceNamesSubscribe {
		c.asked[relay.Key{TypeURL: r.TypeUrl, Name: name}] = true
	}
	for _, name := range r.ResourceNamesUnsubscribe {
		delete(c.asked, relay.Key{TypeURL: r.TypeUrl, Name: name})
	}
	for name, version := range r.InitialResourceVersions {
		c.opening[relay.Key{TypeURL: r.TypeUrl, Name: name}] = version
	}
	if r.ResponseNonce != "" {
		c.answers[r.ResponseNonce] = r.GetErrorDetail().GetMessage()
	}
}

// Asked tells whether the agent is subscribed to a name.
func (c *Controller) Asked(typeURL, name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked[relay.Key{TypeURL: typeURL, Name: name}]
}

// Opening is the version with which the agent opened its stream; false: it knew nothing of the name.
func (c *Controller) Opening(typeURL, name string) (string, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	version, ok := c.opening[relay.Key{TypeURL: typeURL, Name: name}]
	return version, ok
}

// Connected tells whether the agent's stream is open, and how many there were.
func (c *Controller) Connected() (bool, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stream != nil, c.streams
}

// Call lets responses from now on call their state so.
func (c *Controller) Call(state string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = state
}

// Seen is what the agent said when it opened its stream that it was given last.
func (c *Controller) Seen() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen
}

// Cut ends the agent's stream.
func (c *Controller) Cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end != nil {
		c.end()
	}
}

// Send sends resources of one type, by name, nil ones as removed, and returns the response's nonce.
func (c *Controller) Send(t *testing.T, typeURL string, resources map[string]proto.Message) string {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nonce++
	r := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: fmt.Sprint(c.nonce), SystemVersionInfo: c.state}
	for name, m := range resources {
		if m == nil {
			r.RemovedResources = append(r.RemovedResources, name)
			continue
		}
		body, version, err := relay.Pack(m)
		if err != nil {
			t.Fatal(err)
		}
		r.Resources = append(r.Resources, &discovery.Resource{Name: name, Version: version, Resource: body})
	}
	slices.SortFunc(r.Resources, func(a, b *discovery.Resource) int { return strings.Compare(a.Name, b.Name) })
	if c.stream == nil {
		t.Fatal("the agent is not connected")
	}
	if err := c.stream.Send(r); err != nil {
		t.Fatal(err)
	}
	return r.Nonce
}

// Answer is what the agent said to a response; false: nothing yet. Empty text is an ACK.
func (c *Controller) Answer(nonce string) (text string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	text, ok = c.answers[nonce]
	return text, ok
}
