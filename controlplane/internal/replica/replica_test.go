package replica

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/reports"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
)

// deadline is far beyond what any of these takes.
const deadline = 30 * time.Second

var quiet = slog.New(slog.DiscardHandler)

func TestOrdersArriveAsTheyWereGiven(t *testing.T) {
	d := func(stage ir.Stage, mtls bool) resolve.Decision { return resolve.Decision{Stage: stage, MTLS: mtls} }
	lost := resolve.Decision{Stage: ir.Captured, Lost: true, Policy: "p", Moved: "q"}
	full := resolve.Decision{Stage: ir.Enforced, MTLS: true, Lost: true, Policy: "p", Moved: "q", Proxy: 1}
	for v, i := reflect.ValueOf(full), 0; i < v.NumField(); i++ {
		if v.Field(i).IsZero() {
			t.Fatalf("%s is not tried", v.Type().Field(i).Name)
		}
	}
	var sent, got Orders
	whole := true
	for i, now := range []map[string]resolve.Decision{
		nil, {"a": d(ir.Captured, false)}, {"a": d(ir.Captured, true), "b": lost}, {"a": d(ir.Captured, true), "b": lost}, {"b": lost}, {}, {"c": full},
	} {
		next := Orders{Orders: epoch.Orders{Term: 3, Number: uint64(i)}, Decided: uint64(i), Covers: epoch.Kinds{"pods": uint64(i)}, Decisions: now}
		before := maps.Clone(got.Decisions)
		kept := got.Decisions
		m := difference(sent, next, whole)
		if m.Whole != (i == 1) {
			t.Errorf("message %d: whole %t", i, m.Whole)
		}
		sent, whole, got = next, whole && next.Number == 0, apply(got, m)
		if !maps.Equal(got.Decisions, now) || got.Orders != next.Orders || got.Decided != next.Decided || got.Covers["pods"] != uint64(i) {
			t.Errorf("message %d: %+v, want %+v", i, got, next)
		}
		if !maps.Equal(kept, before) {
			t.Errorf("message %d changed what was handed out", i)
		}
	}
	if again := difference(sent, sent, false); len(again.Orders)+len(again.Gone) != 0 {
		t.Errorf("nothing new: %v", again)
	}
}

// site is a replica with its stores.
type site struct {
	server *serve.Server
	store  *reports.Store
}

func newSite() site {
	return site{serve.New(serve.Config{Log: quiet}), reports.New(reports.Config{Changed: func() {}, Log: quiet, Peer: func(context.Context) (string, error) { return "n2", nil }})}
}

// pair is a leader and a follower on a real connection.
type pair struct {
	*testing.T
	leader, follower site
	hub              *Hub
	f                *Follower
	listener         *bufconn.Listener

	mu       sync.Mutex
	presence Presence
	taken    []Orders
	stranger bool
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{T: t, leader: newSite(), follower: newSite(), listener: bufconn.Listen(1 << 20), presence: Presence{Address: "leader"}}
	p.hub = NewHub(HubConfig{Server: p.leader.server, Reports: p.leader.store, Log: quiet, Peer: func(context.Context) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.stranger {
			return errors.New("no replica")
		}
		return nil
	}})
	g := grpc.NewServer()
	meshv1.RegisterReplicasServer(g, p.hub)
	go func() { _ = g.Serve(p.listener) }()
	t.Cleanup(g.Stop)
	p.f = New(FollowerConfig{
		Name: "f", Server: p.follower.server, Reports: p.follower.store, Log: quiet, Limit: 300 * time.Millisecond, Dial: p.dial,
		Leader: func() Presence { p.mu.Lock(); defer p.mu.Unlock(); return p.presence },
		Take: func(o Orders) {
			p.mu.Lock()
			p.taken = append(p.taken, o)
			p.mu.Unlock()
			p.follower.server.Set(serve.Version{Snapshot: &ir.Snapshot{}, Mark: epoch.Mark{Orders: o.Orders}, Number: o.Number})
			p.f.Changed()
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	go p.f.Run(ctx)
	return p
}

func (p *pair) dial(string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.listener.DialContext(ctx) }))
}

func (p *pair) eventually(what string, so func() bool) {
	p.Helper()
	for end := time.Now().Add(deadline); !so(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			p.Fatal("never: ", what)
		}
	}
}

func (p *pair) give(term, number uint64) {
	p.hub.Give(Orders{Orders: epoch.Orders{Term: term, Number: number}, Decisions: map[string]resolve.Decision{"u": {Stage: ir.Captured}}})
}

// reportStream is an agent's.
type reportStream struct {
	grpc.ServerStream
	says chan *meshv1.NodeReport
	ctx  context.Context
}

func (s *reportStream) Context() context.Context     { return s.ctx }
func (s *reportStream) Send(*meshv1.ReportAck) error { return nil }
func (s *reportStream) Recv() (*meshv1.NodeReport, error) {
	select {
	case r := <-s.says:
		return r, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

// TestAFollowerTellsAndServes: orders reach the follower; what its agents report reaches the leader, from before it followed too.
func TestAFollowerTellsAndServes(t *testing.T) {
	p := newPair(t)
	agent := &reportStream{says: make(chan *meshv1.NodeReport, 10), ctx: t.Context()}
	go func() { _ = p.follower.store.Report(agent) }()
	agent.says <- &meshv1.NodeReport{Kind: &meshv1.NodeReport_Hello{Hello: &meshv1.Hello{Node: "n2", BootId: "b", Opened: 5}}}
	agent.says <- &meshv1.NodeReport{Kind: &meshv1.NodeReport_Pod{Pod: &meshv1.PodReport{Uid: "u", State: meshv1.PodState_POD_STATE_CAPTURED}}}
	agent.says <- &meshv1.NodeReport{Kind: &meshv1.NodeReport_Health{Health: &meshv1.NodeHealth{TrustBundle: "h"}}}
	agent.says <- &meshv1.NodeReport{Kind: &meshv1.NodeReport_Synced{Synced: &meshv1.Synced{}}}
	p.eventually("the follower has the report", func() bool { _, synced := p.follower.store.View(); return synced["n2"] })

	p.hub.Lead(7)
	p.eventually("the leader has it before it has orders", func() bool {
		reports, synced := p.leader.store.View()
		return synced["n2"] && reports["n2"]["u"].GetState() == meshv1.PodState_POD_STATE_CAPTURED && len(p.leader.store.Lacking("h", []string{"n2"})) == 0
	})
	p.give(7, 1)
	p.eventually("the follower serves the orders", func() bool { return p.follower.server.Orders() == epoch.Orders{Term: 7, Number: 1} && p.f.Current() })
	p.leader.server.Set(serve.Version{Snapshot: &ir.Snapshot{}, Mark: epoch.Mark{Orders: epoch.Orders{Term: 7, Number: 1}}, Number: 1})

	agent.says <- &meshv1.NodeReport{Kind: &meshv1.NodeReport_Pod{Pod: &meshv1.PodReport{Uid: "u", State: meshv1.PodState_POD_STATE_ENFORCED}}}
	p.eventually("a change is passed on", func() bool {
		reports, _ := p.leader.store.View()
		return reports["n2"]["u"].GetState() == meshv1.PodState_POD_STATE_ENFORCED
	})
	if p.leader.server.Followers() != 1 {
		t.Errorf("%d followers", p.leader.server.Followers())
	}
	p.hub.Lead(0)
	p.eventually("the leader that leads no longer has no followers", func() bool { return p.leader.server.Followers() == 0 })
}

// TestAFollowerThatIsCutOffLetsItsAgentsGo, but not when nobody leads.
func TestAFollowerThatIsCutOffLetsItsAgentsGo(t *testing.T) {
	p := newPair(t)
	p.hub.Lead(7)
	p.give(7, 1)
	p.eventually("it serves", func() bool { return p.follower.server.Ready() && p.f.Current() })
	set := func(now Presence, stranger bool) {
		p.mu.Lock()
		p.presence, p.stranger = now, stranger
		p.mu.Unlock()
	}
	set(Presence{}, true) // the API server is away, and so is the leader
	p.hub.Lead(0)
	p.eventually("it hears of no leader", func() bool { return !p.f.Current() })
	time.Sleep(2 * 300 * time.Millisecond)
	if !p.follower.server.Ready() {
		t.Fatal("nobody leads, and it let its agents go")
	}
	set(Presence{Address: "leader"}, true) // there is one, and it cannot be followed
	p.eventually("it lets its agents go", p.follower.server.Suspended)
	set(Presence{Address: "leader"}, false)
	p.hub.Lead(9)
	p.give(9, 1)
	p.eventually("it serves again", func() bool { return p.follower.server.Ready() && p.follower.server.Orders().Term == 9 })
	// The orders come, and cannot be served: it has not read what they are about.
	p.f.config.Take = func(Orders) {}
	p.give(9, 2)
	p.eventually("it is behind", p.follower.server.Suspended)
}

// TestOnlyReplicasFollow: nobody else is given orders, or believed.
func TestOnlyReplicasFollow(t *testing.T) {
	p := newPair(t)
	p.mu.Lock()
	p.stranger = true
	p.mu.Unlock()
	p.hub.Lead(7)
	conn, err := p.dial("")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := meshv1.NewReplicasClient(conn).Follow(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stranger follows: %v", err)
	}
}

// TestALeaderCountsOtherReplicasNodes: as answered is what they answered of its own orders alone.
func TestALeaderCountsOtherReplicasNodes(t *testing.T) {
	s := newSite().server
	generation := s.Set(serve.Version{Snapshot: &ir.Snapshot{}, Mark: epoch.Mark{Orders: epoch.Orders{Term: 1, Number: 1}}, Number: 1})
	s.Serves("f", 0)
	s.Told("f", &meshv1.NodeAnswers{Node: "n2", Number: 1 << 63})
	if s.Answered() != 0 || !slices.Equal(s.State().Behind, []string{"n2"}) || s.Served() != 0 {
		t.Errorf("the replica serves nothing of this leader's: %d, %+v", s.Answered(), s.State())
	}
	s.Serves("f", generation)
	if s.Answered() != generation || s.AnsweredBy()["n2"] != generation || s.Served() != generation {
		t.Errorf("it does: %d", s.Answered())
	}
	s.Told("f", &meshv1.NodeAnswers{Node: "n2", Joining: true, Number: 1 << 63})
	if s.Answered() != 0 {
		t.Error("a node that has not asked for everything")
	}
	s.Left("f")
	if s.Answered() != 0 || !slices.Equal(s.State().Away, []string{"n2"}) {
		t.Errorf("the replica is gone, its node counts as just gone: %+v", s.State())
	}
}
