package lds

import (
	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
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

// agentAwayText is what a client reads whose Service has no routes on this node, because its agent does not answer.
const agentAwayText = "weft: this Service was not used on this node before, and the node's agent does not answer. See that weft-nodeproxy runs."

// withoutAgent answers with the reason what nobody gave routes for within routeTimeout: Envoy alone would say 504, a slow server's word.
// Streams that have a route are never idle for too long.
func withoutAgent() *hcm.LocalReplyConfig {
	return &hcm.LocalReplyConfig{Mappers: []*hcm.ResponseMapper{{
		Filter: &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_ResponseFlagFilter{
			ResponseFlagFilter: &accesslog.ResponseFlagFilter{Flags: []string{"SI"}}}},
		StatusCode: number(503),
		Body:       &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: agentAwayText}},
	}}}
}
