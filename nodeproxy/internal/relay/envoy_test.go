package relay_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

// TestOnDemand: Envoy gets what the first request needs, and nothing before.
func TestOnDemand(t *testing.T) {
	n := newNode(t)
	a := plainBackend(t, "a")
	until(t, "the listener is there", func() bool { return listens(n.port) }, nil)
	for _, k := range []relay.Key{{TypeURL: relay.TypeRoute, Name: routeName}, {TypeURL: relay.TypeCluster, Name: serviceName}} {
		if n.controller.Asked(k.TypeURL, k.Name) {
			t.Errorf("the agent asked for %s before anybody needed it", k.Name)
		}
	}
	first := make(chan string, 1)
	go func() { // waits for all of it
		status, answer, err := n.get()
		first <- fmt.Sprint(status, " ", answer, " ", err)
	}()
	n.serveFrom(t, a)
	if got := <-first; got != "200 a <nil>" {
		t.Errorf("the first request: %s", got)
	}
	// The answer to the controller comes once Envoy has it.
	b := plainBackend(t, "b")
	nonce := n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)})
	until(t, "the agent answers", func() bool { _, ok := n.controller.Answer(nonce); return ok }, nil)
	if text, _ := n.controller.Answer(nonce); text != "" {
		t.Errorf("the agent refused: %s", text)
	}
	n.answered(t, "b")
}

// TestRefusedListener concerns that one alone, and what was missing may come.
func TestRefusedListener(t *testing.T) {
	n := newNode(t)
	bad := n.entry(t)
	bad.Name = "bad"
	bad.Address = address("127.0.0.1", freePort(t))
	bad.FilterChains[0].Filters[0].ConfigType = &listener.Filter_TypedConfig{TypedConfig: &anypb.Any{TypeUrl: "type.googleapis.com/weft.unknown"}}
	k, version := n.give(t, bad)
	good := n.entry(t)
	port := freePort(t)
	good.Name, good.Address = "good", address("127.0.0.1", port)
	goodKey, goodVersion := n.give(t, good)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var refused *relay.Refused
	if err := n.cache.Wait(ctx, k, version); !errors.As(err, &refused) || refused.Name != "bad" {
		t.Errorf("waiting for what Envoy cannot take: %v", err)
	}
	n.wait(t, goodKey, goodVersion)
	if !listens(port) {
		t.Error("the other listener suffers")
	}
	n.cache.Delete(goodKey)
	n.wait(t, goodKey, "")
	until(t, "the listener that was taken away is gone", func() bool { return !listens(port) }, nil)
	if !listens(n.port) {
		t.Error("the third listener suffers")
	}
	bad = good
	bad.Name = "bad"
	k, version = n.give(t, bad)
	n.wait(t, k, version)
}

// TestRefusedCluster: the last good one goes on, with its endpoints, and the controller hears of it.
func TestRefusedCluster(t *testing.T) {
	n := newNode(t)
	a, b := plainBackend(t, "a"), meshBackend(t, "b", till)
	n.serveFrom(t, a)
	n.answered(t, "a")
	bad := service(t, b)
	bad.TransportSocketMatches[0].TransportSocket.ConfigType = &core.TransportSocket_TypedConfig{TypedConfig: &anypb.Any{TypeUrl: "type.googleapis.com/weft.unknown"}}
	nonce := n.controller.Send(t, relay.TypeCluster, map[string]proto.Message{serviceName: bad})
	beside := n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)})
	for nonce, want := range map[string]string{nonce: "weft.unknown", beside: "its cluster was refused"} {
		until(t, "the agent refuses: "+want, func() bool {
			text, _ := n.controller.Answer(nonce)
			return strings.Contains(names.ParseRefused(text)[serviceName], want)
		}, nil)
	}
	n.answered(t, "a")
	// Endpoints that the good cluster can speak to still come.
	c := plainBackend(t, "c")
	nonce = n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(c)})
	n.answered(t, "c")
	until(t, "the agent answers", func() bool { _, ok := n.controller.Answer(nonce); return ok }, nil)
	if text, _ := n.controller.Answer(nonce); text != "" {
		t.Errorf("the endpoints are refused: %s", text)
	}
}

// TestRefusedScope is alone: a key that is taken refuses one scope among many, and those that came with it are there.
func TestRefusedScope(t *testing.T) {
	n := newNode(t)
	n.cache.Pause(0, true)
	versions := map[relay.Key]string{}
	for i := range 200 {
		s := n.scope()
		s.Name = fmt.Sprintf("10.97.0.%d:80", i)
		s.Key.Fragments[0].GetType().(*route.ScopedRouteConfiguration_Key_Fragment_StringKey).StringKey = s.Name
		k, version := n.give(t, s)
		versions[k] = version
	}
	twice := n.scope()
	twice.Name = "twice"
	bad, badVersion := n.give(t, twice)
	n.cache.Pause(0, false)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var refused *relay.Refused
	if err := n.cache.Wait(ctx, bad, badVersion); !errors.As(err, &refused) || refused.Name != "twice" {
		t.Errorf("waiting for a scope whose key is taken: %v", err)
	}
	for k, version := range versions {
		n.wait(t, k, version)
	}
	a := plainBackend(t, "a")
	n.serveFrom(t, a)
	n.answered(t, "a")
}

// TestRefusedRoute is alone: the routes that came with it are in force.
func TestRefusedRoute(t *testing.T) {
	n := newNode(t)
	n.serveFrom(t, plainBackend(t, "a"))
	n.answered(t, "a")
	other := n.scope()
	other.Name, other.RouteConfigurationName = "10.96.0.11:80", "route/shop/other/80"
	other.Key.Fragments[0].GetType().(*route.ScopedRouteConfiguration_Key_Fragment_StringKey).StringKey = other.Name
	k, version := n.give(t, other)
	n.wait(t, k, version)
	go n.getFrom(other.Name)
	n.asked(t, relay.TypeRoute, other.RouteConfigurationName)
	moved, broken := routes(), routes()
	moved.VirtualHosts[0].Routes[0].ResponseHeadersToAdd = []*core.HeaderValueOption{{Header: &core.HeaderValue{Key: "x-moved", Value: "yes"}}}
	broken.Name = other.RouteConfigurationName
	broken.VirtualHosts = append(broken.VirtualHosts, broken.VirtualHosts[0]) // the same domain twice
	nonce := n.controller.Send(t, relay.TypeRoute, map[string]proto.Message{routeName: moved, broken.Name: broken})
	until(t, "the agent answers", func() bool { _, ok := n.controller.Answer(nonce); return ok }, nil)
	text, _ := n.controller.Answer(nonce)
	if refused := names.ParseRefused(text); len(refused) != 1 || refused[broken.Name] == "" {
		t.Errorf("the controller hears %q, want the refusal of %s alone", text, broken.Name)
	}
	until(t, "the good route is in force", func() bool {
		header, err := n.getFrom(destination)
		return err == nil && header.Get("x-moved") == "yes"
	}, nil)
}

// TestMatchComesBeforeItsEndpoint changes the identity of a service's only endpoint under load: no request meets an
// endpoint without its match, whichever of the two the controller sends first.
func TestMatchComesBeforeItsEndpoint(t *testing.T) {
	n := newNode(t)
	plain, mesh := plainBackend(t, "plain"), meshBackend(t, "mesh", till)
	clusters := map[string]*cluster.Cluster{plain.name: service(t, plain), mesh.name: service(t, mesh)}
	n.serveFrom(t, plain)
	n.answered(t, "plain")

	var requests atomic.Int64
	var failed sync.Map
	ctx, cancel := context.WithCancel(context.Background())
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for ctx.Err() == nil {
				requests.Add(1)
				if status, answer, err := n.get(); status != 200 {
					failed.Store(fmt.Sprint(status, " ", answer, " ", err), true)
				}
			}
		})
	}
	for i := range 20 {
		b := []backend{mesh, plain}[i%2]
		sendCluster := func() {
			n.controller.Send(t, relay.TypeCluster, map[string]proto.Message{serviceName: clusters[b.name]})
		}
		sendEndpoints := func() { n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)}) }
		if i%4 < 2 {
			sendCluster()
			sendEndpoints()
		} else {
			sendEndpoints()
			sendCluster()
		}
		n.answered(t, b.name)
	}
	cancel()
	load.Wait()
	failed.Range(func(what, _ any) bool { t.Errorf("a request failed: %v", what); return true })
	t.Logf("%d requests over 20 changes", requests.Load())
}

// TestEnvoyComesBack: after its stream was cut Envoy omits "*", and still gets what is new and nothing twice.
func TestEnvoyComesBack(t *testing.T) {
	n := newNode(t)
	a := plainBackend(t, "a")
	n.serveFrom(t, a)
	n.answered(t, "a")
	n.server.Stop()
	n.serve(t)
	l := n.entry(t)
	port := freePort(t)
	l.Name, l.Address = "another", address("127.0.0.1", port)
	k, version := n.give(t, l)
	n.wait(t, k, version)
	until(t, "the new listener is there", func() bool { return listens(port) }, nil)
	n.answered(t, "a")
	b := plainBackend(t, "b")
	n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)})
	n.answered(t, "b")
	n.cache.Delete(k)
	n.wait(t, k, "")
	until(t, "the new listener is gone", func() bool { return !listens(port) }, nil)
}

// TestAgentComesBack: Envoy keeps all it has until the new agent says what there is.
func TestAgentComesBack(t *testing.T) {
	n := newNode(t)
	a := plainBackend(t, "a")
	n.serveFrom(t, a)
	n.answered(t, "a")
	l := n.entry(t)
	port := freePort(t)
	l.Name, l.Address = "another", address("127.0.0.1", port)
	k, version := n.give(t, l)
	n.wait(t, k, version)
	l, awaited := n.entry(t), freePort(t)
	l.Name, l.Address = "in/uid-1/sandbox-1", address("127.0.0.1", awaited)
	k, version = n.give(t, l)
	n.wait(t, k, version)

	n.server.Stop()
	n.stopUp()
	n.agent(t) // without the other listeners
	n.cache.Expect([]string{"uid-1"})
	until(t, "Envoy is connected", func() bool { return n.cache.Connected(0) }, nil)
	n.asked(t, relay.TypeEndpoints, serviceName)
	if !listens(port) || !listens(n.port) {
		t.Error("listeners went before the agent had said anything")
	}
	n.cache.Prime()
	until(t, "what the new agent does not have is gone", func() bool { return !listens(port) }, nil)
	if !listens(awaited) {
		t.Error("a listener went that the agent has yet to give")
	}
	n.cache.Complete("uid-1")
	until(t, "what it will not give is gone", func() bool { return !listens(awaited) }, nil)
	n.answered(t, "a")
	// The controller's next word reaches Envoy, and the one it has already is no change.
	n.controller.Send(t, relay.TypeCluster, map[string]proto.Message{serviceName: service(t, a)})
	n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(a)})
	n.answered(t, "a")
	b := plainBackend(t, "b")
	n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)})
	n.answered(t, "b")
}

// TestPodsComeAndGo: what Envoy's listeners share outlives the pods that were there first, once their listeners have drained.
func TestPodsComeAndGo(t *testing.T) {
	n := newNode(t)
	a := plainBackend(t, "a")
	n.give(t, lds.Holder())
	n.cache.Delete(relay.Key{TypeURL: relay.TypeListener, Name: "entry"})
	n.envoy.Stop()
	until(t, "Envoy's stream has ended", func() bool { return !n.cache.Connected(0) }, nil)
	pods := func() map[relay.Key]string {
		versions := map[relay.Key]string{}
		for i := range 6 {
			l := n.entry(t)
			l.Name, l.Address = fmt.Sprint("a-pod-", i), address("127.0.0.1", freePort(t)) // before "holder" by name
			n.port = l.Address.GetSocketAddress().GetPortValue()
			k, version := n.give(t, l)
			versions[k] = version
		}
		return versions
	}
	there := pods()
	n.start(t)
	for round := range 3 {
		for k, version := range there {
			n.wait(t, k, version)
		}
		// A cluster that Envoy does not have yet.
		name := fmt.Sprint(serviceName, "/", round)
		r, c, e := routes(), service(t, a), endpoints(a)
		r.VirtualHosts[0].Routes[0].GetRoute().ClusterSpecifier = &route.RouteAction_Cluster{Cluster: name}
		c.Name, e.ClusterName = name, name
		until(t, "the workers accept", func() bool { return listens(n.port) }, nil)
		go n.get()
		n.asked(t, relay.TypeRoute, routeName)
		n.controller.Send(t, relay.TypeRoute, map[string]proto.Message{routeName: r})
		until(t, "the agent asks for the cluster", func() bool { go n.get(); return n.controller.Asked(relay.TypeCluster, name) }, nil)
		n.controller.Send(t, relay.TypeCluster, map[string]proto.Message{name: c})
		n.asked(t, relay.TypeEndpoints, name)
		n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{name: e})
		n.answered(t, "a")
		for k := range there {
			n.cache.Delete(k)
		}
		for k := range there {
			n.wait(t, k, "")
		}
		until(t, "the listeners have drained", func() bool {
			left, err := n.envoy.Stat("listener_manager.total_listeners_draining")
			return err == nil && left == 0
		}, nil)
		there = pods()
	}
}

// TestPausedEnvoyGetsNothing until it may listen.
func TestPausedEnvoyGetsNothing(t *testing.T) {
	n := newNode(t)
	until(t, "the listener is there", func() bool { return listens(n.port) }, nil)
	n.cache.Pause(0, true)
	l := n.entry(t)
	port := freePort(t)
	l.Name, l.Address = "another", address("127.0.0.1", port)
	k, version := n.give(t, l)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if err := n.cache.Wait(ctx, k, version); !errors.Is(err, context.DeadlineExceeded) || listens(port) {
		t.Errorf("a paused Envoy got a listener: %v", err)
	}
	n.cache.Pause(0, false)
	n.wait(t, k, version)
}

// TestControllerAway: what is known goes on, after a crash of Envoy as well; then the controller comes back.
func TestControllerAway(t *testing.T) {
	n := newNode(t)
	a := plainBackend(t, "a")
	n.serveFrom(t, a)
	n.answered(t, "a")
	n.stopUp()
	n.controller.Cut()
	until(t, "the controller is away", func() bool { open, _ := n.controller.Connected(); return !open }, nil)
	if err := syscall.Kill(n.envoy.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "Envoy's stream has ended", func() bool { return !n.cache.Connected(0) }, nil)
	n.start(t)
	n.answered(t, "a")

	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go n.upstream.Run(ctx)
	until(t, "the agent is connected again", func() bool { open, times := n.controller.Connected(); return open && times == 2 }, nil)
	_, version, err := relay.Pack(endpoints(a))
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the agent says what it has", func() bool {
		got, ok := n.controller.Opening(relay.TypeEndpoints, serviceName)
		return ok && got == version
	}, nil)
	b := plainBackend(t, "b")
	n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)})
	n.answered(t, "b")
}

// TestFirstUseWhileControllerIsAway: a Service that this node has not used gets 503 and the reason, until the controller is back.
func TestFirstUseWhileControllerIsAway(t *testing.T) {
	n := newNode(t)
	n.stopUp()
	n.controller.Cut()
	until(t, "the controller is away", func() bool { open, _ := n.controller.Connected(); return !open }, nil)
	status, answer, err := n.get()
	if err != nil || status != 503 || !strings.HasPrefix(answer, "weft: this Service was not used on this node before") {
		t.Errorf("first use: %d %q, %v", status, answer, err)
	}
	for _, r := range n.cache.Relayed() {
		t.Errorf("what stood in for the controller would be kept: %v", r.Key)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go n.upstream.Run(ctx)
	a := plainBackend(t, "a")
	n.asked(t, relay.TypeRoute, routeName)
	n.controller.Send(t, relay.TypeRoute, map[string]proto.Message{routeName: routes()})
	until(t, "the agent asks for the cluster", func() bool { go n.get(); return n.controller.Asked(relay.TypeCluster, serviceName) }, nil)
	n.serveFrom(t, a)
	n.answered(t, "a")
}

// TestRestoredStateServes: an agent that starts while the controller is away gives Envoy what it knew.
func TestRestoredStateServes(t *testing.T) {
	n := newNode(t)
	a := plainBackend(t, "a")
	n.serveFrom(t, a)
	n.answered(t, "a")
	kept := n.cache.Relayed()
	if len(kept) != 3 {
		t.Fatalf("%d resources are relayed, want a route, a cluster and its endpoints", len(kept))
	}
	n.server.Stop()
	n.stopUp()
	n.controller.Cut()
	n.envoy.Stop()
	n.agent(t)
	n.stopUp()
	n.upstream.Restore(kept)
	n.cache.Prime()
	n.start(t)
	n.answered(t, "a")
}
