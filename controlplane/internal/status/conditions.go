package status

import (
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// conditionCaptured of a Service is False while something about it keeps traffic to it out of the mesh. It is there only then.
const conditionCaptured = names.Group + "/Captured"

func condition(kind string, s metav1.ConditionStatus, reason, message string, generation int64) metav1.Condition {
	return metav1.Condition{Type: kind, Status: s, Reason: reason, Message: clip(message), ObservedGeneration: generation}
}

// clip keeps messages within what the API server takes.
func clip(s string) string {
	const limit = 2000
	if len(s) > limit {
		return strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}

// targets are all objects but pods, with the status that they should have.
func (v *view) targets() []target {
	var out []target
	if m := v.Input.MeshConfig; m != nil {
		want := policyStatus(v.problems[resolve.Ref{Kind: "MeshConfig", Name: m.Name}], v.meshInForce(m), m.Generation, m.Status)
		out = append(out, merged(&v1alpha1.MeshConfig{ObjectMeta: known(m.ObjectMeta)}, m.Status, want, want.Conditions, m.Status.Conditions))
	}
	for _, a := range v.Input.AuthenticationPolicies {
		ref := resolve.Ref{Kind: "AuthenticationPolicy", Namespace: a.Namespace, Name: a.Name}
		want := policyStatus(v.problems[ref], v.inForce(v.concerned(a.Namespace, ""), a.Generation), a.Generation, a.Status)
		out = append(out, merged(&v1alpha1.AuthenticationPolicy{ObjectMeta: known(a.ObjectMeta)}, a.Status, want, want.Conditions, a.Status.Conditions))
	}
	for _, a := range v.Input.AccessPolicies {
		ref := resolve.Ref{Kind: "AccessPolicy", Namespace: a.Namespace, Name: a.Name}
		want := policyStatus(v.problems[ref], v.inForce(v.concerned(a.Namespace, "AccessPolicy "+a.Namespace+"/"+a.Name), a.Generation), a.Generation, a.Status)
		out = append(out, merged(&v1alpha1.AccessPolicy{ObjectMeta: known(a.ObjectMeta)}, a.Status, want, want.Conditions, a.Status.Conditions))
	}
	for _, r := range v.Input.HTTPRoutes {
		want := v.routeStatus(resolve.Ref{Kind: "HTTPRoute", Namespace: r.Namespace, Name: r.Name}, r.Spec.ParentRefs, r.Generation, r.Status.Parents)
		out = append(out, merged(&gwv1.HTTPRoute{ObjectMeta: known(r.ObjectMeta)}, r.Status.RouteStatus, want, flatten(want), flatten(r.Status.RouteStatus)))
	}
	for _, r := range v.Input.GRPCRoutes {
		want := v.routeStatus(resolve.Ref{Kind: "GRPCRoute", Namespace: r.Namespace, Name: r.Name}, r.Spec.ParentRefs, r.Generation, r.Status.Parents)
		out = append(out, merged(&gwv1.GRPCRoute{ObjectMeta: known(r.ObjectMeta)}, r.Status.RouteStatus, want, flatten(want), flatten(r.Status.RouteStatus)))
	}
	for _, s := range v.Input.Services {
		if t, ok := v.service(s); ok {
			out = append(out, t)
		}
	}
	return out
}

// service is a Service with something to say, or with a condition to take back.
func (v *view) service(s *corev1.Service) (target, bool) {
	i := slices.IndexFunc(s.Status.Conditions, func(c metav1.Condition) bool { return c.Type == conditionCaptured })
	problems := v.problems[resolve.Ref{Kind: "Service", Namespace: s.Namespace, Name: s.Name}]
	if i < 0 && len(problems) == 0 {
		return target{}, false
	}
	t := target{object: &corev1.Service{ObjectMeta: known(s.ObjectMeta)}, how: types.StrategicMergePatchType}
	if c := judge(problems, -1, conditionCaptured, "", 0); c.Status == metav1.ConditionFalse {
		// Other conditions of a Service are others': the patch merges by type.
		t.conditions = changed(s.Status.Conditions, []metav1.Condition{c}, time.Now())
		t.done, t.status = len(t.conditions) == 0, map[string]any{"conditions": t.conditions}
		return t, true
	}
	t.done, t.status = i < 0, map[string]any{"conditions": []any{map[string]any{"$patch": "delete", "type": conditionCaptured}}}
	return t, true
}

func flatten(s gwv1.RouteStatus) []metav1.Condition {
	var out []metav1.Condition
	for _, p := range s.Parents {
		out = append(out, p.Conditions...)
	}
	return out
}

// settle merges wanted conditions into those there are, by type, and keeps the times of what did not change.
func settle(have, want []metav1.Condition) []metav1.Condition {
	out := slices.Clone(have)
	for _, c := range changed(have, want, time.Now()) {
		i := slices.IndexFunc(out, func(h metav1.Condition) bool { return h.Type == c.Type })
		if i < 0 {
			out = append(out, c)
		} else {
			out[i] = c
		}
	}
	return out
}

// judge makes Accepted (and, for routes, ResolvedRefs) of an object's problems.
func judge(problems []resolve.Problem, parent int, kind, good string, generation int64) metav1.Condition {
	var reason string
	var messages, warnings []string
	for _, q := range problems {
		if q.Type != kind || q.Parent != parent {
			continue
		}
		if q.Status != "False" {
			warnings = append(warnings, q.Message)
			continue
		}
		if reason == "" {
			reason = q.Reason
		}
		messages = append(messages, q.Message)
	}
	if reason == "" {
		return condition(kind, metav1.ConditionTrue, good, strings.Join(warnings, "; "), generation)
	}
	return condition(kind, metav1.ConditionFalse, reason, strings.Join(messages, "; "), generation)
}
