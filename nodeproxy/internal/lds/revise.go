package lds

import (
	"slices"
	"strconv"
	"strings"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"
)

// Revise gives the chains of a new form their revisions, so that it can stand beside the forms that Envoy has of the pod
// (before, oldest first): a port gets new chains where the old ones would go on with connections that would not be
// accepted any more (Narrowed), and where they would be replaced in place, for Envoy would then cut their connections
// before callers could move. What stays keeps its chains, and its validation secret then only ever lets more in.
func Revise(before []Pod, after Pod) map[uint16]uint32 {
	revision := map[uint16]uint32{}
	for _, p := range before {
		for number, r := range p.Revision {
			revision[number] = max(revision[number], r)
		}
	}
	after.Revision = revision
	raise := map[uint16]bool{}
	for _, p := range before {
		for _, number := range slices.Concat(Narrowed(p, after), replaced(p, after)) {
			if p.Revision[number] == revision[number] {
				raise[number] = true
			}
		}
	}
	for number := range raise {
		revision[number]++
	}
	return revision
}

// replaced lists the ports that have a chain of one name and another content after a change.
func replaced(before, after Pod) []uint16 {
	now := map[string]*listener.FilterChain{}
	for _, chain := range after.in().FilterChains {
		now[chain.Name] = chain
	}
	var out []uint16
	for _, chain := range before.in().FilterChains {
		if other := now[chain.Name]; other != nil && !proto.Equal(chain, other) {
			number, _, _ := strings.Cut(chain.Name, "/")
			n, _ := strconv.ParseUint(number, 10, 16) // "any" is 0
			out = append(out, uint16(n))
		}
	}
	return out
}

// Drops tells whether a change from some listeners of a pod to others takes chains away: Envoy then drains their
// connections, and cuts them after its drain time.
func Drops(before, after []*listener.Listener) bool {
	stay := func(l *listener.Listener, chain *listener.FilterChain) bool {
		return slices.ContainsFunc(after, func(n *listener.Listener) bool {
			return n.Name == l.Name && slices.ContainsFunc(n.FilterChains, func(c *listener.FilterChain) bool { return proto.Equal(c, chain) })
		})
	}
	return slices.ContainsFunc(before, func(l *listener.Listener) bool {
		return slices.ContainsFunc(l.FilterChains, func(c *listener.FilterChain) bool { return c.Name != closed && !stay(l, c) })
	})
}
