package lds

import (
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
)

// awayText is what a client reads whose Service has no routes on this node, because no controller answers.
const awayText = "weft: this Service was not used on this node before, and no controller answers. See that weft-controlplane runs."

// Away is the route configuration of a Service that was never used here, while the controller is away: 503 with the reason.
// Without one Envoy holds each request until its timeout.
func Away(name string) *route.RouteConfiguration {
	return &route.RouteConfiguration{Name: name, VirtualHosts: []*route.VirtualHost{{Name: "away", Domains: []string{"*"}, Routes: []*route.Route{{
		Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
		Action: &route.Route_DirectResponse{DirectResponse: &route.DirectResponseAction{
			Status: 503, Body: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: awayText}},
		}},
	}}}}}
}
