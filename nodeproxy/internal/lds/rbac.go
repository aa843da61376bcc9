package lds

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	rbac "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	metadata "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_to_metadata/v3"
	filter "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// judge makes a port's rules HTTP filters: a request that a Deny rule matches gets 403, and on a restricted port so
// does one that no Allow rule matches. The name of the rule is in the access log's response code details.
func (q port) judge() []*hcm.HttpFilter {
	filters := q.joinHeaders()
	add := func(name string, action rbac.RBAC_Action, rules []*meshv1.Rule) {
		policies := make(map[string]*rbac.Policy, len(rules))
		for i, rule := range rules {
			key := rule.GetName()
			if _, taken := policies[key]; taken || key == "" {
				key = fmt.Sprintf("%s#%d", key, i)
			}
			policies[key] = &rbac.Policy{Permissions: permissions(rule, action), Principals: principals(rule)}
		}
		filters = append(filters, &hcm.HttpFilter{Name: name, ConfigType: &hcm.HttpFilter_TypedConfig{
			TypedConfig: pack(&filter.RBAC{Rules: &rbac.RBAC{Action: action, Policies: policies}})}})
	}
	deny := q.deny
	if q.comparesPaths() {
		deny = append(slices.Clone(deny), ambiguousPath)
	}
	if len(deny) > 0 {
		add("weft.deny", rbac.RBAC_DENY, deny)
	}
	if q.restricted {
		add("weft.allow", rbac.RBAC_ALLOW, q.allow)
	}
	return filters
}

// ambiguousPath denies a path with a segment "." or ".." that has a parameter, where rules look at paths. Envoy takes "/..;/" for
// "/../" and looks before it decodes: what is left of "/%2e%2e;/" is judged here as it stands, and by an app, or on a way with
// one Envoy more, as the folder above.
var ambiguousPath = &meshv1.Rule{Name: "weft.ambiguous-path", Requests: []*meshv1.Request{{
	Paths: []*meshv1.StringMatch{{Match: &meshv1.StringMatch_Regex{Regex: `(?i).*/(\.|%2e){1,2};.*`}}}}}}

// comparesPaths reports whether any rule looks at paths.
func (q port) comparesPaths() bool {
	for request := range q.requests() {
		if len(request.GetPaths()) > 0 {
			return true
		}
	}
	return false
}

// requests are those that any rule describes.
func (q port) requests() iter.Seq[*meshv1.Request] {
	return func(yield func(*meshv1.Request) bool) {
		for _, rule := range slices.Concat(q.deny, q.allow) {
			for _, request := range rule.GetRequests() {
				if !yield(request) {
					return
				}
			}
		}
	}
}

// joined is the namespace of the metadata that holds headers as joinHeaders leaves them.
const joined = "weft.headers"

// joinHeaders keeps the headers whose values rules compare as RFC 9110 (5.3) reads them: lines of one name are one list. Envoy's
// matcher of headers looks at each line alone.
func (q port) joinHeaders() []*hcm.HttpFilter {
	known := map[string]bool{}
	for request := range q.requests() {
		for _, h := range request.GetHeaders() {
			if h.GetValue() != nil {
				known[strings.ToLower(h.GetName())] = true
			}
		}
	}
	var rules []*metadata.Config_Rule
	for _, name := range slices.Sorted(maps.Keys(known)) {
		rules = append(rules, &metadata.Config_Rule{Header: name, OnHeaderPresent: &metadata.Config_KeyValuePair{MetadataNamespace: joined, Key: name}})
	}
	if len(rules) == 0 {
		return nil
	}
	return []*hcm.HttpFilter{{Name: "weft.headers", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: pack(&metadata.Config{RequestRules: rules})}}}
}

// hasValue matches a header's value. An Allow takes the lines of one name together, for an app may read any of them; a Deny
// matches a line alone as well.
func hasValue(name string, value *matcher.StringMatcher, action rbac.RBAC_Action) *rbac.Permission {
	whole := &rbac.Permission{Rule: &rbac.Permission_SourcedMetadata{SourcedMetadata: &rbac.SourcedMetadata{MetadataMatcher: &matcher.MetadataMatcher{
		Filter: joined,
		Path:   []*matcher.MetadataMatcher_PathSegment{{Segment: &matcher.MetadataMatcher_PathSegment_Key{Key: strings.ToLower(name)}}},
		Value:  &matcher.ValueMatcher{MatchPattern: &matcher.ValueMatcher_StringMatch{StringMatch: value}},
	}}}}
	if action == rbac.RBAC_ALLOW {
		return whole
	}
	return either([]*rbac.Permission{whole, header(&route.HeaderMatcher{Name: name, HeaderMatchSpecifier: &route.HeaderMatcher_StringMatch{StringMatch: value}})})
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

func permissions(rule *meshv1.Rule, action rbac.RBAC_Action) []*rbac.Permission {
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
			if want.GetValue() != nil {
				all = append(all, hasValue(want.GetName(), stringMatcher(want.GetValue()), action))
				continue
			}
			all = append(all, header(&route.HeaderMatcher{Name: want.GetName(), HeaderMatchSpecifier: &route.HeaderMatcher_PresentMatch{PresentMatch: want.GetPresent()}}))
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
