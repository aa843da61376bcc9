package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/redirect"
)

func service(class meshv1.Class) *meshv1.Service {
	return &meshv1.Service{Namespace: "shop", Name: "till", Addresses: [][]byte{{10, 96, 0, 10}}, Ports: []*meshv1.ServicePort{{Port: 80, Class: class}}}
}

const scope = "10.96.0.10:80"

func (b *bench) send(t *testing.T, m *meshv1.Service) string {
	t.Helper()
	var body proto.Message
	if m != nil {
		body = m
	}
	return b.controller.Send(t, relay.TypeService, map[string]proto.Message{"shop/till": body})
}

func (b *bench) answered(t *testing.T, nonce string) string {
	t.Helper()
	until(t, "the agent answers", func() bool { _, ok := b.controller.Answer(nonce); return ok })
	text, _ := b.controller.Answer(nonce)
	return text
}

func TestServiceIsCapturedAfterItsScope(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.cache.Prime()
	e := b.envoy(t, relay.TypeScope)
	first, _ := e.next(t) // empty: there are none yet
	e.answer(t, first, "")
	b.connect(t)
	nonce := b.send(t, service(meshv1.Class_CLASS_HTTP))
	r, got := e.next(t)
	if !slices.Equal(got, []string{scope}) {
		t.Errorf("Envoy got %v", got)
	}
	if _, times := b.kernel.captured(); times != 0 {
		t.Error("the service is captured before Envoy has acknowledged its scope")
	}
	if _, ok := b.controller.Answer(nonce); ok {
		t.Error("the controller has an answer before Envoy has given one")
	}
	e.answer(t, r, "")
	if text := b.answered(t, nonce); text != "" {
		t.Errorf("refused: %s", text)
	}
	if got, _ := b.kernel.captured(); len(got) != 1 || got[0] != (redirect.Service{Addr: netip.MustParseAddrPort(scope), Class: redirect.ClassHTTP}) {
		t.Errorf("captured %v", got)
	}
}

// take answers all that Envoy is sent until the controller has an answer, refusing what holds a name, and returns that answer.
func (b *bench) take(t *testing.T, e *stub, nonce, bad string) string {
	t.Helper()
	until(t, "the agent answers", func() bool {
		select {
		case r := <-e.got:
			refuse := ""
			if slices.ContainsFunc(r.Resources, func(x *discovery.Resource) bool { return x.Name == bad }) {
				refuse = "cannot take " + bad
			}
			e.answer(t, r, refuse)
		default:
		}
		_, ok := b.controller.Answer(nonce)
		return ok
	})
	text, _ := b.controller.Answer(nonce)
	return text
}

func TestRefusedScopeIsNotCaptured(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.cache.Prime()
	e := b.envoy(t, relay.TypeScope)
	b.connect(t)
	other := &meshv1.Service{Namespace: "shop", Name: "web", Addresses: [][]byte{{10, 96, 0, 11}}, Ports: []*meshv1.ServicePort{{Port: 80, Class: meshv1.Class_CLASS_HTTP}}}
	nonce := b.controller.Send(t, relay.TypeService, map[string]proto.Message{"shop/till": service(meshv1.Class_CLASS_HTTP), "shop/web": other})
	refused := names.ParseRefused(b.take(t, e, nonce, scope))
	if len(refused) != 1 || !strings.Contains(refused["shop/till"], "cannot take "+scope) {
		t.Errorf("the controller hears of %q, want the refusal of shop/till", refused)
	}
	if got, _ := b.kernel.captured(); len(got) != 1 || got[0].Addr.String() != "10.96.0.11:80" {
		t.Errorf("captured %v, want the service whose scope Envoy has", got)
	}
	// What is refused later is captured as before: Envoy keeps the scope that it has.
	nonce = b.send(t, service(meshv1.Class_CLASS_AUTO))
	if text := b.take(t, e, nonce, ""); text != "" {
		t.Errorf("refused: %s", text)
	}
	if got, _ := b.kernel.captured(); len(got) != 2 {
		t.Errorf("captured %v, want both services", got)
	}
}

// TestRefusalNamesItsResources: the controller hears which of a response's resources are not in force.
func TestRefusalNamesItsResources(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.cache.Prime()
	e := b.envoy(t, relay.TypeScope)
	b.connect(t)
	all := []string{"route/shop/a/80", "route/shop/b/80", "route/shop/c/80", "route/shop/d/80"}
	e.send(t, &discovery.DeltaDiscoveryRequest{TypeUrl: relay.TypeRoute, ResourceNamesSubscribe: all})
	given := map[string]proto.Message{}
	for _, name := range all {
		until(t, "the agent asks for "+name, func() bool { return b.controller.Asked(relay.TypeRoute, name) })
		given[name] = &route.RouteConfiguration{Name: name}
	}
	nonce := b.controller.Send(t, relay.TypeRoute, given)
	refused := names.ParseRefused(b.take(t, e, nonce, all[2]))
	if len(refused) != 1 || refused[all[2]] != "cannot take "+all[2] {
		t.Errorf("the controller hears of %q, want the refusal of %s", refused, all[2])
	}
}

// TestLateAnswerIsAnAnswer: an Envoy that is slow does not refuse, and the controller hears from it in the end.
func TestLateAnswerIsAnAnswer(t *testing.T) {
	const name = "route/shop/a/80"
	b := newBench(t, t.TempDir())
	b.cache.Prime()
	e := b.envoy(t, relay.TypeScope)
	first, _ := e.next(t)
	e.answer(t, first, "")
	b.connect(t)
	e.send(t, &discovery.DeltaDiscoveryRequest{TypeUrl: relay.TypeRoute, ResourceNamesSubscribe: []string{name}})
	until(t, "the agent asks for the route", func() bool { return b.controller.Asked(relay.TypeRoute, name) })
	routes := b.controller.Send(t, relay.TypeRoute, map[string]proto.Message{name: &route.RouteConfiguration{Name: name}})
	services := b.send(t, service(meshv1.Class_CLASS_HTTP))
	var late []*discovery.DeltaDiscoveryResponse
	for range 2 {
		r, _ := e.next(t)
		late = append(late, r)
	}
	until(t, "the agent has waited longer than usual for both", func() bool {
		return strings.Contains(b.log.String(), "type="+relay.TypeRoute) && strings.Contains(b.log.String(), "type="+relay.TypeService)
	})
	for what, nonce := range map[string]string{"routes": routes, "services": services} {
		if text, ok := b.controller.Answer(nonce); ok {
			t.Errorf("%s are answered though Envoy has not: %q", what, text)
		}
	}
	for _, r := range late {
		e.answer(t, r, "")
	}
	for what, nonce := range map[string]string{"routes": routes, "services": services} {
		if text := b.answered(t, nonce); text != "" {
			t.Errorf("%s are refused: %s", what, text)
		}
	}
}

func TestServiceLeavesBeforeItsScope(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.connect(t) // no Envoy: nobody to wait for
	b.answered(t, b.send(t, service(meshv1.Class_CLASS_HTTP)))
	held := func() bool { return slices.Contains(b.cache.Names(relay.TypeScope, ""), scope) }
	if !held() {
		t.Fatal("Envoy would not get the scope")
	}
	// A port that falls from HTTP keeps its scope: connections that were captured have requests to come.
	b.answered(t, b.send(t, service(meshv1.Class_CLASS_UNSPECIFIED)))
	if got, _ := b.kernel.captured(); len(got) != 0 || !held() {
		t.Errorf("captured %v, scope held: %t", got, held())
	}
	b.answered(t, b.send(t, service(meshv1.Class_CLASS_HTTP)))
	early := false
	b.kernel.before = func() { early = !held() }
	b.answered(t, b.send(t, nil))
	if got, _ := b.kernel.captured(); len(got) != 0 || early || held() {
		t.Errorf("captured %v, scope went too early: %t, is left: %t", got, early, held())
	}
}

func TestPeersAreCapturedByAddress(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.connect(t)
	nonce := b.controller.Send(t, relay.TypeWorkload, map[string]proto.Message{
		"1": &meshv1.Workload{Uid: "1", Mtls: true, Addresses: [][]byte{{10, 1, 0, 1}, {1, 2}}},
		"2": &meshv1.Workload{Uid: "2", Addresses: [][]byte{{10, 1, 0, 2}}},
	})
	b.answered(t, nonce)
	if got := b.kernel.addresses; len(got) != 1 || !slices.Equal(got[0], []netip.Addr{netip.MustParseAddr("10.1.0.1")}) {
		t.Errorf("captured %v, want those that speak mTLS", got)
	}
}

func TestClientAddressReachesTheKernel(t *testing.T) {
	b := newBench(t, t.TempDir())
	b.connect(t)
	for _, own := range []bool{false, true, false} {
		b.answered(t, b.controller.Send(t, relay.TypeMesh, map[string]proto.Message{"mesh": &meshv1.Mesh{OwnClientAddress: own}}))
		b.kernel.mu.Lock()
		if told := b.kernel.clientAddress; len(told) == 0 || told[len(told)-1] != own {
			t.Errorf("the controller says %v and has an answer, the kernel was told %v", own, told)
		}
		b.kernel.mu.Unlock()
	}
}
