package lds

import (
	"strings"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	matcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	inputs "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weftmesh/weft/api/names"
)

// refuse is the chain of connections that are to be closed. No listener has a chain of that name: Envoy then closes
// the connection and counts it (listener.<prefix>.no_filter_chain_match). Every map below says it in so many words,
// because a nested matcher that finds nothing falls back to its parent's "no match", which may be a more open chain.
const refuse = "refuse"

// Listener filters describe an offered ALPN list and a detected protocol as one string each.
var (
	offersHTTP1 = offer(names.ALPNOfferH1)
	offersHTTP2 = offer(names.ALPNOfferH2)
	offersTCP   = offer(names.ALPNOfferTCP)
	plainHTTP   = []string{"'http/1.0'", "'http/1.1'", "'h2c'"}
)

func offer(protocols []string) string { return "'" + strings.Join(protocols, "','") + "'" }

type onMatch = matcher.Matcher_OnMatch

func chain(name string) *onMatch {
	return &onMatch{OnMatch: &matcher.Matcher_OnMatch_Action{Action: &xdscore.TypedExtensionConfig{
		Name: name, TypedConfig: pack(wrapperspb.String(name))}}}
}

func next(m *matcher.Matcher) *onMatch {
	return &onMatch{OnMatch: &matcher.Matcher_OnMatch_Matcher{Matcher: m}}
}

func input(name string, m proto.Message) *xdscore.TypedExtensionConfig {
	return &xdscore.TypedExtensionConfig{Name: name, TypedConfig: pack(m)}
}

// lookup goes by the exact value of an input; anything else goes on with otherwise.
func lookup(in *xdscore.TypedExtensionConfig, values map[string]*onMatch, otherwise *onMatch) *matcher.Matcher {
	return &matcher.Matcher{
		MatcherType: &matcher.Matcher_MatcherTree_{MatcherTree: &matcher.Matcher_MatcherTree{
			Input:    in,
			TreeType: &matcher.Matcher_MatcherTree_ExactMatchMap{ExactMatchMap: &matcher.Matcher_MatcherTree_MatchMap{Map: values}},
		}},
		OnNoMatch: otherwise,
	}
}

func byALPN(values map[string]*onMatch, otherwise *onMatch) *matcher.Matcher {
	return lookup(input("alpn", &inputs.ApplicationProtocolInput{}), values, otherwise)
}

func byTransport(values map[string]*onMatch, otherwise *onMatch) *matcher.Matcher {
	return lookup(input("transport", &inputs.TransportProtocolInput{}), values, otherwise)
}

func byPort(values map[string]*onMatch, otherwise *onMatch) *matcher.Matcher {
	return lookup(input("port", &inputs.DestinationPortInput{}), values, otherwise)
}

func byState(key string, values map[string]*onMatch, otherwise *onMatch) *matcher.Matcher {
	return lookup(input("state", &inputs.FilterStateInput{Key: key}), values, otherwise)
}

// knownDestination refuses connections whose original destination is unknown: Envoy then still sees the steering
// address.
func knownDestination(otherwise *matcher.Matcher) *matcher.Matcher {
	steering := &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: &matcher.RegexMatcher{
		EngineType: &matcher.RegexMatcher_GoogleRe2{GoogleRe2: &matcher.RegexMatcher_GoogleRE2{}},
		Regex:      `127\..*|::1|fd77:5eed:.*|::ffff:127\..*`,
	}}}
	return &matcher.Matcher{
		MatcherType: &matcher.Matcher_MatcherList_{MatcherList: &matcher.Matcher_MatcherList{Matchers: []*matcher.Matcher_MatcherList_FieldMatcher{{
			Predicate: &matcher.Matcher_MatcherList_Predicate{MatchType: &matcher.Matcher_MatcherList_Predicate_SinglePredicate_{
				SinglePredicate: &matcher.Matcher_MatcherList_Predicate_SinglePredicate{
					Input:   input("destination", &inputs.DestinationIPInput{}),
					Matcher: &matcher.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{ValueMatch: steering},
				},
			}},
			OnMatch: chain(refuse),
		}}}},
		OnNoMatch: next(otherwise),
	}
}
