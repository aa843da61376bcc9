// Package engine turns the crank: new objects, reports and acknowledgements go in, a snapshot and conditions come out. One
// goroutine does it, so that no two steps of a pod's life happen at once.
package engine

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/weftmesh/weft/controlplane/internal/barrier"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/replica"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
)

// Config of an Engine.
type Config struct {
	// Server serves snapshots, and tells what the nodes answered.
	Server Server
	// Reports returns what the nodes' kernels hold, and which nodes have told everything.
	Reports func() (barrier.Reports, map[string]bool)
	// Give gives a leader's orders to the other replicas; it must not block.
	Give func(replica.Orders)
	// Status takes a complete picture after each turn of a leader; it must not block.
	Status func(Picture)
	// Served is told of each snapshot that is served; it must not block.
	Served func(*ir.Snapshot)
	// Resolved gets how long each snapshot took to make, Converged how long each took until every node had answered it.
	Resolved, Converged func(took time.Duration)
}

// Server is package serve's, as far as an Engine needs it.
type Server interface {
	// Expect names nodes that served under the controller before this one.
	Expect(nodes []string)
	// Set serves a snapshot and returns its generation; Advance says that it is a later order's, too.
	Set(serve.Version) uint64
	Advance(m epoch.Mark, number uint64)
	// Answered, AnsweredBy, State and Served tell what the nodes answered, and what all replicas serve.
	Answered() uint64
	AnsweredBy() map[string]uint64
	State() serve.State
	Served() uint64
}

// Picture is what conditions are made from.
type Picture struct {
	Input      resolve.Input
	Snapshot   *ir.Snapshot
	Problems   []resolve.Problem
	Generation uint64
	Nodes      serve.State
	Reports    barrier.Reports
	// Good are the policies' last good forms, by uid.
	Good map[string]resolve.Good
}

// Engine holds the current snapshot.
type Engine struct {
	config Config
	turn   chan struct{}
	crank  crank // the turns' own

	mu    sync.Mutex
	input *resolve.Input
	// term of this replica as the leader; 0: it follows orders.
	term    uint64
	orders  *replica.Orders
	current bool // when it began to lead it served the newest orders
	shown   *ir.Snapshot
	newer   chan struct{}
	// since is when the turn that is under way began; zero: none is.
	since time.Time
}

// New makes an Engine; Run turns it.
func New(c Config) *Engine {
	return &Engine{config: c, turn: make(chan struct{}, 1), newer: make(chan struct{})}
}

// Input gives a new set of objects.
func (e *Engine) Input(in resolve.Input) {
	e.mu.Lock()
	e.input = &in
	e.mu.Unlock()
	e.Changed()
}

// Lead makes this replica the leader of a term, or a follower: 0. current: it served what the leader before ordered, so far as can
// be known; else its orders may be older than the pods' conditions.
func (e *Engine) Lead(term uint64, current bool) {
	e.mu.Lock()
	e.term, e.current = term, current
	e.mu.Unlock()
	e.Changed()
}

// Take takes a leader's orders. Those that are older than what is known are not followed.
func (e *Engine) Take(o replica.Orders) {
	e.mu.Lock()
	if e.orders == nil || e.orders.Before(o.Orders) {
		e.orders = &o
	}
	e.mu.Unlock()
	e.Changed()
}

// Changed says that reports or acknowledgements changed.
func (e *Engine) Changed() {
	select {
	case e.turn <- struct{}{}:
	default:
	}
}

// Snapshot returns the current snapshot, nil before the first, and a channel that is closed when a newer one is there.
func (e *Engine) Snapshot() (*ir.Snapshot, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.shown, e.newer
}

// Busy is how long the turn that is under way has taken so far; 0: none is.
func (e *Engine) Busy() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.since.IsZero() {
		return 0
	}
	return time.Since(e.since)
}

// Run turns until ctx ends.
func (e *Engine) Run(ctx context.Context) {
	// A pod's step can wait for time alone to pass (a node that is gone for good), so the crank turns now and then.
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.turn:
		case <-tick.C:
		}
		e.Turn()
	}
}

// Turn is one turn. Run calls it.
func (e *Engine) Turn() {
	e.mu.Lock()
	input, term, orders := e.input, e.term, e.orders
	e.since = time.Now()
	e.mu.Unlock()
	switch {
	case input == nil:
	case term != 0:
		e.lead(&e.crank, input, term)
	default:
		e.follow(&e.crank, input, orders)
	}
	e.mu.Lock()
	e.since = time.Time{}
	e.mu.Unlock()
}

// crank is what lasts from turn to turn.
type crank struct {
	// term that this replica leads in; 0: it follows.
	term   uint64
	steps  *barrier.Barrier
	result *resolve.Result
	used   *resolve.Input
	// mark names the orders that are served, decisions are what they say; nil: there are none yet.
	mark      epoch.Orders
	decided   uint64 // the number with which the decisions became what they are
	decisions map[string]resolve.Decision
	// awaited are nodes that a leader that has just begun hears first, until then.
	awaited []string
	until   time.Time

	generation uint64
	// under way are the generations that some node has not answered yet, oldest first.
	underWay []published
	// waits is a picture that is told when every replica serves it.
	waits *Picture
}

// told is what agents are told of a snapshot.
func (c *crank) told(input *resolve.Input) epoch.Mark {
	return epoch.Mark{Orders: epoch.Orders{Term: c.mark.Term, Number: c.decided}, Made: input.Made}
}

type published struct {
	generation uint64
	at         time.Time
}

// hearLimit is how long a leader that begins waits to hear every node that served, while it goes on serving the orders of the
// leader before it.
const hearLimit = 30 * time.Second

// follow is one turn of a replica that does not lead: its objects under the leader's orders.
func (e *Engine) follow(c *crank, input *resolve.Input, orders *replica.Orders) {
	if c.term != 0 { // it led until now: its own orders are the newest that it knows
		c.term, c.steps, c.awaited, c.waits, c.underWay = 0, nil, nil, nil, nil
	}
	// Orders about what is not known here yet would not be what is served.
	newer := orders != nil && c.mark.Before(orders.Orders) && input.Seen.Covers(orders.Covers)
	same := false
	if newer {
		same = c.decisions != nil && maps.Equal(c.decisions, orders.Decisions)
		c.mark, c.decided, c.decisions = orders.Orders, orders.Decided, orders.Decisions
	}
	switch {
	case c.decisions == nil:
	case c.used != input || newer && !same:
		e.again(c, input)
	case newer:
		e.config.Server.Advance(c.told(input), c.mark.Number)
	}
}

// again serves the objects under the orders that are served.
func (e *Engine) again(c *crank, input *resolve.Input) {
	c.result = e.resolve(c.result, input, c.decisions)
	c.used = input
	e.serve(c)
}

// begin takes over from the leader before: its orders, if they are known, else what it wrote into the pods' conditions. The last
// orders may not have come here: no decision is made before the nodes have been heard, and until then agents that have newer
// ones are given nothing.
func (e *Engine) begin(c *crank, input *resolve.Input, term uint64) {
	decisions, nodes := seed(input)
	e.mu.Lock()
	if o := e.orders; !e.current {
		c.decisions = nil
	} else if o != nil && c.mark.Before(o.Orders) { // given, and not served yet
		c.decisions = o.Decisions
	}
	e.mu.Unlock()
	c.term, c.awaited, c.waits = term, nil, nil
	if c.decisions != nil {
		decisions, c.awaited, c.until = c.decisions, nodes, time.Now().Add(hearLimit)
		time.AfterFunc(hearLimit, e.Changed)
	}
	c.steps = barrier.New(decisions)
	e.config.Server.Expect(nodes)
}

// heard tells whether a leader that begins may decide.
func (e *Engine) heard(c *crank, synced map[string]bool) bool {
	if time.Now().Before(c.until) && slices.ContainsFunc(c.awaited, func(node string) bool { return !synced[node] }) {
		return false
	}
	c.awaited = nil
	return true
}

// lead is one turn of the leader.
func (e *Engine) lead(c *crank, input *resolve.Input, term uint64) {
	begins := c.term != term
	if begins {
		e.begin(c, input, term)
	}
	reports, synced := e.config.Reports()
	if len(c.awaited) > 0 && !e.heard(c, synced) {
		if c.decisions != nil && c.used != input {
			e.again(c, input)
		}
		return
	}
	if c.mark.Term != term {
		// This only tells the pods' goals. It is not served: no step has been taken yet.
		c.result = e.resolve(c.result, input, c.steps.Decisions())
	}
	for {
		first := c.mark.Term != term
		fresh := first || c.used != input
		reports, synced = e.config.Reports()
		if fresh && !first {
			c.result = e.resolve(c.result, input, c.steps.Decisions())
		}
		moved := c.steps.Step(barrier.View{Pods: c.result.Snapshot.Pods, Reports: reports, Synced: synced,
			Answered: e.config.Server.Answered(), Nodes: e.config.Server.AnsweredBy()})
		if !fresh && !moved {
			break
		}
		if moved {
			c.result = e.resolve(c.result, input, c.steps.Decisions())
		}
		c.used = input
		e.publish(c)
	}
	e.converged(c)
	e.tell(c, input)
}
func (e *Engine) resolve(prev *resolve.Result, input *resolve.Input, decisions map[string]resolve.Decision) *resolve.Result {
	start := time.Now()
	in := *input
	in.Decisions = decisions
	result := resolve.Resolve(prev, in)
	e.config.Resolved(time.Since(start))
	return result
}

// publish serves the current snapshot as the leader's next orders. The other replicas are given them first: if this one dies
// now, the next leader should know what agents have.
func (e *Engine) publish(c *crank) {
	next := epoch.Orders{Term: c.term, Number: c.generation + 1}
	if now := c.steps.Decisions(); c.mark.Term != c.term || !maps.Equal(now, c.decisions) {
		c.decided, c.decisions = next.Number, now
	}
	c.mark = next
	e.config.Give(replica.Orders{Orders: c.mark, Decided: c.decided, Covers: c.used.Made, Decisions: c.decisions})
	e.serve(c)
	c.steps.Published(c.generation)
	c.underWay = append(c.underWay, published{c.generation, time.Now()})
}

// serve gives the current snapshot to this replica's agents.
func (e *Engine) serve(c *crank) {
	c.generation = e.config.Server.Set(serve.Version{Snapshot: c.result.Snapshot, Mark: c.told(c.used), Number: c.mark.Number, Seen: c.used.Seen})
	e.mu.Lock()
	e.shown = c.result.Snapshot
	close(e.newer)
	e.newer = make(chan struct{})
	e.mu.Unlock()
	e.config.Served(c.result.Snapshot)
}

// tell gives the picture, once all replicas serve it: what their nodes answered is about it, or about what is newer.
func (e *Engine) tell(c *crank, input *resolve.Input) {
	served := e.config.Server.Served()
	newest := &Picture{Input: *input, Snapshot: c.result.Snapshot, Problems: c.result.Problems, Generation: c.generation, Good: c.result.Good}
	if c.waits == nil || c.generation <= served {
		c.waits = newest
	}
	if c.waits.Generation > served {
		return
	}
	now := *c.waits
	now.Nodes = e.config.Server.State()
	now.Reports, _ = e.config.Reports()
	c.waits = newest
	e.config.Status(now)
}

// converged tells how long the generations took that every node has answered by now.
func (e *Engine) converged(c *crank) {
	answered := e.config.Server.Answered()
	for len(c.underWay) > 0 && c.underWay[0].generation <= answered {
		e.config.Converged(time.Since(c.underWay[0].at))
		c.underWay = c.underWay[1:]
	}
	const most = 1000 // while a node is away nothing converges
	c.underWay = c.underWay[max(0, len(c.underWay)-most):]
}
