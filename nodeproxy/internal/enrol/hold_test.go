package enrol

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/redirect"
)

// hold holds the world's pod, as the runtime's news of a new one do.
func (w *world) hold() *Enroller {
	e := w.enroller()
	p := w.running[uid]
	p.Unheld = false
	w.running[uid] = p
	e.Hold(p)
	return e
}

// admitted asks for a container as long as no turn can change the answer.
func admitted(t *testing.T, e *Enroller) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*admitPoll)
	defer cancel()
	return e.Admit(ctx, container(e, "app"))
}

// TestNoOtherSidecarIsMade in a pod that is in the mesh or about to be; its other containers are.
func TestNoOtherSidecarIsMade(t *testing.T) {
	w := newWorld()
	e := w.enroller()
	if err := e.Admit(t.Context(), container(e, otherSidecar)); err != nil {
		t.Errorf("outside the mesh: %v", err)
	}
	e.Hold(w.running[uid])
	for _, when := range []string{"held", "in the mesh"} {
		if err := e.Admit(t.Context(), container(e, otherSidecar)); !errors.Is(err, errOtherSidecar) {
			t.Errorf("%s: %v, want the refusal", when, err)
		}
		turn(t, e)
	}
	if err := admitted(t, e); err != nil {
		t.Errorf("another container: %v", err)
	}
}

// container is one of the world's pod, in the sandbox that it has now.
func container(e *Enroller, name string) pods.Container {
	p, _ := e.config.Runtime(uid)
	return pods.Container{UID: uid, Sandbox: p.Sandbox, Name: name}
}

func refusedFor(t *testing.T, e *Enroller, want string) {
	t.Helper()
	if err := admitted(t, e); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("the container's fate is %v, want a refusal for %q", err, want)
	}
}

func TestHeldPodGoesToItsPolicyAtOnce(t *testing.T) {
	for _, stage := range []meshv1.Stage{out, captured, enforced} { // whatever the leader has got to
		t.Run(stage.String(), func(t *testing.T) {
			w := newWorld()
			w.wish.Stage = stage
			e := w.hold()
			if !w.held[uid].Gated {
				t.Fatal("the pod is not closed")
			}
			refusedFor(t, e, "has not begun")
			turn(t, e)
			w.inOrder(t, "gate", "SVID", "kernel enrols", "Envoy gets in/", "Envoy acknowledges in/", "kernel lists listeners", "flip to 0",
				"mode strict=true", "capture in=true out=false", "capture in=true out=true", "report ENFORCED")
			w.never(t, "mode strict=false")
			w.never(t, "kernel withdraws")
			if r := w.report(t); r.StartedUnheld || r.InboundPolicy != hashed {
				t.Errorf("reported %v", r)
			}
			if err := admitted(t, e); err != nil {
				t.Error("its container is not made:", err)
			}
			w.clear()
			w.wish.Stage = captured // the leader has yet to hear of it
			turn(t, e)
			w.never(t, "mode")
			w.never(t, "Envoy gets")
		})
	}
}

// TestHeldPodStaysClosed: what goes wrong on the way leaves it closed, and its container is refused with the reason.
func TestHeldPodStaysClosed(t *testing.T) {
	for step, want := range map[string]string{
		"SVID": "broken on purpose", "kernel enrols": "enrol", "Envoy gets out/": "broken on purpose", "kernel lists listeners": "read listeners",
		"flip": "switch to Envoy", "mode": "set mode", "capture in=true out=false": "capture inbound", "capture in=true out=true": "capture outbound",
	} {
		t.Run(step, func(t *testing.T) {
			w := newWorld()
			e := w.hold()
			w.fail[step] = errBroken
			if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, errBroken) {
				t.Fatalf("%v, want the step's failure", err)
			}
			if s := w.held[uid]; s == nil || !s.Gated || s.Inbound && s.Outbound {
				t.Fatalf("the kernel holds %+v", s)
			}
			refusedFor(t, e, want)
			delete(w.fail, step)
			turn(t, e)
			w.never(t, "mode strict=false")
			if err := admitted(t, e); err != nil {
				t.Error("its container is not made:", err)
			}
		})
	}
	t.Run("no word of the controller", func(t *testing.T) {
		w := newWorld()
		e, wish := w.hold(), w.wish
		w.wish = nil
		turn(t, e)
		refusedFor(t, e, "the controller has not told of it")
		w.wish = wish
		turn(t, e)
		if err := admitted(t, e); err != nil {
			t.Error(err)
		}
	})
	t.Run("no policy yet", func(t *testing.T) {
		w := newWorld()
		e := w.hold()
		w.wish.InboundPolicy = "policy-2"
		_, _ = e.reconcile(t.Context(), uid)
		refusedFor(t, e, "policy-2 has not come")
		if !w.held[uid].Gated {
			t.Error("the pod is open")
		}
	})
	t.Run("refused for good", func(t *testing.T) {
		w := newWorld()
		e := w.hold()
		w.fail["inspect"] = &Refusal{"PortInUse", errBroken}
		looked := make(chan bool)
		go func() { looked <- e.turn(t.Context()) }()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := e.Admit(ctx, container(e, "app")); !errors.Is(err, errBroken) || ctx.Err() != nil {
			t.Errorf("its container's fate is %v", err)
		}
		<-looked
		if r := w.report(t); r.Reason != "PortInUse" || !w.held[uid].Gated {
			t.Errorf("reported %v, the kernel holds %+v", r, w.held[uid])
		}
	})
}

func TestHeldPodThatStaysOutIsLetGo(t *testing.T) {
	w := newWorld()
	e := w.hold()
	w.wish.Goal = out
	turn(t, e)
	if err := admitted(t, e); err != nil {
		t.Error("its container is not made:", err)
	}
	w.nothing(t)
}

func TestHeldPodThatIsDeleted(t *testing.T) {
	w := newWorld()
	e := w.hold()
	p := w.running[uid]
	e.Ended(uid, "another sandbox of it")
	if err := admitted(t, e); err == nil {
		t.Error("the end of another sandbox let it go")
	}
	delete(w.running, uid)
	turn(t, e)
	e.Ended(uid, p.Sandbox)
	if _, held := e.holding(uid, p.Sandbox); held {
		t.Error("it is still held")
	}
	w.nothing(t)
}

// TestHeldPodUnderARefusedPolicy: it starts, and nobody is let in.
func TestHeldPodUnderARefusedPolicy(t *testing.T) {
	no := &relay.Refused{Name: "in/5f0c", Text: "regex too large"}
	w := newWorld()
	w.policies = written()
	w.wish.InboundPolicy = "admin"
	w.refuses = func(m proto.Message) error {
		if strings.Contains(fmt.Sprint(m), "shop/path") {
			return no
		}
		return nil
	}
	e := w.hold()
	if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, no) {
		t.Errorf("Envoy refused, and: %v", err)
	}
	w.expect(t, "nobody is let in", "", "", "closed")
	if s := w.held[uid]; !s.Strict || !s.Captured() {
		t.Errorf("the kernel holds %+v", s)
	}
	if r := w.report(t); r.Refused != no.Text || r.State != meshv1.PodState_POD_STATE_ENFORCED {
		t.Errorf("reported %v", r)
	}
	if err := admitted(t, e); err != nil {
		t.Error("its container is not made:", err)
	}
}

// TestHeldInANewSandbox: the end of the old sandbox must not open the new one.
func TestHeldInANewSandbox(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	p := w.running[uid]
	p.Sandbox, p.NetnsPath, p.Unheld = "sandbox-two-0002", "/run/netns/cni-2", false
	w.running[uid] = p
	w.held[uid] = &redirect.State{Pod: kernelPod(p), Gated: true} // what the kernel does at Gate of a known pod's new sandbox
	e.Hold(p)
	w.clear()
	turn(t, e)
	w.inOrder(t, "kernel withdraws", "gate", "kernel enrols", "mode strict=true", "capture in=true out=true")
	w.never(t, "mode strict=false")
	if err := admitted(t, e); err != nil {
		t.Error(err)
	}
}

// TestHeldWhileAWorkerLooks: what a look at the pod of before decides does not count for the one that was held meanwhile.
func TestHeldWhileAWorkerLooks(t *testing.T) {
	closedAgain := func(t *testing.T, w *world, e *Enroller) {
		t.Helper()
		if err := admitted(t, e); err == nil {
			t.Fatal("its container is made")
		}
		w.clear()
		turn(t, e)
		w.inOrder(t, "gate", "mode strict=true", "capture in=true out=true")
		w.never(t, "mode strict=false")
		if err := admitted(t, e); err != nil {
			t.Error(err)
		}
	}
	t.Run("before the runtime's table had it", func(t *testing.T) {
		w := newWorld()
		e, p := w.enroller(), w.running[uid]
		p.Unheld = false
		delete(w.running, uid)
		w.during["complete"] = func() { // the worker has found it not to run
			delete(w.during, "complete")
			e.Hold(p)
			w.running[uid] = p
		}
		turn(t, e)
		closedAgain(t, w, e)
	})
	t.Run("in another sandbox", func(t *testing.T) {
		w := newWorld()
		w.wish.Stage = enforced
		e, p := w.enroller(), w.running[uid]
		w.during["flip"] = func() {
			delete(w.during, "flip")
			p.Sandbox, p.Unheld = "sandbox-two-0002", false
			w.running[uid] = p
			e.Hold(p)
		}
		turn(t, e)
		closedAgain(t, w, e)
	})
}

// TestVainWaitsAreBounded: they hold up every other container of the node.
func TestVainWaitsAreBounded(t *testing.T) {
	w := newWorld()
	e := w.hold()
	e.patience()
	e.spend(admitBudget)
	if p := e.patience(); p > admitLimit/10 {
		t.Errorf("the next wait takes up to %v", p)
	}
	turn(t, e)
	if p := e.patience(); p > admitLimit/10 { // pods come and go all the time
		t.Errorf("after one was let go the next wait takes up to %v", p)
	}
	e.waits = budget{since: time.Now().Add(-2 * admitWindow), spent: admitBudget}
	if p := e.patience(); p != admitLimit {
		t.Errorf("a good while later the next wait takes up to %v", p)
	}
}

// TestGatedPodOfAnAgentBefore goes straight to its policy, and its condition does not say that it ran outside.
func TestGatedPodOfAnAgentBefore(t *testing.T) {
	w := newWorld()
	w.held[uid] = &redirect.State{Pod: kernelPod(w.running[uid]), Gated: true}
	turn(t, w.enroller())
	w.inOrder(t, "kernel enrols", "mode strict=true", "capture in=true out=true", "report ENFORCED")
	w.never(t, "mode strict=false")
	if r := w.report(t); r.StartedUnheld {
		t.Errorf("reported %v", r)
	}
}

// A failure of the first attempt does not open the gate that an agent before closed.
func TestGateOfAnAgentBeforeOutlivesFailure(t *testing.T) {
	w := newWorld()
	w.held[uid] = &redirect.State{Pod: kernelPod(w.running[uid]), Gated: true}
	w.fail["Envoy acknowledges in/"] = errBroken
	e := w.enroller()
	if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, errBroken) {
		t.Errorf("%v, want the step's failure", err)
	}
	w.never(t, "kernel withdraws")
	if s := w.held[uid]; s == nil || !s.Gated {
		t.Errorf("the kernel holds %+v", s)
	}
	delete(w.fail, "Envoy acknowledges in/")
	turn(t, e)
	w.inOrder(t, "mode strict=true", "capture in=true out=true", "report ENFORCED")
	w.never(t, "mode strict=false")
	if r := w.report(t); r.StartedUnheld {
		t.Errorf("reported %v", r)
	}
}

func TestRestartedAgentKnowsWhoWasHeld(t *testing.T) {
	for _, stage := range []meshv1.Stage{captured, enforced} { // the leader may not have heard of it
		for _, forgotten := range []bool{false, true} {
			t.Run(fmt.Sprint(stage, ", record lost: ", forgotten), func(t *testing.T) {
				w := newWorld()
				w.wish.Stage = stage
				turn(t, w.hold())
				p := w.running[uid]
				p.Unheld = true // as the runtime tells of whatever runs
				w.running[uid] = p
				if forgotten {
					clear(w.memory)
				}
				w.clear()
				turn(t, w.enroller())
				w.never(t, "mode strict=false")
				if r := w.report(t); !forgotten && r.StartedUnheld || r.State != meshv1.PodState_POD_STATE_ENFORCED || r.InboundPolicy != hashed {
					t.Errorf("reported %v", r)
				}
			})
		}
	}
}

// TestHeldOnceAndBack: a pod that was held when it was new, left the mesh and comes back is one that runs.
func TestHeldOnceAndBack(t *testing.T) {
	w := newWorld()
	e := w.hold()
	turn(t, e)
	w.wish.Stage, w.wish.Goal = out, out
	turn(t, e)
	w.nothing(t)
	w.wish.Stage, w.wish.Goal = captured, enforced
	w.clear()
	turn(t, e)
	for _, r := range w.reports {
		if !r.StartedUnheld {
			t.Errorf("reported %v, want it unheld", r)
		}
	}
}
