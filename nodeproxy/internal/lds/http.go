package lds

import (
	"time"

	mutation "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	ondemand "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/on_demand/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	early "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	preserve "github.com/envoyproxy/go-control-plane/envoy/extensions/http/header_formatters/preserve_case/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/weftmesh/weft/api/names"
)

const (
	// onDemandTimeout bounds how long a request or connection waits for a cluster that Envoy does not have yet.
	onDemandTimeout = 5 * time.Second
	// routeTimeout bounds how long a request waits for its route. It is the idle timeout of streams that have no route
	// yet; every route of weft's lifts it, so that server-sent events and gRPC streams may be silent for ever.
	routeTimeout = 15 * time.Second
	// drainTimeout is how long an HTTP connection that is told to go may finish (docs/LIFECYCLE.md).
	drainTimeout = time.Second
	// http10Host stands in for the Host header that HTTP/1.0 clients may leave out.
	http10Host = "http10.invalid"
)

type http struct {
	stat    string
	codec   hcm.HttpConnectionManager_CodecType
	filters []*hcm.HttpFilter
	// set are headers written over whatever the client sent, name and format.
	set [][2]string
	// routes: nil means the scoped routes of outbound listeners.
	routes *route.RouteConfiguration
	// strictPaths: rules compare paths, so that one path must not be written in two ways.
	strictPaths bool
	maxAge      time.Duration
	log         bool
	outbound    bool
}

// manager builds the HTTP connection manager. It leaves requests and responses as they are but for what weft must not
// believe: x-envoy-*, x-weft-* and x-forwarded-client-cert of the client are removed. use_remote_address stays off,
// for it would overwrite an ingress's x-forwarded-proto; without it nothing is appended to x-forwarded-for.
func (h http) manager() *listener.Filter {
	m := &hcm.HttpConnectionManager{
		CodecType:   h.codec,
		StatPrefix:  h.stat,
		HttpFilters: append(h.filters, routerFilter()),
		CommonHttpProtocolOptions: &core.HttpProtocolOptions{
			// An app may leave its connection idle for as long as it could without weft; Envoy's default is 1 h.
			IdleTimeout:                  seconds(0),
			HeadersWithUnderscoresAction: core.HttpProtocolOptions_REJECT_REQUEST,
			MaxHeadersCount:              number(200),
		},
		HttpProtocolOptions: &core.Http1ProtocolOptions{
			AcceptHttp_10:         true,
			DefaultHostForHttp_10: http10Host,
			EnableTrailers:        true,
			HeaderKeyFormat:       keepCase(),
		},
		Http2ProtocolOptions: &core.Http2ProtocolOptions{
			InitialStreamWindowSize:     number(bufferLimit),
			InitialConnectionWindowSize: number(4 * bufferLimit),
			MaxConcurrentStreams:        number(1000),
		},
		ServerHeaderTransformation:    hcm.HttpConnectionManager_PASS_THROUGH,
		MaxRequestHeadersKb:           number(96),
		StreamIdleTimeout:             seconds(routeTimeout),
		DrainTimeout:                  seconds(drainTimeout),
		UseRemoteAddress:              truth(false),
		SkipXffAppend:                 true,
		GenerateRequestId:             truth(false),
		PreserveExternalRequestId:     true,
		ForwardClientCertDetails:      hcm.HttpConnectionManager_SANITIZE,
		Proxy_100Continue:             true,
		UpgradeConfigs:                []*hcm.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		NormalizePath:                 truth(true),
		InternalAddressConfig:         &hcm.HttpConnectionManager_InternalAddressConfig{},
		EarlyHeaderMutationExtensions: []*core.TypedExtensionConfig{sanitise(h.set)},
	}
	if h.strictPaths {
		m.MergeSlashes = true
		m.PathWithEscapedSlashesAction = hcm.HttpConnectionManager_REJECT_REQUEST
	}
	if h.maxAge > 0 {
		m.CommonHttpProtocolOptions.MaxConnectionDuration = seconds(h.maxAge)
		m.CommonHttpProtocolOptions.MaxConnectionDurationJitter = percent(maxAgeJitter)
	}
	if h.routes != nil {
		m.RouteSpecifier = &hcm.HttpConnectionManager_RouteConfig{RouteConfig: h.routes}
	} else {
		m.RouteSpecifier = scopedRoutes()
	}
	if h.outbound {
		m.LocalReplyConfig = withoutAgent()
	}
	if h.log {
		m.AccessLog = requestLog(h.outbound)
	}
	return network("envoy.filters.network.http_connection_manager", m)
}

// scopedRoutes picks the routes by the original destination, never by Host. The key stands in a header that manager
// writes over whatever the client sent; the routes remove it again.
func scopedRoutes() *hcm.HttpConnectionManager_ScopedRoutes {
	return &hcm.HttpConnectionManager_ScopedRoutes{ScopedRoutes: &hcm.ScopedRoutes{
		Name: names.ScopedRoutes,
		ScopeKeyBuilder: &hcm.ScopedRoutes_ScopeKeyBuilder{Fragments: []*hcm.ScopedRoutes_ScopeKeyBuilder_FragmentBuilder{{
			Type: &hcm.ScopedRoutes_ScopeKeyBuilder_FragmentBuilder_HeaderValueExtractor_{
				HeaderValueExtractor: &hcm.ScopedRoutes_ScopeKeyBuilder_FragmentBuilder_HeaderValueExtractor{
					Name: names.HeaderDestination,
					// Index 0 must be said.
					ExtractType: &hcm.ScopedRoutes_ScopeKeyBuilder_FragmentBuilder_HeaderValueExtractor_Index{Index: 0},
				},
			},
		}}},
		RdsConfigSource: ads(),
		ConfigSpecifier: &hcm.ScopedRoutes_ScopedRds{ScopedRds: &hcm.ScopedRds{ScopedRdsConfigSource: ads()}},
	}}
}

func sanitise(set [][2]string) *core.TypedExtensionConfig {
	var mutations []*mutation.HeaderMutation
	for _, prefix := range []string{"x-envoy-", "x-weft-"} {
		mutations = append(mutations, &mutation.HeaderMutation{Action: &mutation.HeaderMutation_RemoveOnMatch_{
			RemoveOnMatch: &mutation.HeaderMutation_RemoveOnMatch{KeyMatcher: &matcher.StringMatcher{
				MatchPattern: &matcher.StringMatcher_Prefix{Prefix: prefix}, IgnoreCase: true}},
		}})
	}
	mutations = append(mutations, &mutation.HeaderMutation{Action: &mutation.HeaderMutation_Remove{Remove: "x-forwarded-client-cert"}})
	// Where a client has not said it Envoy would say what the connection is, https between Envoys: an app that builds links of it
	// would answer by the way that a request took.
	mutations = append(mutations, &mutation.HeaderMutation{Action: &mutation.HeaderMutation_Append{Append: &core.HeaderValueOption{
		Header: &core.HeaderValue{Key: "x-forwarded-proto", Value: "http"}, AppendAction: core.HeaderValueOption_ADD_IF_ABSENT,
	}}})
	for _, header := range set {
		mutations = append(mutations, &mutation.HeaderMutation{Action: &mutation.HeaderMutation_Append{
			Append: &core.HeaderValueOption{
				Header:       &core.HeaderValue{Key: header[0], Value: header[1]},
				AppendAction: core.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
			},
		}})
	}
	return extension("envoy.http.early_header_mutation.header_mutation", &early.HeaderMutation{Mutations: mutations})
}

// keepCase sends HTTP/1 header names as they came.
func keepCase() *core.Http1ProtocolOptions_HeaderKeyFormat {
	return &core.Http1ProtocolOptions_HeaderKeyFormat{HeaderFormat: &core.Http1ProtocolOptions_HeaderKeyFormat_StatefulFormatter{
		StatefulFormatter: extension("envoy.http.stateful_header_formatters.preserve_case",
			&preserve.PreserveCaseFormatterConfig{ForwardReasonPhrase: true}),
	}}
}

func routerFilter() *hcm.HttpFilter {
	return &hcm.HttpFilter{Name: "envoy.filters.http.router", ConfigType: &hcm.HttpFilter_TypedConfig{
		TypedConfig: pack(&router.Router{SuppressEnvoyHeaders: true})}}
}

func onDemandFilter() *hcm.HttpFilter {
	return &hcm.HttpFilter{Name: "envoy.filters.http.on_demand", ConfigType: &hcm.HttpFilter_TypedConfig{
		TypedConfig: pack(&ondemand.OnDemand{Odcds: &ondemand.OnDemandCds{Source: ads(), Timeout: seconds(onDemandTimeout)}})}}
}

// toApp sends every request to the app in the protocol that it came in.
func toApp() *route.RouteConfiguration {
	return &route.RouteConfiguration{
		Name: "app",
		VirtualHosts: []*route.VirtualHost{{
			Name: "app", Domains: []string{"*"},
			Routes: []*route.Route{{
				Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
				Action: &route.Route_Route{Route: &route.RouteAction{
					ClusterSpecifier: &route.RouteAction_Cluster{Cluster: names.ClusterLocalH1},
					Timeout:          seconds(0),
					IdleTimeout:      seconds(0),
				}},
			}},
		}},
	}
}
