package xds

import (
	"slices"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// MetadataWeft is the metadata namespace of what agents need to lay their node's view over endpoints: "node" and,
// where only endpoints on the caller's node may be used, "local_only".
const MetadataWeft = "weft"

// Endpoints answers names.ServiceCluster and names.TCPCluster with the port's endpoints: the ready ones, or where none is left those that
// still serve while they terminate, as kube-proxy does. Endpoints that must not be spoken to at all are left out.
func Endpoints(s *ir.Snapshot, name string) *endpoint.ClusterLoadAssignment {
	out := &endpoint.ClusterLoadAssignment{ClusterName: name}
	port := portByAddress(s, name)
	if key, ok := parsePort("svc", name); ok {
		port = findPort(s, key)
	}
	if port == nil {
		return out
	}
	usable := slices.DeleteFunc(slices.Clone(port.Endpoints), func(e *ir.Endpoint) bool {
		return e.Transport != ir.Plain && (e.Transport != ir.MTLS || e.Identity == "")
	})
	slices.SortStableFunc(usable, func(a, b *ir.Endpoint) int { return a.Address.Compare(b.Address) })
	group := &endpoint.LocalityLbEndpoints{}
	for _, wanted := range []func(*ir.Endpoint) bool{
		func(e *ir.Endpoint) bool { return e.Ready },
		func(e *ir.Endpoint) bool { return e.Serving },
	} {
		for _, e := range usable {
			if wanted(e) {
				group.LbEndpoints = append(group.LbEndpoints, lbEndpoint(e, port.LocalOnly))
			}
		}
		if len(group.LbEndpoints) > 0 {
			out.Endpoints = []*endpoint.LocalityLbEndpoints{group}
			break
		}
	}
	return out
}

func lbEndpoint(e *ir.Endpoint, localOnly bool) *endpoint.LbEndpoint {
	peer := names.TransportSocketPlain
	if e.Transport == ir.MTLS {
		peer = e.Identity
	}
	metadata := map[string]*structpb.Struct{
		names.MetadataNamespace: fields(names.MetadataPeer, peer),
		"envoy.lb":              fields("hash_key", e.Address.String()),
	}
	only := ""
	if localOnly {
		only = "true"
	}
	if where := fields("node", e.Node, "local_only", only); len(where.Fields) > 0 {
		metadata[MetadataWeft] = where
	}
	return &endpoint.LbEndpoint{
		HealthStatus: core.HealthStatus_HEALTHY,
		Metadata:     &core.Metadata{FilterMetadata: metadata},
		HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{
			Hostname: e.Generation,
			Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
				Address:       e.Address.Addr().String(),
				PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(e.Address.Port())},
			}}},
		}},
	}
}
