package resolve

import (
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/intstr"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"
)

func portNamed(name string) intstr.IntOrString { return intstr.FromString(name) }

func grant(name, kind, namespace string, service ...string) *gwv1.ReferenceGrant {
	g := &gwv1.ReferenceGrant{ObjectMeta: meta(name)}
	g.Spec.From = []gwv1.ReferenceGrantFrom{{Group: gwv1.GroupName, Kind: gwv1.Kind(kind), Namespace: gwv1.Namespace(namespace)}}
	g.Spec.To = []gwv1.ReferenceGrantTo{{Kind: "Service"}}
	if len(service) > 0 {
		g.Spec.To[0].Name = ptr(gwv1.ObjectName(service[0]))
	}
	return g
}

func aged(r *gwv1.HTTPRoute, minute int) *gwv1.HTTPRoute { born(r, minute); return r }

func TestHTTPRoutes(t *testing.T) {
	web, v2 := service("web", "10.96.0.1", "http:80>8080 admin:81 redis:6379"), service("v2", "10.96.0.2", "http:80")
	prefix, exact, regex := gwv1.PathMatchPathPrefix, gwv1.PathMatchExact, gwv1.PathMatchRegularExpression
	at := func(m ...gwv1.HTTPRouteMatch) []gwv1.HTTPRouteMatch { return m }
	only := func(r *gwv1.HTTPRoute, n int32) *gwv1.HTTPRoute {
		r.Spec.ParentRefs[0].Port = ptr(gwv1.PortNumber(n))
		return r
	}
	header := gwv1.HTTPHeaderFilter{Set: []gwv1.HTTPHeader{{Name: "X-A", Value: "1"}}, Add: []gwv1.HTTPHeader{{Name: "X-B", Value: "2"}}, Remove: []string{"X-C"}}
	route := func(r ...gwv1.HTTPRouteRule) *gwv1.HTTPRoute { return only(httpRoute("r", "web", r...), 80) }
	rich := at(gwv1.HTTPRouteMatch{
		Method:      ptr(gwv1.HTTPMethodGet),
		Headers:     []gwv1.HTTPHeaderMatch{{Name: "X-User", Value: "ann"}, {Name: "X-Re", Type: ptr(gwv1.HeaderMatchRegularExpression), Value: "a.*"}},
		QueryParams: []gwv1.HTTPQueryParamMatch{{Name: "Page", Value: "1"}},
	})
	backendFilter := rule(nil, "v2:80")
	backendFilter.BackendRefs[0].Filters = []gwv1.HTTPRouteFilter{{Type: gwv1.HTTPRouteFilterRequestHeaderModifier, RequestHeaderModifier: &header}}
	backendRedirect := rule(nil, "v2:80")
	backendRedirect.BackendRefs[0].Filters = []gwv1.HTTPRouteFilter{{Type: gwv1.HTTPRouteFilterRequestRedirect, RequestRedirect: &gwv1.HTTPRequestRedirectFilter{}}}
	timeouts := rule(nil, "v2:80")
	timeouts.Timeouts = &gwv1.HTTPRouteTimeouts{Request: &second, BackendRequest: ptr(gwv1.Duration("500ms"))}
	retried, sticky := rule(nil, "v2:80"), rule(nil, "v2:80")
	retried.Retry, sticky.SessionPersistence = &gwv1.HTTPRouteRetry{}, &gwv1.SessionPersistence{}
	twice := at(gwv1.HTTPRouteMatch{Headers: []gwv1.HTTPHeaderMatch{{Name: "X-A", Value: "1"}, {Name: "x-a", Value: "2"}}})
	kind := rule(nil, "v2:80")
	kind.BackendRefs[0].Kind, kind.BackendRefs[0].Group = ptr(gwv1.Kind("Bucket")), ptr(gwv1.Group("example.com"))
	golden(t, "httproutes", []goldenCase{
		{name: "weights", objects: objects{web, v2, route(rule(nil, "web:80*90 v2:80*10"))}},
		{name: "no backendRef means the parent itself", objects: objects{web, route(rule(nil, ""))}},
		{name: "a route on every HTTP port, none on redis", objects: objects{web, v2, httpRoute("r", "web", rule(nil, "v2:80"))}},
		{name: "matches: method, headers, query parameters with their case", objects: objects{web, route(rule(rich, "web:80"))}},
		{name: "order of matches: exact, regex, longer prefix, method, headers, query", objects: objects{web, route(
			rule(at(path(prefix, "/")), "web:80"), rule(rich, "web:80"), rule(at(path(prefix, "/a")), "web:80"), rule(at(path(prefix, "/a/long")), "web:80"),
			rule(at(path(exact, "/a")), "web:80"), rule(at(path(regex, "/a.*")), "web:80"))}},
		{name: "two conflicting routes: the older first", objects: objects{web, v2,
			only(aged(httpRoute("a", "web", rule(at(path(exact, "/a")), "v2:80")), 5), 80), only(aged(httpRoute("b", "web", rule(at(path(exact, "/a")), "web:80")), 1), 80)}},
		{name: "two conflicting routes of one age: the name decides", objects: objects{web, v2,
			only(httpRoute("b", "web", rule(at(path(exact, "/a")), "v2:80")), 80), only(httpRoute("a", "web", rule(at(path(exact, "/a")), "web:80")), 80)}},
		{name: "header filters, rewrite", objects: objects{web, route(rule(nil, "web:80",
			gwv1.HTTPRouteFilter{RequestHeaderModifier: &header}, gwv1.HTTPRouteFilter{ResponseHeaderModifier: &header},
			gwv1.HTTPRouteFilter{URLRewrite: &gwv1.HTTPURLRewriteFilter{Hostname: ptr(gwv1.PreciseHostname("new.example.com")), Path: &gwv1.HTTPPathModifier{ReplacePrefixMatch: ptr("/new")}}}))}},
		{name: "redirect", objects: objects{web, route(rule(nil, "", gwv1.HTTPRouteFilter{RequestRedirect: &gwv1.HTTPRequestRedirectFilter{
			Scheme: ptr("https"), Hostname: ptr(gwv1.PreciseHostname("example.com")), Port: ptr(gwv1.PortNumber(8443)), StatusCode: ptr(301), Path: &gwv1.HTTPPathModifier{ReplaceFullPath: ptr("/x")}}}))}},
		{name: "filters of one backend", objects: objects{web, v2, route(backendFilter)}},
		{name: "a redirect of one backend is refused", objects: objects{web, v2, route(backendRedirect)}},
		{name: "a filter that is not supported refuses the route", objects: objects{web, route(rule(nil, "web:80", gwv1.HTTPRouteFilter{Type: gwv1.HTTPRouteFilterRequestMirror}))}},
		{name: "retry and session persistence refuse the route", objects: objects{web, v2, route(retried), httpRoute("s", "web", sticky)}},
		{name: "of two names of a header that differ in case the first counts", objects: objects{web, route(rule(twice, "web:80"))}},
		{name: "timeouts", objects: objects{web, v2, route(timeouts)}},
		{name: "invalid regex", objects: objects{web, route(rule(at(path(regex, "/a(")), "web:80"), rule(at(path(exact, "/ok")), "web:80"))}},
		{name: "regex too long", objects: objects{web, route(rule(at(path(regex, longRegex())), "web:80"))}},
		{name: "edits that Envoy would refuse drop their own routes alone", objects: append(badEdits(), web, route(rule(at(path(exact, "/good")), "web:80")))},
		{name: "matches that Envoy would refuse drop their own routes alone", objects: append(badMatches(), web, route(rule(at(path(exact, "/good")), "web:80")))},
		{name: "a route of more than 64 KiB", objects: objects{web, route(rule(slices.Repeat(at(path(exact, "/"+strings.Repeat("a", 1000))), 64), "web:80"))}},
		{name: "unknown parent", objects: objects{httpRoute("r", "nowhere", rule(nil, "nowhere:80"))}},
		{name: "parent without such a port", objects: objects{web, only(httpRoute("r", "web", rule(nil, "web:80")), 99)}},
		{name: "parent port that is not HTTP", objects: objects{web, only(httpRoute("r", "web", rule(nil, "web:80")), 6379)}},
		{name: "missing backend beside a good one", objects: objects{web, route(rule(nil, "web:80*1 gone:80*3"))}},
		{name: "backend port 0, none, unknown", objects: objects{web, route(rule(nil, "web:0 web web:99"))}},
		{name: "backend that is no Service", objects: objects{web, route(kind)}},
		{name: "backend that is an ExternalName", objects: objects{web, service("ext", "", "http:80", external), route(rule(nil, "ext:80"))}},
		{name: "backend in another namespace without a grant", objects: objects{web, service("other/x", "10.96.0.3", "http:80"), route(rule(nil, "other/x:80"))}},
		{name: "backend in another namespace with a grant", objects: objects{web, service("other/x", "10.96.0.3", "http:80"), grant("other/g", "HTTPRoute", "shop"), route(rule(nil, "other/x:80"))}},
		{name: "a grant for another kind, namespace or name grants nothing", objects: objects{web, service("other/x", "10.96.0.3", "http:80"),
			grant("other/kind", "GRPCRoute", "shop"), grant("other/from", "HTTPRoute", "else"), grant("other/name", "HTTPRoute", "shop", "y"), grant("shop/where", "HTTPRoute", "shop"), route(rule(nil, "other/x:80"))}},
		{name: "consumer route before producer route", objects: objects{web, v2, service("other/mine", "10.96.0.3", "http:80"),
			route(rule(at(path(exact, "/a")), "v2:80")), only(httpRoute("other/c", "shop/web", rule(nil, "mine:80")), 80)}},
		{name: "a Gateway's route is none of weft's business", objects: objects{web, gatewayRoute()}},
		{name: "an undeclared port becomes HTTP by a route", objects: objects{service("raw", "10.96.0.5", "x:80"), httpRoute("r", "raw", rule(nil, "raw:80"))}},
		{name: "a consumer's route does not say what another's undeclared port speaks", objects: objects{service("raw", "10.96.0.5", "x:80"), httpRoute("other/r", "shop/raw", rule(nil, "shop/raw:80"))}},
		{name: "hostnames are ignored, as GAMMA asks", objects: objects{web, hosted(route(rule(nil, "web:80")))}},
	})
}

func hosted(r *gwv1.HTTPRoute) *gwv1.HTTPRoute {
	r.Spec.Hostnames = []gwv1.Hostname{"shop.example.com"}
	return r
}

func gatewayRoute() *gwv1.HTTPRoute {
	r := httpRoute("r", "web", rule(nil, "gone:80"))
	r.Spec.ParentRefs[0].Kind, r.Spec.ParentRefs[0].Group = nil, nil
	return r
}

// badEdits are consumer routes, each with one filter that Envoy would refuse a whole RouteConfiguration for, or that would
// let a route speak for the mesh.
func badEdits() []any {
	set := func(name, value string) gwv1.HTTPRouteFilter {
		return gwv1.HTTPRouteFilter{RequestHeaderModifier: &gwv1.HTTPHeaderFilter{Set: []gwv1.HTTPHeader{{Name: gwv1.HTTPHeaderName(name), Value: value}}}}
	}
	remove := func(name string) gwv1.HTTPRouteFilter {
		return gwv1.HTTPRouteFilter{ResponseHeaderModifier: &gwv1.HTTPHeaderFilter{Remove: []string{name}}}
	}
	rewrite := func(full, prefix *string, host string) gwv1.HTTPRouteFilter {
		f := &gwv1.HTTPURLRewriteFilter{Path: &gwv1.HTTPPathModifier{ReplaceFullPath: full, ReplacePrefixMatch: prefix}}
		if host != "" {
			f.Hostname, f.Path = ptr(gwv1.PreciseHostname(host)), nil
		}
		return gwv1.HTTPRouteFilter{URLRewrite: f}
	}
	redirect := func(change func(*gwv1.HTTPRequestRedirectFilter)) gwv1.HTTPRouteFilter {
		f := &gwv1.HTTPRequestRedirectFilter{}
		change(f)
		return gwv1.HTTPRouteFilter{RequestRedirect: f}
	}
	var out []any
	for name, f := range map[string]gwv1.HTTPRouteFilter{
		"host": set("Host", "x"), "authority": remove(":authority"), "no-name": remove(""), "no-token": set("x a", "x"), "name-newline": remove("x\n"),
		"newline": set("x-a", "1\r\nhost: x"), "nul": set("x-a", "\x00"), "delete": set("x-a", "\x7f"), "framing": set("Content-Length", "1"),
		"internal": set("X-Weft-Src-Ns", "shop"), "envoy": set("x-envoy-retry-on", "5xx"), "identity": set("X-Forwarded-Client-Cert", "URI=spiffe://x"),
		"path-newline": rewrite(ptr("/a\n"), nil, ""), "path-space": rewrite(nil, ptr("/a b"), ""), "path-relative": rewrite(ptr("a"), nil, ""),
		"path-query": rewrite(nil, ptr("/a?b"), ""), "hostname": rewrite(nil, nil, "a\nb"),
		"to-path":   redirect(func(f *gwv1.HTTPRequestRedirectFilter) { f.Path = &gwv1.HTTPPathModifier{ReplaceFullPath: ptr("/é")} }),
		"to-host":   redirect(func(f *gwv1.HTTPRequestRedirectFilter) { f.Hostname = ptr(gwv1.PreciseHostname("a/b")) }),
		"to-scheme": redirect(func(f *gwv1.HTTPRequestRedirectFilter) { f.Scheme = ptr("javascript") }),
		"to-status": redirect(func(f *gwv1.HTTPRequestRedirectFilter) { f.StatusCode = ptr(200) }),
	} {
		r := httpRoute("other/"+name, "shop/web", rule(nil, "", f))
		if name == "no-token" { // the same of one backend's
			r = httpRoute("other/"+name, "shop/web", rule(nil, "web:80"))
			r.Spec.Rules[0].BackendRefs[0].Filters = []gwv1.HTTPRouteFilter{f}
		}
		r.Spec.ParentRefs[0].Port = ptr(gwv1.PortNumber(80))
		out = append(out, r)
	}
	return out
}

func badMatches() []any {
	prefix, exact, regex := gwv1.PathMatchPathPrefix, gwv1.PathMatchExact, gwv1.PathMatchRegularExpression
	pattern := ptr(gwv1.HeaderMatchRegularExpression)
	var out []any
	for name, m := range map[string]gwv1.HTTPRouteMatch{
		"query": path(prefix, "/a?b"), "fragment": path(exact, "/a#b"), "relative": path(prefix, "a"), "newline": path(exact, "/a\n"),
		"class": path(regex, `/\p{Letter}`), "large": path(regex, `/.{1000}`),
		"header": {Headers: []gwv1.HTTPHeaderMatch{{Name: "a b", Value: "x"}}}, "header-regex": {Headers: []gwv1.HTTPHeaderMatch{{Name: "a", Type: pattern, Value: "("}}},
		"parameter": {QueryParams: []gwv1.HTTPQueryParamMatch{{Name: "", Value: "x"}}},
	} {
		r := httpRoute("other/"+name, "shop/web", rule([]gwv1.HTTPRouteMatch{m}, ""))
		r.Spec.ParentRefs[0].Port = ptr(gwv1.PortNumber(80))
		out = append(out, r)
	}
	return out
}

func TestGRPCRoutes(t *testing.T) {
	api := service("api", "10.96.0.1", "grpc:80")
	method := func(service, name string, kind gwv1.GRPCMethodMatchType) gwv1.GRPCRouteRule {
		m := &gwv1.GRPCMethodMatch{Type: &kind}
		if service != "" {
			m.Service = &service
		}
		if name != "" {
			m.Method = &name
		}
		return gwv1.GRPCRouteRule{Matches: []gwv1.GRPCRouteMatch{{Method: m}}, BackendRefs: []gwv1.GRPCBackendRef{{BackendRef: ref("api:80")}}}
	}
	headers := gwv1.GRPCRouteRule{Matches: []gwv1.GRPCRouteMatch{{Headers: []gwv1.GRPCHeaderMatch{{Name: "X-A", Value: "1"}}}}, BackendRefs: []gwv1.GRPCBackendRef{{BackendRef: ref("api:80*1")}, {BackendRef: ref("gone:80*1")}}}
	filtered := method("shop.Cart", "", gwv1.GRPCMethodMatchExact)
	filtered.BackendRefs[0].Filters = []gwv1.GRPCRouteFilter{{RequestHeaderModifier: &gwv1.HTTPHeaderFilter{Remove: []string{"x-a"}}}}
	host, authority := method("shop.Cart", "", gwv1.GRPCMethodMatchExact), method("shop.Cart", "", gwv1.GRPCMethodMatchExact)
	host.BackendRefs[0].Filters = []gwv1.GRPCRouteFilter{{RequestHeaderModifier: &gwv1.HTTPHeaderFilter{Set: []gwv1.HTTPHeader{{Name: "Host", Value: "x"}}}}}
	authority.Filters = []gwv1.GRPCRouteFilter{{RequestHeaderModifier: &gwv1.HTTPHeaderFilter{Remove: []string{":authority"}}}}
	mirror := method("shop.Cart", "", gwv1.GRPCMethodMatchExact)
	mirror.BackendRefs[0].Filters = []gwv1.GRPCRouteFilter{{Type: gwv1.GRPCRouteFilterRequestMirror}}
	golden(t, "grpcroutes", []goldenCase{
		{name: "service and method, service, method, regular expression", objects: objects{api, grpcRoute("r", "api",
			method("shop.Cart", "Add", gwv1.GRPCMethodMatchExact), method("shop.Cart", "", gwv1.GRPCMethodMatchExact), method("", "Add", gwv1.GRPCMethodMatchExact),
			method("shop\\..*", "", gwv1.GRPCMethodMatchRegularExpression), method("", "", gwv1.GRPCMethodMatchExact))}},
		{name: "headers and a missing backend", objects: objects{api, grpcRoute("r", "api", headers)}},
		{name: "filters of one backend", objects: objects{api, grpcRoute("r", "api", filtered)}},
		{name: "a filter that is not supported refuses the route", objects: objects{api, grpcRoute("r", "api", mirror)}},
		{name: "invalid regex", objects: objects{api, grpcRoute("r", "api", method("(", "", gwv1.GRPCMethodMatchRegularExpression))}},
		{name: "service and method are expressions of their own", objects: objects{api, grpcRoute("r", "api", method("a|b", "C|D", gwv1.GRPCMethodMatchRegularExpression)),
			grpcRoute("split", "api", method("a(", ")", gwv1.GRPCMethodMatchRegularExpression))}},
		{name: "edits and matches that Envoy would refuse drop their own routes alone", objects: objects{api, grpcRoute("other/edit", "shop/api", host),
			grpcRoute("other/filter", "shop/api", authority), grpcRoute("other/path", "shop/api", method("a b", "C", gwv1.GRPCMethodMatchExact)),
			grpcRoute("good", "api", method("a.B", "C", gwv1.GRPCMethodMatchExact))}},
		{name: "a port that is declared HTTP/1.1 takes no gRPC", objects: objects{service("web", "10.96.0.4", "http:80"), grpcRoute("r", "web", method("a.B", "C", gwv1.GRPCMethodMatchExact))}},
		{name: "an undeclared port with routes of both kinds speaks HTTP/2", objects: objects{service("raw", "10.96.0.5", "x:80"), httpRoute("h", "raw", rule(nil, "raw:80")),
			grpcRoute("g", "raw", gwv1.GRPCRouteRule{Matches: []gwv1.GRPCRouteMatch{{Method: &gwv1.GRPCMethodMatch{Service: ptr("a.B")}}}})}},
		{name: "a consumer's route does not say that another's undeclared port speaks HTTP/2", objects: objects{service("raw", "10.96.0.5", "x:80"), grpcRoute("other/r", "shop/raw", method("a.B", "C", gwv1.GRPCMethodMatchExact))}},
		{name: "a consumer's route where the producer's says HTTP/2", objects: objects{service("raw", "10.96.0.5", "x:80"), api, grpcRoute("other/r", "shop/raw", gwv1.GRPCRouteRule{}), grpcRoute("s", "raw", method("a.B", "C", gwv1.GRPCMethodMatchExact))}},
		{name: "an undeclared port becomes HTTP/2", objects: objects{service("raw", "10.96.0.5", "x:80"), grpcRoute("r", "raw", method("a.B", "C", gwv1.GRPCMethodMatchExact)), api}},
	})
}
