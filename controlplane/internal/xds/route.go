package xds

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// Route answers names.Route: how callers of one service port are routed. Without routes of its own the port sends
// everything to its endpoints; with some, what none of them matches is answered 404, as Gateway API demands. Consumer
// routes bind their namespace's callers first and leave the rest to the others.
func Route(s *ir.Snapshot, name string) *route.RouteConfiguration {
	out := &route.RouteConfiguration{
		Name:                            name,
		RequestHeadersToRemove:          []string{names.HeaderDestination, names.HeaderSourceNamespace},
		IgnorePortInHostMatching:        true,
		MostSpecificHeaderMutationsWins: true,
	}
	key, ok := parsePort("route", name)
	var port *ir.ServicePort
	if ok {
		port = findPort(s, key)
	}
	if port == nil {
		out.VirtualHosts = []*route.VirtualHost{{Name: "*", Domains: []string{"*"}, Routes: []*route.Route{answer(&route.RouteMatch{
			PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}}, 503, "no such service")}}}
		return out
	}
	host := &route.VirtualHost{Name: "*", Domains: []string{"*"}}
	for _, r := range port.Routes {
		host.Routes = append(host.Routes, routes(s, port.Key.Port, r)...)
	}
	if !slices.ContainsFunc(port.Routes, func(r *ir.Route) bool { return r.Match.SourceNamespace == "" }) {
		host.Routes = append(host.Routes, toPort(port))
	}
	out.VirtualHosts = []*route.VirtualHost{host}
	return out
}

func toPort(port *ir.ServicePort) *route.Route {
	key := port.Key
	action := forward()
	action.ClusterSpecifier = &route.RouteAction_Cluster{Cluster: names.ServiceCluster(key.Service.Namespace, key.Service.Name, key.Port)}
	action.HashPolicy = affinity(port)
	return &route.Route{
		Name:   "service " + key.Service.String(),
		Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
		Action: &route.Route_Route{Route: action},
	}
}

// forward has no timeout unless a route sets one, and lets streams be silent for ever.
func forward() *route.RouteAction {
	return &route.RouteAction{
		Timeout:     durationpb.New(0),
		IdleTimeout: durationpb.New(0),
		RetryPolicy: &route.RetryPolicy{
			// What has not reached the app may be sent once more.
			RetryOn:    "connect-failure,refused-stream,reset-before-request",
			NumRetries: wrapperspb.UInt32(1),
		},
	}
}

func affinity(port *ir.ServicePort) []*route.RouteAction_HashPolicy {
	if port.Affinity <= 0 {
		return nil
	}
	return []*route.RouteAction_HashPolicy{{PolicySpecifier: &route.RouteAction_HashPolicy_ConnectionProperties_{
		ConnectionProperties: &route.RouteAction_HashPolicy_ConnectionProperties{SourceIp: true}}}}
}

// routes makes one rule of a service port Envoy routes: usually one, two where a share of requests is to be answered without
// a backend.
func routes(s *ir.Snapshot, port uint16, r *ir.Route) []*route.Route {
	match := routeMatch(r.Match)
	base := &route.Route{Name: r.Source, Match: match}
	edit(base, r.RequestHeaders, r.ResponseHeaders)
	if r.Redirect != nil {
		base.Action = &route.Route_Redirect{Redirect: redirect(r, port)}
		return []*route.Route{base}
	}
	var valid []ir.Backend
	var total, invalid uint64
	status := uint32(500)
	if r.Match.GRPC {
		status = 503 // UNAVAILABLE to gRPC clients, GRPCRoute's backendRefs
	}
	for _, backend := range r.Backends {
		total += uint64(backend.Weight)
		switch {
		case backend.Weight == 0:
		case backend.Status != 0:
			invalid += uint64(backend.Weight)
			status = backend.Status
		default:
			valid = append(valid, backend)
		}
	}
	if len(valid) == 0 {
		return []*route.Route{answer(match, status, r.Source)}
	}
	action := forward()
	clusters(s, action, valid)
	rewrite(action, r)
	if r.Timeout != nil {
		action.Timeout = durationpb.New(*r.Timeout)
	}
	if r.BackendTimeout != nil && *r.BackendTimeout > 0 {
		action.RetryPolicy.PerTryTimeout = durationpb.New(*r.BackendTimeout)
	}
	base.Action = &route.Route_Route{Route: action}
	if invalid == 0 {
		return []*route.Route{base}
	}
	const million = 1_000_000
	share := routeMatch(r.Match)
	share.RuntimeFraction = &core.RuntimeFractionalPercent{DefaultValue: &envoytype.FractionalPercent{
		Numerator: uint32(invalid * million / total), Denominator: envoytype.FractionalPercent_MILLION}}
	return []*route.Route{answer(share, status, r.Source), base}
}

// clusters points an action at its backends, by weight.
func clusters(s *ir.Snapshot, action *route.RouteAction, backends []ir.Backend) {
	weighted := &route.WeightedCluster{}
	edits := false
	for _, backend := range backends {
		key := backend.Port
		if port := findPort(s, key); port != nil && action.HashPolicy == nil {
			action.HashPolicy = affinity(port)
		}
		one := &route.WeightedCluster_ClusterWeight{
			Name:   names.ServiceCluster(key.Service.Namespace, key.Service.Name, key.Port),
			Weight: wrapperspb.UInt32(backend.Weight),
		}
		one.RequestHeadersToAdd, one.RequestHeadersToRemove = headerEdit(backend.RequestHeaders)
		one.ResponseHeadersToAdd, one.ResponseHeadersToRemove = headerEdit(backend.ResponseHeaders)
		edits = edits || len(one.RequestHeadersToAdd)+len(one.RequestHeadersToRemove)+len(one.ResponseHeadersToAdd)+len(one.ResponseHeadersToRemove) > 0
		weighted.Clusters = append(weighted.Clusters, one)
	}
	if len(backends) == 1 && !edits {
		action.ClusterSpecifier = &route.RouteAction_Cluster{Cluster: weighted.Clusters[0].Name}
		return
	}
	action.ClusterSpecifier = &route.RouteAction_WeightedClusters{WeightedClusters: weighted}
}

func answer(match *route.RouteMatch, status uint32, source string) *route.Route {
	return &route.Route{Name: source, Match: match, Action: &route.Route_DirectResponse{DirectResponse: &route.DirectResponseAction{
		Status: status,
		Body:   &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: fmt.Sprintf("weft: %s\n", source)}},
	}}}
}

func routeMatch(m ir.RouteMatch) *route.RouteMatch {
	out := &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}}
	if m.Path != nil {
		switch trimmed := strings.TrimRight(m.Path.Value, "/"); m.Path.Kind {
		case ir.Exact:
			out.PathSpecifier = &route.RouteMatch_Path{Path: m.Path.Value}
		case ir.Regex:
			out.PathSpecifier = &route.RouteMatch_SafeRegex{SafeRegex: regex(m.Path.Value)}
		case ir.PathPrefix:
			if trimmed != "" {
				out.PathSpecifier = &route.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: trimmed}
			}
		case ir.Prefix:
			out.PathSpecifier = &route.RouteMatch_Prefix{Prefix: m.Path.Value}
		}
	}
	if m.SourceNamespace != "" {
		out.Headers = append(out.Headers, headerMatch(ir.NamedMatch{Name: names.HeaderSourceNamespace, StringMatch: ir.StringMatch{Kind: ir.Exact, Value: m.SourceNamespace}}))
	}
	if m.Method != "" {
		out.Headers = append(out.Headers, headerMatch(ir.NamedMatch{Name: ":method", StringMatch: ir.StringMatch{Kind: ir.Exact, Value: m.Method}}))
	}
	for _, header := range m.Headers {
		out.Headers = append(out.Headers, headerMatch(header))
	}
	for _, query := range m.Query {
		parameter := &route.QueryParameterMatcher{Name: query.Name}
		if query.Kind == ir.Present {
			parameter.QueryParameterMatchSpecifier = &route.QueryParameterMatcher_PresentMatch{PresentMatch: true}
		} else {
			parameter.QueryParameterMatchSpecifier = &route.QueryParameterMatcher_StringMatch{StringMatch: stringMatcher(query.StringMatch)}
		}
		out.QueryParameters = append(out.QueryParameters, parameter)
	}
	if m.GRPC {
		out.Grpc = &route.RouteMatch_GrpcRouteMatchOptions{}
	}
	return out
}

func headerMatch(m ir.NamedMatch) *route.HeaderMatcher {
	out := &route.HeaderMatcher{Name: m.Name}
	if m.Kind == ir.Present {
		out.HeaderMatchSpecifier = &route.HeaderMatcher_PresentMatch{PresentMatch: true}
	} else {
		out.HeaderMatchSpecifier = &route.HeaderMatcher_StringMatch{StringMatch: stringMatcher(m.StringMatch)}
	}
	return out
}

func stringMatcher(m ir.StringMatch) *matcher.StringMatcher {
	switch m.Kind {
	case ir.Prefix, ir.PathPrefix:
		return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: m.Value}}
	case ir.Regex:
		return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: regex(m.Value)}}
	default:
		return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: m.Value}}
	}
}

func regex(pattern string) *matcher.RegexMatcher { return &matcher.RegexMatcher{Regex: pattern} }

func edit(r *route.Route, request, response ir.HeaderEdit) {
	r.RequestHeadersToAdd, r.RequestHeadersToRemove = headerEdit(request)
	r.ResponseHeadersToAdd, r.ResponseHeadersToRemove = headerEdit(response)
}

func headerEdit(e ir.HeaderEdit) (add []*core.HeaderValueOption, remove []string) {
	for _, h := range e.Set {
		add = append(add, headerOption(h, core.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD))
	}
	for _, h := range e.Add {
		add = append(add, headerOption(h, core.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD))
	}
	return add, e.Remove
}

// headerOption keeps the value literal: Envoy would read "%…%" as a command.
func headerOption(h ir.Header, action core.HeaderValueOption_HeaderAppendAction) *core.HeaderValueOption {
	return &core.HeaderValueOption{
		Header:         &core.HeaderValue{Key: h.Name, Value: strings.ReplaceAll(h.Value, "%", "%%")},
		AppendAction:   action,
		KeepEmptyValue: true,
	}
}

func redirect(r *ir.Route, port uint16) *route.RedirectAction {
	to := r.Redirect
	out := &route.RedirectAction{HostRedirect: to.Hostname, PortRedirect: redirectPort(to, port)}
	if to.Scheme != "" {
		out.SchemeRewriteSpecifier = &route.RedirectAction_SchemeRedirect{SchemeRedirect: to.Scheme}
	}
	switch {
	case to.Path != nil:
		out.PathRewriteSpecifier = &route.RedirectAction_PathRedirect{PathRedirect: *to.Path}
	case to.PrefixPath != nil && atRoot(*to.PrefixPath):
		out.PathRewriteSpecifier = &route.RedirectAction_RegexRewrite{RegexRewrite: stripPrefix(r.Match.Path)}
	case to.PrefixPath != nil:
		out.PathRewriteSpecifier = &route.RedirectAction_PrefixRewrite{PrefixRewrite: replacement(r.Match.Path, *to.PrefixPath)}
	}
	switch to.Status {
	case 301:
		out.ResponseCode = route.RedirectAction_MOVED_PERMANENTLY
	case 303:
		out.ResponseCode = route.RedirectAction_SEE_OTHER
	case 307:
		out.ResponseCode = route.RedirectAction_TEMPORARY_REDIRECT
	case 308:
		out.ResponseCode = route.RedirectAction_PERMANENT_REDIRECT
	default:
		out.ResponseCode = route.RedirectAction_FOUND
	}
	return out
}

// redirectPort is the port that Envoy writes into the Location, as Gateway API defines it: the route's, else the one known
// for the scheme, else the Service's. 0: none; Envoy then keeps the port that stands in the request's Host.
func redirectPort(to *ir.Redirect, port uint16) uint32 {
	known := map[string]uint32{"": 80, "http": 80, "https": 443}[to.Scheme]
	want := to.Port
	switch {
	case want != 0:
	case to.Scheme != "":
		want = known
	case to.Hostname == "":
		return 0
	default:
		want = uint32(port)
	}
	if want == known && to.Hostname != "" {
		return 0 // need not be said
	}
	return want
}

func rewrite(action *route.RouteAction, r *ir.Route) {
	to := r.Rewrite
	if to == nil {
		return
	}
	if to.Hostname != "" {
		action.HostRewriteSpecifier = &route.RouteAction_HostRewriteLiteral{HostRewriteLiteral: to.Hostname}
	}
	switch {
	case to.Path != nil:
		action.RegexRewrite = &matcher.RegexMatchAndSubstitute{Pattern: regex("^.*$"), Substitution: strings.ReplaceAll(*to.Path, `\`, `\\`)}
	case to.PrefixPath != nil && atRoot(*to.PrefixPath):
		action.RegexRewrite = stripPrefix(r.Match.Path)
	case to.PrefixPath != nil:
		action.PrefixRewrite = replacement(r.Match.Path, *to.PrefixPath)
	}
}

func atRoot(prefix string) bool { return strings.Trim(prefix, "/") == "" }

// replacement keeps the slash that a matched "/" would take away.
func replacement(match *ir.StringMatch, prefix string) string {
	prefix = strings.TrimRight(prefix, "/")
	if match == nil || atRoot(match.Value) {
		return prefix + "/"
	}
	return prefix
}

// stripPrefix takes a path prefix away and leaves one leading slash.
func stripPrefix(match *ir.StringMatch) *matcher.RegexMatchAndSubstitute {
	prefix := ""
	if match != nil {
		prefix = strings.TrimRight(match.Value, "/")
	}
	return &matcher.RegexMatchAndSubstitute{Pattern: regex("^" + regexp.QuoteMeta(prefix) + "/*"), Substitution: "/"}
}
