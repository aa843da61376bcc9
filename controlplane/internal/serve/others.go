package serve

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// other is what another replica tells of its nodes.
type other struct {
	// served is the number of the newest orders that it serves.
	served uint64
	nodes  map[string]*meshv1.NodeAnswers
}

func (o *other) answered(n *meshv1.NodeAnswers) uint64 {
	if n.Joining {
		return 0
	}
	return min(n.Number, o.served)
}

// describe adds the replica's nodes to a State.
func (o *other) describe(out *State, generation uint64) {
	for node, n := range o.nodes {
		out.Nodes = append(out.Nodes, node)
		if o.answered(n) < generation {
			out.Behind = append(out.Behind, node)
		}
		if n.Joining {
			out.Joining = append(out.Joining, node)
		}
		for _, k := range n.Open {
			at := Resource{k.TypeUrl, k.Name}
			out.Open[at] = append(out.Open[at], node)
		}
		for _, r := range n.Refusals {
			out.Refusals = append(out.Refusals, Refusal{node, r.Resource.GetTypeUrl(), r.Resource.GetName(), r.Text})
		}
	}
}

// here tells whether a node has a stream, to whichever replica.
func (s *Server) here(node string) bool {
	if len(s.byNode[node]) > 0 {
		return true
	}
	for _, o := range s.others {
		if o.nodes[node] != nil {
			return true
		}
	}
	return false
}

// leaves notes that a node has lost a stream, if that was its last.
func (s *Server) leaves(node string, gone absence) {
	if !s.here(node) {
		s.away[node] = gone
	}
	s.routes = nil
}

func (s *Server) other(replica string) *other {
	if s.others[replica] == nil {
		s.others[replica] = &other{nodes: map[string]*meshv1.NodeAnswers{}}
	}
	return s.others[replica]
}

// Told takes what another replica says of one of its nodes.
func (s *Server) Told(replica string, n *meshv1.NodeAnswers) {
	s.mu.Lock()
	s.other(replica).nodes[n.Node] = n
	delete(s.away, n.Node)
	s.routes = nil
	s.mu.Unlock()
	s.config.Changed()
}

// Serves takes the number of the newest orders that another replica serves.
func (s *Server) Serves(replica string, number uint64) {
	s.mu.Lock()
	s.other(replica).served = number
	s.mu.Unlock()
	s.config.Changed()
}

// Gone says that a node has lost its last stream to another replica.
func (s *Server) Gone(replica, node string) {
	s.mu.Lock()
	s.gone(s.other(replica), node)
	s.mu.Unlock()
	s.config.Changed()
}

func (s *Server) gone(o *other, node string) {
	if n := o.nodes[node]; n != nil {
		delete(o.nodes, node)
		s.leaves(node, absence{since: time.Now(), routes: n.Routes})
	}
}

// Left says that another replica tells nothing any more: its nodes count as gone.
func (s *Server) Left(replica string) {
	s.mu.Lock()
	if o := s.others[replica]; o != nil {
		for node := range maps.Clone(o.nodes) {
			s.gone(o, node)
		}
		delete(s.others, replica)
	}
	s.mu.Unlock()
	s.config.Changed()
}

// Begin forgets what is known of nodes that are not served here: a leader begins with what it is told.
func (s *Server) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.others, s.away, s.routes = map[string]*other{}, map[string]absence{}, nil
}

// Served is the number of the newest orders that every replica with nodes serves.
func (s *Server) Served() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	least := s.number
	for _, o := range s.others {
		if len(o.nodes) > 0 {
			least = min(least, o.served)
		}
	}
	return least
}

// Followers counts the replicas that follow this one.
func (s *Server) Followers() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.others)
}

// all is the number that a node has answered when it has answered everything that its replica serves.
const all = math.MaxUint64

// Answers tells what the nodes that are served here have answered of a term's orders, by node, and the number of those that
// are served.
func (s *Server) Answers(term uint64) (answers map[string]*meshv1.NodeAnswers, number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	answers = map[string]*meshv1.NodeAnswers{}
	least := s.generation
	for node, streams := range s.byNode {
		n := &meshv1.NodeAnswers{Node: node}
		state := State{Open: map[Resource][]string{}}
		answered := s.generation
		for st := range streams {
			answered = min(answered, st.answered())
			st.describe(&state, s.generation)
			for k := range st.named {
				if k.TypeURL == xds.TypeRoute {
					n.Routes = append(n.Routes, k.Name)
				}
			}
		}
		least = min(least, answered)
		n.Number, n.Joining = s.numberAt(term, answered), len(state.Joining) > 0
		slices.Sort(n.Routes)
		n.Routes = slices.Compact(n.Routes)
		for k := range state.Open {
			n.Open = append(n.Open, &meshv1.ResourceName{TypeUrl: k.TypeURL, Name: k.Name})
		}
		for _, r := range state.Refusals {
			n.Refusals = append(n.Refusals, &meshv1.RefusedResource{Resource: &meshv1.ResourceName{TypeUrl: r.TypeURL, Name: r.Name}, Text: r.Text})
		}
		slices.SortFunc(n.Open, byName)
		slices.SortFunc(n.Refusals, func(a, b *meshv1.RefusedResource) int {
			return cmp.Or(byName(a.Resource, b.Resource), cmp.Compare(a.Text, b.Text))
		})
		answers[node] = n
	}
	// What no node can be behind any more is forgotten.
	for len(s.served) > 1 && s.served[1].generation <= least {
		s.served = slices.Delete(s.served, 0, 1)
	}
	if s.mark.Term != term {
		return answers, 0
	}
	return answers, s.number
}

func byName(a, b *meshv1.ResourceName) int {
	return cmp.Or(cmp.Compare(a.TypeUrl, b.TypeUrl), cmp.Compare(a.Name, b.Name))
}

// numberAt is the number of a term's newest orders that are in a generation and those before it.
func (s *Server) numberAt(term, generation uint64) uint64 {
	if s.mark.Term != term {
		return 0
	}
	if generation == s.generation {
		return all
	}
	number := uint64(0)
	for _, v := range s.served {
		if v.generation <= generation {
			number = v.number
		}
	}
	return number
}
