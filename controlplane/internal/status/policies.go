package status

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// made tells whether an object went into a policy.
func made(p *ir.InboundPolicy, source string) bool {
	if p == nil {
		return false
	}
	return slices.Contains(p.Default.Sources, source) || slices.ContainsFunc(p.Ports, func(q ir.PortPolicy) bool { return slices.Contains(q.Sources, source) })
}

// concerned are the pods of a namespace that have a policy; with a source, those whose policy it went into.
func (v *view) concerned(namespace, source string) []*ir.Pod {
	var out []*ir.Pod
	for _, uid := range v.pods[namespace] {
		if pod := v.Snapshot.Pods[uid]; source == "" || made(v.Snapshot.Policies[pod.Policy], source) {
			out = append(out, pod)
		}
	}
	return out
}

// inForce is Programmed of a policy: the nodes of its pods have what it went into, and the pods' nodes report that it, and
// nothing older, is in force.
func (v *view) inForce(pods []*ir.Pod, generation int64) metav1.Condition {
	var nodes, open, refusals, problems []string
	for _, pod := range pods {
		nodes = append(nodes, pod.Node)
		for _, k := range []serve.Resource{{TypeURL: xds.TypeLocalPod, Name: pod.Node + "/" + pod.UID}, {TypeURL: xds.TypeInboundPolicy, Name: pod.Policy}} {
			if slices.Contains(v.Nodes.Open[k], pod.Node) {
				open = append(open, pod.Node)
			}
		}
		r := v.Reports.Of(pod)
		where := "node " + pod.Node + ", pod " + pod.Key.String() + ": "
		if r.GetRefused() != "" {
			refusals = append(refusals, where+r.Refused)
		}
		for _, q := range r.GetPolicyProblems() {
			problems = append(problems, where+q)
		}
	}
	c := v.progress(nodes, open, refusals, generation)
	switch {
	case len(refusals) > 0:
		return c
	case len(problems) > 0:
		return condition("Programmed", metav1.ConditionFalse, engine.ReasonNotEnforceable, strings.Join(problems, "; "), generation)
	case c.Status != metav1.ConditionTrue:
		return c
	}
	all := 0
	var waiting []string
	for _, pod := range pods {
		if pod.Stage != ir.Enforced || v.nodes[pod.Node] == unreachable {
			continue // it enforces nothing yet, or its node is counted apart
		}
		all++
		if what := lacks(pod, v.Reports.Of(pod)); what != "" {
			waiting = append(waiting, pod.Key.String()+" on "+pod.Node+" ("+what+")")
		}
	}
	if len(waiting) > 0 {
		return condition("Programmed", metav1.ConditionFalse, pending, fmt.Sprintf("%d/%d pods; waiting for %s", all-len(waiting), all, some(waiting)), generation)
	}
	return c
}

// lacks tells what is missing until a pod's policy alone is in force there; empty: nothing.
func lacks(pod *ir.Pod, r *meshv1.PodReport) string {
	switch {
	case r == nil:
		return "not reported"
	case r.InboundPolicy != pod.Policy:
		return "its listener has an earlier policy"
	case r.SettledPolicy != pod.Policy && pod.Moved != pod.Policy:
		return "callers are being told"
	case r.SettledPolicy != pod.Policy:
		return "connections under an earlier policy are ending"
	}
	return ""
}

// meshInForce is Programmed of the MeshConfig. Its mTLS mode is in the policy of every pod: after a change those count too.
func (v *view) meshInForce(m *v1alpha1.MeshConfig) metav1.Condition {
	nodes := slices.Collect(maps.Keys(v.nodes))
	c := v.progress(nodes, v.mesh, nil, m.Generation)
	for _, h := range m.Status.Conditions {
		if h.Type == c.Type && h.Status == metav1.ConditionTrue && h.ObservedGeneration == m.Generation {
			return c // what changes a pod's policy now is another object
		}
	}
	if c.Status != metav1.ConditionTrue {
		return c
	}
	var pods []*ir.Pod
	for _, namespace := range slices.Sorted(maps.Keys(v.pods)) {
		pods = append(pods, v.concerned(namespace, "")...)
	}
	if all := v.inForce(pods, m.Generation); all.Status != metav1.ConditionTrue {
		return all
	}
	return c
}

func policyStatus(problems []resolve.Problem, programmed metav1.Condition, generation int64, have v1alpha1.Status) v1alpha1.Status {
	return v1alpha1.Status{Conditions: settle(have.Conditions, []metav1.Condition{judge(problems, -1, "Accepted", "Accepted", generation), programmed})}
}
