// Package serve gives the resources of a snapshot to node agents by delta ADS. Its work is proportional to what changed:
// a resource is built and marshalled once for all streams that subscribed to it, and a version is the hash of the content,
// equal on every replica.
package serve

import (
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// Config of a Server.
type Config struct {
	Log *slog.Logger
	// Changed is called, without blocking, when nodes come, go, acknowledge or refuse.
	Changed func()
	// Patience is how long an agent that was given newer objects by another replica is given nothing; 0: 10 seconds.
	Patience time.Duration
}

// Version is a snapshot and what it was made of.
type Version struct {
	Snapshot *ir.Snapshot
	// Mark is what agents are told: its orders are the last that differ from those before.
	epoch.Mark
	// Number of the leader's snapshot whose orders are in it.
	Number uint64
	// Seen is how far the objects were followed.
	Seen epoch.Kinds
}

// order in which types are sent: a cluster comes before its endpoints, both before a route that names them, and policies
// before the pods that name them.
var order = []string{
	xds.TypeCluster, xds.TypeEndpoints, xds.TypeRoute,
	xds.TypeMesh, xds.TypeNamespace, xds.TypeService, xds.TypeWorkload, xds.TypeInboundPolicy, xds.TypeLocalPod,
}

// wildcard types are given whole; LocalPods only to the node that they are on.
var wildcard = map[string]bool{xds.TypeMesh: true, xds.TypeNamespace: true, xds.TypeService: true, xds.TypeWorkload: true, xds.TypeLocalPod: true}

// Resource names what nodes are given.
type Resource struct{ TypeURL, Name string }

// resource is one built resource; without a body the snapshot has none.
type resource struct {
	version string
	body    *anypb.Any
	// source is what it was made of, where that is one thing.
	source  any
	streams map[*stream]bool
}

// Server holds the current snapshot's resources, as far as somebody subscribed to them.
type Server struct {
	config Config

	mu         sync.Mutex
	snapshot   *ir.Snapshot
	generation uint64
	// mark, number and seen are the current snapshot's. served are the numbers of the orders that are in generations.
	mark   epoch.Mark
	number uint64
	seen   epoch.Kinds
	served []served
	// changed is closed and replaced when there is another snapshot, and when the Server is suspended or resumed.
	changed   chan struct{}
	suspended bool
	// others are what other replicas tell of their nodes, by name.
	others map[string]*other
	// named resources that streams subscribed to; index resources are of the wildcard types, as far as somebody took them.
	// Both are those of the current snapshot.
	named, index map[Resource]*resource
	// local holds the uids of a node's pods.
	local   map[string]map[string]bool
	streams map[*stream]bool
	byNode  map[string]map[*stream]bool
	// away holds nodes without a stream that have had one, or should.
	away map[string]absence
	// routes are the users of route configurations, by name; nil: to be counted anew.
	routes map[string][]string
}

// served says that the orders of a number are in a generation.
type served struct {
	generation, number uint64
}

// absence is a node without a stream.
type absence struct {
	since time.Time
	// routes that it used.
	routes []string
}

const (
	// awayLimit is how long a node without a stream counts as one that has not answered, so that others wait for it. It
	// resyncs before it serves again.
	awayLimit = 30 * time.Second
	// awayShown is how long it counts so in conditions.
	awayShown = time.Minute
)

// New makes a Server without a snapshot; streams wait until it has one.
func New(c Config) *Server {
	if c.Changed == nil {
		c.Changed = func() {}
	}
	if c.Patience == 0 {
		c.Patience = 10 * time.Second
	}
	return &Server{config: c, changed: make(chan struct{}), others: map[string]*other{}, named: map[Resource]*resource{}, index: map[Resource]*resource{}, local: map[string]map[string]bool{},
		streams: map[*stream]bool{}, byNode: map[string]map[*stream]bool{}, away: map[string]absence{}}
}

// Expect names nodes that served before this Server was made: until they are here or have been waited for, nothing counts
// as answered by all.
func (s *Server) Expect(nodes []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, node := range nodes {
		if !s.here(node) {
			s.away[node] = absence{since: time.Now()}
		}
	}
}

// Set makes a snapshot the current one and returns its generation, for Answered.
func (s *Server) Set(v Version) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.snapshot
	s.snapshot, s.seen = v.Snapshot, v.Seen
	s.generation++
	s.advance(v.Mark, v.Number)
	for k, r := range s.named {
		if s.rebuild(k, r) {
			for st := range r.streams {
				st.dirty(k, s.generation)
			}
		}
	}
	for _, k := range s.difference(before) {
		s.spread(k)
	}
	for node, a := range s.away {
		if len(s.local[node]) == 0 && time.Since(a.since) > awayShown {
			delete(s.away, node)
			s.routes = nil
		}
	}
	for st := range s.streams {
		st.reach(s.generation)
	}
	return s.generation
}

// Advance says that the current snapshot is what orders of a later number ask for, too.
func (s *Server) Advance(m epoch.Mark, number uint64) {
	s.mu.Lock()
	s.advance(m, number)
	s.mu.Unlock()
	s.config.Changed()
}

func (s *Server) advance(m epoch.Mark, number uint64) {
	if s.mark.Term != m.Term {
		s.served = nil
	}
	if s.number != number || len(s.served) == 0 {
		s.served = append(s.served, served{s.generation, number})
	}
	if s.mark.Orders != m.Orders { // who has answered these must know them, even if nothing that it has is different
		for st := range s.streams {
			st.inform(s.generation)
		}
	}
	s.mark, s.number = m, number
	s.notify()
}

func (s *Server) notify() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// difference lists the resources of wildcard types that may have changed since a snapshot: what did not change is the
// same pointer in both.
func (s *Server) difference(before *ir.Snapshot) []Resource {
	var out []Resource
	if before == nil || before.Mesh != s.snapshot.Mesh {
		for _, name := range xds.Names(s.snapshot, xds.TypeMesh, "") {
			out = append(out, Resource{xds.TypeMesh, name})
		}
	}
	if before == nil {
		before = &ir.Snapshot{}
	}
	differ(before.Namespaces, s.snapshot.Namespaces, func(name string, _ *ir.Namespace) {
		out = append(out, Resource{xds.TypeNamespace, name})
	})
	differ(before.Services, s.snapshot.Services, func(k ir.Key, _ *ir.Service) { out = append(out, Resource{xds.TypeService, k.String()}) })
	differ(before.Pods, s.snapshot.Pods, func(uid string, p *ir.Pod) {
		out = append(out, Resource{xds.TypeWorkload, uid}, Resource{xds.TypeLocalPod, localName(p.Node, uid)})
		switch {
		case s.snapshot.Pods[uid] == nil:
			if delete(s.local[p.Node], uid); len(s.local[p.Node]) == 0 {
				delete(s.local, p.Node)
			}
		case s.local[p.Node] == nil:
			s.local[p.Node] = map[string]bool{uid: true}
		default:
			s.local[p.Node][uid] = true
		}
	})
	return out
}

// differ calls changed for what is another value than before, new or gone.
func differ[K comparable, V any](before, now map[K]*V, changed func(K, *V)) {
	for k, v := range now {
		if before[k] != v {
			changed(k, v)
		}
	}
	for k, v := range before {
		if now[k] == nil {
			changed(k, v)
		}
	}
}

func localName(node, uid string) string { return node + "/" + uid }

// spread hands a resource of a wildcard type that may have changed to the streams that are to have it.
func (s *Server) spread(k Resource) {
	streams := s.streams
	if k.TypeURL == xds.TypeLocalPod {
		node, _, _ := strings.Cut(k.Name, "/")
		streams = s.byNode[node]
	}
	var to []*stream
	for st := range streams {
		if st.wants(k.TypeURL) {
			to = append(to, st)
		}
	}
	if len(to) == 0 {
		delete(s.index, k) // made anew when somebody asks
		return
	}
	r := s.index[k]
	if r == nil {
		r = &resource{}
		s.index[k] = r
	}
	changed := s.rebuild(k, r)
	if r.body == nil {
		delete(s.index, k)
	}
	if !changed {
		return
	}
	for _, st := range to {
		st.dirty(k, s.generation)
	}
}

// rebuild makes a resource of the current snapshot; true: it changed.
func (s *Server) rebuild(k Resource, r *resource) bool {
	source, one := xds.Source(s.snapshot, k.TypeURL, k.Name)
	if one && r.source != nil && r.source == source {
		return false
	}
	r.source = nil
	if one {
		r.source = source
	}
	message, ok := xds.Build(s.snapshot, k.TypeURL, k.Name)
	if !ok {
		changed := r.body != nil
		r.body, r.version = nil, ""
		return changed
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		s.config.Log.Error("marshal resource", "type", k.TypeURL, "name", k.Name, "error", err)
		return false
	}
	sum := sha256.Sum256(body)
	version := hex.EncodeToString(sum[:8])
	if version == r.version {
		return false
	}
	r.version, r.body = version, &anypb.Any{TypeUrl: k.TypeURL, Value: body}
	return true
}

// subscribe adds a stream to a named resource.
func (s *Server) subscribe(st *stream, k Resource) {
	r := s.named[k]
	if r == nil {
		r = &resource{streams: map[*stream]bool{}}
		s.named[k] = r
		if s.snapshot != nil {
			s.rebuild(k, r)
		}
	}
	r.streams[st] = true
	if k.TypeURL == xds.TypeRoute {
		s.routes = nil
	}
}

func (s *Server) unsubscribe(st *stream, k Resource) {
	r := s.named[k]
	if r == nil {
		return
	}
	delete(r.streams, st)
	if len(r.streams) == 0 {
		delete(s.named, k)
	}
	if k.TypeURL == xds.TypeRoute {
		s.routes = nil
	}
}

// current returns the form of a resource in the current snapshot; no body: it has none.
func (s *Server) current(k Resource) (version string, body *anypb.Any) {
	if !wildcard[k.TypeURL] {
		if r := s.named[k]; r != nil {
			return r.version, r.body
		}
		return "", nil
	}
	r := s.index[k]
	if r == nil && s.snapshot != nil {
		r = &resource{}
		if s.rebuild(k, r) {
			s.index[k] = r
		}
	}
	if r == nil {
		return "", nil
	}
	return r.version, r.body
}
