package lds

import (
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

func rule(peers ...string) *meshv1.Rule {
	r := &meshv1.Rule{Name: "shop/rule[0]"}
	for _, p := range peers {
		if strings.HasSuffix(p, "/") {
			r.Peers = append(r.Peers, &meshv1.Peer{Match: &meshv1.Peer_SpiffePrefix{SpiffePrefix: p}})
		} else {
			r.Peers = append(r.Peers, &meshv1.Peer{Match: &meshv1.Peer_SpiffeId{SpiffeId: p}})
		}
	}
	return r
}

func (s peerSet) matches(id string) bool {
	if slices.Contains(s.exact, id) || s.coversPrefix(id) {
		return true
	}
	return slices.ContainsFunc(s.patterns, func(p string) bool {
		return regexp.MustCompile("^(?:" + p + ")$").MatchString(id)
	})
}

// TestAllowedPeersAgreesWithRules compares the compiled set with the rules themselves for every short ID.
func TestAllowedPeersAgreesWithRules(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var ids []string
	for _, ns := range []string{"a", "b", "ab", "a-b"} {
		for _, sa := range []string{"a", "b", "aa", "ab", "a-", "a.b", "b]"} {
			ids = append(ids, "spiffe://td/ns/"+ns+"/sa/"+sa)
		}
	}
	ids = append(ids, "spiffe://td/ns/a/sa/", "spiffe://td/", "spiffe://other/ns/a/sa/a")
	prefixes := []string{"spiffe://td/ns/a/", "spiffe://td/ns/b/", "spiffe://td/", "spiffe://td/ns/ab/"}
	pick := func() *meshv1.Rule {
		var peers []string
		for range random.IntN(4) {
			if random.IntN(3) == 0 {
				peers = append(peers, prefixes[random.IntN(len(prefixes))])
			} else {
				peers = append(peers, ids[random.IntN(len(ids))])
			}
		}
		return rule(peers...)
	}
	hit := func(rules []*meshv1.Rule, id string) bool {
		return slices.ContainsFunc(rules, func(r *meshv1.Rule) bool {
			return len(r.Peers) == 0 || slices.ContainsFunc(r.Peers, func(p *meshv1.Peer) bool {
				return p.GetSpiffeId() == id || p.GetSpiffePrefix() != "" && strings.HasPrefix(id, p.GetSpiffePrefix())
			})
		})
	}
	denials := 0
	for range 2000 {
		var allow, deny []*meshv1.Rule
		for range random.IntN(3) {
			allow = append(allow, pick())
		}
		for range random.IntN(3) {
			deny = append(deny, pick())
		}
		restricted := random.IntN(2) == 0
		set, err := allowedPeers(restricted, allow, deny)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			want := !hit(deny, id) && (!restricted || hit(allow, id))
			if !want {
				denials++
			}
			if got := set.matches(id); got != want {
				t.Fatalf("restricted %v, allow %v, deny %v: %s: got %v, want %v (set %+v)", restricted, allow, deny, id, got, want, set)
			}
		}
	}
	if denials == 0 {
		t.Fatal("the cases deny nothing")
	}
}

func TestAllowedPeersRefusesWhatIsTooLarge(t *testing.T) {
	var peers []string
	for i := range 400 {
		peers = append(peers, "spiffe://cluster.local/ns/tenant-"+strings.Repeat("x", i%50)+"/sa/"+strings.Repeat("y", i))
	}
	if _, err := allowedPeers(false, nil, []*meshv1.Rule{rule(peers...)}); err == nil {
		t.Fatal("a pattern beyond the bound was accepted")
	}
}
