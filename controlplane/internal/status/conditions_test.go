package status

import (
	"encoding/json"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/barrier"
	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// connectedTo is a mesh of nodes with nothing left to answer.
func connectedTo(nodes ...string) serve.State { return serve.State{Nodes: nodes} }

func say(c metav1.Condition) string { return string(c.Status) + " " + c.Reason + " " + c.Message }

func TestProgress(t *testing.T) {
	five := []string{"a", "b", "c", "d", "e"}
	for _, c := range []struct {
		name            string
		nodes           serve.State
		concerned, open []string
		refusals        []string
		want            string
	}{
		{"on the way", connectedTo(five...), five, []string{"d", "e"}, nil, "False Pending 3/5 nodes; waiting for d, e"},
		{"at the beginning", connectedTo(five...), five, five, nil, "False Pending 0/5 nodes; waiting for a, b, c and 2 more"},
		{"everywhere", connectedTo(five...), five, nil, nil, "True Programmed 5/5 nodes"},
		{"a node twice counts once", connectedTo(five...), []string{"b", "a", "b"}, nil, nil, "True Programmed 2/2 nodes"},
		{"nodes that are not concerned do not count", connectedTo(five...), []string{"a"}, []string{"e"}, nil, "True Programmed 1/1 nodes"},
		{"a node whose stream has just gone", serve.State{Nodes: []string{"a", "b"}, Away: []string{"c"}}, []string{"a", "b", "c"}, nil, nil, "False Pending 2/3 nodes; waiting for c (away)"},
		{"a node that has not asked for everything yet", serve.State{Nodes: []string{"a", "b"}, Joining: []string{"b"}}, []string{"a", "b"}, nil, nil, "False Pending 1/2 nodes; waiting for b (away)"},
		{"unreachable", connectedTo("a", "b", "c", "d"), five, nil, nil, "True Programmed 4/4 nodes, 1 unreachable"},
		{"nobody", connectedTo(five...), nil, nil, nil, "True NoConsumers no node has anything to do with it"},
		{"refused", connectedTo(five...), five, nil, []string{"node b: bad regex"}, "False Refused node b: bad regex"},
	} {
		v := newView(&engine.Picture{Snapshot: &ir.Snapshot{}, Nodes: c.nodes})
		if got := v.progress(c.concerned, c.open, c.refusals, 3); say(got) != c.want || got.ObservedGeneration != 3 {
			t.Errorf("%s: %s (generation %d), want %s", c.name, say(got), got.ObservedGeneration, c.want)
		}
	}
}

// policyPicture has one AccessPolicy that went into the policy "new" of two pods on two nodes.
func policyPicture() *engine.Picture {
	source := "AccessPolicy shop/a"
	pod := func(uid, node string) *ir.Pod {
		return &ir.Pod{UID: uid, Key: ir.Key{Namespace: "shop", Name: uid}, Node: node, Goal: ir.Enforced, Stage: ir.Enforced, Policy: "new", Moved: "new"}
	}
	report := &meshv1.PodReport{State: meshv1.PodState_POD_STATE_ENFORCED, InboundPolicy: "new", SettledPolicy: "new"}
	other := proto.Clone(report).(*meshv1.PodReport)
	return &engine.Picture{
		Input: resolve.Input{AccessPolicies: []*v1alpha1.AccessPolicy{{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "a", UID: "u-a", ResourceVersion: "7", Generation: 2}}}},
		Snapshot: &ir.Snapshot{
			Pods:     map[string]*ir.Pod{"p1": pod("p1", "n1"), "p2": pod("p2", "n2")},
			Policies: map[string]*ir.InboundPolicy{"new": {Hash: "new", Default: ir.PortPolicy{Sources: []string{source}}}},
		},
		Nodes:   serve.State{Nodes: []string{"n1", "n2", "n3"}},
		Reports: barrier.Reports{"n1": {"p1": report}, "n2": {"p2": other}},
	}
}

func TestPolicyIsProgrammedWhenItsPodsSaySo(t *testing.T) {
	local := serve.Resource{TypeURL: xds.TypeLocalPod, Name: "n1/p1"}
	for _, c := range []struct {
		name   string
		change func(*engine.Picture)
		want   string
	}{
		{"every pod has it", func(*engine.Picture) {}, "True Programmed 2/2 nodes"},
		{"one pod has the old one", func(p *engine.Picture) { p.Reports["n2"]["p2"].InboundPolicy = "old" },
			"False Pending 1/2 pods; waiting for shop/p2 on n2 (its listener has an earlier policy)"},
		{"one pod has it, and callers do not know yet", func(p *engine.Picture) { p.Reports["n2"]["p2"].SettledPolicy = "old"; p.Snapshot.Pods["p2"].Moved = "" },
			"False Pending 1/2 pods; waiting for shop/p2 on n2 (callers are being told)"},
		{"one pod has it, and connections under the old one are left", func(p *engine.Picture) { p.Reports["n2"]["p2"].SettledPolicy = "old" },
			"False Pending 1/2 pods; waiting for shop/p2 on n2 (connections under an earlier policy are ending)"},
		{"one pod is not reported", func(p *engine.Picture) { delete(p.Reports["n2"], "p2") }, "False Pending 1/2 pods; waiting for shop/p2 on n2 (not reported)"},
		{"another node speaks for the pod", func(p *engine.Picture) {
			p.Reports["n3"] = p.Reports["n2"]
			delete(p.Reports, "n2")
		}, "False Pending 1/2 pods; waiting for shop/p2 on n2 (not reported)"},
		{"a pod that enforces nothing yet is its own condition's matter", func(p *engine.Picture) { p.Snapshot.Pods["p2"].Stage = ir.Captured; delete(p.Reports, "n2") }, "True Programmed 2/2 nodes"},
		{"a node has not acknowledged", func(p *engine.Picture) { p.Nodes.Open = map[serve.Resource][]string{local: {"n1"}} }, "False Pending 1/2 nodes; waiting for n1"},
		{"a node has not acknowledged something else", func(p *engine.Picture) {
			p.Nodes.Open = map[serve.Resource][]string{{TypeURL: xds.TypeService, Name: "shop/web"}: {"n1"}, {TypeURL: xds.TypeLocalPod, Name: "n1/other"}: {"n1"}, {TypeURL: xds.TypeInboundPolicy, Name: "new"}: {"n3"}}
		}, "True Programmed 2/2 nodes"},
		{"Envoy refuses a pod's listeners", func(p *engine.Picture) { p.Reports["n1"]["p1"].Refused = "too large" }, "False Refused node n1, pod shop/p1: too large"},
		{"another node says that Envoy refuses them", func(p *engine.Picture) {
			p.Reports["n3"] = map[string]*meshv1.PodReport{"p1": {Refused: "forged"}}
		}, "True Programmed 2/2 nodes"},
		{"a port cannot be enforced as written", func(p *engine.Picture) {
			p.Reports["n2"]["p2"].PolicyProblems = []string{"port 3306 is closed", "port 25 is closed"}
		},
			"False NotEnforceable node n2, pod shop/p2: port 3306 is closed; node n2, pod shop/p2: port 25 is closed"},
		{"a node has just gone", func(p *engine.Picture) { p.Nodes.Nodes, p.Nodes.Away = []string{"n1"}, []string{"n2"} }, "False Pending 1/2 nodes; waiting for n2 (away)"},
		{"a node is gone for good", func(p *engine.Picture) { p.Nodes.Nodes = []string{"n1"}; delete(p.Reports, "n2") }, "True Programmed 1/1 nodes, 1 unreachable"},
	} {
		p := policyPicture()
		c.change(p)
		got := newView(p).targets()[0].conditions[1]
		if got.Type != "Programmed" || say(got) != c.want {
			t.Errorf("%s: %s %s, want %s", c.name, got.Type, say(got), c.want)
		}
	}
}

func TestMeshConfigIsProgrammed(t *testing.T) {
	old := metav1.Condition{Type: "Programmed", Status: metav1.ConditionTrue, ObservedGeneration: 1}
	for _, c := range []struct {
		name   string
		change func(*engine.Picture)
		want   string
	}{
		{"every node and pod has it", func(*engine.Picture) {}, "True Programmed 3/3 nodes"},
		{"a node has not acknowledged a namespace", func(p *engine.Picture) {
			p.Nodes.Open = map[serve.Resource][]string{{TypeURL: xds.TypeNamespace, Name: "shop"}: {"n3"}}
		}, "False Pending 2/3 nodes; waiting for n3"},
		{"a node has not acknowledged an endpoint", func(p *engine.Picture) {
			p.Nodes.Open = map[serve.Resource][]string{{TypeURL: xds.TypeEndpoints, Name: "svc/shop/web/80"}: {"n3"}}
		}, "True Programmed 3/3 nodes"},
		{"a pod has the policy of before", func(p *engine.Picture) { p.Reports["n1"]["p1"].SettledPolicy = "old" },
			"False Pending 1/2 pods; waiting for shop/p1 on n1 (connections under an earlier policy are ending)"},
		{"a pod's policy changes for another reason", func(p *engine.Picture) {
			p.Reports["n1"]["p1"].SettledPolicy = "old"
			p.Input.MeshConfig.Status.Conditions[0].ObservedGeneration = 2
		}, "True Programmed 3/3 nodes"},
	} {
		p := policyPicture()
		p.Input.MeshConfig = &v1alpha1.MeshConfig{ObjectMeta: metav1.ObjectMeta{Name: "default", Generation: 2}, Status: v1alpha1.Status{Conditions: []metav1.Condition{old}}}
		c.change(p)
		if got := newView(p).meshInForce(p.Input.MeshConfig); say(got) != c.want {
			t.Errorf("%s: %s, want %s", c.name, say(got), c.want)
		}
	}
}

func TestServiceConditions(t *testing.T) {
	ref := resolve.Ref{Kind: "Service", Namespace: "shop", Name: "web"}
	conflict := resolve.Problem{Object: ref, Parent: -1, Type: conditionCaptured, Status: "False", Reason: "AddressConflict", Message: "203.0.113.1 is db/db's"}
	has := metav1.Condition{Type: conditionCaptured, Status: metav1.ConditionFalse, Reason: conflict.Reason, Message: conflict.Message}
	was := metav1.Condition{Type: conditionCaptured, Status: metav1.ConditionFalse, Reason: "ForeignEndpoint"}
	foreign := metav1.Condition{Type: "example.com/Announced", Status: metav1.ConditionTrue}
	for _, c := range []struct {
		name     string
		have     []metav1.Condition
		problems []resolve.Problem
		done     bool
		want     string // the Service's conditions once the API server has taken the patch
	}{
		{"nothing to say", []metav1.Condition{foreign}, nil, true, "example.com/Announced=True/ "},
		{"a conflict", []metav1.Condition{foreign}, []resolve.Problem{conflict}, false, "weft.dev/Captured=False/AddressConflict example.com/Announced=True/ "},
		{"another reason", []metav1.Condition{foreign, was}, []resolve.Problem{conflict}, false, "example.com/Announced=True/ weft.dev/Captured=False/AddressConflict "},
		{"it is there already", []metav1.Condition{foreign, has}, []resolve.Problem{conflict}, true, "example.com/Announced=True/ weft.dev/Captured=False/AddressConflict "},
		{"it is over", []metav1.Condition{has, foreign}, nil, false, "example.com/Announced=True/ "},
	} {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}}
		s.Status.Conditions = c.have
		p := &engine.Picture{Input: resolve.Input{Services: []*corev1.Service{s}}, Snapshot: &ir.Snapshot{}, Problems: c.problems}
		targets := newView(p).targets()
		done := len(targets) == 0 || targets[0].done
		after := *s
		if !done {
			original, _ := json.Marshal(s)
			patch, _ := json.Marshal(map[string]any{"status": targets[0].status})
			merged, err := strategicpatch.StrategicMergePatch(original, patch, s)
			if err != nil {
				t.Fatal(err)
			}
			after = corev1.Service{}
			if err := json.Unmarshal(merged, &after); err != nil {
				t.Fatal(err)
			}
		}
		got := ""
		for _, x := range after.Status.Conditions {
			got += x.Type + "=" + string(x.Status) + "/" + x.Reason + " "
		}
		if done != c.done || got != c.want {
			t.Errorf("%s: done %v, %s; want %v, %s", c.name, done, got, c.done, c.want)
		}
	}
}

func TestRouteStatus(t *testing.T) {
	kind := gwv1.Kind("Service")
	foreign := gwv1.RouteParentStatus{ControllerName: "example.com/other", ParentRef: gwv1.ParentReference{Name: "gate"}}
	route := &gwv1.HTTPRoute{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "r", Generation: 4}}
	route.Spec.ParentRefs = []gwv1.ParentReference{{Kind: &kind, Name: "web"}, {Name: "gate"}}
	route.Status.Parents = []gwv1.RouteParentStatus{foreign}
	ref := resolve.Ref{Kind: "HTTPRoute", Namespace: "shop", Name: "r"}
	web, cluster := names.Route("shop", "web", 80), names.ServiceCluster("shop", "back", 8080)
	for _, c := range []struct {
		name     string
		problems []resolve.Problem
		nodes    serve.State
		want     string
	}{
		{"good", nil, serve.State{Routes: map[string][]string{web: {"n1", "n2"}}}, "Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=True/Programmed 2/2 nodes"},
		{"nobody uses it", nil, serve.State{}, "Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=True/NoConsumers no node has anything to do with it"},
		{"missing backend", []resolve.Problem{{Object: ref, Parent: 0, Type: "ResolvedRefs", Status: "False", Reason: "BackendNotFound"}}, serve.State{},
			"Accepted=True/Accepted ResolvedRefs=False/BackendNotFound Programmed=True/NoConsumers no node has anything to do with it"},
		{"not accepted, so not programmed", []resolve.Problem{{Object: ref, Parent: 0, Type: "Accepted", Status: "False", Reason: "UnsupportedValue"}}, serve.State{},
			"Accepted=False/UnsupportedValue ResolvedRefs=True/ResolvedRefs Programmed=False/NotAccepted the route is not in force: see Accepted"},
		{"a user has not acknowledged", nil, serve.State{Routes: map[string][]string{web: {"n1", "n2"}}, Open: map[serve.Resource][]string{{TypeURL: xds.TypeRoute, Name: web}: {"n2"}}},
			"Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=False/Pending 1/2 nodes; waiting for n2"},
		{"a user has not acknowledged a backend", nil, serve.State{Routes: map[string][]string{web: {"n1"}}, Open: map[serve.Resource][]string{{TypeURL: xds.TypeCluster, Name: cluster}: {"n1", "n3"}}},
			"Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=False/Pending 0/1 nodes; waiting for n1"},
		{"a node does not capture the Service yet", nil, serve.State{Open: map[serve.Resource][]string{{TypeURL: xds.TypeService, Name: "shop/web"}: {"n3"}}},
			"Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=False/Pending 0/1 nodes; waiting for n3"},
		{"other things are open", nil, serve.State{Routes: map[string][]string{web: {"n1"}}, Open: map[serve.Resource][]string{{TypeURL: xds.TypeRoute, Name: names.Route("shop", "web2", 80)}: {"n1"}, {TypeURL: xds.TypeEndpoints, Name: cluster}: {"n1"}}},
			"Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=True/Programmed 1/1 nodes"},
		{"a user's stream has just gone", nil, serve.State{Away: []string{"n4"}, Routes: map[string][]string{web: {"n1", "n4"}}},
			"Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=False/Pending 1/2 nodes; waiting for n4 (away)"},
		{"Envoy refuses it", nil, serve.State{Refusals: []serve.Refusal{{Node: "n1", TypeURL: xds.TypeRoute, Name: web, Text: "no"}}},
			"Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=False/Refused node n1, route/shop/web/80: no"},
		{"Envoy refuses a backend", nil, serve.State{Refusals: []serve.Refusal{{Node: "n1", TypeURL: xds.TypeCluster, Name: cluster, Text: "no"}}},
			"Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=False/Refused node n1, svc/shop/back/8080: no"},
		{"Envoy refuses another Service's", nil, serve.State{Refusals: []serve.Refusal{{Node: "n1", TypeURL: xds.TypeRoute, Name: names.Route("shop", "web2", 80), Text: "no"},
			{Node: "n1", TypeURL: xds.TypeCluster, Name: names.ServiceCluster("shop", "other", 80), Text: "no"}}},
			"Accepted=True/Accepted ResolvedRefs=True/ResolvedRefs Programmed=True/NoConsumers no node has anything to do with it"},
	} {
		c.nodes.Nodes = []string{"n1", "n2", "n3"}
		key := ir.PortKey{Service: ir.Key{Namespace: "shop", Name: "web"}, Port: 80}
		back := func(name string, port uint16) []ir.Backend {
			return []ir.Backend{{Port: ir.PortKey{Service: ir.Key{Namespace: "shop", Name: name}, Port: port}}}
		}
		port := &ir.ServicePort{Key: key, Routes: []*ir.Route{
			{Source: "HTTPRoute shop/r rule 0 match 0", Backends: back("back", 8080)}, {Source: "HTTPRoute shop/r2 rule 0 match 0", Backends: back("other", 80)}}}
		p := &engine.Picture{Input: resolve.Input{HTTPRoutes: []*gwv1.HTTPRoute{route}}, Problems: c.problems, Nodes: c.nodes,
			Snapshot: &ir.Snapshot{Services: map[ir.Key]*ir.Service{key.Service: {Key: key.Service, Ports: []*ir.ServicePort{port}}}}}
		parents := newView(p).routeStatus(ref, route.Spec.ParentRefs, 4, route.Status.Parents).Parents
		if len(parents) != 2 || parents[0].ControllerName != foreign.ControllerName || parents[1].ControllerName != ControllerName {
			t.Fatalf("%s: parents %+v, want the foreign one and weft's", c.name, parents)
		}
		got := ""
		for _, x := range parents[1].Conditions {
			got += x.Type + "=" + string(x.Status) + "/" + x.Reason + " "
		}
		if got += parents[1].Conditions[2].Message; got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestPodConditions(t *testing.T) {
	report := func(s meshv1.PodState) *meshv1.PodReport { return &meshv1.PodReport{State: s, InboundPolicy: "h"} }
	with := func(s meshv1.PodState, change func(*meshv1.PodReport)) *meshv1.PodReport {
		r := report(s)
		change(r)
		return r
	}
	const (
		out       = meshv1.PodState_POD_STATE_OUT
		preparing = meshv1.PodState_POD_STATE_PREPARING
		captured  = meshv1.PodState_POD_STATE_CAPTURED
		enforced  = meshv1.PodState_POD_STATE_ENFORCED
		failed    = meshv1.PodState_POD_STATE_FAILED
	)
	was := func(s corev1.ConditionStatus, reason string) []corev1.PodCondition {
		return []corev1.PodCondition{{Type: names.ConditionEnrolled, Status: corev1.ConditionTrue}, {Type: names.ConditionEnforced, Status: s, Reason: reason}}
	}
	silent := "weft.dev/Enrolled=False/NotReported weft.dev/Enforced=False/NotReported "
	for _, c := range []struct {
		name   string
		goal   ir.Stage
		report *meshv1.PodReport
		node   string
		had    []corev1.PodCondition
		away   bool
		want   string
	}{
		{"repaired a moment ago", ir.Enforced, with(enforced, func(r *meshv1.PodReport) { r.Reason, r.Message = "Drift", "repaired" }), "n1", nil, false, "weft.dev/Enrolled=False/Pending weft.dev/Enforced=False/Pending repaired"},
		{"started unheld", ir.Enforced, with(enforced, func(r *meshv1.PodReport) { r.StartedUnheld, r.PreexistingConnections = true, 3 }), "n1", nil, false, "weft.dev/Enrolled=True/StartedUnheld weft.dev/Enforced=True/Enforced policy h applies"},
		{"captured", ir.Enforced, report(captured), "n1", nil, false, "weft.dev/Enrolled=True/Captured weft.dev/Enforced=False/Pending peers are being told to speak mTLS"},
		{"leaving", ir.Out, report(captured), "n1", nil, false, "weft.dev/Enrolled=True/Captured weft.dev/Enforced=False/Leaving peers are being told to speak plaintext"},
		{"under way", ir.Enforced, report(preparing), "n1", nil, false, "weft.dev/Enrolled=False/Pending weft.dev/Enforced=False/Pending enrolment is under way"},
		{"full maps", ir.Enforced, with(failed, func(r *meshv1.PodReport) { r.Reason, r.Message = "NodeFull", "no room" }), "n1", nil, false, "weft.dev/Enrolled=False/NodeFull weft.dev/Enforced=False/NodeFull no room"},
		{"Envoy refuses the next policy", ir.Enforced, with(enforced, func(r *meshv1.PodReport) { r.Refused = "no such filter" }), "n1", nil, false,
			"weft.dev/Enrolled=True/Captured weft.dev/Enforced=False/Refused policy h applies; Envoy refused policy new: no such filter"},
		{"Envoy refuses the first policy", ir.Enforced, with(captured, func(r *meshv1.PodReport) { r.Refused = "no such filter" }), "n1", nil, false,
			"weft.dev/Enrolled=True/Captured weft.dev/Enforced=False/Refused Envoy refused policy new: no such filter"},
		{"a port refuses everything", ir.Enforced, with(enforced, func(r *meshv1.PodReport) { r.PolicyProblems = []string{"port 25 is closed"} }), "n1", nil, false,
			"weft.dev/Enrolled=True/Captured weft.dev/Enforced=False/NotEnforceable policy h applies; port 25 is closed"},
		{"another node's word counts for nothing", ir.Enforced, report(enforced), "n2", nil, false, silent + "the agent of node n1 has not reported the pod: see that weft-nodeproxy runs there"},
		{"a silent node's pod that was enforced", ir.Enforced, nil, "n1", was(corev1.ConditionTrue, "Enforced"), false,
			"weft.dev/Enrolled=Unknown/NotReported weft.dev/Enforced=Unknown/NotReported the agent of node n1 has not reported the pod: see that weft-nodeproxy runs there"},
		{"a silent node's pod that enforced an earlier policy", ir.Enforced, nil, "n1", was(corev1.ConditionFalse, engine.ReasonRefused), false,
			"weft.dev/Enrolled=Unknown/NotReported weft.dev/Enforced=Unknown/NotReported the agent of node n1 has not reported the pod: see that weft-nodeproxy runs there"},
		{"a silent node's pod that was captured", ir.Enforced, nil, "n1", was(corev1.ConditionFalse, "Pending"), false,
			"weft.dev/Enrolled=Unknown/NotReported weft.dev/Enforced=False/NotReported the agent of node n1 has not reported the pod: see that weft-nodeproxy runs there"},
		{"a node that may be back any moment", ir.Enforced, nil, "n1", was(corev1.ConditionTrue, "Enforced"), true, ""},
		{"left", ir.Out, report(out), "n1", was(corev1.ConditionTrue, "Enforced"), false, "weft.dev/Enrolled=False/Withdrawn weft.dev/Enforced=False/Withdrawn the pod is not in the mesh"},
		{"never in", ir.Out, report(out), "n1", nil, false, ""},
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", UID: types.UID("u")}}
		pod.Status.Conditions = c.had
		target := &ir.Pod{UID: "u", Node: "n1", Goal: c.goal, Stage: ir.Captured, Policy: "new"}
		if c.goal == ir.Out && c.report.GetState() == out {
			target.Stage = ir.Out
		}
		p := &engine.Picture{Snapshot: &ir.Snapshot{Pods: map[string]*ir.Pod{"u": target}}, Reports: barrier.Reports{}, Nodes: connectedTo("n1", "n2")}
		if c.report != nil {
			p.Reports[c.node] = map[string]*meshv1.PodReport{"u": c.report}
		}
		if c.away {
			p.Nodes = serve.State{Away: []string{"n1"}}
		}
		if got := list(newView(p).podConditions(pod)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// list shows conditions, and the last one's message.
func list(conditions []metav1.Condition) string {
	out := ""
	for i, c := range conditions {
		out += c.Type + "=" + string(c.Status) + "/" + c.Reason + " "
		if i == len(conditions)-1 {
			out += c.Message
		}
	}
	return out
}

func TestShortcutConditions(t *testing.T) {
	had := []corev1.PodCondition{{Type: names.ConditionShortcut, Status: corev1.ConditionTrue}}
	for _, c := range []struct {
		name  string
		asked bool
		had   []corev1.PodCondition
		node  func(*meshv1.PodReport)
		want  string
	}{
		{"never asked for", false, nil, func(*meshv1.PodReport) {}, ""},
		{"on", true, nil, func(r *meshv1.PodReport) { r.Shortcut = true }, "weft.dev/Shortcut=True/Joined"},
		{"the kernel cannot", true, nil, func(r *meshv1.PodReport) { r.ShortcutRefused = "kernel 6.1 is too old" }, "weft.dev/Shortcut=False/Unsupported kernel 6.1 is too old"},
		{"not yet", true, nil, func(r *meshv1.PodReport) { r.State = meshv1.PodState_POD_STATE_PREPARING }, "weft.dev/Shortcut=False/Pending"},
		{"on its way out", false, had, func(r *meshv1.PodReport) { r.Shortcut = true }, "weft.dev/Shortcut=True/Leaving"},
		{"off again", false, had, func(*meshv1.PodReport) {}, "weft.dev/Shortcut=False/Off"},
		{"out of the mesh", true, append([]corev1.PodCondition{{Type: names.ConditionEnrolled, Status: corev1.ConditionTrue}}, had...),
			func(r *meshv1.PodReport) { r.State = meshv1.PodState_POD_STATE_OUT }, "weft.dev/Shortcut=False/Off"},
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", UID: types.UID("u")}}
		pod.Status.Conditions = c.had
		report := &meshv1.PodReport{State: meshv1.PodState_POD_STATE_ENFORCED, InboundPolicy: "h"}
		c.node(report)
		target := &ir.Pod{UID: "u", Node: "n1", Goal: ir.Enforced, Stage: ir.Enforced, Policy: "h", Shortcut: c.asked}
		if report.State == meshv1.PodState_POD_STATE_OUT {
			target.Goal, target.Stage = ir.Out, ir.Out
		}
		p := &engine.Picture{Snapshot: &ir.Snapshot{Pods: map[string]*ir.Pod{"u": target}}, Nodes: connectedTo("n1"),
			Reports: barrier.Reports{"n1": {"u": report}}}
		got := newView(p).podConditions(pod)
		if c.want == "" && len(got) != 2 || c.want != "" && (len(got) != 3 || !strings.HasPrefix(list(got[2:]), c.want)) {
			t.Errorf("%s: %s, want %q", c.name, list(got), c.want)
		}
	}
}

func TestPodProblems(t *testing.T) {
	ref := resolve.Ref{Kind: "Pod", Namespace: "shop", Name: "p", Generation: 1}
	ignored := resolve.Problem{Object: ref, Parent: -1, Type: names.ConditionEnrolled, Status: "True", Reason: "OptOutForbidden", Message: "the label is ignored"}
	host := resolve.Problem{Object: ref, Parent: -1, Type: names.ConditionEnrolled, Status: "False", Reason: "HostNetwork", Message: "remove it"}
	for _, c := range []struct {
		name    string
		problem resolve.Problem
		state   meshv1.PodState
		want    string
	}{
		{"its label is ignored", ignored, meshv1.PodState_POD_STATE_ENFORCED, "weft.dev/Enrolled=True/OptOutForbidden the label is ignored; the kernel hands the pod's connections to Envoy"},
		{"its label is ignored, and it is on its way", ignored, meshv1.PodState_POD_STATE_PREPARING, "weft.dev/Enrolled=False/Pending the label is ignored; enrolment is under way"},
		{"it cannot be enrolled", host, meshv1.PodState_POD_STATE_OUT, "weft.dev/Enrolled=False/HostNetwork remove it"},
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", UID: types.UID("u")}}
		p := &engine.Picture{Snapshot: &ir.Snapshot{Pods: map[string]*ir.Pod{"u": {UID: "u", Node: "n1", Goal: ir.Enforced, Stage: ir.Captured}}}, Problems: []resolve.Problem{c.problem},
			Reports: barrier.Reports{"n1": {"u": {State: c.state}}}, Nodes: connectedTo("n1")}
		if got := list(newView(p).podConditions(pod)[:1]); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// What is accepted and does less than it says is told in the message.
func TestWarnings(t *testing.T) {
	warning, fault := resolve.Problem{Parent: -1, Type: "Accepted", Status: "True", Message: "blind"}, resolve.Problem{Parent: -1, Type: "Accepted", Status: "False", Reason: "Invalid", Message: "broken"}
	for _, c := range []struct {
		name     string
		problems []resolve.Problem
		status   metav1.ConditionStatus
		reason   string
		message  string
	}{
		{"none", nil, metav1.ConditionTrue, "Accepted", ""},
		{"a warning", []resolve.Problem{warning}, metav1.ConditionTrue, "Accepted", "blind"},
		{"a fault", []resolve.Problem{warning, fault}, metav1.ConditionFalse, "Invalid", "broken"},
	} {
		got := judge(c.problems, -1, "Accepted", "Accepted", 1)
		if got.Status != c.status || got.Reason != c.reason || got.Message != c.message {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
}
