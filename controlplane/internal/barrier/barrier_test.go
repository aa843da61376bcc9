package barrier

import (
	"slices"
	"testing"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

const uid = "u1"

// world is one pod, its node's kernel, and the acknowledgements of all nodes.
type world struct {
	barrier    *Barrier
	goal       ir.Stage
	report     *meshv1.PodReport
	forged     *meshv1.PodReport // what another node says of the pod
	generation uint64
	answered   uint64
	told       []bool // by generation: peers are to speak mTLS
	fresh      bool   // the controller has published nothing yet
	silent     bool   // the pod's node has yet to find this controller
}

func (w *world) step() resolve.Decision {
	v := View{
		Pods:    map[string]*ir.Pod{uid: {UID: uid, Node: "n1", Goal: w.goal}},
		Reports: Reports{}, Synced: map[string]bool{"n1": true}, Answered: w.answered, Nodes: map[string]uint64{"n1": w.answered},
	}
	if w.silent {
		v.Synced = nil
	} else if w.report != nil {
		v.Reports["n1"] = map[string]*meshv1.PodReport{uid: w.report}
	}
	if w.forged != nil {
		v.Reports["n2"] = map[string]*meshv1.PodReport{uid: w.forged}
	}
	for w.barrier.Step(v) || w.fresh {
		w.fresh = false
		w.generation++
		w.barrier.Published(w.generation)
		w.told = append(w.told, w.barrier.Decisions()[uid].MTLS)
	}
	return w.barrier.Decisions()[uid]
}

func (w *world) says(s meshv1.PodState) {
	w.report = &meshv1.PodReport{Uid: uid, Sandbox: "s1", State: s, StartedUnheld: true}
}

// holds is the node's report of a pod that was held when it was new.
func (w *world) holds(sandbox string, s meshv1.PodState) {
	w.report = &meshv1.PodReport{Uid: uid, Sandbox: sandbox, State: s}
	if s == meshv1.PodState_POD_STATE_ENFORCED {
		w.report.InboundPolicy = "p"
	}
}

// some tells whether a peer may speak mTLS to the pod, or plaintext: each is between what all have answered and the newest.
func (w *world) some(mtls bool) bool {
	return slices.Contains(append([]bool{false}, w.told...)[w.answered:], mtls)
}

// enforces is the node's report of a policy in force.
func (w *world) enforces(policy string) {
	w.says(meshv1.PodState_POD_STATE_ENFORCED)
	w.report.InboundPolicy = policy
}

func TestEnrolmentAndWithdrawalGoStepByStep(t *testing.T) {
	w := &world{barrier: New(nil), goal: ir.Enforced}
	w.says(meshv1.PodState_POD_STATE_OUT)
	steps := []struct {
		name string
		do   func()
		want resolve.Decision
	}{
		{"a pod that is to be in is captured first", func() {}, resolve.Decision{Stage: ir.Captured}},
		{"while it prepares nothing goes on", func() { w.says(meshv1.PodState_POD_STATE_PREPARING); w.answered = 99 }, resolve.Decision{Stage: ir.Captured}},
		{"captured: peers are told", func() { w.answered = w.generation; w.says(meshv1.PodState_POD_STATE_CAPTURED) }, resolve.Decision{Stage: ir.Captured, MTLS: true}},
		{"until all have answered it stays Permissive", func() {}, resolve.Decision{Stage: ir.Captured, MTLS: true}},
		{"all have answered: enforced", func() { w.answered = w.generation }, resolve.Decision{Stage: ir.Enforced, MTLS: true}},
		{"the node says so: callers are to move", func() { w.enforces("p") }, resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
		{"until all have answered nothing earlier goes", func() {}, resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
		{"all have answered: callers have moved", func() { w.answered = w.generation }, resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p", Moved: "p"}},
		{"another policy: callers are to move again", func() { w.answered = w.generation; w.enforces("q") }, resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "q"}},
		{"back before they moved: an earlier answer does not count", func() { w.enforces("p") }, resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p"}},
		{"all have answered", func() { w.answered = w.generation }, resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "p", Moved: "p"}},
		{"it is to leave: Permissive first", func() { w.answered = w.generation; w.goal = ir.Out }, resolve.Decision{Stage: ir.Captured, MTLS: true, Policy: "p", Moved: "p"}},
		{"Permissive: peers are told", func() { w.answered = w.generation; w.says(meshv1.PodState_POD_STATE_CAPTURED) }, resolve.Decision{Stage: ir.Captured}},
		{"all have answered: out", func() { w.answered = w.generation }, resolve.Decision{Stage: ir.Out}},
		{"gone from the kernel: forgotten", func() { w.says(meshv1.PodState_POD_STATE_OUT) }, resolve.Decision{}},
	}
	for _, s := range steps {
		s.do()
		if got := w.step(); got != s.want {
			t.Fatalf("%s: %+v, want %+v", s.name, got, s.want)
		}
	}
}

// TestAnOrderToLeaveMayBeOnItsWay: a pod that is to be in again is not spoken mTLS to on the word of a report that may be older
// than what its node does now.
func TestAnOrderToLeaveMayBeOnItsWay(t *testing.T) {
	w := &world{barrier: New(map[string]resolve.Decision{uid: {Stage: ir.Captured}}), goal: ir.Out}
	w.says(meshv1.PodState_POD_STATE_CAPTURED)
	w.step()
	w.answered = w.generation
	if got := w.step(); got.Stage != ir.Out {
		t.Fatalf("it is to leave: %+v", got)
	}
	w.goal = ir.Enforced // before the node has said that it left
	if got := w.step(); got != (resolve.Decision{Stage: ir.Captured}) {
		t.Errorf("it is to be in again: %+v", got)
	}
	if got := w.step(); got.MTLS {
		t.Errorf("its node may leave yet: %+v", got)
	}
	w.answered = w.generation
	if got := w.step(); !got.MTLS {
		t.Errorf("its node has answered the order to stay: %+v", got)
	}
}

func TestLosses(t *testing.T) {
	enforced := func() *world {
		w := &world{barrier: New(map[string]resolve.Decision{uid: {Stage: ir.Enforced, MTLS: true}}), goal: ir.Enforced}
		w.says(meshv1.PodState_POD_STATE_ENFORCED)
		w.step()
		return w
	}
	t.Run("a controller that starts takes over what the kernel holds", func(t *testing.T) {
		w := &world{barrier: New(nil), goal: ir.Enforced}
		w.says(meshv1.PodState_POD_STATE_ENFORCED)
		w.answered = 99
		if got := w.step(); got.Stage != ir.Enforced || !got.MTLS {
			t.Errorf("%+v", got)
		}
	})
	t.Run("it does so at once: a step back would open a pod that enforces", func(t *testing.T) {
		w := &world{barrier: New(map[string]resolve.Decision{uid: {Stage: ir.Captured}}), goal: ir.Enforced}
		w.says(meshv1.PodState_POD_STATE_ENFORCED)
		if got := w.step(); got.Stage != ir.Enforced || !got.MTLS {
			t.Errorf("%+v", got)
		}
	})
	t.Run("a seeded pod keeps its stage while its node is silent", func(t *testing.T) {
		w := &world{barrier: New(map[string]resolve.Decision{uid: {Stage: ir.Enforced, MTLS: true}}), goal: ir.Enforced, answered: 99}
		v := View{Pods: map[string]*ir.Pod{uid: {UID: uid, Node: "n1", Goal: ir.Enforced}}, Answered: 99}
		w.barrier.Step(v)
		if got := w.barrier.Decisions()[uid]; got.Stage != ir.Enforced || !got.MTLS {
			t.Errorf("%+v", got)
		}
	})
	t.Run("a new sandbox voids the old one's standing", func(t *testing.T) {
		w := enforced()
		w.report = &meshv1.PodReport{Uid: uid, Sandbox: "s2", State: meshv1.PodState_POD_STATE_PREPARING}
		if got := w.step(); got.MTLS || !got.Lost || got.Stage != ir.Captured {
			t.Errorf("%+v", got)
		}
	})
	t.Run("a node that has forgotten the pod voids it", func(t *testing.T) {
		w := enforced()
		w.report = nil
		if got := w.step(); got.MTLS || !got.Lost {
			t.Errorf("%+v", got)
		}
	})
	t.Run("a pod that leaves is not lost", func(t *testing.T) {
		w := enforced()
		w.goal = ir.Out
		if got := w.step(); got.Lost || got.Stage != ir.Captured {
			t.Errorf("%+v", got)
		}
	})
}

// TestOnlyThePodsOwnNodeSpeaksForIt: a compromised agent may report any uid.
func TestOnlyThePodsOwnNodeSpeaksForIt(t *testing.T) {
	states := []meshv1.PodState{meshv1.PodState_POD_STATE_OUT, meshv1.PodState_POD_STATE_PREPARING, meshv1.PodState_POD_STATE_CAPTURED,
		meshv1.PodState_POD_STATE_ENFORCED, meshv1.PodState_POD_STATE_FAILED, meshv1.PodState_POD_STATE_GONE}
	for _, goal := range []ir.Stage{ir.Out, ir.Enforced} {
		for _, own := range append([]meshv1.PodState{meshv1.PodState_POD_STATE_UNSPECIFIED}, states...) {
			for _, forged := range states {
				var got [2]resolve.Decision
				for i := range got {
					w := &world{barrier: New(nil), goal: goal, answered: 99}
					if own != meshv1.PodState_POD_STATE_UNSPECIFIED { // else its own node says nothing
						w.says(own)
					}
					if i == 1 {
						w.forged = &meshv1.PodReport{Uid: uid, Sandbox: "s9", State: forged, InboundPolicy: "forged"}
					}
					w.step()
					got[i] = w.step()
				}
				if got[0] != got[1] {
					t.Errorf("goal %d, own node says %s: another node's %s makes %+v of %+v", goal, own, forged, got[1], got[0])
				}
			}
		}
	}
}

// TestOrderToEnforceIsAnsweredFirst: what a node said before it was told to enforce is no answer to what comes next.
func TestOrderToEnforceIsAnsweredFirst(t *testing.T) {
	for name, answer := range map[string]func(*world){
		"it enforces": func(w *world) { w.says(meshv1.PodState_POD_STATE_ENFORCED) },
		"it cannot":   func(w *world) { w.says(meshv1.PodState_POD_STATE_CAPTURED); w.report.Reason = "StepFailed" },
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{barrier: New(map[string]resolve.Decision{uid: {Stage: ir.Enforced, MTLS: true}}), goal: ir.Out}
			w.says(meshv1.PodState_POD_STATE_CAPTURED)
			if got := w.step(); got.Stage != ir.Enforced || !got.MTLS {
				t.Fatalf("before the answer: %+v", got)
			}
			answer(w)
			if got := w.step(); got.Stage != ir.Captured {
				t.Fatalf("after the answer: %+v", got)
			}
			w.says(meshv1.PodState_POD_STATE_CAPTURED)
			if got := w.step(); got.MTLS {
				t.Errorf("Permissive again: %+v", got)
			}
		})
	}
}
