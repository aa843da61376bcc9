package engine

import (
	"context"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/barrier"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/replica"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
)

const deadline = 30 * time.Second

// nodes are the mesh's nodes as an engine sees them.
type nodes struct {
	events     []string
	served     []*ir.Snapshot
	marks      []epoch.Mark
	given      []replica.Orders
	generation uint64
	answered   uint64
	behind     bool // another replica serves nothing of it
	reports    barrier.Reports
	synced     map[string]bool
	converged  int
	picture    Picture
	told       int
}

func (n *nodes) engine() *Engine {
	n.reports, n.synced = barrier.Reports{}, map[string]bool{}
	return New(Config{
		Server:   n,
		Give:     func(o replica.Orders) { n.events, n.given = append(n.events, "give"), append(n.given, o) },
		Reports:  func() (barrier.Reports, map[string]bool) { return n.reports, n.synced },
		Status:   func(p Picture) { n.picture = p; n.told++ },
		Served:   func(*ir.Snapshot) {},
		Resolved: func(time.Duration) {}, Converged: func(time.Duration) { n.converged++ },
	})
}

func (n *nodes) Expect(l []string) { n.events = append(n.events, append([]string{"expect"}, l...)...) }

func (n *nodes) Set(v serve.Version) uint64 {
	n.events = append(n.events, "serve")
	n.served, n.marks = append(n.served, v.Snapshot), append(n.marks, v.Mark)
	n.generation++
	return n.generation
}

func (n *nodes) Advance(m epoch.Mark, _ uint64) { n.marks = append(n.marks, m) }
func (n *nodes) Answered() uint64               { return n.answered }
func (n *nodes) AnsweredBy() map[string]uint64  { return map[string]uint64{"n1": n.answered} }
func (n *nodes) State() serve.State             { return serve.State{} }

func (n *nodes) Served() uint64 {
	if n.behind {
		return 0
	}
	return n.generation
}

func (n *nodes) says(node, uid string, s meshv1.PodState) {
	n.synced[node] = true
	n.reports[node] = map[string]*meshv1.PodReport{uid: {Uid: uid, Sandbox: "s", State: s}}
}

func (n *nodes) pod() *ir.Pod { return n.served[len(n.served)-1].Pods["u"] }

func condition(kind, reason, message string, s corev1.ConditionStatus) corev1.PodCondition {
	return corev1.PodCondition{Type: corev1.PodConditionType(kind), Status: s, Reason: reason, Message: message}
}

var (
	enrolled = condition(names.ConditionEnrolled, "Captured", "", corev1.ConditionTrue)
	enforced = condition(names.ConditionEnforced, "Enforced", InForce("00ff", 0), corev1.ConditionTrue)
)

// world is one pod on n1, in or not in the mesh by its label, with conditions that somebody has written.
func world(label string, conditions ...corev1.PodCondition) *resolve.Input {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", UID: types.UID("u"), Labels: map[string]string{names.LabelMesh: label}}}
	pod.Spec.NodeName = "n1"
	pod.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.1"}}
	pod.Status.Conditions = conditions
	return &resolve.Input{Namespace: "weft-system", TrustDomain: "cluster.local", Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}}, Pods: []*corev1.Pod{pod}}
}

func TestSeed(t *testing.T) {
	is := resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "00ff"}
	for _, c := range []struct {
		name       string
		conditions []corev1.PodCondition
		want       resolve.Decision
	}{
		{"no condition", nil, resolve.Decision{}},
		{"captured", []corev1.PodCondition{enrolled}, resolve.Decision{Stage: ir.Captured}},
		{"enforced, in any order", []corev1.PodCondition{enforced, enrolled}, is},
		{"its node was silent", []corev1.PodCondition{condition(names.ConditionEnrolled, "NotReported", "", corev1.ConditionUnknown),
			condition(names.ConditionEnforced, "NotReported", "", corev1.ConditionUnknown)}, resolve.Decision{Stage: ir.Enforced, MTLS: true}},
		{"a newer policy was refused", []corev1.PodCondition{enrolled, condition(names.ConditionEnforced, ReasonRefused, InForce("00ff", 0)+"; Envoy refused", corev1.ConditionFalse)}, is},
		{"by another Envoy", []corev1.PodCondition{enrolled, condition(names.ConditionEnforced, "Enforced", InForce("00ff", 1), corev1.ConditionTrue)},
			resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: "00ff", Proxy: 1}},
		{"a port is closed", []corev1.PodCondition{enrolled, condition(names.ConditionEnforced, ReasonNotEnforceable, InForce("00ff", 0), corev1.ConditionFalse)}, is},
		{"on its way", []corev1.PodCondition{enrolled, condition(names.ConditionEnforced, "Pending", "", corev1.ConditionFalse)}, resolve.Decision{Stage: ir.Captured}},
		{"left", []corev1.PodCondition{condition(names.ConditionEnrolled, "Withdrawn", "", corev1.ConditionFalse)}, resolve.Decision{}},
		{"another's condition", []corev1.PodCondition{condition("Ready", "", "", corev1.ConditionTrue)}, resolve.Decision{}},
		{"a policy's name that is none", []corev1.PodCondition{condition(names.ConditionEnforced, "Enforced", InForce("x/../y", 0), corev1.ConditionTrue)}, resolve.Decision{Stage: ir.Enforced, MTLS: true}},
	} {
		decisions, _ := seed(world(names.MeshEnabled, c.conditions...))
		if decisions["u"] != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, decisions["u"], c.want)
		}
	}
}

func TestSeedKnowsTheNodesThatServed(t *testing.T) {
	in := world(names.MeshEnabled, enrolled)
	for _, p := range []struct {
		namespace, app, node string
		phase                corev1.PodPhase
	}{
		{"weft-system", "weft-nodeproxy", "n2", corev1.PodRunning},
		{"weft-system", "weft-nodeproxy", "", corev1.PodPending},
		{"weft-system", "weft-nodeproxy", "n7", corev1.PodPending}, // it has not served yet
		{"weft-system", "weft-nodeproxy", "n3", corev1.PodFailed},
		{"weft-system", "weft-controlplane", "n4", corev1.PodRunning},
		{"shop", "weft-nodeproxy", "n5", corev1.PodRunning}, // anybody may call a pod so
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: p.app, Labels: map[string]string{"app": p.app}}}
		pod.Spec.NodeName, pod.Status.Phase = p.node, p.phase
		in.Pods = append(in.Pods, pod)
	}
	host := world(names.MeshEnabled, enforced).Pods[0] // a forged one: it has no network namespace of its own
	host.UID, host.Spec.HostNetwork, host.Spec.NodeName = "h", true, "n6"
	in.Pods = append(in.Pods, host)
	decisions, nodes := seed(in)
	if !slices.Equal(nodes, []string{"n1", "n2"}) || len(decisions) != 1 {
		t.Errorf("nodes %v, decisions %v", nodes, decisions)
	}
}

// TestAControllerThatStartsTakesNothingBack: the first snapshot that nodes see has the pods where they were.
func TestAControllerThatStartsTakesNothingBack(t *testing.T) {
	n := &nodes{}
	e := n.engine()
	var c crank
	e.lead(&c, world(names.MeshEnabled, enrolled, enforced), 1)
	if !slices.Equal(n.events, []string{"expect", "n1", "give", "serve"}) {
		t.Errorf("events %v: want the nodes expected first, then one snapshot", n.events)
	}
	if p := n.pod(); p.Stage != ir.Enforced || !p.MTLS || p.Goal != ir.Enforced {
		t.Errorf("served %+v", p)
	}
	if s, newer := e.Snapshot(); s != n.served[0] || newer == nil {
		t.Error("the snapshot that is served is not the current one")
	}
	// Its node is back and says the same: nothing moves, and no caller goes to new connections.
	n.says("n1", "u", meshv1.PodState_POD_STATE_ENFORCED)
	n.reports["n1"]["u"].InboundPolicy = "00ff"
	e.lead(&c, c.used, 1)
	if len(n.served) != 1 {
		t.Errorf("served again: %+v", n.pod())
	}
	n.answered = n.generation
	e.lead(&c, c.used, 1)
	if p := n.pod(); p.Moved != "00ff" || n.converged != 1 {
		t.Errorf("all have answered: %+v, %d generations converged", p, n.converged)
	}
}

// TestForgedConditions: who may write a pod's status makes it no member of the mesh (DESIGN §5.11).
func TestForgedConditions(t *testing.T) {
	for _, c := range []struct {
		name  string
		label string
		state meshv1.PodState // of the pod at its node; unspecified: the node does not know it
		want  ir.Stage
	}{
		{"a pod that nothing wants in", names.MeshDisabled, meshv1.PodState_POD_STATE_OUT, ir.Out},
		{"a pod that nothing wants in and its node does not know", names.MeshDisabled, meshv1.PodState_POD_STATE_UNSPECIFIED, ir.Out},
		{"a pod that is to be in starts at the beginning", names.MeshEnabled, meshv1.PodState_POD_STATE_OUT, ir.Captured},
		{"a pod that is to be in and its node does not know", names.MeshEnabled, meshv1.PodState_POD_STATE_UNSPECIFIED, ir.Captured},
	} {
		n := &nodes{}
		e := n.engine()
		var crank crank
		in := world(c.label, enrolled, enforced)
		e.lead(&crank, in, 1)
		n.says("n1", "u", c.state)
		if c.state == meshv1.PodState_POD_STATE_UNSPECIFIED {
			n.reports["n1"] = nil
		}
		for range 5 {
			n.answered = n.generation
			e.lead(&crank, in, 1)
		}
		if p := n.pod(); p.MTLS || p.Stage != c.want || p.Moved != "" {
			t.Errorf("%s: %+v, want stage %d and plaintext", c.name, p, c.want)
		}
	}
}

func TestATurnThatHangsShows(t *testing.T) {
	n := &nodes{}
	e := n.engine()
	hang := make(chan struct{})
	e.config.Status = func(Picture) { <-hang }
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	done := make(chan struct{})
	go func() { e.Run(ctx); close(done) }()
	if e.Busy() != 0 {
		t.Error("busy with nothing to do")
	}
	e.Input(*world(names.MeshEnabled))
	e.Lead(1, true)
	wait := func(what string, so func() bool) {
		for !so() {
			if ctx.Err() != nil {
				t.Fatal("never: ", what)
			}
			time.Sleep(time.Millisecond)
		}
	}
	wait("busy while the turn hangs", func() bool { return e.Busy() > 0 })
	first := e.Busy()
	wait("it grows", func() bool { return e.Busy() > first })
	close(hang)
	wait("idle again", func() bool { return e.Busy() == 0 })
	cancel()
	<-done
}
