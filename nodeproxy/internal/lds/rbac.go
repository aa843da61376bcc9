package lds

import (
	"fmt"

	rbac "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	filter "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// judge makes a port's rules HTTP filters: a request that a Deny rule matches gets 403, and on a restricted port so
// does one that no Allow rule matches. The name of the rule is in the access log's response code details.
func (q port) judge() []*hcm.HttpFilter {
	var filters []*hcm.HttpFilter
	add := func(name string, action rbac.RBAC_Action, rules []*meshv1.Rule) {
		policies := make(map[string]*rbac.Policy, len(rules))
		for i, rule := range rules {
			key := rule.GetName()
			if _, taken := policies[key]; taken || key == "" {
				key = fmt.Sprintf("%s#%d", key, i)
			}
			policies[key] = &rbac.Policy{Permissions: permissions(rule), Principals: principals(rule)}
		}
		filters = append(filters, &hcm.HttpFilter{Name: name, ConfigType: &hcm.HttpFilter_TypedConfig{
			TypedConfig: pack(&filter.RBAC{Rules: &rbac.RBAC{Action: action, Policies: policies}})}})
	}
	if len(q.deny) > 0 {
		add("weft.deny", rbac.RBAC_DENY, q.deny)
	}
	if q.restricted {
		add("weft.allow", rbac.RBAC_ALLOW, q.allow)
	}
	return filters
}

// comparesPaths reports whether any rule looks at paths.
func (q port) comparesPaths() bool {
	for _, rules := range [][]*meshv1.Rule{q.deny, q.allow} {
		for _, rule := range rules {
			for _, request := range rule.GetRequests() {
				if len(request.GetPaths()) > 0 {
					return true
				}
			}
		}
	}
	return false
}

func principals(rule *meshv1.Rule) []*rbac.Principal {
	if len(rule.GetPeers()) == 0 {
		return []*rbac.Principal{{Identifier: &rbac.Principal_Any{Any: true}}}
	}
	var out []*rbac.Principal
	for _, peer := range rule.GetPeers() {
		name := exactly(peer.GetSpiffeId())
		if prefix := peer.GetSpiffePrefix(); prefix != "" {
			name = &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: prefix}}
		}
		out = append(out, &rbac.Principal{Identifier: &rbac.Principal_Authenticated_{
			Authenticated: &rbac.Principal_Authenticated{PrincipalName: name}}})
	}
	return out
}

func permissions(rule *meshv1.Rule) []*rbac.Permission {
	if len(rule.GetRequests()) == 0 {
		return []*rbac.Permission{anything()}
	}
	var out []*rbac.Permission
	for _, request := range rule.GetRequests() {
		var all []*rbac.Permission
		if methods := request.GetMethods(); len(methods) > 0 {
			var any []*rbac.Permission
			for _, method := range methods {
				any = append(any, header(&route.HeaderMatcher{Name: ":method",
					HeaderMatchSpecifier: &route.HeaderMatcher_StringMatch{StringMatch: exactly(method)}}))
			}
			all = append(all, either(any))
		}
		if paths := request.GetPaths(); len(paths) > 0 {
			var any []*rbac.Permission
			for _, path := range paths {
				any = append(any, &rbac.Permission{Rule: &rbac.Permission_UrlPath{UrlPath: &matcher.PathMatcher{
					Rule: &matcher.PathMatcher_Path{Path: stringMatcher(path)}}}})
			}
			all = append(all, either(any))
		}
		for _, want := range request.GetHeaders() {
			match := &route.HeaderMatcher{Name: want.GetName()}
			if want.GetValue() != nil {
				match.HeaderMatchSpecifier = &route.HeaderMatcher_StringMatch{StringMatch: stringMatcher(want.GetValue())}
			} else {
				match.HeaderMatchSpecifier = &route.HeaderMatcher_PresentMatch{PresentMatch: want.GetPresent()}
			}
			all = append(all, header(match))
		}
		if len(all) == 0 {
			all = append(all, anything())
		}
		out = append(out, &rbac.Permission{Rule: &rbac.Permission_AndRules{AndRules: &rbac.Permission_Set{Rules: all}}})
	}
	return out
}

func stringMatcher(m *meshv1.StringMatch) *matcher.StringMatcher {
	switch m.GetMatch().(type) {
	case *meshv1.StringMatch_Prefix:
		return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: m.GetPrefix()}}
	case *meshv1.StringMatch_Regex:
		return &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: &matcher.RegexMatcher{Regex: m.GetRegex()}}}
	default:
		return exactly(m.GetExact())
	}
}

func anything() *rbac.Permission { return &rbac.Permission{Rule: &rbac.Permission_Any{Any: true}} }

func header(m *route.HeaderMatcher) *rbac.Permission {
	return &rbac.Permission{Rule: &rbac.Permission_Header{Header: m}}
}

func either(any []*rbac.Permission) *rbac.Permission {
	return &rbac.Permission{Rule: &rbac.Permission_OrRules{OrRules: &rbac.Permission_Set{Rules: any}}}
}
