package enrol

import (
	"slices"
	"testing"
	"time"
)

// TestAnotherEnvoyTakesOver: the pod goes over when the next Envoy listens in it, without a step back, and the one before keeps
// its listeners and follows the pod's policy.
func TestAnotherEnvoyTakesOver(t *testing.T) {
	for name, fresh := range map[string]bool{"under the same agent": false, "under another agent": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			e := w.settled(t, "wide")
			if fresh {
				e = w.enroller()
				if err := e.Adopt(); err != nil {
					t.Fatal(err)
				}
			}
			if n := e.Elsewhere(1); n != 1 || e.Elsewhere(0) != 0 {
				t.Errorf("%d pods are to go over to generation 1", n)
			}
			w.clear()
			w.generation, w.beside = 1, []uint32{0}
			turn(t, e)
			w.inOrder(t, "Envoy gets in/5f0c/sandbox-one-/1", "Envoy acknowledges in/5f0c/sandbox-one-/1", "kernel lists listeners", "Envoy gets in/5f0c/sandbox-one-/0", "flip to 1", "report ENFORCED")
			for _, wrong := range []string{"Envoy loses", "capture in=false", "mode strict=false", "kernel withdraws"} {
				w.never(t, wrong)
			}
			if r := w.report(t); r.ProxyGeneration != 1 || r.SettledPolicy != "wide" {
				t.Errorf("reported %v", r)
			}
			if e.Elsewhere(1) != 0 {
				t.Error("the pod still goes elsewhere")
			}

			// A policy that lets less in is in force at both, and settled when both have cut what they had.
			w.wish.InboundPolicy = "narrow"
			w.fail["Envoy acknowledges in/5f0c/sandbox-one-/0"] = errBroken
			turn(t, e)
			w.wish.MovedPolicy = "narrow"
			turn(t, e)
			w.now = w.now.Add(drain + time.Second)
			turn(t, e)
			if r := w.report(t); r.InboundPolicy != "narrow" || r.SettledPolicy != "" {
				t.Errorf("reported %v while an Envoy has not taken the policy", r)
			}
			delete(w.fail, "Envoy acknowledges in/5f0c/sandbox-one-/0")
			turn(t, e)
			if r := w.report(t); r.SettledPolicy != "" {
				t.Errorf("settled before that Envoy has cut what it had: %v", r)
			}
			w.now = w.now.Add(drain + time.Second)
			turn(t, e)
			if r := w.report(t); r.SettledPolicy != "narrow" {
				t.Errorf("reported %v", r)
			}

			// It ends: its listeners are nobody's business, and the pod's end takes all.
			w.beside = nil
			w.wish.Stage, w.wish.Goal = out, out
			turn(t, e)
			w.nothing(t)
			if e.Elsewhere(0) != 0 {
				t.Error("a pod that left goes somewhere")
			}
		})
	}
}

// TestBackToTheEnvoyBefore when the next one is gone: it has the listeners still.
func TestBackToTheEnvoyBefore(t *testing.T) {
	w := newWorld()
	e := w.settled(t, "wide")
	w.generation, w.beside = 1, []uint32{0}
	turn(t, e)
	w.clear()
	w.generation, w.beside = 0, nil
	turn(t, e)
	w.inOrder(t, "flip to 0", "report ENFORCED")
	if got := w.listeners(); !slices.Contains(got, "in/5f0c/sandbox-one-/0") {
		t.Errorf("listeners are %v", got)
	}
}

// TestPodStaysWhereItIsServed: an Envoy that does not listen in the pod gets nothing of it.
func TestPodStaysWhereItIsServed(t *testing.T) {
	w := newWorld()
	e := w.settled(t, "wide")
	w.clear()
	w.generation, w.beside = 1, []uint32{0}
	w.fail["Envoy acknowledges in/5f0c/sandbox-one-/1"] = errBroken
	if _, err := e.reconcile(t.Context(), uid); err == nil {
		t.Error("it went over")
	}
	w.never(t, "flip")
	w.never(t, "Envoy loses in/5f0c/sandbox-one-/0")
	if s := w.held[uid]; !s.Strict || !s.Inbound || !s.Outbound || s.Generation != 0 {
		t.Errorf("the kernel holds %+v", s)
	}
	if e.Elsewhere(1) != 1 {
		t.Error("a pod that did not go over counts as if it had")
	}
}
