package agent

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

var running = envoy.State{PID: 7, Cgroup: "/weft/envoy", Live: true, Restarts: 2}

// follows runs the agent's stream of trust bundles and that of its reports.
func (b *bench) follows(t *testing.T) {
	t.Helper()
	conn, err := b.controller.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.conn, b.due = conn.(*grpc.ClientConn), time.Now().Add(time.Hour)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go b.followBundle(ctx)
	go b.reporter.Run(ctx)
}

// confirms waits until the controller hears that the node trusts a bundle.
func (b *bench) confirms(t *testing.T, hash string) *meshv1.NodeHealth {
	t.Helper()
	until(t, "the node trusts bundle "+hash, func() bool { return b.controller.Health().GetTrustBundle() == hash })
	return b.controller.Health()
}

// authorise gives Envoy a rule with the roots of now, as the enroller does.
func (b *bench) authorise(t *testing.T, name string, peers ...string) {
	t.Helper()
	roots, err := b.self.RootsPEM()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.cache.Set(name, lds.ValidationSecret(lds.RuleSecret{Name: name, Exact: peers}, roots)); err != nil {
		t.Fatal(err)
	}
}

// secrets is an Envoy that asked for secrets, and has answered what came of another type.
func (b *bench) secrets(t *testing.T, names ...string) *stub {
	t.Helper()
	e := b.envoy(t, relay.TypeScope)
	e.send(t, &discovery.DeltaDiscoveryRequest{TypeUrl: relay.TypeSecret, ResourceNamesSubscribe: names})
	r, _ := e.next(t)
	for r.TypeUrl != relay.TypeScope {
		defer func(r *discovery.DeltaDiscoveryResponse) { e.got <- r }(r) // the test's
		r, _ = e.next(t)
	}
	e.answer(t, r, "")
	return e
}

// TestTrustBundleIsConfirmedWhenEnvoyHasIt in each secret that holds roots, and to every new stream of reports.
func TestTrustBundleIsConfirmedWhenEnvoyHasIt(t *testing.T) {
	const rule, unused = "rule/pod/80", "rule/other/80"
	b := newBench(t, t.TempDir())
	b.cache.Prime()
	b.follow(0, running)
	b.self.SetRoots([][]byte{{1}})
	if err := b.giveBundle(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{rule, unused} {
		b.authorise(t, name)
	}
	e := b.secrets(t, names.SecretBundle, rule)
	before, got := e.next(t)
	if !slices.Equal(got, []string{names.SecretBundle, rule}) {
		t.Fatalf("Envoy got %v", got)
	}
	e.answer(t, before, "")
	b.controller.SetBundle(&meshv1.TrustBundle{Roots: [][]byte{{1}, {2}}, Hash: "two"})
	b.follows(t)
	r, got := e.next(t)
	if !slices.Equal(got, []string{names.SecretBundle}) {
		t.Fatalf("Envoy got %v", got)
	}
	if h := b.controller.Health(); h.GetTrustBundle() != "" {
		t.Errorf("confirmed %s before Envoy had acknowledged it", h.TrustBundle)
	}
	b.authorise(t, rule, "spiffe://cluster.local/ns/shop/sa/web")
	second, got := e.next(t)
	if !slices.Equal(got, []string{rule}) {
		t.Fatalf("Envoy got %v", got)
	}
	e.answer(t, r, "")
	if h := b.controller.Health(); h.GetTrustBundle() != "" {
		t.Errorf("confirmed %s before Envoy had acknowledged it in every rule", h.TrustBundle)
	}
	e.answer(t, second, "")
	if h := b.confirms(t, "two"); !h.ProxyLive || h.ProxyRestarts != 2 {
		t.Errorf("the node's health is %v, want Envoy live after 2 restarts", h)
	}
	b.controller.CutReports()
	b.confirms(t, "two")

	// The next change, and back again: Envoy has acknowledged this form before.
	for _, next := range []*meshv1.TrustBundle{{Roots: [][]byte{{2}}, Hash: "new"}, {Roots: [][]byte{{1}, {2}}, Hash: "two"}} {
		b.controller.SetBundle(next)
		r, got = e.next(t)
		if !slices.Equal(got, []string{names.SecretBundle}) {
			t.Fatalf("Envoy got %v", got)
		}
		if h := b.controller.Health(); h.GetTrustBundle() == next.Hash {
			t.Errorf("confirmed %s before Envoy had acknowledged it", h.TrustBundle)
		}
		e.answer(t, r, "")
		b.confirms(t, next.Hash)
	}
}

// TestWhoseTrustIsWaitedFor: what no Envoy asked for needs no answer; an Envoy that runs without a stream may trust anything.
func TestWhoseTrustIsWaitedFor(t *testing.T) {
	const briefly = 100 * time.Millisecond
	for _, c := range []struct {
		name  string
		given func(*testing.T, *bench)
		waits bool
	}{
		{"no Envoy runs", func(_ *testing.T, b *bench) { b.follow(0, envoy.State{}) }, false},
		{"the supervisor has not said", func(*testing.T, *bench) {}, true},
		{"Envoy runs without a stream", func(_ *testing.T, b *bench) { b.follow(0, running) }, true},
		{"Envoy has not said all that it asks for", func(t *testing.T, b *bench) {
			b.follow(0, running)
			e := b.envoy(t, relay.TypeScope)
			e.next(t)
		}, true},
		{"Envoy asked for a rule that it had of the agent before", func(t *testing.T, b *bench) {
			b.follow(0, running)
			b.secrets(t, "rule/pod/80")
		}, true},
		{"Envoy asked for no secret", func(t *testing.T, b *bench) {
			b.follow(0, running)
			b.secrets(t)
		}, false},
		{"Envoy asked for another secret", func(t *testing.T, b *bench) {
			b.follow(0, running)
			b.secrets(t, "spiffe://cluster.local/ns/shop/sa/web")
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, t.TempDir())
			b.cache.Prime()
			b.self.SetRoots([][]byte{{1}})
			if err := b.giveBundle(); err != nil {
				t.Fatal(err)
			}
			c.given(t, b)
			limit := patience
			if c.waits {
				limit = briefly
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			if err := b.envoyTrusts(ctx); (err != nil) != c.waits {
				t.Errorf("waited: %v, want %t", err, c.waits)
			}
		})
	}
}

// TestRefusedTrustBundleIsNotConfirmed: Envoy goes on with the old one.
func TestRefusedTrustBundleIsNotConfirmed(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.cache.Prime()
	b.follow(0, running)
	b.self.SetRoots([][]byte{{1}})
	if err := b.giveBundle(); err != nil {
		t.Fatal(err)
	}
	e := b.secrets(t, names.SecretBundle)
	r, _ := e.next(t)
	e.answer(t, r, "no certificate")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var refused *relay.Refused
	if err := b.envoyTrusts(ctx); !errors.As(err, &refused) || refused.Name != names.SecretBundle {
		t.Errorf("waited: %v, want the refusal of the bundle", err)
	}
}
