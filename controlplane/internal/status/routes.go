package status

import (
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// ControllerName marks weft's part of a route's status.
const ControllerName = gwv1.GatewayController(names.Group + "/controlplane")

// routeStatus replaces weft's own parents and leaves other controllers' alone.
func (v *view) routeStatus(ref resolve.Ref, parents []gwv1.ParentReference, generation int64, have []gwv1.RouteParentStatus) gwv1.RouteStatus {
	var out []gwv1.RouteParentStatus
	for _, h := range have {
		if h.ControllerName != ControllerName {
			out = append(out, h)
		}
	}
	own := v.problems[ref]
	for i, parent := range parents {
		if parent.Kind == nil || *parent.Kind != "Service" || parent.Group != nil && *parent.Group != "" && *parent.Group != "core" {
			continue
		}
		status := gwv1.RouteParentStatus{ParentRef: parent, ControllerName: ControllerName}
		for _, h := range have {
			if h.ControllerName == ControllerName && deref(h.ParentRef) == deref(parent) {
				status.Conditions = h.Conditions
			}
		}
		admitted := judge(own, i, "Accepted", "Accepted", generation)
		programmed := condition("Programmed", metav1.ConditionFalse, "NotAccepted", "the route is not in force: see Accepted", generation)
		if admitted.Status == metav1.ConditionTrue {
			programmed = v.routed(ref, parent, generation)
		}
		status.Conditions = settle(status.Conditions, []metav1.Condition{admitted, judge(own, i, "ResolvedRefs", "ResolvedRefs", generation), programmed})
		out = append(out, status)
	}
	return gwv1.RouteStatus{Parents: out}
}

// routed is Programmed of a route at one parent. Concerned are the nodes whose Envoy uses the parent's routes, and those
// that have yet to learn whether connections to the parent are captured.
func (v *view) routed(ref resolve.Ref, parent gwv1.ParentReference, generation int64) metav1.Condition {
	key := ir.Key{Namespace: ref.Namespace, Name: string(parent.Name)}
	if parent.Namespace != nil {
		key.Namespace = string(*parent.Namespace)
	}
	open := slices.Clone(v.Nodes.Open[serve.Resource{TypeURL: xds.TypeService, Name: key.String()}])
	concerned := slices.Clone(open)
	var resources []serve.Resource
	if service := v.Snapshot.Services[key]; service != nil {
		for _, port := range service.Ports {
			if parent.Port != nil && uint16(*parent.Port) != port.Key.Port {
				continue
			}
			name := names.Route(key.Namespace, key.Name, port.Key.Port)
			users := v.Nodes.Routes[name]
			concerned = append(concerned, users...)
			resources = append(resources, serve.Resource{TypeURL: xds.TypeRoute, Name: name})
			resources = append(resources, backends(port, ref)...)
			for _, k := range resources {
				for _, node := range v.Nodes.Open[k] {
					if slices.Contains(users, node) {
						open = append(open, node)
					}
				}
			}
		}
	}
	return v.progress(concerned, open, v.refused(resources...), generation)
}

// backends are the clusters of what a route sends to.
func backends(port *ir.ServicePort, ref resolve.Ref) []serve.Resource {
	var out []serve.Resource
	source := ref.Kind + " " + ref.Namespace + "/" + ref.Name + " "
	for _, r := range port.Routes {
		if !strings.HasPrefix(r.Source, source) {
			continue
		}
		for _, b := range r.Backends {
			k := serve.Resource{TypeURL: xds.TypeCluster, Name: names.ServiceCluster(b.Port.Service.Namespace, b.Port.Service.Name, b.Port.Port)}
			if b.Status == 0 && !slices.Contains(out, k) {
				out = append(out, k)
			}
		}
	}
	return out
}

// deref makes a parentRef comparable.
func deref(p gwv1.ParentReference) [6]string {
	s := func(v any) string { return fmt.Sprint(v) }
	var out [6]string
	if p.Group != nil {
		out[0] = s(*p.Group)
	}
	if p.Kind != nil {
		out[1] = s(*p.Kind)
	}
	if p.Namespace != nil {
		out[2] = s(*p.Namespace)
	}
	out[3] = s(p.Name)
	if p.SectionName != nil {
		out[4] = s(*p.SectionName)
	}
	if p.Port != nil {
		out[5] = s(*p.Port)
	}
	return out
}
