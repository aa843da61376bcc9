package enrol

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/svid"
)

const strict = meshv1.Mode_MODE_STRICT

// written are policies by their hashes.
func written() map[string]*meshv1.InboundPolicy {
	whole := func(p *meshv1.PortPolicy) *meshv1.InboundPolicy { return &meshv1.InboundPolicy{DefaultPort: p} }
	only := []*meshv1.Rule{{Name: "shop/only", Peers: []*meshv1.Peer{{Match: &meshv1.Peer_SpiffeId{SpiffeId: till}}}}}
	path := func(p string) []*meshv1.Rule {
		return []*meshv1.Rule{{Name: "shop/path", Requests: []*meshv1.Request{{Paths: []*meshv1.StringMatch{{Match: &meshv1.StringMatch_Prefix{Prefix: p}}}}}}}
	}
	return map[string]*meshv1.InboundPolicy{
		"open":   whole(&meshv1.PortPolicy{Mode: meshv1.Mode_MODE_PERMISSIVE}),
		"wide":   whole(&meshv1.PortPolicy{Mode: strict}),
		"narrow": whole(&meshv1.PortPolicy{Mode: strict, Restricted: true, Allow: only}),
		"admin":  whole(&meshv1.PortPolicy{Mode: strict, Http: true, Deny: path("/admin")}),
		"reads":  whole(&meshv1.PortPolicy{Mode: strict, Http: true, Deny: path("/write")}),
		"modeless": {DefaultPort: &meshv1.PortPolicy{Mode: strict},
			Ports: []*meshv1.PortPolicy{{Port: 8080}}},
	}
}

// settled brings the pod to where a policy alone is in force, and forgets how.
func (w *world) settled(t *testing.T, hash string) *Enroller {
	t.Helper()
	w.policies = written()
	w.wish.InboundPolicy, w.wish.MovedPolicy = hash, hash
	e := w.enrolled(t, enforced)
	w.now = w.now.Add(drain)
	turn(t, e)
	if r := w.report(t); r.SettledPolicy != hash {
		t.Fatalf("%s is not settled: %v", hash, r)
	}
	w.clear()
	return e
}

// chains are the names of the inbound listener's.
func (w *world) chains(t *testing.T) string {
	t.Helper()
	var out []string
	for _, chain := range w.inbound(t).FilterChains {
		out = append(out, chain.Name)
	}
	return strings.Join(out, " ")
}

// expect checks what was reported last, and which chains Envoy has.
func (w *world) expect(t *testing.T, when, inForce, settled, chains string) {
	t.Helper()
	r := w.report(t)
	if r.State != meshv1.PodState_POD_STATE_ENFORCED || r.InboundPolicy != inForce || r.SettledPolicy != settled {
		t.Errorf("%s: %s is reported with %q in force and %q settled, want %q and %q", when, r.State, r.InboundPolicy, r.SettledPolicy, inForce, settled)
	}
	if got := w.chains(t); got != chains {
		t.Errorf("%s: chains %s, want %s", when, got, chains)
	}
}

// A policy changes in three steps: new connections meet it; callers have moved; Envoy has cut what was left.
func TestPolicyChangesStepByStep(t *testing.T) {
	for name, c := range map[string]struct{ from, to, beside, alone string }{
		"fewer are let in":  {"wide", "narrow", "any/weft-l4/1 any/weft-l4", "any/weft-l4/1"},
		"bytes become HTTP": {"wide", "admin", "any/weft-h1 any/weft-h2 any/weft-l4", "any/weft-h1 any/weft-h2"},
		"HTTP becomes bytes": {"admin", "wide", "any/weft-l4 any/weft-h1 any/weft-h2",
			"any/weft-l4"},
		"HTTP rules change": {"admin", "reads", "any/weft-h1/1 any/weft-h2/1 any/weft-h1 any/weft-h2", "any/weft-h1/1 any/weft-h2/1"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			e := w.settled(t, c.from)
			w.wish.InboundPolicy = c.to
			turn(t, e)
			w.inOrder(t, "Envoy acknowledges in/", "remember", "report ENFORCED")
			w.expect(t, "before callers have moved", c.to, "", c.beside)

			w.now = w.now.Add(time.Hour) // the controller is away: old connections stay
			turn(t, e)
			w.expect(t, "while callers have not moved", c.to, "", c.beside)

			w.wish.MovedPolicy = c.to
			again, err := e.reconcile(t.Context(), uid)
			if err != nil || again != drain {
				t.Errorf("after callers moved, look again after %v, error %v", again, err)
			}
			w.expect(t, "while Envoy drains", c.to, "", c.alone)

			w.now = w.now.Add(drain)
			turn(t, e)
			w.expect(t, "in the end", c.to, c.to, c.alone)
			w.never(t, "capture")
		})
	}
}

func TestPolicyChangesThatNeedNoMove(t *testing.T) {
	t.Run("more are let in", func(t *testing.T) {
		w := newWorld()
		e := w.settled(t, "narrow")
		w.wish.InboundPolicy = "wide"
		turn(t, e)
		// Nothing in Envoy ends, so the policy is settled at once.
		w.expect(t, "at once", "wide", "wide", "any/weft-l4/1")
	})
	t.Run("callers without mesh TLS are refused", func(t *testing.T) {
		w := newWorld()
		e := w.settled(t, "open")
		w.wish.InboundPolicy = "wide"
		turn(t, e)
		w.expect(t, "while Envoy drains", "wide", "", "any/weft-l4")
		w.now = w.now.Add(drain)
		turn(t, e)
		w.expect(t, "in the end", "wide", "wide", "any/weft-l4")
	})
}

func TestPolicyChangesWhileCallersMove(t *testing.T) {
	w := newWorld()
	e := w.settled(t, "wide")
	w.wish.InboundPolicy = "narrow"
	turn(t, e)
	w.wish.InboundPolicy = "admin"
	turn(t, e)
	w.expect(t, "both before stay", "admin", "", "any/weft-h1/1 any/weft-h2/1 any/weft-l4 any/weft-l4/1")
	w.wish.MovedPolicy = "narrow"
	turn(t, e)
	w.expect(t, "the first goes", "admin", "", "any/weft-h1/1 any/weft-h2/1 any/weft-l4/1")
	w.wish.MovedPolicy = "admin"
	turn(t, e)
	w.expect(t, "the second goes", "admin", "", "any/weft-h1/1 any/weft-h2/1")
	w.now = w.now.Add(drain)
	turn(t, e)
	w.expect(t, "in the end", "admin", "admin", "any/weft-h1/1 any/weft-h2/1")
}

func TestPolicyGoesBackWhileCallersMove(t *testing.T) {
	w := newWorld()
	e := w.settled(t, "wide")
	w.wish.InboundPolicy, w.wish.MovedPolicy = "narrow", ""
	turn(t, e)
	w.wish.InboundPolicy = "wide"
	turn(t, e)
	// What "wide" had accepted is as welcome as before, and so is what came by "narrow".
	w.expect(t, "back", "wide", "", "any/weft-l4/1 any/weft-l4")
}

// Policies that change faster than callers move do not grow the listener without end.
func TestKeptChainsAreBounded(t *testing.T) {
	w := newWorld()
	e := w.settled(t, "admin")
	w.wish.MovedPolicy = ""
	for i := range 20 {
		w.wish.InboundPolicy = []string{"reads", "admin"}[i%2]
		turn(t, e)
	}
	if n := len(w.inbound(t).FilterChains); n != 2*mostForms {
		t.Errorf("the listener has %d chains, want two for each of %d policies", n, mostForms)
	}
}

// Withdrawal begins with Permissive; callers that have not gone yet keep their connections.
func TestWithdrawalKeepsChains(t *testing.T) {
	w := newWorld()
	e := w.settled(t, "admin")
	w.wish.Stage, w.wish.Goal = captured, out
	turn(t, e)
	if got := w.chains(t); got != "any/weft-l4 any/plain-http any/plain any/weft-h1 any/weft-h2" {
		t.Errorf("chains %s", got)
	}
	if r := w.report(t); r.State != meshv1.PodState_POD_STATE_CAPTURED || r.InboundPolicy != "" || r.SettledPolicy != "" {
		t.Errorf("reported %v", r)
	}
}

// rules are the peers that Envoy's authorisation secrets let in, by their names.
func (w *world) rules() map[string][]string {
	out := map[string][]string{}
	for _, name := range (*fakeEnvoy)(w).Names(relay.TypeSecret, "rule/") {
		secret := w.resources[relay.Key{TypeURL: relay.TypeSecret, Name: name}].(*tls.Secret)
		for _, m := range secret.GetValidationContext().GetMatchTypedSubjectAltNames() {
			out[name] = append(out[name], m.GetMatcher().GetExact()+m.GetMatcher().GetPrefix())
		}
	}
	return out
}

// A rule never lets more in than the listener in force says, nor less than the one that may stay.
func TestRulesChangeWithTheirListener(t *testing.T) {
	t.Run("fewer are let in", func(t *testing.T) {
		w := newWorld()
		e := w.settled(t, "wide")
		w.wish.InboundPolicy = "narrow"
		turn(t, e)
		w.inOrder(t, "Envoy gets rule/5f0c/0/1", "Envoy gets in/", "Envoy acknowledges in/")
		if got := fmt.Sprint(w.rules()); got != "map[rule/5f0c/0:[spiffe://] rule/5f0c/0/1:["+till+"]]" {
			t.Errorf("rules %s", got)
		}
		w.wish.MovedPolicy = "narrow"
		turn(t, e)
		if got := fmt.Sprint(w.rules()); got != "map[rule/5f0c/0/1:["+till+"]]" {
			t.Errorf("after the old chain went: rules %s", got)
		}
	})
	t.Run("more are let in", func(t *testing.T) {
		w := newWorld()
		e := w.settled(t, "narrow")
		w.during["Envoy acknowledges in/"] = func() {
			if got := fmt.Sprint(w.rules()); !strings.Contains(got, till) {
				t.Errorf("before Envoy has acknowledged the listener: rules %s", got)
			}
		}
		w.wish.InboundPolicy = "wide"
		turn(t, e)
		w.inOrder(t, "Envoy gets in/", "Envoy acknowledges in/", "Envoy gets rule/", "Envoy acknowledges rule/", "report ENFORCED")
		if got := fmt.Sprint(w.rules()); strings.Contains(got, till) {
			t.Errorf("rules %s", got)
		}
	})
}

func TestRefusedPolicy(t *testing.T) {
	no := &relay.Refused{Name: "in/5f0c", Text: "regex too large"}
	t.Run("after a good one", func(t *testing.T) {
		for name, to := range map[string]string{"narrower": "narrow", "wider": "open", "for HTTP": "admin"} {
			t.Run(name, func(t *testing.T) {
				w := newWorld()
				e := w.settled(t, "wide")
				listener, rules := proto.Clone(w.inbound(t)), fmt.Sprint(w.rules())
				w.wish.InboundPolicy, w.fail["Envoy acknowledges in/"] = to, no
				if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, no) {
					t.Errorf("Envoy refused, and: %v", err)
				}
				w.expect(t, "the last good one serves", "wide", "wide", "any/weft-l4")
				if r := w.report(t); r.Refused != no.Text || r.Reason != "Refused" {
					t.Errorf("reported %v", r)
				}
				if !proto.Equal(w.inbound(t), listener) || fmt.Sprint(w.rules()) != rules {
					t.Errorf("Envoy is not given the last good listener again, with rules %s", rules)
				}
				delete(w.fail, "Envoy acknowledges in/")
				turn(t, e)
				if r := w.report(t); r.InboundPolicy != to || r.Refused != "" || r.Reason != "" {
					t.Errorf("when Envoy takes it: reported %v", r)
				}
			})
		}
	})
	t.Run("the first", func(t *testing.T) {
		w := newWorld()
		w.policies = written()
		e := w.enrolled(t, captured)
		w.wish.Stage, w.wish.InboundPolicy = enforced, "admin"
		w.refuses = func(m proto.Message) error {
			if strings.Contains(fmt.Sprint(m), "shop/path") {
				return no
			}
			return nil
		}
		for range 2 { // and again at each try
			if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, no) {
				t.Errorf("Envoy refused, and: %v", err)
			}
			w.expect(t, "nobody is let in", "", "", "closed")
			if r := w.report(t); r.Refused != no.Text {
				t.Errorf("reported %v", r)
			}
			if s := w.held[uid]; !s.Strict || !s.Inbound || !s.Outbound {
				t.Errorf("the kernel holds %+v", s)
			}
		}
		w.wish.InboundPolicy = "wide"
		turn(t, e)
		w.expect(t, "another policy", "wide", "", "any/weft-l4")
	})
}

// An agent that starts gives Envoy the same listeners that it has, whatever their chains have been through.
func TestRestartedAgentChangesNoChain(t *testing.T) {
	for name, bring := range map[string]func(*testing.T, *world){
		"a settled policy": func(t *testing.T, w *world) { w.settled(t, "narrow") },
		"revised chains": func(t *testing.T, w *world) {
			e := w.settled(t, "admin")
			w.wish.InboundPolicy, w.wish.MovedPolicy = "reads", "reads"
			turn(t, e)
		},
		"callers have not moved": func(t *testing.T, w *world) {
			e := w.settled(t, "wide")
			w.wish.InboundPolicy = "narrow"
			turn(t, e)
		},
		"nobody is let in": func(t *testing.T, w *world) {
			w.policies = written()
			e := w.enrolled(t, captured)
			w.wish.Stage, w.wish.InboundPolicy = enforced, "admin"
			if err := e.deny(t.Context(), e.state(uid), w.wish); err != nil {
				t.Fatal(err)
			}
		},
	} {
		for how, noSVID := range map[string]bool{"with the controller": false, "while the controller is away": true} {
			t.Run(name+", "+how, func(t *testing.T) {
				w := newWorld()
				bring(t, w)
				before := w.inbound(t)
				var settled string
				if len(w.reports) > 0 {
					settled = w.report(t).SettledPolicy
				}
				w.clear()
				w.resources, w.users, w.noSVID = map[relay.Key]proto.Message{}, map[string]bool{}, noSVID
				w.now = w.now.Add(time.Second)
				var first proto.Message
				w.during["Envoy acknowledges in/"] = func() {
					if first == nil {
						first = proto.Clone(w.inbound(t))
					}
				}
				e := w.enroller()
				if err := e.Adopt(); err != nil {
					t.Fatal(err)
				}
				turn(t, e)
				if !proto.Equal(first, before) {
					t.Errorf("Envoy is first given\n%v\nit has\n%v", first, before)
				}
				if r := w.report(t); settled != "" && r.SettledPolicy != settled {
					t.Errorf("settled was %q, reported %v", settled, r)
				}
				w.never(t, "mode strict=false")
			})
		}
	}
}

// A policy that changed while no agent ran changes by the same steps.
func TestRestartedAgentChangesPolicyStepByStep(t *testing.T) {
	w := newWorld()
	w.settled(t, "wide")
	w.resources = map[relay.Key]proto.Message{}
	w.wish.InboundPolicy = "narrow"
	e := w.enroller()
	turn(t, e)
	w.expect(t, "at first", "narrow", "", "any/weft-l4/1 any/weft-l4")
}

// What the agent before wrote is not believed where it cannot be right.
func TestUnusableMemory(t *testing.T) {
	for name, spoil := range map[string]func(*world){
		"none":    func(w *world) { w.memory = map[string][]byte{} },
		"damaged": func(w *world) { w.memory[uid] = []byte("{") },
		"of another sandbox": func(w *world) {
			w.memory[uid] = []byte(strings.Replace(string(w.memory[uid]), "sandbox-one", "sandbox-two", 1))
		},
		"more open than the kernel": func(w *world) { w.memory[uid] = []byte(`{"Sandbox":"sandbox-one-0001","Forms":[{"Stage":1}]}`) },
		"without the form in force": func(w *world) { w.memory[uid] = []byte(`{"Sandbox":"sandbox-one-0001"}`) },
		"with a policy that is none": func(w *world) {
			w.memory[uid] = []byte(`{"Sandbox":"sandbox-one-0001","Forms":[{"Stage":2,"Policy":"/w=="}]}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.settled(t, "wide")
			w.resources = map[relay.Key]proto.Message{}
			spoil(w)
			e := w.enroller()
			turn(t, e)
			w.never(t, "mode strict=false")
			w.expect(t, "while Envoy may drain", "wide", "", "any/weft-l4")
			w.now = w.now.Add(drain)
			turn(t, e)
			w.expect(t, "in the end", "wide", "wide", "any/weft-l4")
		})
	}
}

// A record that cannot be replaced is removed: an older one would be wrong.
func TestMemoryIsNeverOld(t *testing.T) {
	w := newWorld()
	e := w.settled(t, "wide")
	w.fail["remember"] = errBroken
	w.wish.InboundPolicy = "narrow"
	turn(t, e)
	if len(w.memory) != 0 {
		t.Errorf("kept: %s", w.memory[uid])
	}
	w.expect(t, "without memory", "narrow", "", "any/weft-l4/1 any/weft-l4")
}

func TestEndedPodIsForgotten(t *testing.T) {
	w := newWorld()
	e := w.settled(t, "wide")
	if len(w.memory) != 1 {
		t.Fatalf("%d pods are remembered", len(w.memory))
	}
	delete(w.running, uid)
	turn(t, e)
	if len(w.memory) != 0 {
		t.Error("an ended pod is remembered")
	}
}

func TestPolicyProblemsAreReported(t *testing.T) {
	w := newWorld()
	w.policies = written()
	w.wish.InboundPolicy = "modeless"
	w.wish.Stage = enforced
	turn(t, w.enroller())
	want := []string{lds.ReasonMode + ": the policy of port 8080 has no mTLS mode"}
	if r := w.report(t); r.InboundPolicy != "modeless" || !slices.Equal(r.PolicyProblems, want) {
		t.Errorf("reported %v, want %v", r, want)
	}
}

// The bound is the same at each renewal, and leaves room for its jitter in what a peer's certificate has left.
func TestMaxConnection(t *testing.T) {
	start := time.Now()
	lives := func(d time.Duration) *svid.SVID { return &svid.SVID{NotBefore: start, NotAfter: start.Add(d)} }
	for name, c := range map[string]struct {
		id         *svid.SVID
		last, want time.Duration
	}{
		"an hour":                      {lives(time.Hour), 0, 24 * time.Minute},
		"received a little later":      {lives(time.Hour - 700*time.Millisecond), 24 * time.Minute, 24 * time.Minute},
		"the controller has changed":   {lives(10 * time.Minute), 24 * time.Minute, 4 * time.Minute},
		"no SVID yet, and none before": {nil, 0, 0},
		"no SVID yet":                  {nil, 24 * time.Minute, 24 * time.Minute},
		"one that has ended":           {lives(-time.Minute), 0, time.Second},
	} {
		if got := maxConnection(c.id, c.last); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	w := newWorld()
	w.settled(t, "wide")
	var proxy tcpproxy.TcpProxy
	if err := w.inbound(t).FilterChains[0].Filters[0].GetTypedConfig().UnmarshalTo(&proxy); err != nil {
		t.Fatal(err)
	}
	if got := proxy.GetMaxDownstreamConnectionDuration().AsDuration(); got != 24*time.Minute {
		t.Errorf("an hour's SVIDs bound connections to %v", got)
	}
}

// TestStrictWaitsForCallersWorkers: Envoys acknowledge "speak TLS to this pod" before their workers have it.
func TestStrictWaitsForCallersWorkers(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, captured)
	e.config.Settle = 500 * time.Millisecond
	w.wish.Stage = enforced
	for _, wait := range []time.Duration{500 * time.Millisecond, 200 * time.Millisecond} {
		again, err := e.reconcile(t.Context(), uid)
		if err != nil || again != wait {
			t.Errorf("it looks again after %v, want %v; %v", again, wait, err)
		}
		w.never(t, "mode strict=true")
		w.now = w.now.Add(300 * time.Millisecond)
	}
	turn(t, e)
	w.inOrder(t, "mode strict=true", "report ENFORCED")
	// The next time the pod enters it waits anew.
	w.wish.Stage = captured
	turn(t, e)
	w.clear()
	w.wish.Stage = enforced
	turn(t, e)
	w.never(t, "mode strict=true")
}
