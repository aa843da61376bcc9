package engine

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// Reasons of weft.dev/Enforced=False of a pod that enforces something all the same: an earlier policy, or a closed port.
const (
	ReasonRefused        = "Refused"
	ReasonNotEnforceable = "NotEnforceable"
)

// InForce is how the message of weft.dev/Enforced names the policy that applies, and the generation of Envoy that applies it. The
// next controller reads it there, so that it does not move every caller to new connections.
func InForce(policy string, generation uint32) string {
	if generation == 0 {
		return "policy " + policy + " applies"
	}
	return fmt.Sprintf("policy %s applies, by Envoy's generation %d", policy, generation)
}

var inForce = regexp.MustCompile("^policy ([0-9a-f]{1,64}) applies(?:, by Envoy's generation ([0-9]{1,9}))?")

// seed reads the decisions of the controller before this one from the pods' conditions, and which nodes served it. The
// decisions hold until the nodes report: a forged condition therefore only closes a pod, and not for long.
func seed(in *resolve.Input) (decisions map[string]resolve.Decision, nodes []string) {
	decisions, serving := map[string]resolve.Decision{}, map[string]bool{}
	for _, p := range in.Pods {
		if p.Spec.NodeName == "" || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		if p.Namespace == in.Namespace && p.Labels["app"] == names.AgentServiceAccount && p.Status.Phase == corev1.PodRunning {
			serving[p.Spec.NodeName] = true
		}
		if p.Spec.HostNetwork {
			continue
		}
		if d := decided(p.Status.Conditions); d.Stage != ir.Out {
			decisions[string(p.UID)] = d
			serving[p.Spec.NodeName] = true
		}
	}
	return decisions, slices.Sorted(maps.Keys(serving))
}

// decided is what conditions tell of one pod. Unknown is what a silent node makes of True.
func decided(conditions []corev1.PodCondition) resolve.Decision {
	var d resolve.Decision
	for _, c := range conditions {
		stands := c.Status == corev1.ConditionTrue || c.Status == corev1.ConditionUnknown
		switch string(c.Type) {
		case names.ConditionEnrolled:
			if stands {
				d.Stage = max(d.Stage, ir.Captured)
			}
		case names.ConditionEnforced:
			if stands || c.Reason == ReasonRefused || c.Reason == ReasonNotEnforceable {
				d.Stage, d.MTLS = ir.Enforced, true
				if m := inForce.FindStringSubmatch(c.Message); m != nil {
					generation, _ := strconv.ParseUint(m[2], 10, 32) // none: 0
					d.Policy, d.Proxy = m[1], uint32(generation)
				}
			}
		}
	}
	return d
}
