package lds_test

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
)

// What random policies are made of.
var (
	somePeers = []string{front, reports, "spiffe://cluster.local/ns/batch/sa/nightly", "spiffe://cluster.local/ns/team/sa/lead"}
	someRules = []*meshv1.Rule{
		allowFront, denyBatch, {Name: "shop/team", Peers: []*meshv1.Peer{namespace("team")}}, {Name: "shop/everybody"},
	}
)

func randomPort(r *rand.Rand, number uint32) *meshv1.PortPolicy {
	p := &meshv1.PortPolicy{Port: number, Mode: strict, Closed: r.IntN(6) == 0, Http: r.IntN(4) == 0, Restricted: r.IntN(2) == 0}
	if r.IntN(3) == 0 {
		p.Mode = permissive
	}
	for _, rule := range someRules {
		switch r.IntN(4) {
		case 0:
			p.Allow = append(p.Allow, rule)
		case 1:
			if len(rule.Peers) > 0 {
				p.Deny = append(p.Deny, rule)
			}
		}
	}
	return p
}

// changed is a policy that differs from another in one place.
func changed(r *rand.Rand, from *meshv1.InboundPolicy) *meshv1.InboundPolicy {
	out := proto.CloneOf(from)
	number := []uint32{0, 80, 90}[r.IntN(3)]
	if number == 0 {
		out.DefaultPort = randomPort(r, 0)
		return out
	}
	out.Ports = slices.DeleteFunc(out.Ports, func(p *meshv1.PortPolicy) bool { return p.Port == number })
	if r.IntN(3) > 0 {
		out.Ports = append(out.Ports, randomPort(r, number))
	}
	return out
}

// takes says, from the policy alone, which of a pod's chains takes a peer with mesh TLS on a port; "": none.
func takes(p lds.Pod, number uint16, peer string) (chain string) {
	rules, name := p.Policy.DefaultPort, "any"
	for _, listed := range p.Policy.Ports {
		if listed.Port == uint32(number) {
			rules, name = listed, fmt.Sprint(number)
		}
	}
	revision := p.Revision[uint16(rules.Port)]
	revised := func(kind string) string {
		if revision == 0 {
			return name + "/" + kind
		}
		return fmt.Sprintf("%s/%s/%d", name, kind, revision)
	}
	matches := func(rules []*meshv1.Rule) bool {
		return slices.ContainsFunc(rules, func(r *meshv1.Rule) bool {
			return len(r.Peers) == 0 || slices.ContainsFunc(r.Peers, func(m *meshv1.Peer) bool {
				return m.GetSpiffeId() == peer || m.GetSpiffePrefix() != "" && strings.HasPrefix(peer, m.GetSpiffePrefix())
			})
		})
	}
	switch {
	case rules.Closed:
		return ""
	case rules.Http:
		return revised("weft-h1")
	case matches(rules.Deny), rules.Restricted && !matches(rules.Allow):
		return ""
	}
	return revised("weft-l4")
}

func letsIn(rule lds.RuleSecret, peer string) bool {
	return slices.Contains(rule.Exact, peer) ||
		slices.ContainsFunc(rule.Prefixes, func(p string) bool { return strings.HasPrefix(peer, p) }) ||
		slices.ContainsFunc(rule.Patterns, func(p string) bool { return regexp.MustCompile("^(?:" + p + ")$").MatchString(peer) })
}

// TestReviseHolds: over random changes, whatever a chain that stays has accepted is accepted by it still, a secret that stays
// only lets more in, and no chain is replaced in place.
func TestReviseHolds(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	kept := 0
	for round := range 400 {
		var before []lds.Pod
		last := policy(randomPort(r, 0))
		for range 1 + r.IntN(3) {
			last = changed(r, last)
			p := pod(func(p *lds.Pod) { p.Policy = last })
			p.Revision = lds.Revise(before, p)
			before = append(before, p)
		}
		after := pod(func(p *lds.Pod) { p.Policy = changed(r, last) })
		after.Revision = lds.Revise(before, after)
		now := chainsOf(t, after)
		for _, p := range before {
			for name, chain := range chainsOf(t, p) {
				if other := now[name]; other != nil && !proto.Equal(chain, other) {
					t.Fatalf("round %d: chain %s is replaced in place", round, name)
				}
			}
			for _, old := range lds.RuleSecrets(p) {
				for _, rule := range lds.RuleSecrets(after) {
					for _, peer := range somePeers {
						if rule.Name == old.Name && letsIn(old, peer) && !letsIn(rule, peer) {
							t.Fatalf("round %d: secret %s no longer lets %s in", round, rule.Name, peer)
						}
					}
				}
			}
			for _, number := range []uint16{80, 90, 443} {
				for _, peer := range somePeers {
					through := takes(p, number, peer)
					if through == "" || now[through] == nil {
						continue
					}
					kept++
					if got := takes(after, number, peer); got != through && (got == "" || strings.Contains(got+through, "weft-h")) {
						t.Fatalf("round %d: %s on port %d came through %s, which stays; it would now be taken by %q\nbefore %v\nafter %v", round, peer, number, through, got, p.Policy, after.Policy)
					}
				}
			}
		}
	}
	if kept < 1000 {
		t.Errorf("only %d connections were on chains that stay: the policies are too different to try much", kept)
	}
}

func chainsOf(t *testing.T, p lds.Pod) map[string]*listener.FilterChain {
	t.Helper()
	listeners, err := lds.Listeners(p)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*listener.FilterChain{}
	for _, chain := range listeners[1].FilterChains {
		out[chain.Name] = chain
	}
	return out
}
