package lds

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// maxPattern bounds the regular expressions of one port's identity rules, in bytes.
const maxPattern = 16 << 10

// anyPeer is the prefix that every SPIFFE ID has.
const anyPeer = "spiffe://"

// peerSet is a set of SPIFFE IDs as TLS can check it: a peer is in it when any of exact, prefixes or patterns matches
// the URI SAN of its certificate. Weft's CA puts exactly one URI SAN into each.
type peerSet struct {
	exact, prefixes []string
	// patterns are RE2, matched against the whole ID. They say "with this prefix, except …".
	patterns []string
}

func (s peerSet) empty() bool { return len(s.exact)+len(s.prefixes)+len(s.patterns) == 0 }

// allowedPeers compiles rules without HTTP requests into the set of peers that they let in. Deny rules are part of
// the set, so that a denied peer fails the TLS handshake and the app never sees a connection, whoever speaks first
// (docs/adr/0002-identity-denial-in-tls.md).
func allowedPeers(restricted bool, allow, deny []*meshv1.Rule) (peerSet, error) {
	in, denied := peerSet{prefixes: []string{anyPeer}}, peerSet{}
	if restricted {
		in = peerSet{}
		for _, rule := range allow {
			in.add(rule)
		}
	}
	for _, rule := range deny {
		denied.add(rule)
	}
	in.sort()
	denied.sort()
	out := peerSet{exact: slices.DeleteFunc(in.exact, denied.covers)}
	size := 0
	for _, prefix := range in.prefixes {
		if denied.coversPrefix(prefix) {
			continue
		}
		hole := newTrie(denied, prefix)
		if hole == nil {
			out.prefixes = append(out.prefixes, prefix)
			continue
		}
		rest, _ := hole.complement()
		pattern := regexp.QuoteMeta(prefix) + rest
		if size += len(pattern); size > maxPattern {
			return peerSet{}, fmt.Errorf("name too many denied peers: they make a pattern of more than %d bytes; deny namespaces instead, or allow by name", maxPattern)
		}
		out.patterns = append(out.patterns, pattern)
	}
	return out, nil
}

func (s *peerSet) add(rule *meshv1.Rule) {
	if len(rule.GetPeers()) == 0 {
		s.prefixes = append(s.prefixes, anyPeer)
	}
	for _, peer := range rule.GetPeers() {
		if prefix := peer.GetSpiffePrefix(); prefix != "" {
			s.prefixes = append(s.prefixes, prefix)
		} else if id := peer.GetSpiffeId(); id != "" {
			s.exact = append(s.exact, id)
		}
	}
}

// sort orders the set and drops what another entry says already.
func (s *peerSet) sort() {
	slices.Sort(s.prefixes)
	var prefixes []string
	for _, prefix := range s.prefixes {
		if len(prefixes) == 0 || !strings.HasPrefix(prefix, prefixes[len(prefixes)-1]) {
			prefixes = append(prefixes, prefix)
		}
	}
	s.prefixes = prefixes
	slices.Sort(s.exact)
	s.exact = slices.DeleteFunc(slices.Compact(s.exact), s.coversPrefix)
}

func (s peerSet) coversPrefix(prefix string) bool {
	return slices.ContainsFunc(s.prefixes, func(p string) bool { return strings.HasPrefix(prefix, p) })
}

func (s peerSet) covers(id string) bool { return slices.Contains(s.exact, id) || s.coversPrefix(id) }

// trie holds the denied rests of IDs behind a prefix.
type trie struct {
	children map[rune]*trie
	// exact: the ID that ends here is denied. all: so is every ID that goes on from here.
	exact, all bool
}

// newTrie returns nil when nothing behind prefix is denied.
func newTrie(denied peerSet, prefix string) *trie {
	var root *trie
	insert := func(ids []string, mark func(*trie)) {
		for _, id := range ids {
			rest, ok := strings.CutPrefix(id, prefix)
			if !ok {
				continue
			}
			if root == nil {
				root = &trie{}
			}
			node := root
			for _, r := range rest {
				if node.children == nil {
					node.children = map[rune]*trie{}
				}
				if node.children[r] == nil {
					node.children[r] = &trie{}
				}
				node = node.children[r]
			}
			mark(node)
		}
	}
	insert(denied.prefixes, func(t *trie) { t.all = true })
	insert(denied.exact, func(t *trie) { t.exact = true })
	return root
}

// complement returns a pattern for what is not denied from here on; false: nothing.
func (t *trie) complement() (string, bool) {
	if t.all {
		return "", false
	}
	letters := make([]rune, 0, len(t.children))
	for r := range t.children {
		letters = append(letters, r)
	}
	slices.Sort(letters)
	var ways []string
	var others strings.Builder
	for _, r := range letters {
		if rest, ok := t.children[r].complement(); ok {
			ways = append(ways, regexp.QuoteMeta(string(r))+rest)
		}
		if strings.ContainsRune(`\]^-`, r) {
			others.WriteByte('\\')
		}
		others.WriteRune(r)
	}
	if others.Len() > 0 {
		ways = append(ways, "[^"+others.String()+"].*")
	} else {
		ways = append(ways, ".+")
	}
	pattern := "(?:" + strings.Join(ways, "|") + ")"
	if !t.exact {
		pattern += "?"
	}
	return pattern, true
}
