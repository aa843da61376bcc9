package lds

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	selector "github.com/envoyproxy/go-control-plane/envoy/extensions/local_address_selectors/filter_state_override/v3"
	upstream "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/anypb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
)

// appIdleTimeout is how long an HTTP connection to an app waits for the same client's next request.
const appIdleTimeout = 10 * time.Second

type netnsSelector = selector.Config

// Clusters are the ones that every Envoy of the mesh has whatever its pods call: the last hop to the app, and the one
// that refuses. ClusterLocalH1 speaks to the app the HTTP version that the request came in, or passes bytes. It has pools
// for each client's address, which outlive the client's connections; bytes go with their caller's connection.
func Clusters() []*cluster.Cluster {
	return []*cluster.Cluster{
		{
			Name:                          names.ClusterLocalH1,
			ClusterDiscoveryType:          &cluster.Cluster_Type{Type: cluster.Cluster_ORIGINAL_DST},
			LbPolicy:                      cluster.Cluster_CLUSTER_PROVIDED,
			ConnectTimeout:                seconds(10 * time.Second),
			CleanupInterval:               seconds(time.Minute),
			PerConnectionBufferLimitBytes: number(bufferLimit),
			UpstreamBindConfig:            bindConfig(names.TagLocalLeg),
			CircuitBreakers:               unbroken(),
			UpstreamConnectionOptions:     &cluster.UpstreamConnectionOptions{TcpKeepalive: keepalive()},
			TypedExtensionProtocolOptions: map[string]*anypb.Any{
				"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(&upstream.HttpProtocolOptions{
					CommonHttpProtocolOptions: &core.HttpProtocolOptions{IdleTimeout: seconds(appIdleTimeout)},
					UpstreamProtocolOptions: &upstream.HttpProtocolOptions_UseDownstreamProtocolConfig{
						UseDownstreamProtocolConfig: &upstream.HttpProtocolOptions_UseDownstreamHttpConfig{
							HttpProtocolOptions: &core.Http1ProtocolOptions{EnableTrailers: true, HeaderKeyFormat: keepCase()},
							Http2ProtocolOptions: &core.Http2ProtocolOptions{
								InitialStreamWindowSize: number(bufferLimit), InitialConnectionWindowSize: number(4 * bufferLimit)},
						},
					},
				}),
			},
		},
		{
			Name:                 names.ClusterNone,
			ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
			LoadAssignment:       &endpoint.ClusterLoadAssignment{ClusterName: names.ClusterNone},
		},
	}
}

// unbroken: the local cluster serves all pods of the node, and a shared limit would let one pod starve the others.
// What a pod may hold is bounded where it is captured.
func unbroken() *cluster.CircuitBreakers {
	const most = 1 << 30
	return &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{{
		MaxConnections: number(most), MaxPendingRequests: number(most), MaxRequests: number(most), MaxRetries: number(most),
	}}}
}

// Scopes leads every HTTP or undeclared service address to its port's routes. No key comes twice, for one duplicate
// would make Envoy refuse them all: the first service by name keeps it.
func Scopes(services []*meshv1.Service) []*route.ScopedRouteConfiguration {
	sorted := slices.Clone(services)
	slices.SortFunc(sorted, func(a, b *meshv1.Service) int {
		return cmp.Or(cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()))
	})
	var scopes []*route.ScopedRouteConfiguration
	taken := map[string]bool{}
	for _, service := range sorted {
		for _, raw := range service.GetAddresses() {
			address, ok := netip.AddrFromSlice(raw)
			if !ok {
				continue
			}
			for _, port := range service.GetPorts() {
				name := names.Scope(netip.AddrPortFrom(address.Unmap(), uint16(port.GetPort())))
				if c := port.GetClass(); c != meshv1.Class_CLASS_HTTP && c != meshv1.Class_CLASS_AUTO || taken[name] {
					continue
				}
				taken[name] = true
				scopes = append(scopes, &route.ScopedRouteConfiguration{
					Name:                   name,
					OnDemand:               true,
					RouteConfigurationName: names.Route(service.GetNamespace(), service.GetName(), uint16(port.GetPort())),
					Key: &route.ScopedRouteConfiguration_Key{Fragments: []*route.ScopedRouteConfiguration_Key_Fragment{{
						Type: &route.ScopedRouteConfiguration_Key_Fragment_StringKey{StringKey: name}}}},
				})
			}
		}
	}
	slices.SortFunc(scopes, func(a, b *route.ScopedRouteConfiguration) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return scopes
}
