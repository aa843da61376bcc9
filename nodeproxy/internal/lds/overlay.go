package lds

import (
	"slices"

	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
)

// LocalOnly leaves, of endpoints that the controller marked "local_only" (internalTrafficPolicy Local), those on a node.
// False: nothing was to be done.
func LocalOnly(load *endpoint.ClusterLoadAssignment, node string) bool {
	changed := false
	for _, group := range load.Endpoints {
		before := len(group.LbEndpoints)
		group.LbEndpoints = slices.DeleteFunc(group.LbEndpoints, func(e *endpoint.LbEndpoint) bool {
			fields := e.GetMetadata().GetFilterMetadata()["weft"].GetFields()
			return fields["local_only"].GetStringValue() == "true" && fields["node"].GetStringValue() != node
		})
		changed = changed || len(group.LbEndpoints) != before
	}
	return changed
}
