package serve

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// Refusal is a node's NACK of a resource.
type Refusal struct{ Node, TypeURL, Name, Text string }

// State is what status needs to know of the nodes.
type State struct {
	// Nodes that are connected; Away lost their stream not long ago; Joining are connected and have not asked for everything
	// yet. All are sorted.
	Nodes, Away, Joining []string
	// Behind are connected and have not answered everything.
	Behind []string
	// Open are the nodes that have not answered a resource as it is now.
	Open map[Resource][]string
	// Routes are the nodes that use a route configuration, by its name; one without a stream still counts.
	Routes map[string][]string
	// Refusals that stand, sorted.
	Refusals []Refusal
}

// Answered is the newest generation that every node has answered, with all before it; 0 while one is waited for.
func (s *Server) Answered() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.away {
		if time.Since(a.since) < awayLimit {
			return 0
		}
	}
	least := s.generation
	for st := range s.streams {
		least = min(least, st.answered())
	}
	for _, o := range s.others {
		for _, n := range o.nodes {
			least = min(least, o.answered(n))
		}
	}
	return least
}

// AnsweredBy is the newest generation that each connected node has answered, with all before it.
func (s *Server) AnsweredBy() map[string]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]uint64{}
	put := func(node string, answered uint64) {
		if before, ok := out[node]; !ok || answered < before {
			out[node] = answered
		}
	}
	for st := range s.streams {
		put(st.node, st.answered())
	}
	for _, o := range s.others {
		for node, n := range o.nodes {
			put(node, o.answered(n))
		}
	}
	return out
}

// State describes the nodes.
func (s *Server) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := State{Nodes: slices.Sorted(maps.Keys(s.byNode)), Open: map[Resource][]string{}, Routes: s.users()}
	for st := range s.streams {
		st.describe(&out, s.generation)
	}
	for node, a := range s.away {
		if time.Since(a.since) < awayShown {
			out.Away = append(out.Away, node)
		}
	}
	for _, o := range s.others {
		o.describe(&out, s.generation)
	}
	for _, l := range []*[]string{&out.Nodes, &out.Away, &out.Joining, &out.Behind} {
		slices.Sort(*l)
		*l = slices.Compact(*l)
	}
	slices.SortFunc(out.Refusals, func(a, b Refusal) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.TypeURL, b.TypeURL), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Text, b.Text))
	})
	return out
}

// users are the nodes that use each route configuration. The map is not changed once it is handed out.
func (s *Server) users() map[string][]string {
	if s.routes != nil {
		return s.routes
	}
	s.routes = map[string][]string{}
	for k, r := range s.named {
		if k.TypeURL == xds.TypeRoute {
			for st := range r.streams {
				s.routes[k.Name] = append(s.routes[k.Name], st.node)
			}
		}
	}
	for node, a := range s.away {
		for _, name := range a.routes {
			s.routes[name] = append(s.routes[name], node)
		}
	}
	for _, o := range s.others {
		for node, n := range o.nodes {
			for _, name := range n.Routes {
				s.routes[name] = append(s.routes[name], node)
			}
		}
	}
	for name, nodes := range s.routes {
		slices.Sort(nodes)
		s.routes[name] = slices.Compact(nodes)
	}
	return s.routes
}

// answered is the newest generation that the node has answered, with all before it: nothing of them is left to send.
func (st *stream) answered() uint64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.wild) < len(wildcard) {
		return 0 // it has not asked for everything yet
	}
	least := st.generation
	if st.untold > 0 {
		least = min(least, st.untold-1)
	}
	for _, g := range st.pending {
		least = min(least, max(g, 1)-1)
	}
	for _, f := range st.flight {
		least = min(least, max(f.generation, 1)-1)
	}
	return least
}

// describe adds a stream to a State.
func (st *stream) describe(out *State, generation uint64) {
	behind := st.answered() < generation
	st.mu.Lock()
	defer st.mu.Unlock()
	if behind {
		out.Behind = append(out.Behind, st.node)
	}
	if len(st.wild) < len(wildcard) {
		out.Joining = append(out.Joining, st.node)
	}
	open := map[Resource]bool{}
	for k := range st.pending {
		open[k] = true
	}
	for _, f := range st.flight {
		for _, k := range f.keys {
			open[k] = true
		}
	}
	for k := range open {
		out.Open[k] = append(out.Open[k], st.node)
	}
	for k, text := range st.refused {
		out.Refusals = append(out.Refusals, Refusal{st.node, k.TypeURL, k.Name, text})
	}
}
