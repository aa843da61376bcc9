package replica

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/reports"
	"github.com/weftmesh/weft/controlplane/internal/serve"
)

// Presence is what is known of a leader.
type Presence struct {
	// Address of the leader that holds the Lease now; empty: none does, or nothing is known of it.
	Address string
	// Self: this replica leads.
	Self bool
}

// FollowerConfig of a Follower.
type FollowerConfig struct {
	// Name of this replica.
	Name string
	// Leader tells who leads.
	Leader func() Presence
	// Dial connects to a leader.
	Dial    func(address string) (*grpc.ClientConn, error)
	Server  *serve.Server
	Reports *reports.Store
	// Take takes a leader's orders; it must not block. Take of what is older does nothing.
	Take func(Orders)
	// Limit is how long this replica keeps its agents when it is behind a leader that is there; 0: 8 seconds.
	Limit time.Duration
	Log   *slog.Logger
}

// Follower is the side of the replicas that do not lead.
type Follower struct {
	config FollowerConfig
	wake   chan struct{}

	mu    sync.Mutex
	queue []*meshv1.Following
	// heard is when a leader spoke last, wanted the newest orders that it gave.
	heard  time.Time
	wanted epoch.Orders
}

// lookEvery is how often it is looked who leads.
const lookEvery = 250 * time.Millisecond

// New makes a Follower.
func New(c FollowerConfig) *Follower {
	if c.Limit == 0 {
		c.Limit = 8 * time.Second
	}
	return &Follower{config: c, wake: make(chan struct{}, 1)}
}

// Changed says that there may be something to tell the leader.
func (f *Follower) Changed() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// Run follows whoever leads until ctx ends.
func (f *Follower) Run(ctx context.Context) {
	go f.judge(ctx)
	for ctx.Err() == nil {
		if p := f.config.Leader(); !p.Self && p.Address != "" {
			err := f.follow(ctx, p.Address)
			if ctx.Err() == nil {
				f.config.Log.Info("the leader is followed no longer", "leader", p.Address, "error", err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(lookEvery):
		}
	}
}

// judge lets the agents go while this replica is behind a leader that is there: it would keep them from what they are to do.
// Without a leader nobody decides anything, and what is known goes on.
func (f *Follower) judge(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	good := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !f.behind(time.Now()) {
			good = time.Now()
		}
		late := time.Since(good) > f.config.Limit
		if late && !f.config.Server.Suspended() {
			f.config.Log.Warn("behind the leader: agents are to find another replica", "since", good.UTC().Format(time.RFC3339))
		} else if !late && f.config.Server.Suspended() {
			f.config.Log.Info("no longer behind the leader: agents are served again")
		}
		f.config.Server.Suspend(late)
	}
}

// behind tells whether a leader is there, as far as is known, whose orders are not served here.
func (f *Follower) behind(now time.Time) bool {
	p := f.config.Leader()
	if p.Self {
		return false
	}
	f.mu.Lock()
	heard, wanted := now.Sub(f.heard) < silence, f.wanted
	f.mu.Unlock()
	if !heard {
		return p.Address != ""
	}
	return f.config.Server.Orders().Before(wanted)
}

// Current tells whether this replica serves what a leader that is there orders.
func (f *Follower) Current() bool {
	f.mu.Lock()
	heard := time.Since(f.heard) < silence
	f.mu.Unlock()
	return heard && !f.behind(time.Now())
}

// follow follows one leader for as long as it leads.
func (f *Follower) follow(ctx context.Context, address string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	conn, err := f.config.Dial(address)
	if err != nil {
		return fmt.Errorf("dial the leader: %w", err)
	}
	defer conn.Close()
	quiet := time.AfterFunc(silence, func() { cancel(fmt.Errorf("the leader has said nothing for %s", silence)) })
	defer quiet.Stop()
	stream, err := meshv1.NewReplicasClient(conn).Follow(ctx)
	if err != nil {
		return fmt.Errorf("follow the leader: %w", err)
	}
	if err := stream.Send(&meshv1.Following{Kind: &meshv1.Following_Name{Name: f.config.Name}}); err != nil {
		return fmt.Errorf("follow the leader: %w", err)
	}
	var term uint64
	termKnown := make(chan struct{})
	go func() {
		var orders Orders
		for first := true; ; first = false {
			m, err := stream.Recv()
			if err != nil {
				cancel(fmt.Errorf("follow the leader: %w", err))
				return
			}
			quiet.Reset(silence)
			orders = apply(orders, m)
			f.mu.Lock()
			f.heard = time.Now()
			if m.Number > 0 {
				f.wanted = orders.Orders
			}
			f.mu.Unlock()
			if first {
				term = m.Term
				close(termKnown)
				f.config.Log.Info("following the leader", "leader", address, "term", m.Term)
			}
			if m.Number > 0 {
				f.config.Take(orders)
			}
		}
	}()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-termKnown:
	}
	return f.tell(ctx, stream, term)
}

// tell says what the agents of this replica answer and report.
func (f *Follower) tell(ctx context.Context, stream meshv1.Replicas_FollowClient, term uint64) error {
	f.mu.Lock()
	f.queue = nil
	f.mu.Unlock()
	stop := f.config.Reports.Pass(func(node string, r *meshv1.NodeReport) {
		f.mu.Lock()
		f.queue = append(f.queue, &meshv1.Following{Kind: &meshv1.Following_Report{Report: &meshv1.PassedReport{Node: node, Report: r}}})
		f.mu.Unlock()
		f.Changed()
	})
	defer stop()
	said := map[string]*meshv1.NodeAnswers{}
	served := uint64(0)
	f.Changed()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-f.wake:
		}
		f.mu.Lock()
		out := f.queue
		f.queue = nil
		f.mu.Unlock()
		// What nodes answered comes before the number that it is about.
		answers, number := f.config.Server.Answers(term)
		for node, n := range answers {
			if before := said[node]; before == nil || !proto.Equal(before, n) {
				said[node] = n
				out = append(out, &meshv1.Following{Kind: &meshv1.Following_Answers{Answers: n}})
			}
		}
		for node := range said {
			if answers[node] == nil {
				delete(said, node)
				out = append(out, &meshv1.Following{Kind: &meshv1.Following_Gone{Gone: node}})
			}
		}
		if number != served {
			served = number
			out = append(out, &meshv1.Following{Kind: &meshv1.Following_Served{Served: number}})
		}
		for _, m := range out {
			if err := stream.Send(m); err != nil {
				<-ctx.Done() // Recv says why
				return context.Cause(ctx)
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}
