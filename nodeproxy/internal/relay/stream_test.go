package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
)

// deadline is far beyond what any of these takes.
const deadline = 20 * time.Second

// player is an Envoy of the test's: it refuses a response that holds what it cannot take, as a whole.
type player struct {
	*stream
	t   *testing.T
	bad map[string]bool
	// got are the names of each response, in order.
	got [][]string
}

func play(t *testing.T, c *Cache, bad ...string) *player {
	c.Prime()
	p := &player{stream: c.open(true), t: t, bad: map[string]bool{}}
	for _, name := range bad {
		p.bad[name] = true
	}
	return p
}

func (p *player) ask(typeURL string, names ...string) {
	p.request(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

// turn takes all that is sent, and what its answers bring.
func (p *player) turn() [][]string {
	p.t.Helper()
	p.got = nil
	for {
		responses := p.responses()
		if len(responses) == 0 {
			return p.got
		}
		for _, r := range responses {
			var names []string
			answer := &discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
			for _, x := range r.Resources {
				names = append(names, x.Name)
				if p.bad[x.Name] {
					answer.ErrorDetail = &rpcstatus.Status{Message: "cannot take " + x.Name}
				}
			}
			p.got = append(p.got, append(names, r.RemovedResources...))
			if len(p.got) > 1000 {
				p.t.Fatal("there is no end of responses")
			}
			p.request(answer)
		}
	}
}

func (p *player) wait(k Key, version string) error {
	ctx, cancel := context.WithTimeout(p.t.Context(), deadline)
	defer cancel()
	return p.cache.Wait(ctx, k, version)
}

func quiet() *Cache {
	return NewCache(Config{Want: func(Key, bool) {}, Log: slog.New(slog.DiscardHandler)})
}

// scope gives the cache a scope that leads to a route, and returns what to wait for.
func giveScope(t *testing.T, c *Cache, name, to string) (Key, string) {
	t.Helper()
	version, err := c.Set(name, &route.ScopedRouteConfiguration{Name: name, RouteConfigurationName: to})
	if err != nil {
		t.Fatal(err)
	}
	return Key{TypeScope, name}, version
}

// TestRefusedResponseIsSplit until the bad resource is alone; the others are in force, and it burdens no later response.
func TestRefusedResponseIsSplit(t *testing.T) {
	const count, bad = 5000, "10.96.0.77:80"
	c := quiet()
	p := play(t, c, bad)
	versions := map[Key]string{}
	for i := range count {
		k, version := giveScope(t, c, fmt.Sprintf("10.96.%d.%d:80", i/256, i%256), "a")
		versions[k] = version
	}
	p.ask(TypeScope, "*")
	rounds := p.turn()
	if len(rounds) > 40 { // 1 + 2 log2(5000)
		t.Errorf("%d responses to find one bad resource among %d", len(rounds), count)
	}
	for k, version := range versions {
		err := p.wait(k, version)
		var refused *Refused
		if k.Name == bad && (!errors.As(err, &refused) || refused.Text != "cannot take "+bad) || k.Name != bad && err != nil {
			t.Fatalf("%s: %v", k.Name, err)
		}
	}

	giveScope(t, c, bad, "b")
	good, version := giveScope(t, c, "10.96.0.1:80", "b")
	if got := p.turn(); len(got) != 2 || !slices.Equal(got[0], []string{"10.96.0.1:80"}) || !slices.Equal(got[1], []string{bad}) {
		t.Errorf("sent %v, want what was refused apart", got)
	}
	if err := p.wait(good, version); err != nil {
		t.Error(err)
	}
	// Once it is good it goes with all others again.
	p.bad = nil
	giveScope(t, c, bad, "c")
	p.turn()
	giveScope(t, c, bad, "d")
	giveScope(t, c, "10.96.0.1:80", "d")
	if got := p.turn(); len(got) != 1 || len(got[0]) != 2 {
		t.Errorf("sent %v, want both together", got)
	}
}

// TestRefusedResponseAndRemovals: what is taken away while Envoy may have it or not is taken away there as well.
func TestRefusedResponseAndRemovals(t *testing.T) {
	c := quiet()
	p := play(t, c)
	p.ask(TypeScope, "*")
	p.turn()
	for _, name := range []string{"a", "b", "c", "d"} {
		giveScope(t, c, name, "x")
	}
	r := p.responses()
	if len(r) != 1 || len(r[0].Resources) != 4 {
		t.Fatalf("sent %v", r)
	}
	c.Delete(Key{TypeScope, "b"})
	p.request(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeScope, ResponseNonce: r[0].Nonce, ErrorDetail: &rpcstatus.Status{Message: "no"}})
	removed := false
	for _, names := range p.turn() {
		removed = removed || slices.Contains(names, "b")
	}
	if !removed {
		t.Error("Envoy may still have what was taken away")
	}
	if err := p.wait(Key{TypeScope, "b"}, ""); err != nil {
		t.Error(err)
	}
}

// TestNothingIsKeptOfWhatIsGone: a stream lasts for months, and scopes, listeners and SVIDs come and go.
func TestNothingIsKeptOfWhatIsGone(t *testing.T) {
	c := quiet()
	p := play(t, c, "bad")
	p.ask(TypeScope, "*")
	p.ask(TypeListener, "*")
	p.turn()
	for _, name := range []string{"1", "2", "bad"} {
		k, _ := giveScope(t, c, name, "x")
		l := lds.Holder()
		l.Name = name
		if _, err := c.Set(name, l); err != nil {
			t.Fatal(err)
		}
		p.turn()
		c.Delete(k)
		c.Delete(Key{TypeListener, name})
		p.turn()
		if err := p.wait(k, ""); err != nil {
			t.Error(err)
		}
	}
	if n := len(p.sent) + len(p.acked) + len(p.refused) + len(p.apart) + len(p.pending) + len(p.flight); n != 0 {
		t.Errorf("the stream keeps sent %v, acknowledged %v, refused %v, apart %v, pending %v, in flight %v", p.sent, p.acked, p.refused, p.apart, p.pending, p.flight)
	}
}

// TestAcknowledgedBefore: a version that Envoy acknowledged once is not in force while it has another.
func TestAcknowledgedBefore(t *testing.T) {
	c := quiet()
	p := play(t, c)
	p.ask(TypeScope, "*")
	k, a := giveScope(t, c, "s", "a")
	p.turn()
	if err := p.wait(k, a); err != nil {
		t.Fatal(err)
	}
	giveScope(t, c, "s", "b")
	second := p.responses()
	giveScope(t, c, "s", "a")
	third := p.responses()
	inForce := func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		done, err := c.state(k, a)
		return done && err == nil
	}
	for _, r := range append(second, third...) {
		if inForce() {
			t.Error("a version is in force though Envoy has not answered what came since")
		}
		p.request(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeScope, ResponseNonce: r.Nonce})
	}
	if !inForce() {
		t.Error("the version is not in force though Envoy has acknowledged it")
	}
}

// TestGenerationsHaveTheirOwnListeners: the listeners in pods are one Envoy's alone, all else is for both, and waiting is for whom
// it concerns.
func TestGenerationsHaveTheirOwnListeners(t *testing.T) {
	c := quiet()
	set := func(name string, m proto.Message) (Key, string) {
		t.Helper()
		version, err := c.Set(name, m)
		if err != nil {
			t.Fatal(err)
		}
		body, _, err := Pack(m)
		if err != nil {
			t.Fatal(err)
		}
		return Key{body.TypeUrl, name}, version
	}
	first, second := names.Listener("in", "1", "sandbox", 0), names.Listener("in", "1", "sandbox", 1)
	set("holder", &listener.Listener{Name: "holder"})
	kf, vf := set(first, &listener.Listener{Name: first})
	ks, vs := set(second, &listener.Listener{Name: second})
	node := func(generation float64) *core.Node {
		return &core.Node{Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{names.MetadataGeneration: structpb.NewNumberValue(generation)}}}
	}
	old, next := play(t, c), play(t, c)
	if got := next.turn(); got != nil {
		t.Errorf("an Envoy that has said nothing got %v", got)
	}
	old.request(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeListener}) // one that does not tell is the first
	if got := fmt.Sprint(old.turn()); got != "[[holder] [in/1/sandbox/0]]" {
		t.Errorf("the first got %s", got)
	}
	if err := old.wait(kf, vf); err != nil {
		t.Error(err)
	}
	c.Pause(1, true)
	next.request(&discovery.DeltaDiscoveryRequest{Node: node(1), TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}})
	if got := next.turn(); got != nil {
		t.Errorf("a paused Envoy got %v", got)
	}
	if !c.Connected(0) || !c.Connected(1) || c.Connected(2) {
		t.Error("it is not known which Envoys are connected")
	}
	c.Pause(1, false)
	if got := fmt.Sprint(next.turn()); got != "[[holder] [in/1/sandbox/1]]" {
		t.Errorf("the second got %s", got)
	}
	if err := next.wait(ks, vs); err != nil {
		t.Error(err)
	}
	c.Delete(kf)
	if got := next.turn(); got != nil {
		t.Errorf("the second heard of the first's listener: %v", got)
	}
	if got := fmt.Sprint(old.turn()); got != "[[in/1/sandbox/0]]" {
		t.Errorf("the first got %s", got)
	}
	if err := old.wait(kf, ""); err != nil {
		t.Error(err)
	}
	// What is for both is acknowledged when both have it.
	ask := func(p *player) { p.ask(TypeScope, "*") }
	ask(old)
	ask(next)
	k, version := giveScope(t, c, "10.96.0.1:80", "a")
	old.turn()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.Wait(ctx, k, version); err == nil {
		t.Error("acknowledged by one of two")
	}
	next.turn()
	if err := next.wait(k, version); err != nil {
		t.Error(err)
	}
}
