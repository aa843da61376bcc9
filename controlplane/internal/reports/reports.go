// Package reports takes what the nodes' kernels hold, as their agents report it.
package reports

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/barrier"
)

// Config of a Store.
type Config struct {
	// Peer tells which node a call comes from.
	Peer func(ctx context.Context) (string, error)
	// Changed is called, without blocking, after each report.
	Changed func()
	Log     *slog.Logger
}

// Limits of what one node is listened to: an agent that is not ours any more must not exhaust the controller.
const (
	maxPods     = 2000
	maxProblems = 16
	maxText     = 2048
	maxName     = 256
)

// Store is the gRPC service Reports and what it was told.
type Store struct {
	meshv1.UnimplementedReportsServer
	config Config

	mu    sync.Mutex
	nodes map[string]*node
	// pass is given what agents say to this replica; nil: nobody is.
	pass func(node string, r *meshv1.NodeReport)
}

type node struct {
	bootID string
	synced bool
	// stream is the newest one, opened when it says; an older one that still talks is not listened to.
	stream, opened uint64
	// hello of the newest stream; direct: it is an agent's own, and open.
	hello  *meshv1.Hello
	direct bool
	// pods is replaced, never changed: View hands it out.
	pods map[string]*meshv1.PodReport
	// next collects the pods of a new stream until it is synced.
	next   map[string]*meshv1.PodReport
	health *meshv1.NodeHealth
}

// New makes a Store.
func New(c Config) *Store { return &Store{config: c, nodes: map[string]*node{}} }

// Report serves one agent.
func (s *Store) Report(stream meshv1.Reports_ReportServer) error {
	name, err := s.config.Peer(stream.Context())
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	session := s.Open(name)
	session.direct = true
	defer session.close()
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if hello := r.GetHello(); hello != nil && hello.Node != name {
			return status.Errorf(codes.PermissionDenied, "report: the caller is the agent of %s, not of %s", name, hello.Node)
		}
		if err := session.Take(r); err != nil {
			return err
		}
	}
}

// Session is one stream of a node's reports, to this replica or to another one that passes it on.
type Session struct {
	store  *Store
	node   string
	id     uint64
	direct bool
}

// Open begins a session; what is said in it counts from its Hello on.
func (s *Store) Open(node string) *Session { return &Session{store: s, node: node} }

// Take takes what the node's agent says.
func (x *Session) Take(r *meshv1.NodeReport) error {
	s := x.store
	s.mu.Lock()
	err := x.take(r)
	if err == nil && x.direct && s.pass != nil {
		s.pass(x.node, r)
	}
	s.mu.Unlock()
	if err == nil && r.GetHello() == nil {
		s.config.Changed()
	}
	return err
}

func (x *Session) take(r *meshv1.NodeReport) (err error) {
	if hello := r.GetHello(); hello != nil {
		x.id, err = x.store.begin(x.node, hello, x.direct)
		return err
	}
	if x.id == 0 {
		return status.Error(codes.FailedPrecondition, "report: say Hello first")
	}
	return x.store.take(x.node, x.id, r)
}

// close notes that an agent's stream has ended.
func (x *Session) close() {
	x.store.mu.Lock()
	defer x.store.mu.Unlock()
	if n := x.store.nodes[x.node]; n != nil && n.stream == x.id {
		n.direct = false
	}
}

// Pass gives to everything that agents say to this replica, from the beginning of each open stream on, until stop is called. It
// must not block.
func (s *Store) Pass(to func(node string, r *meshv1.NodeReport)) (stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, n := range s.nodes {
		if !n.direct {
			continue
		}
		to(name, &meshv1.NodeReport{Kind: &meshv1.NodeReport_Hello{Hello: n.hello}})
		pods := n.next
		if pods == nil {
			pods = n.pods
		}
		for _, p := range pods {
			to(name, &meshv1.NodeReport{Kind: &meshv1.NodeReport_Pod{Pod: p}})
		}
		if n.health != nil {
			to(name, &meshv1.NodeReport{Kind: &meshv1.NodeReport_Health{Health: n.health}})
		}
		if n.next == nil {
			to(name, &meshv1.NodeReport{Kind: &meshv1.NodeReport_Synced{Synced: &meshv1.Synced{}}})
		}
	}
	s.pass = to
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pass = nil
	}
}

// Begin forgets what nodes said that do not speak to this replica now: it may be old. A leader begins with it.
func (s *Store) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.nodes, func(_ string, n *node) bool { return !n.direct })
}

// begin makes a stream the newest one of its node. What a replica passes on may be older than what another one has heard.
func (s *Store) begin(name string, hello *meshv1.Hello, direct bool) (uint64, error) {
	n := s.nodes[name]
	if n == nil {
		n = &node{pods: map[string]*meshv1.PodReport{}}
		s.nodes[name] = n
	}
	if n.bootID == hello.BootId && hello.Opened < n.opened {
		return 0, status.Error(codes.Aborted, "report: a newer stream of this node is known")
	}
	if n.bootID != "" && n.bootID != hello.BootId {
		s.config.Log.Info("node booted anew: what it held is void", "node", name)
		n.pods, n.synced = map[string]*meshv1.PodReport{}, false
	}
	n.bootID, n.opened, n.health = hello.BootId, hello.Opened, nil
	n.hello, n.direct = hello, direct
	n.next = map[string]*meshv1.PodReport{}
	n.stream++
	return n.stream, nil
}

func (s *Store) take(name string, id uint64, r *meshv1.NodeReport) error {
	n := s.nodes[name]
	if n == nil || n.stream != id {
		return status.Error(codes.Aborted, "report: a newer stream of this node has taken over")
	}
	switch k := r.Kind.(type) {
	case *meshv1.NodeReport_Pod:
		k.Pod = bounded(k.Pod)
		return n.pod(k.Pod)
	case *meshv1.NodeReport_Synced:
		if n.next != nil {
			n.pods, n.next, n.synced = n.next, nil, true
		}
	case *meshv1.NodeReport_Health:
		k.Health.RefusedServices = k.Health.RefusedServices[:min(len(k.Health.RefusedServices), maxPods)]
		n.health = k.Health
	}
	return nil
}

// pod takes a report. Those of a new stream count when it has told everything, what is enforced at once: peers must know.
func (n *node) pod(p *meshv1.PodReport) error {
	if n.next != nil && p.State == meshv1.PodState_POD_STATE_ENFORCED && len(n.pods) < maxPods {
		n.pods = maps.Clone(n.pods)
		n.pods[p.Uid] = p
	}
	pods := n.next
	if pods == nil {
		pods = maps.Clone(n.pods)
	}
	if n.next == nil && p.State == meshv1.PodState_POD_STATE_GONE {
		delete(pods, p.Uid)
	} else {
		pods[p.Uid] = p
	}
	if len(pods) > maxPods {
		return status.Errorf(codes.ResourceExhausted, "report: more than %d pods of one node", maxPods)
	}
	if n.next == nil {
		n.pods = pods
	}
	return nil
}

// bounded is a report of a size that conditions can carry. It holds no part of the message that it came in.
func bounded(p *meshv1.PodReport) *meshv1.PodReport {
	out := &meshv1.PodReport{
		Uid: clip(p.Uid, maxName), Sandbox: clip(p.Sandbox, maxName), NetnsCookie: p.NetnsCookie, State: p.State, Reason: clip(p.Reason, maxName),
		Message: clip(p.Message, maxText), InboundPolicy: clip(p.InboundPolicy, maxName), StartedUnheld: p.StartedUnheld,
		PreexistingConnections: p.PreexistingConnections, ProxyGeneration: p.ProxyGeneration, Took: p.Took, SettledPolicy: clip(p.SettledPolicy, maxName), Refused: clip(p.Refused, maxText),
		Shortcut: p.Shortcut, ShortcutRefused: clip(p.ShortcutRefused, maxText),
	}
	for _, q := range p.PolicyProblems[:min(len(p.PolicyProblems), maxProblems)] {
		out.PolicyProblems = append(out.PolicyProblems, clip(q, maxText))
	}
	return out
}

// clip cuts at a rune's start.
func clip(s string, limit int) string {
	for limit < len(s) && limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return strings.Clone(s[:min(len(s), limit)])
}

// View returns what each node said of pods, and the nodes that have told everything.
func (s *Store) View() (reports barrier.Reports, synced map[string]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	reports, synced = barrier.Reports{}, map[string]bool{}
	for name, n := range s.nodes {
		reports[name], synced[name] = n.pods, n.synced
	}
	return reports, synced
}

// Lacking lists those of some nodes that have not said that they trust a bundle, by its hash.
func (s *Store) Lacking(hash string, nodes []string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, name := range nodes {
		if n := s.nodes[name]; n == nil || n.health.GetTrustBundle() != hash {
			out = append(out, name)
		}
	}
	return out
}
