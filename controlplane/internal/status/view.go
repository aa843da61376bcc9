package status

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// Reasons that the writer treats in its own way.
const (
	pending     = "Pending"
	notReported = "NotReported"
)

// presence is whether a node can answer.
type presence uint8

const (
	unreachable presence = iota
	// away: its stream is gone, not for long, or it has not asked for everything yet.
	away
	connected
)

// view is a Picture with what the conditions of many objects look up.
type view struct {
	*engine.Picture
	nodes    map[string]presence
	problems map[resolve.Ref][]resolve.Problem
	refusals map[serve.Resource][]serve.Refusal
	// pods holds the uids of the pods that have a policy, in order, by namespace.
	pods map[string][]string
	// mesh are the nodes that have not answered the Mesh or a Namespace.
	mesh []string
}

func newView(p *engine.Picture) *view {
	v := &view{Picture: p, nodes: map[string]presence{}, problems: map[resolve.Ref][]resolve.Problem{}, refusals: map[serve.Resource][]serve.Refusal{}, pods: map[string][]string{}}
	for _, node := range p.Nodes.Nodes {
		v.nodes[node] = connected
	}
	for _, node := range slices.Concat(p.Nodes.Away, p.Nodes.Joining) {
		v.nodes[node] = away
	}
	for _, q := range p.Problems {
		ref := q.Object
		ref.Generation = 0
		v.problems[ref] = append(v.problems[ref], q)
	}
	for _, r := range p.Nodes.Refusals {
		k := serve.Resource{TypeURL: r.TypeURL, Name: r.Name}
		v.refusals[k] = append(v.refusals[k], r)
	}
	for _, uid := range slices.Sorted(maps.Keys(p.Snapshot.Pods)) {
		if pod := p.Snapshot.Pods[uid]; pod.Policy != "" {
			v.pods[pod.Key.Namespace] = append(v.pods[pod.Key.Namespace], uid)
		}
	}
	for k, nodes := range p.Nodes.Open {
		if k.TypeURL == xds.TypeMesh || k.TypeURL == xds.TypeNamespace {
			v.mesh = append(v.mesh, nodes...)
		}
	}
	return v
}

// refused are the refusals of resources, as conditions name them.
func (v *view) refused(resources ...serve.Resource) []string {
	var out []string
	for _, k := range resources {
		for _, r := range v.refusals[k] {
			out = append(out, "node "+r.Node+", "+r.Name+": "+r.Text)
		}
	}
	return out
}

// progress tells how many of the concerned nodes have acknowledged; open are those that have something left to.
func (v *view) progress(concerned, open, refusals []string, generation int64) metav1.Condition {
	concerned = slices.Compact(slices.Sorted(slices.Values(concerned)))
	still := map[string]bool{}
	for _, node := range open {
		still[node] = true
	}
	all, lost := 0, 0
	var waiting []string
	for _, node := range concerned {
		switch {
		case v.nodes[node] == unreachable:
			lost++
			continue
		case v.nodes[node] == away:
			waiting = append(waiting, node+" (away)")
		case still[node]:
			waiting = append(waiting, node)
		}
		all++
	}
	message := fmt.Sprintf("%d/%d nodes", all-len(waiting), all)
	if lost > 0 {
		message += fmt.Sprintf(", %d unreachable", lost)
	}
	switch {
	case len(refusals) > 0:
		return condition("Programmed", metav1.ConditionFalse, engine.ReasonRefused, strings.Join(refusals, "; "), generation)
	case len(concerned) == 0:
		return condition("Programmed", metav1.ConditionTrue, "NoConsumers", "no node has anything to do with it", generation)
	case len(waiting) > 0:
		return condition("Programmed", metav1.ConditionFalse, pending, message+"; waiting for "+some(waiting), generation)
	}
	return condition("Programmed", metav1.ConditionTrue, "Programmed", message, generation)
}

// some lists the first few.
func some(l []string) string {
	const few = 3
	if len(l) > few {
		return strings.Join(l[:few], ", ") + fmt.Sprintf(" and %d more", len(l)-few)
	}
	return strings.Join(l, ", ")
}
