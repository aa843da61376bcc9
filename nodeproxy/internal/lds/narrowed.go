package lds

import (
	"slices"
)

// Narrowed lists the ports (0: those that the policy does not list) whose chains a change of policy leaves in place
// although connections accepted through them would not be accepted any more. Envoy drains a chain only when it goes or
// changes, so the caller raises Pod.Revision for these, together with the endpoints' generation (docs/LIFECYCLE.md).
//
// Port 0 comes up when a port is listed for the first time, with less than was allowed before: its old connections run
// through the chain that it shared. Raising that revision also ends raw TCP connections to the pod's other unlisted
// ports; HTTP connections move without loss.
func Narrowed(before, after Pod) []uint16 {
	old, now := before.ports(), after.ports()
	var out []uint16
	for _, number := range union(old, now) {
		o, n := find(old, number), find(now, number)
		kept := find(now, o.number)
		if o.refuse {
			continue
		}
		meshStays := kept.number == o.number && !kept.refuse && !o.http && !kept.http
		if meshStays && (n.refuse || n.http || !n.peers.includes(o.peers)) {
			out = append(out, o.number)
		}
		// HTTP rules are part of the chain: they strand only what the port shared before it was listed.
		if o.http && n.number != o.number && kept.number == o.number && kept.http && !kept.refuse {
			out = append(out, o.number)
		}
		if o.plain && !n.plain && !o.http && slices.ContainsFunc(now, func(q port) bool { return q.plain && !q.http }) {
			out = append(out, 0)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func union(a, b []port) []uint16 {
	var out []uint16
	for _, q := range slices.Concat(a, b) {
		out = append(out, q.number)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// find returns what applies to a port: its own entry, or the one of unlisted ports.
func find(ports []port, number uint16) port {
	for _, q := range ports {
		if q.number == number {
			return q
		}
	}
	return ports[0]
}

// includes reports whether every peer of the other set is in this one. It may say no where the answer is yes: then a
// connection is cut that could have stayed.
func (s peerSet) includes(other peerSet) bool {
	for _, id := range other.exact {
		if !s.covers(id) {
			return false
		}
	}
	for _, prefix := range other.prefixes {
		if !s.coversPrefix(prefix) {
			return false
		}
	}
	for _, pattern := range other.patterns {
		if !slices.Contains(s.patterns, pattern) && !s.coversPrefix(anyPeer) {
			return false
		}
	}
	return true
}
