package xds_test

import (
	"strings"
	"testing"

	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// oddRoute is a route of the oddest values that resolve accepts. The contract tier shows that Envoy takes them.
func oddRoute(t *testing.T) []proto.Message {
	t.Helper()
	result := resolve.Resolve(nil, resolve.Input{
		Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}},
		Services: []*corev1.Service{{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "odd"}, Spec: corev1.ServiceSpec{
			ClusterIPs: []string{"10.96.0.9"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}}},
		HTTPRoutes: []*gwv1.HTTPRoute{edges()},
	})
	if len(result.Problems) > 0 {
		t.Fatalf("not accepted: %v", result.Problems)
	}
	return build[*route.RouteConfiguration](t, result.Snapshot, xds.TypeRoute, names.Route("shop", "odd", 80))
}

func edges() *gwv1.HTTPRoute {
	exact, prefix, regex := gwv1.PathMatchExact, gwv1.PathMatchPathPrefix, gwv1.PathMatchRegularExpression
	pattern := gwv1.HeaderMatchRegularExpression
	path := func(kind gwv1.PathMatchType, value string) gwv1.HTTPRouteMatch {
		return gwv1.HTTPRouteMatch{Path: &gwv1.HTTPPathMatch{Type: &kind, Value: &value}}
	}
	header := func(value string) gwv1.HTTPRouteMatch {
		return gwv1.HTTPRouteMatch{Headers: []gwv1.HTTPHeaderMatch{{Name: "a", Type: &pattern, Value: value}}}
	}
	every := "!\"$%&'()*+,-./0123456789:;<=>@ABC[\\]^_`abc{|}~"
	headers := gwv1.HTTPHeaderFilter{
		Set:    []gwv1.HTTPHeader{{Name: "!#$%&'*+-.^_`|~09azAZ", Value: strings.Repeat("%", 4096)}, {Name: "x-tab", Value: "\té\u0085 "}, {Name: "cookie", Value: every}},
		Remove: []string{"!#$%&'*+-.^_`|~09azAZ", "server"},
	}
	rule := func(matches []gwv1.HTTPRouteMatch, filters ...gwv1.HTTPRouteFilter) gwv1.HTTPRouteRule {
		return gwv1.HTTPRouteRule{Matches: matches, Filters: filters}
	}
	full := func(path string) *gwv1.HTTPPathModifier { return &gwv1.HTTPPathModifier{ReplaceFullPath: &path} }
	onto := func(path string) *gwv1.HTTPPathModifier { return &gwv1.HTTPPathModifier{ReplacePrefixMatch: &path} }
	visible := strings.ReplaceAll("/"+every, "?", "")
	rules := []gwv1.HTTPRouteRule{rule([]gwv1.HTTPRouteMatch{
		path(exact, visible), path(prefix, visible), path(prefix, "//"), path(prefix, "/a//"), path(exact, "/"),
		path(regex, `.{0,740}`), path(regex, `[^/]{780}`), path(regex, `(?i)[^a-\x{7f}\177]+\Q\p{Letter}\E`), path(regex, strings.Repeat(`a?`, 128)),
		path(regex, `(?i:[k-s]{500})\b(?P<x>a)(?<y>b)\z`), path(regex, strings.Repeat("(", 120)+"a"+strings.Repeat(")", 120)), header(`|`), header(`[[:^word:]]*?\D\\pX`),
	}), rule(nil, gwv1.HTTPRouteFilter{RequestHeaderModifier: &headers}, gwv1.HTTPRouteFilter{ResponseHeaderModifier: &headers})}
	longest := gwv1.Duration("99999h99999h99999h99999h")
	rules[0].Timeouts = &gwv1.HTTPRouteTimeouts{Request: &longest, BackendRequest: &longest}
	weight, port := int32(1_000_000), gwv1.PortNumber(80)
	for range 16 {
		rules[1].BackendRefs = append(rules[1].BackendRefs, gwv1.HTTPBackendRef{BackendRef: gwv1.BackendRef{
			Weight: &weight, BackendObjectReference: gwv1.BackendObjectReference{Name: "odd", Port: &port}}})
	}
	rules[1].BackendRefs[0].Filters = rules[1].Filters
	below := []gwv1.HTTPRouteMatch{path(prefix, "/a.b"), path(prefix, "/"), path(regex, "/.*")}
	for _, to := range []*gwv1.HTTPPathModifier{full("/%41\\1$&"), onto("/\\0%"), onto(""), onto("/"), full("/")} {
		rules = append(rules, rule(below, gwv1.HTTPRouteFilter{RequestRedirect: &gwv1.HTTPRequestRedirectFilter{Path: to}}),
			rule(below, gwv1.HTTPRouteFilter{URLRewrite: &gwv1.HTTPURLRewriteFilter{Path: to}}))
	}
	out := &gwv1.HTTPRoute{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "odd"}, Spec: gwv1.HTTPRouteSpec{Rules: rules}}
	kind, group := gwv1.Kind("Service"), gwv1.Group("")
	out.Spec.ParentRefs = []gwv1.ParentReference{{Kind: &kind, Group: &group, Name: "odd"}}
	return out
}
