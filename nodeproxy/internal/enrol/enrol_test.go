package enrol

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/redirect"
)

const (
	out      = meshv1.Stage_STAGE_OUT
	captured = meshv1.Stage_STAGE_CAPTURED
	enforced = meshv1.Stage_STAGE_ENFORCED
)

func TestCaptureComesAfterListeners(t *testing.T) {
	w := newWorld()
	w.wish.Stage = captured
	e := w.enroller()
	turn(t, e)
	w.inOrder(t, "report PREPARING", "SVID", "kernel enrols", "Envoy gets in/", "Envoy acknowledges in/", "kernel lists listeners", "flip to 0",
		"mode strict=false", "capture in=true out=false", "capture in=true out=true", "report CAPTURED")
	w.inOrder(t, "Envoy acknowledges out/", "kernel lists listeners")
	if r := w.report(t); r.Sandbox != "sandbox-one-0001" || !r.StartedUnheld || r.InboundPolicy != "" || r.PreexistingConnections != 3 {
		t.Errorf("reported %v", r)
	}
	w.clear()
	turn(t, e)
	w.never(t, "capture")
	w.never(t, "Envoy gets")
}

// The label switches a running pod's short circuit, and what an agent before left on goes.
func TestShortcutFollowsTheLabel(t *testing.T) {
	w := newWorld()
	w.wish.Stage = captured
	e := w.enroller()
	turn(t, e)
	w.never(t, "short circuit")
	w.wish.Shortcut = true
	w.clear()
	turn(t, e)
	w.inOrder(t, "short circuit true", "report CAPTURED")
	w.never(t, "capture")
	if r := w.report(t); !r.Shortcut || r.ShortcutRefused != "" {
		t.Errorf("reported %v", r)
	}
	w.held[uid].Shortcut = false // behind the agent's back
	turn(t, e)
	if r := w.report(t); !r.Shortcut {
		t.Errorf("reported %v", r)
	}
	w.wish.Shortcut = false
	turn(t, w.enroller()) // another agent
	w.inOrder(t, "short circuit true", "short circuit false")
	if r := w.report(t); r.Shortcut || r.State != meshv1.PodState_POD_STATE_CAPTURED {
		t.Errorf("reported %v", r)
	}
}

func TestPodIsInTheMeshWhereTheKernelHasNoShortcut(t *testing.T) {
	w := newWorld()
	w.wish.Stage, w.wish.Shortcut = captured, true
	w.fail["short circuit true"] = fmt.Errorf("kernel 6.1 is too old: %w", redirect.ErrUnsupported)
	e := w.enroller()
	turn(t, e)
	if r := w.report(t); r.State != meshv1.PodState_POD_STATE_CAPTURED || r.Shortcut || !strings.Contains(r.ShortcutRefused, "too old") {
		t.Errorf("reported %v", r)
	}
	w.wish.Shortcut = false
	turn(t, e)
	if r := w.report(t); r.ShortcutRefused != "" {
		t.Errorf("reported %v", r)
	}
}

// An acknowledgement alone is not enough: Envoy gives it before its workers listen.
func TestCaptureWaitsForTheSocketMap(t *testing.T) {
	w := newWorld()
	w.wish.Stage, w.deaf = captured, true
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.enroller().reconcile(ctx, uid); err == nil || !strings.Contains(err.Error(), "0 of 2 listeners") {
		t.Errorf("a deaf Envoy: %v", err)
	}
	w.inOrder(t, "Envoy acknowledges in/", "kernel lists listeners")
	w.never(t, "capture")
}

func TestFailureLeavesNothingAttached(t *testing.T) {
	for step, want := range map[string]string{
		"SVID":                         "broken on purpose",
		"kernel enrols":                "broken on purpose",
		"Envoy gets out/":              "broken on purpose",
		"Envoy acknowledges in/":       "broken on purpose",
		"kernel lists listeners":       "read listeners",
		"flip":                         "switch to Envoy",
		"mode":                         "set mode",
		"capture in=true out=false":    "capture inbound",
		"capture in=true out=true":     "capture outbound",
		"Envoy acknowledges out/5f0c/": "broken on purpose",
	} {
		t.Run(step, func(t *testing.T) {
			w := newWorld()
			w.wish.Stage = captured
			w.fail[step] = errBroken
			e := w.enroller()
			if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, errBroken) {
				t.Fatalf("%v, want the step's failure", err)
			}
			w.nothing(t)
			if r := w.report(t); r.State != meshv1.PodState_POD_STATE_FAILED || r.Reason != "StepFailed" || !strings.Contains(r.Message, want) {
				t.Errorf("reported %v", r)
			}
			delete(w.fail, step)
			turn(t, e)
			if r := w.report(t); r.State != meshv1.PodState_POD_STATE_CAPTURED || r.Reason != "" {
				t.Errorf("afterwards reported %v", r)
			}
		})
	}
}

func TestRefusedPodsAreLeftAlone(t *testing.T) {
	for want, change := range map[string]func(*world){
		"RuntimeUnsupported":   func(w *world) { p := w.running[uid]; p.Runtime = "kata-qemu"; w.running[uid] = p },
		"OtherSidecar":         func(w *world) { p := w.running[uid]; p.Containers = []string{"app", "istio-proxy"}; w.running[uid] = p },
		"NoAddress":            func(w *world) { p := w.running[uid]; p.Addresses = nil; w.running[uid] = p },
		"AddressMismatch":      func(w *world) { w.wish.Addresses = [][]byte{{10, 9, 9, 9}} },
		"PortInUse":            func(w *world) { w.fail["inspect"] = &Refusal{"PortInUse", errBroken} },
		"NodeFull":             func(w *world) { w.fail["kernel enrols"] = fmt.Errorf("enrol: %w", redirect.ErrPodsFull) },
		"NetworkNamespaceGone": func(w *world) { w.fail["kernel enrols"] = redirect.ErrNetnsGone },
	} {
		t.Run(want, func(t *testing.T) {
			w := newWorld()
			w.wish.Stage = captured
			change(w)
			if _, err := w.enroller().reconcile(t.Context(), uid); err == nil {
				t.Error("the pod was enrolled")
			}
			w.nothing(t)
			w.never(t, "capture")
			if r := w.report(t); r.State != meshv1.PodState_POD_STATE_FAILED || r.Reason != want || r.Message == "" {
				t.Errorf("reported %v", r)
			}
		})
	}
}

func TestNoEnvoy(t *testing.T) {
	w := newWorld()
	w.wish.Stage, w.noEnvoy = captured, true
	if _, err := w.enroller().reconcile(t.Context(), uid); err == nil || !strings.Contains(err.Error(), "no Envoy serves") {
		t.Errorf("without Envoy: %v", err)
	}
	w.nothing(t)
}

func TestPolicyAppliesAfterItsListener(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, captured)
	permissive := w.inbound(t)
	w.wish.Stage = enforced
	turn(t, e)
	w.inOrder(t, "Envoy gets in/", "Envoy acknowledges in/", "mode strict=true probes=[8081]", "report ENFORCED")
	w.never(t, "capture")
	if w.inbound(t) == permissive {
		t.Error("the listener did not change")
	}
	if r := w.report(t); r.InboundPolicy != hashed {
		t.Errorf("reported %v", r)
	}
}

func TestRefusedPolicyKeepsTheLast(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	w.wish.InboundPolicy = "policy-2"
	turn(t, e) // it has not come yet
	w.never(t, "mode")
	if r := w.report(t); r.State != meshv1.PodState_POD_STATE_ENFORCED || r.InboundPolicy != hashed {
		t.Errorf("reported %v", r)
	}
	w.policies["policy-2"] = &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_PERMISSIVE}}
	w.fail["Envoy acknowledges in/"] = errBroken
	w.wish.Strict = false
	rules := fmt.Sprint(w.rules())
	if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, errBroken) {
		t.Errorf("Envoy refused, and: %v", err)
	}
	w.never(t, "mode")
	w.never(t, "kernel withdraws")
	if got := fmt.Sprint(w.rules()); got != rules {
		t.Errorf("the last policy's listener lets in %s, not %s", got, rules)
	}
	if r := w.report(t); r.State != meshv1.PodState_POD_STATE_ENFORCED || r.InboundPolicy != hashed || r.Message == "" {
		t.Errorf("reported %v", r)
	}
	if s := w.held[uid]; !s.Strict || !s.Inbound || !s.Outbound {
		t.Errorf("the kernel holds %+v", s)
	}
}

func TestMissingPolicyDoesNotEnforce(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, captured)
	w.wish.Stage, w.wish.InboundPolicy = enforced, "unknown"
	if _, err := e.reconcile(t.Context(), uid); err == nil || !strings.Contains(err.Error(), "has not come") {
		t.Errorf("without the policy: %v", err)
	}
	if r := w.report(t); r.State != meshv1.PodState_POD_STATE_CAPTURED {
		t.Errorf("reported %v", r)
	}
}

func TestWithdrawalMirrorsEnrolment(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	// The leader first asks for Permissive and lets peers go back to plaintext.
	w.wish.Stage, w.wish.Goal = captured, out
	turn(t, e)
	w.inOrder(t, "Envoy acknowledges in/", "mode strict=false", "report CAPTURED")
	w.never(t, "capture")
	w.clear()

	e.config.Settle, e.config.Linger = time.Hour, time.Hour
	w.wish.Stage = out
	turn(t, e)
	// Callers whose Envoy has acknowledged plaintext may still be about to speak TLS.
	w.inOrder(t, "capture in=true out=false", "report CAPTURED")
	w.never(t, "capture in=false")
	w.never(t, "report OUT")
	// Connections that still use them keep the listeners.
	e.config.Settle = 0
	w.held[uid].Incoming = 1
	turn(t, e)
	w.inOrder(t, "capture in=false out=false", "report OUT")
	w.never(t, "kernel withdraws")
	if len(w.listeners()) == 0 {
		t.Error("the listeners went with the capture")
	}
	w.never(t, "Envoy loses")
	w.held[uid].Incoming = 0
	turn(t, e)
	w.inOrder(t, "Envoy loses in/", "kernel withdraws", "leave SVID")
	w.nothing(t)
	if r := w.report(t); r.State != meshv1.PodState_POD_STATE_OUT {
		t.Errorf("reported %v", r)
	}
}

func TestLingerEnds(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, captured)
	w.wish.Stage, w.wish.Goal = out, out
	w.held[uid].Outgoing = 1
	turn(t, e) // Settle and Linger are 0
	w.nothing(t)
}

func TestReturnWhileLeaving(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, captured)
	e.config.Settle = time.Hour
	w.wish.Stage = out
	turn(t, e)
	w.clear()
	w.wish.Stage = captured
	turn(t, e)
	w.inOrder(t, "flip to 0", "capture in=true out=true", "report CAPTURED")
	w.never(t, "Envoy loses")
}

// An agent that starts finds its pods as they were.
func TestAdoptedPodStaysAsItIs(t *testing.T) {
	for name, noSVID := range map[string]bool{"with the controller": false, "while the controller is away": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.enrolled(t, enforced)
			w.resources, w.users, w.noSVID = map[relay.Key]proto.Message{}, map[string]bool{}, noSVID
			e := w.enroller()
			if err := e.Adopt(); err != nil {
				t.Fatal(err)
			}
			turn(t, e)
			w.inOrder(t, "Envoy gets in/", "report ENFORCED")
			for _, opening := range []string{"capture in=false", "capture in=true out=false", "mode strict=false", "kernel withdraws", "report PERMISSIVE", "inspect"} {
				w.never(t, opening)
			}
			if s := w.held[uid]; !s.Strict || !s.Inbound || !s.Outbound {
				t.Errorf("the kernel holds %+v", s)
			}
		})
	}
}

// A step that fails for an adopted pod does not open it.
func TestAdoptedPodSurvivesFailure(t *testing.T) {
	for step, failure := range map[string]error{"Envoy acknowledges in/": errBroken, "kernel enrols": redirect.ErrNetnsGone} {
		t.Run(step, func(t *testing.T) {
			w := newWorld()
			w.enrolled(t, enforced)
			w.fail[step] = failure
			e := w.enroller()
			if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, failure) {
				t.Errorf("%v, want the step's failure", err)
			}
			w.never(t, "kernel withdraws")
			if s := w.held[uid]; s == nil || !s.Strict || !s.Inbound || !s.Outbound {
				t.Errorf("the kernel holds %+v", s)
			}
		})
	}
}

// A kernel that cannot be read says nothing about the pod: it is neither made Permissive nor taken out.
func TestAdoptedPodSurvivesABlindMoment(t *testing.T) {
	for name, stage := range map[string]meshv1.Stage{"that is to stay": enforced, "that is to leave": out} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.enrolled(t, enforced)
			w.clear()
			e := w.enroller()
			w.wish.Stage = stage
			w.fail["kernel is read"] = errBroken
			if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, errBroken) {
				t.Errorf("%v, want the kernel's failure", err)
			}
			for _, opening := range []string{"kernel withdraws", "capture", "mode", "inspect", "Envoy loses"} {
				w.never(t, opening)
			}
		})
	}
}

// A pod that nobody has asked this process about ends like any other.
func TestUnaskedPodEnds(t *testing.T) {
	w := newWorld()
	w.enrolled(t, enforced)
	e := w.enroller()
	if err := e.Adopt(); err != nil || e.Elsewhere(1) != 1 {
		t.Fatalf("%d pods go to another Envoy: %v", e.Elsewhere(1), err)
	}
	w.wish = nil
	turn(t, e)
	w.never(t, "kernel withdraws")
	delete(w.running, uid)
	turn(t, e)
	w.inOrder(t, "kernel withdraws")
	if n := e.Elsewhere(1); n != 0 {
		t.Errorf("%d pods are waited for that are gone", n)
	}
	if len(w.held) != 0 || len(w.memory) != 0 {
		t.Errorf("left: %v in the kernel, %d records", w.held, len(w.memory))
	}
}

// An agent that starts while a pod leaves does not capture it again.
func TestRestartWhileLeaving(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, captured)
	e.config.Linger = time.Hour
	w.wish.Stage, w.wish.Goal = out, out
	w.held[uid].Incoming = 1
	turn(t, e)
	w.inOrder(t, "capture in=false out=false")
	w.clear()
	e = w.enroller()
	e.config.Linger = time.Hour
	turn(t, e)
	w.never(t, "capture")
	w.never(t, "kernel withdraws")
	w.held[uid].Incoming = 0
	turn(t, e)
	w.nothing(t)
}

func TestAdoptEndsPodsThatAreGone(t *testing.T) {
	w := newWorld()
	w.enrolled(t, enforced)
	p := w.running[uid]
	p.Sandbox = "sandbox-two-0002"
	w.running[uid] = p
	if err := w.enroller().Adopt(); err != nil {
		t.Fatal(err)
	}
	w.inOrder(t, "kernel withdraws")
	if len(w.memory) != 0 {
		t.Error("a pod that is gone is remembered")
	}
}

func TestDriftIsRepaired(t *testing.T) {
	for name, drift := range map[string]func(*world){
		"a link detached":           func(w *world) { w.held[uid].Drift = []string{"sk_lookup is detached"} },
		"the whole pod is out":      func(w *world) { delete(w.held, uid) },
		"inbound is not captured":   func(w *world) { w.held[uid].Inbound = false },
		"outbound is not captured":  func(w *world) { w.held[uid].Outbound = false },
		"not Strict any more":       func(w *world) { w.held[uid].Strict = false },
		"another generation":        func(w *world) { w.held[uid].Generation = 7 },
		"gated":                     func(w *world) { w.held[uid].Gated = true },
		"no socket of Envoy's left": func(w *world) { w.lost = true },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			e := w.enrolled(t, enforced)
			drift(w)
			lost := w.lost
			turn(t, e)
			w.inOrder(t, "report PREPARING", "kernel enrols", "flip to 0", "mode strict=true", "capture in=true out=true")
			if r := w.reports[0]; r.Reason != "Drift" || !strings.HasPrefix(r.Message, "being repaired: ") {
				t.Errorf("reported %v while it was repaired", r)
			}
			if r := w.report(t); r.State != meshv1.PodState_POD_STATE_ENFORCED || r.Reason != "Drift" || !strings.HasPrefix(r.Message, "repaired, ") {
				t.Errorf("reported %v right after the repair", r)
			}
			if lost {
				w.inOrder(t, "Envoy loses in/", "Envoy acknowledges in/", "Envoy gets in/", "flip to 0")
			} else {
				w.never(t, "Envoy loses")
			}
			if s := w.held[uid]; !s.Captured() || !s.Strict || s.Generation != 0 {
				t.Errorf("the kernel holds %+v", s)
			}
			w.clear()
			w.now = w.now.Add(lookAgain)
			turn(t, e)
			w.never(t, "kernel enrols")
			if r := w.report(t); r.State != meshv1.PodState_POD_STATE_ENFORCED || r.Reason != "" {
				t.Errorf("reported %v after another look", r)
			}
		})
	}
}

// While Envoy is away nothing listens: that is no drift, and nothing is taken from it.
func TestEnvoyAwayIsNoDrift(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	w.lost, w.noEnvoy = true, true
	turn(t, e)
	w.never(t, "Envoy loses")
	w.never(t, "kernel enrols")
	if r := w.report(t); r.State != meshv1.PodState_POD_STATE_ENFORCED {
		t.Errorf("reported %v", r)
	}
}

// A repair is the kernel's alone: the policy that Envoy refuses stays refused, and the last good one served.
func TestDriftUnderARefusedPolicy(t *testing.T) {
	no := &relay.Refused{Name: "in/5f0c", Text: "regex too large"}
	w := newWorld()
	e := w.settled(t, "wide")
	w.wish.InboundPolicy, w.fail["Envoy acknowledges in/"] = "narrow", no
	for _, drift := range []bool{false, true, false} {
		if drift {
			w.held[uid].Strict = false
		}
		if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, no) {
			t.Errorf("Envoy refused, and: %v", err)
		}
		w.expect(t, "the last good one serves", "wide", "wide", "any/weft-l4")
		if r := w.report(t); r.State != meshv1.PodState_POD_STATE_ENFORCED || r.Refused != no.Text {
			t.Errorf("drifted %t: reported %v", drift, r)
		}
		if s := w.held[uid]; !s.Captured() || !s.Strict {
			t.Errorf("drifted %t: the kernel holds %+v", drift, s)
		}
	}
}

// What cannot be repaired is not reported as served.
func TestDriftThatStays(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	w.held[uid].Strict, w.fail["mode"] = false, errBroken
	if _, err := e.reconcile(t.Context(), uid); !errors.Is(err, errBroken) {
		t.Errorf("%v, want the step's failure", err)
	}
	if r := w.report(t); r.State == meshv1.PodState_POD_STATE_ENFORCED || r.State == meshv1.PodState_POD_STATE_CAPTURED {
		t.Errorf("reported %v", r)
	}
}

func TestReplacedSandboxStartsAnew(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, captured)
	p := w.running[uid]
	p.Sandbox, p.NetnsPath = "sandbox-two-0002", "/run/netns/cni-2"
	w.running[uid] = p
	turn(t, e)
	w.inOrder(t, "Envoy loses in/5f0c/sandbox-one-", "kernel withdraws", "kernel enrols", "Envoy gets in/5f0c/sandbox-two-", "report CAPTURED")
	for _, name := range w.listeners() {
		if strings.Contains(name, "sandbox-one-") {
			t.Errorf("%s is left", name)
		}
	}
}

func TestPodDeletedWhileItIsEnrolled(t *testing.T) {
	w := newWorld()
	w.wish.Stage = captured
	e := w.enroller()
	w.during["Envoy acknowledges in/"] = func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.running, uid)
	}
	w.fail["Envoy acknowledges in/"] = &relay.Refused{Name: "in", Text: "no such network namespace"}
	if _, err := e.reconcile(t.Context(), uid); err == nil {
		t.Error("a pod without a netns was enrolled")
	}
	w.nothing(t)
	turn(t, e)
	w.nothing(t)
	if r := w.report(t); r.State != meshv1.PodState_POD_STATE_GONE {
		t.Errorf("reported %v", r)
	}
}

func TestEndedPodLeavesNothing(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	delete(w.running, uid)
	turn(t, e)
	w.inOrder(t, "Envoy loses in/", "kernel withdraws", "leave SVID", "report GONE")
	w.nothing(t)
}

func TestUnspokenOfPodIsLeftAlone(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	w.wish = nil // the controller has been away since the agent started, or has forgotten the pod
	turn(t, e)
	if len(w.events) != 0 {
		t.Errorf("happened: %v", w.events)
	}
}

func TestStopWithdrawsNothing(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); e.Run(ctx) }()
	e.Changed(uid)
	cancel()
	<-ended
	w.never(t, "kernel withdraws")
	w.never(t, "capture")
	w.never(t, "Envoy loses")
}

func TestTrustReachesEveryRule(t *testing.T) {
	w := newWorld()
	e := w.enrolled(t, enforced)
	rules := (*fakeEnvoy)(w).Names(relay.TypeSecret, "rule/")
	if len(rules) == 0 {
		t.Fatal("the policy has no rule")
	}
	w.roots = "second roots"
	if err := e.TrustChanged(); err != nil {
		t.Fatal(err)
	}
	for _, name := range rules {
		s := w.resources[relay.Key{TypeURL: relay.TypeSecret, Name: name}].(*tls.Secret)
		if got := string(s.GetValidationContext().GetTrustedCa().GetInlineBytes()); got != "second roots" {
			t.Errorf("%s trusts %q", name, got)
		}
		if len(s.GetValidationContext().GetMatchTypedSubjectAltNames()) == 0 {
			t.Errorf("%s has lost its peers", name)
		}
	}
	// A rule that is gone does not come back.
	delete(w.running, uid)
	turn(t, e)
	if err := e.TrustChanged(); err != nil {
		t.Fatal(err)
	}
	w.nothing(t)
}

func TestListeningInRange(t *testing.T) {
	const head = "  sl  local_address rem_address   st\n"
	for name, c := range map[string]struct {
		table string
		want  int
	}{
		"listens on 15001":      {head + "   0: 00000000:3A99 00000000:0000 0A\n", 15001},
		"listens on 15019":      {head + "   0: 00000000:3AAB 00000000:0000 0A\n", 15019},
		"listens on 8080":       {head + "   0: 00000000:1F90 00000000:0000 0A\n", 0},
		"connected from 15001":  {head + "   0: 0100007F:3A99 0100007F:1F90 01\n", 0},
		"IPv6":                  {head + "   0: 00000000000000000000000000000000:3A9E 0:0000 0A\n", 15006},
		"no socket":             {head, 0},
		"a line that is broken": {"x\n", 0},
	} {
		if got := listeningInRange(c.table); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestEstablishedIn(t *testing.T) {
	const table = `  sl  local_address rem_address   st
   0: 0100007F:3A99 0100007F:1F90 01
   1: 0B01F40A:1F90 00000000:0000 0A
   2: 0B01F40A:1F90 0C02F40A:C001 01
   3: 0B01F40A:C002 0160600A:0050 01
   4: 0B01F40A:C003 0160600A:0050 06
x
   5: 0000000000000000FFFF00000B01F40A:1F90 0000000000000000FFFF00000C02F40A:C004 01
`
	if got := establishedIn(table); got != 3 {
		t.Errorf("%d connections, want 3", got)
	}
}
