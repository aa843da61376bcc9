package lds_test

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
)

func TestNarrowed(t *testing.T) {
	open, shut := &meshv1.PortPolicy{Mode: permissive}, &meshv1.PortPolicy{Mode: strict}
	listed := func(port uint32, change func(*meshv1.PortPolicy)) *meshv1.PortPolicy {
		p := &meshv1.PortPolicy{Port: port, Mode: strict}
		change(p)
		return p
	}
	frontOnly := listed(80, func(p *meshv1.PortPolicy) { p.Restricted, p.Allow = true, []*meshv1.Rule{allowFront} })
	noBatch := listed(80, func(p *meshv1.PortPolicy) { p.Deny = []*meshv1.Rule{denyBatch} })
	http := listed(80, func(p *meshv1.PortPolicy) { p.Http, p.Deny = true, []*meshv1.Rule{denyAdmin} })
	closed := listed(80, func(p *meshv1.PortPolicy) { p.Closed = true })
	plain := listed(80, func(*meshv1.PortPolicy) {})
	for name, c := range map[string]struct {
		before, after *meshv1.InboundPolicy
		want          []uint16
	}{
		"nothing changes":                        {policy(shut, frontOnly), policy(shut, frontOnly), nil},
		"a listed port takes fewer":              {policy(shut, plain), policy(shut, frontOnly), []uint16{80}},
		"a listed port denies some":              {policy(shut, plain), policy(shut, noBatch), []uint16{80}},
		"a listed port takes more":               {policy(shut, frontOnly), policy(shut, plain), nil},
		"a listed port becomes HTTP: chain goes": {policy(shut, plain), policy(shut, http), nil},
		"a listed port closes: chain goes":       {policy(shut, plain), policy(shut, closed), nil},
		"a port is listed with less":             {policy(shut), policy(shut, frontOnly), []uint16{0}},
		"a port is listed for HTTP":              {policy(shut), policy(shut, http), []uint16{0}},
		"a port is listed and closed":            {policy(shut), policy(shut, closed), []uint16{0}},
		"a port is listed with the same":         {policy(shut), policy(shut, plain), nil},
		"a port is listed no more":               {policy(shut, frontOnly), policy(shut), nil},
		"Permissive to Strict: plain chains go":  {policy(open), policy(shut), nil},
		"one port becomes Strict":                {policy(open), policy(open, plain), []uint16{0}},
	} {
		before, after := pod(func(p *lds.Pod) { p.Policy = c.before }), pod(func(p *lds.Pod) { p.Policy = c.after })
		if got := lds.Narrowed(before, after); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

// TestRevisionReplacesChains: every chain of a port gets another name, and so does its validation secret; nothing else changes.
func TestRevisionReplacesChains(t *testing.T) {
	before, err := lds.Listeners(pod(pods["permissive-http"]))
	if err != nil {
		t.Fatal(err)
	}
	raised := pod(pods["permissive-http"])
	raised.Revision = map[uint16]uint32{0: 1, 8080: 1, 8443: 1}
	after, err := lds.Listeners(raised)
	if err != nil {
		t.Fatal(err)
	}
	for i, chain := range before[1].FilterChains {
		other := after[1].FilterChains[i]
		if other.Name == chain.Name {
			t.Errorf("chain %s keeps its name", chain.Name)
		}
		other.Name = chain.Name
		if strings.HasSuffix(chain.Name, "weft-l4") {
			if proto.Equal(chain.TransportSocket, other.TransportSocket) {
				t.Errorf("chain %s keeps its validation secret", chain.Name)
			}
			other.TransportSocket = chain.TransportSocket
		}
		if !proto.Equal(chain, other) {
			t.Errorf("chain %s changed otherwise", chain.Name)
		}
	}
	for _, rule := range lds.RuleSecrets(raised) {
		if !strings.HasSuffix(rule.Name, "/1") {
			t.Errorf("secret %s has no revision", rule.Name)
		}
	}
}

// TestRevise: the chains of a new policy, by name, and the chains of the one before it that stand beside them.
func TestRevise(t *testing.T) {
	shut, open := &meshv1.PortPolicy{Mode: strict}, &meshv1.PortPolicy{Mode: permissive}
	front := &meshv1.PortPolicy{Port: 80, Mode: strict, Restricted: true, Allow: []*meshv1.Rule{allowFront}}
	noBatch := &meshv1.PortPolicy{Port: 80, Mode: strict, Deny: []*meshv1.Rule{denyBatch}}
	all := &meshv1.PortPolicy{Port: 80, Mode: strict}
	admin := &meshv1.PortPolicy{Port: 80, Mode: strict, Http: true, Deny: []*meshv1.Rule{denyAdmin}}
	reads := &meshv1.PortPolicy{Port: 80, Mode: strict, Http: true, Restricted: true, Allow: []*meshv1.Rule{allowReads}}
	for name, c := range map[string]struct {
		before []lds.Form
		after  *meshv1.InboundPolicy
		want   map[uint16]uint32
		chains string
	}{
		"the first policy":          {nil, policy(shut, front), nil, "any/weft-l4 80/weft-l4"},
		"nothing changes":           {[]lds.Form{{Policy: policy(shut, front)}}, policy(shut, front), nil, "any/weft-l4 80/weft-l4"},
		"more are let in":           {[]lds.Form{{Policy: policy(shut, front)}}, policy(shut, all), nil, "any/weft-l4 80/weft-l4"},
		"fewer are let in":          {[]lds.Form{{Policy: policy(shut, all)}}, policy(shut, front), map[uint16]uint32{80: 1}, "any/weft-l4 80/weft-l4/1 80/weft-l4"},
		"fewer for a second time":   {[]lds.Form{{Policy: policy(shut, noBatch), Revision: map[uint16]uint32{80: 3}}}, policy(shut, front), map[uint16]uint32{80: 4}, "any/weft-l4 80/weft-l4/4 80/weft-l4/3"},
		"bytes become HTTP":         {[]lds.Form{{Policy: policy(shut, all)}}, policy(shut, admin), nil, "any/weft-l4 80/weft-h1 80/weft-h2 80/weft-l4"},
		"HTTP rules change":         {[]lds.Form{{Policy: policy(shut, admin)}}, policy(shut, reads), map[uint16]uint32{80: 1}, "any/weft-l4 80/weft-h1/1 80/weft-h2/1 80/weft-h1 80/weft-h2"},
		"HTTP becomes bytes":        {[]lds.Form{{Policy: policy(shut, admin)}}, policy(shut, all), nil, "any/weft-l4 80/weft-l4 80/weft-h1 80/weft-h2"},
		"Permissive becomes Strict": {[]lds.Form{{Policy: policy(open)}}, policy(shut), nil, "any/weft-l4"},
		"one port becomes Strict":   {[]lds.Form{{Policy: policy(open)}}, policy(open, all), map[uint16]uint32{0: 1}, "any/weft-l4/1 any/plain-http/1 any/plain/1 80/weft-l4 any/weft-l4"},
		"back while the first stays": {[]lds.Form{{Policy: policy(shut, all)}, {Policy: policy(shut, front), Revision: map[uint16]uint32{80: 1}}}, policy(shut, all),
			map[uint16]uint32{80: 1}, "any/weft-l4 80/weft-l4/1 80/weft-l4"},
		"narrower than one before the last": {[]lds.Form{{Policy: policy(shut, all)}, {Policy: policy(shut)}}, policy(shut, front), map[uint16]uint32{0: 1, 80: 1},
			"any/weft-l4/1 80/weft-l4/1 any/weft-l4 80/weft-l4"},
		"another bound of age": {[]lds.Form{{Policy: policy(shut), MaxConnection: time.Minute}}, policy(shut), map[uint16]uint32{0: 1}, "any/weft-l4/1 any/weft-l4"},
	} {
		t.Run(name, func(t *testing.T) {
			var before []lds.Pod
			for _, form := range c.before {
				before = append(before, pod(func(p *lds.Pod) { p.Form = form }))
			}
			after := pod(func(p *lds.Pod) { p.Policy, p.Previous = c.after, c.before })
			after.Revision = lds.Revise(before, after)
			if !maps.Equal(after.Revision, c.want) {
				t.Errorf("revisions %v, want %v", after.Revision, c.want)
			}
			listeners, err := lds.Listeners(after)
			if err != nil {
				t.Fatal(err)
			}
			var chains []string
			for _, chain := range listeners[1].FilterChains {
				chains = append(chains, chain.Name)
			}
			if got := strings.Join(chains, " "); got != c.chains {
				t.Errorf("chains %s, want %s", got, c.chains)
			}
			// Every chain that callers with mesh TLS came through is still what it was.
			for _, p := range before {
				old, err := lds.Listeners(p)
				if err != nil {
					t.Fatal(err)
				}
				for _, chain := range old[1].FilterChains {
					kept := slices.ContainsFunc(listeners[1].FilterChains, func(c *listener.FilterChain) bool { return proto.Equal(c, chain) })
					if plain := strings.Contains(chain.Name, "plain"); kept == plain {
						t.Errorf("chain %s is kept: %t", chain.Name, kept)
					}
				}
			}
		})
	}
}

func TestDrops(t *testing.T) {
	listeners := func(name string, change func(*lds.Pod)) []*listener.Listener {
		p := pod(pods[name])
		change(&p)
		out, err := lds.Listeners(p)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	as := func(*lds.Pod) {}
	for name, c := range map[string]struct {
		before, after []*listener.Listener
		want          bool
	}{
		"the first":              {nil, listeners("strict", as), false},
		"the same":               {listeners("strict", as), listeners("strict", as), false},
		"a chain more":           {listeners("strict", as), listeners("strict-http", as), false},
		"a chain less":           {listeners("strict-http", as), listeners("strict", as), true},
		"a chain changes":        {listeners("strict", as), listeners("strict", func(p *lds.Pod) { p.MaxConnection = time.Minute }), true},
		"the listener goes":      {listeners("server-first", as), listeners("server-first", as)[:2], true},
		"from nobody":            {listeners("policy-missing", as), listeners("strict", as), false},
		"only secrets change":    {listeners("strict-deny-l4", as), listeners("strict", as), false},
		"another Envoy's follow": {listeners("strict", as), listeners("odd-generation", as), true},
	} {
		if got := lds.Drops(c.before, c.after); got != c.want {
			t.Errorf("%s: %t, want %t", name, got, c.want)
		}
	}
}

// TestPreviousChainsStay: they are there, and no new connection is led to them.
func TestPreviousChainsStay(t *testing.T) {
	bytes := policy(&meshv1.PortPolicy{Mode: strict}, &meshv1.PortPolicy{Port: 80, Mode: strict})
	judged := policy(&meshv1.PortPolicy{Mode: strict}, &meshv1.PortPolicy{Port: 80, Mode: strict, Http: true})
	build := func(p lds.Pod) (chains []string, matcher string) {
		listeners, err := lds.Listeners(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, chain := range listeners[1].FilterChains {
			chains = append(chains, chain.Name)
		}
		return chains, listeners[1].FilterChainMatcher.String()
	}
	_, want := build(pod(func(p *lds.Pod) { p.Policy = judged }))
	kept := pod(func(p *lds.Pod) { p.Policy, p.Previous = judged, []lds.Form{{Policy: bytes}} })
	chains, matcher := build(kept)
	if !slices.Contains(chains, "80/weft-l4") || !slices.Contains(chains, "80/weft-h1") {
		t.Errorf("chains %v", chains)
	}
	if matcher != want {
		t.Error("the previous policy changed where new connections go")
	}
	if secrets := lds.RuleSecrets(kept); len(secrets) != 2 {
		t.Errorf("secrets %v", secrets)
	}
}
