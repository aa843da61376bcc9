package status

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// podConditions are a pod's, none for a pod that never had to do with the mesh.
func (v *view) podConditions(pod *corev1.Pod) []metav1.Condition {
	problems := v.problems[resolve.Ref{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name}]
	for _, q := range problems {
		if q.Status == "False" {
			return []metav1.Condition{condition(q.Type, metav1.ConditionFalse, q.Reason, q.Message, 0)}
		}
	}
	out := v.standing(pod)
	for _, q := range problems {
		for i, c := range out {
			if c.Type != q.Type {
				continue
			}
			if string(c.Status) == q.Status {
				out[i].Reason = q.Reason
			}
			out[i].Message = clip(q.Message + "; " + c.Message)
		}
	}
	return out
}

// both gives a pod's two conditions the same status.
func both(s metav1.ConditionStatus, reason, message string) []metav1.Condition {
	return []metav1.Condition{condition(names.ConditionEnrolled, s, reason, message, 0), condition(names.ConditionEnforced, s, reason, message, 0)}
}

// standing is where a pod is, as its node reports it.
func (v *view) standing(pod *corev1.Pod) []metav1.Condition {
	target := v.Snapshot.Pods[string(pod.UID)]
	if target == nil {
		return nil
	}
	report := v.Reports.Of(target)
	if target.Goal == ir.Out && target.Stage == ir.Out && !target.MTLS {
		if _, ok := podCondition(pod, names.ConditionEnrolled); !ok {
			return nil
		}
		if report == nil || report.State == meshv1.PodState_POD_STATE_OUT {
			out := both(metav1.ConditionFalse, "Withdrawn", "the pod is not in the mesh")
			if _, had := podCondition(pod, names.ConditionShortcut); had {
				out = append(out, condition(names.ConditionShortcut, metav1.ConditionFalse, names.ReasonOff, "the pod is not in the mesh", 0))
			}
			return out
		}
	}
	if report == nil {
		return v.unreported(pod, target.Node)
	}
	out := reported(target, report)
	if c, ok := shortcut(pod, target, report); ok {
		out = append(out, c)
	}
	return out
}

// shortcut is the condition of a pod that asks for the short circuit, or once did.
func shortcut(pod *corev1.Pod, target *ir.Pod, r *meshv1.PodReport) (metav1.Condition, bool) {
	is := func(s metav1.ConditionStatus, reason, message string) (metav1.Condition, bool) {
		return condition(names.ConditionShortcut, s, reason, message, 0), true
	}
	_, had := podCondition(pod, names.ConditionShortcut)
	switch {
	case !target.Shortcut && !had:
		return metav1.Condition{}, false
	case !target.Shortcut && !r.Shortcut:
		return is(metav1.ConditionFalse, names.ReasonOff, "the pod does not ask for it")
	case !target.Shortcut:
		return is(metav1.ConditionTrue, "Leaving", "it is being switched off")
	case r.ShortcutRefused != "":
		return is(metav1.ConditionFalse, "Unsupported", r.ShortcutRefused)
	case !r.Shortcut:
		return is(metav1.ConditionFalse, pending, "it comes when the pod is captured")
	}
	return is(metav1.ConditionTrue, "Joined", "payload between the pod's apps and Envoy goes past TCP on connections made since")
}

func podCondition(pod *corev1.Pod, kind string) (corev1.PodCondition, bool) {
	i := slices.IndexFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool { return string(c.Type) == kind })
	if i < 0 {
		return corev1.PodCondition{}, false
	}
	return pod.Status.Conditions[i], true
}

// unreported are the conditions of a pod whose node is silent: what was True may still be, and the next controller is to
// know that it was.
func (v *view) unreported(pod *corev1.Pod, node string) []metav1.Condition {
	if v.nodes[node] == away {
		return nil // it may be back any moment
	}
	out := both(metav1.ConditionFalse, notReported, "the agent of node "+node+" has not reported the pod: see that weft-nodeproxy runs there")
	for i, c := range out {
		was, _ := podCondition(pod, c.Type)
		if was.Status == corev1.ConditionTrue || was.Status == corev1.ConditionUnknown || was.Reason == engine.ReasonRefused || was.Reason == engine.ReasonNotEnforceable {
			out[i].Status = metav1.ConditionUnknown
		}
	}
	return out
}

func reported(target *ir.Pod, r *meshv1.PodReport) []metav1.Condition {
	switch r.State {
	case meshv1.PodState_POD_STATE_CAPTURED, meshv1.PodState_POD_STATE_ENFORCED:
		if r.Reason == names.ReasonDrift {
			return both(metav1.ConditionFalse, "Pending", r.Message)
		}
		reason, said := "Captured", "the kernel hands the pod's connections to Envoy"
		if r.StartedUnheld {
			reason, said = "StartedUnheld", said+"; nothing held the pod before that"
		}
		if n := r.PreexistingConnections; n > 0 {
			said += fmt.Sprintf("; connections from before that, which stay as they are: %d", n)
		}
		return []metav1.Condition{condition(names.ConditionEnrolled, metav1.ConditionTrue, reason, said, 0), enforced(target, r)}
	case meshv1.PodState_POD_STATE_FAILED:
		reason := r.Reason
		if reason == "" {
			reason = "Failed"
		}
		return both(metav1.ConditionFalse, reason, r.Message)
	}
	message := r.Message
	if message == "" {
		message = "enrolment is under way"
	}
	return both(metav1.ConditionFalse, "Pending", message)
}

// enforced tells whether a captured pod's policy applies as it is written.
func enforced(target *ir.Pod, r *meshv1.PodReport) metav1.Condition {
	no := func(reason, message string) metav1.Condition {
		return condition(names.ConditionEnforced, metav1.ConditionFalse, reason, message, 0)
	}
	applies := ""
	if r.State == meshv1.PodState_POD_STATE_ENFORCED {
		applies = engine.InForce(r.InboundPolicy, r.ProxyGeneration)
	}
	also := func(said string) string { return strings.TrimPrefix(applies+"; "+said, "; ") }
	switch {
	case target.Goal == ir.Out && applies == "":
		return no("Leaving", "peers are being told to speak plaintext")
	case r.Refused != "":
		return no(engine.ReasonRefused, also("Envoy refused policy "+target.Policy+": "+r.Refused))
	case len(r.PolicyProblems) > 0:
		return no(engine.ReasonNotEnforceable, also(strings.Join(r.PolicyProblems, "; ")))
	case applies == "":
		return no("Pending", "peers are being told to speak mTLS")
	}
	return condition(names.ConditionEnforced, metav1.ConditionTrue, "Enforced", applies, 0)
}
