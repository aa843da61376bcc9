// Package replica lets every replica serve agents under one leader's orders (docs/adr/0007-replicas.md): the leader gives its
// decisions, the others serve them and tell it what their agents answer and report.
package replica

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/reports"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
)

const (
	// beat is how often a leader that has nothing new says that it is there.
	beat = time.Second
	// silence is how long a replica hears nothing of its leader before it looks for another.
	silence = 5 * time.Second
	// pause gathers what a replica says.
	pause = 10 * time.Millisecond
)

// Orders are a leader's decisions.
type Orders struct {
	epoch.Orders
	// Decided is the number with which the decisions became what they are.
	Decided uint64
	// Covers is what the leader had read.
	Covers    epoch.Kinds
	Decisions map[string]resolve.Decision
}

// HubConfig of a Hub.
type HubConfig struct {
	// Peer says no to a caller that is no replica.
	Peer    func(ctx context.Context) error
	Server  *serve.Server
	Reports *reports.Store
	Log     *slog.Logger
}

// Hub is the leader's side: the gRPC service Replicas.
type Hub struct {
	meshv1.UnimplementedReplicasServer
	config HubConfig

	mu   sync.Mutex
	term uint64 // 0: this replica does not lead
	now  Orders
	next chan struct{} // closed and replaced when now is another one
	live map[string]uint64
	last uint64
}

// NewHub makes a Hub of a replica that does not lead yet.
func NewHub(c HubConfig) *Hub {
	return &Hub{config: c, next: make(chan struct{}), live: map[string]uint64{}}
}

// Lead begins a term, or ends it: 0.
func (h *Hub) Lead(term uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.term, h.now = term, Orders{Orders: epoch.Orders{Term: term}}
	h.wake()
}

// Give hands new orders to all followers, without waiting for them.
func (h *Hub) Give(o Orders) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if o.Term != h.term {
		return
	}
	h.now = o
	h.wake()
}

func (h *Hub) wake() {
	close(h.next)
	h.next = make(chan struct{})
}

func (h *Hub) current() (Orders, uint64, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now, h.term, h.next
}

// Follow serves one follower.
func (h *Hub) Follow(stream meshv1.Replicas_FollowServer) error {
	if err := h.config.Peer(stream.Context()); err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	name := first.GetName()
	if name == "" {
		return status.Error(codes.InvalidArgument, "follow: say the replica's name first")
	}
	_, term, _ := h.current()
	if term == 0 {
		return status.Error(codes.FailedPrecondition, "follow: this replica does not lead")
	}
	id := h.begin(name)
	defer h.end(name, id)
	h.config.Log.Info("a replica follows", "replica", name)
	defer h.config.Log.Info("a replica follows no longer", "replica", name)
	failed := make(chan error, 1)
	go func() { failed <- h.listen(stream, name, id) }()
	return h.tell(stream, term, failed)
}

// begin makes a stream the one that counts for a replica.
func (h *Hub) begin(name string) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last++
	h.live[name] = h.last
	h.config.Server.Left(name)
	h.config.Server.Serves(name, 0)
	return h.last
}

func (h *Hub) end(name string, id uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.live[name] == id {
		delete(h.live, name)
		h.config.Server.Left(name)
	}
}

// counts does something if a stream is still the one that counts.
func (h *Hub) counts(name string, id uint64, do func()) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.live[name] != id {
		return false
	}
	do()
	return true
}

// tell gives orders until the term ends.
func (h *Hub) tell(stream meshv1.Replicas_FollowServer, term uint64, failed <-chan error) error {
	tick := time.NewTicker(beat)
	defer tick.Stop()
	var sent Orders
	whole := true
	for {
		now, current, next := h.current()
		if current != term {
			return status.Error(codes.FailedPrecondition, "follow: this replica leads no longer")
		}
		if err := stream.Send(difference(sent, now, whole)); err != nil {
			return err
		}
		sent, whole = now, whole && now.Number == 0
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case err := <-failed:
			return err
		case <-next:
		case <-tick.C:
		}
	}
}

// difference is what a follower that has some orders is to be sent to have others.
func difference(had, now Orders, whole bool) *meshv1.Orders {
	out := &meshv1.Orders{Term: now.Term, Number: now.Number, Decided: now.Decided, Covers: now.Covers, Whole: whole && now.Number > 0}
	for uid, d := range now.Decisions {
		if before, ok := had.Decisions[uid]; !ok || before != d {
			out.Orders = append(out.Orders, &meshv1.Order{Uid: uid, Stage: meshv1.Stage(d.Stage), Mtls: d.MTLS, Lost: d.Lost, Policy: d.Policy, Moved: d.Moved, Proxy: d.Proxy})
		}
	}
	for uid := range had.Decisions {
		if _, still := now.Decisions[uid]; !still {
			out.Gone = append(out.Gone, uid)
		}
	}
	return out
}

// apply makes of orders what a message changes them to.
func apply(had Orders, m *meshv1.Orders) Orders {
	next := Orders{Orders: epoch.Orders{Term: m.Term, Number: m.Number}, Decided: m.Decided, Covers: m.Covers, Decisions: had.Decisions}
	if m.Whole || len(m.Orders) > 0 || len(m.Gone) > 0 { // those that were given are never changed
		next.Decisions = maps.Clone(had.Decisions)
	}
	if next.Decisions == nil || m.Whole {
		next.Decisions = map[string]resolve.Decision{}
	}
	for _, o := range m.Orders {
		next.Decisions[o.Uid] = resolve.Decision{Stage: ir.Stage(o.Stage), MTLS: o.Mtls, Lost: o.Lost, Policy: o.Policy, Moved: o.Moved, Proxy: o.Proxy}
	}
	for _, uid := range m.Gone {
		delete(next.Decisions, uid)
	}
	return next
}

// listen takes what a follower says of its nodes.
func (h *Hub) listen(stream meshv1.Replicas_FollowServer, name string, id uint64) error {
	sessions := map[string]*reports.Session{}
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		still := h.counts(name, id, func() {
			switch k := m.Kind.(type) {
			case *meshv1.Following_Served:
				h.config.Server.Serves(name, k.Served)
			case *meshv1.Following_Answers:
				h.config.Server.Told(name, k.Answers)
			case *meshv1.Following_Gone:
				h.config.Server.Gone(name, k.Gone)
			case *meshv1.Following_Report:
				node := k.Report.GetNode()
				if k.Report.GetReport().GetHello() != nil || sessions[node] == nil {
					sessions[node] = h.config.Reports.Open(node)
				}
				if err := sessions[node].Take(k.Report.GetReport()); err != nil {
					h.config.Log.Debug("a report that was passed on does not count", "replica", name, "node", node, "error", err)
				}
			}
		})
		if !still {
			return errors.New("a newer stream of this replica has taken over")
		}
	}
}
