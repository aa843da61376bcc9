// Package engine turns the crank: new objects, reports and acknowledgements go in, a snapshot and conditions come out. One
// goroutine does it, so that no two steps of a pod's life happen at once.
package engine

import (
	"context"
	"sync"
	"time"

	"github.com/weftmesh/weft/controlplane/internal/barrier"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
)

// Config of an Engine.
type Config struct {
	// Expect names, before the first snapshot, the nodes that served under the controller before this one.
	Expect func(nodes []string)
	// SetSnapshot serves a snapshot and returns its generation; Answered and State tell what the nodes answered.
	SetSnapshot func(*ir.Snapshot) uint64
	Answered    func() uint64
	State       func() serve.State
	// Reports returns what the nodes' kernels hold, and which nodes have told everything.
	Reports func() (barrier.Reports, map[string]bool)
	// Status takes a complete picture after each turn; it must not block.
	Status func(Picture)
	// Resolved gets how long each snapshot took to make, Converged how long each took until every node had answered it.
	Resolved, Converged func(took time.Duration)
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

	mu      sync.Mutex
	input   *resolve.Input
	current *ir.Snapshot
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
	return e.current, e.newer
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
	var c crank
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.turn:
		case <-tick.C:
		}
		e.mu.Lock()
		input := e.input
		e.since = time.Now()
		e.mu.Unlock()
		if input != nil {
			e.step(&c, input)
		}
		e.mu.Lock()
		e.since = time.Time{}
		e.mu.Unlock()
	}
}

// crank is what lasts from turn to turn.
type crank struct {
	steps      *barrier.Barrier
	result     *resolve.Result
	used       *resolve.Input
	generation uint64
	// under way are the generations that some node has not answered yet, oldest first.
	underWay []published
}

type published struct {
	generation uint64
	at         time.Time
}

// step is one turn.
func (e *Engine) step(c *crank, input *resolve.Input) {
	if c.steps == nil {
		decisions, nodes := seed(input)
		c.steps = barrier.New(decisions)
		e.config.Expect(nodes)
		// The first snapshot only tells the pods' goals. It is not served: no step has been taken yet.
		c.result = e.resolve(nil, input, c.steps)
	}
	for {
		fresh := c.used != input
		reports, synced := e.config.Reports()
		if fresh && c.used != nil {
			c.result = e.resolve(c.result, input, c.steps)
		}
		moved := c.steps.Step(barrier.View{Pods: c.result.Snapshot.Pods, Reports: reports, Synced: synced, Answered: e.config.Answered()})
		if !fresh && !moved {
			break
		}
		if moved {
			c.result = e.resolve(c.result, input, c.steps)
		}
		c.used = input
		e.publish(c)
	}
	e.converged(c)
	reports, _ := e.config.Reports()
	e.config.Status(Picture{*input, c.result.Snapshot, c.result.Problems, c.generation, e.config.State(), reports, c.result.Good})
}

func (e *Engine) resolve(prev *resolve.Result, input *resolve.Input, steps *barrier.Barrier) *resolve.Result {
	start := time.Now()
	in := *input
	in.Decisions = steps.Decisions()
	result := resolve.Resolve(prev, in)
	e.config.Resolved(time.Since(start))
	return result
}

// publish serves the current snapshot.
func (e *Engine) publish(c *crank) {
	c.generation = e.config.SetSnapshot(c.result.Snapshot)
	c.steps.Published(c.generation)
	c.underWay = append(c.underWay, published{c.generation, time.Now()})
	e.mu.Lock()
	defer e.mu.Unlock()
	e.current = c.result.Snapshot
	close(e.newer)
	e.newer = make(chan struct{})
}

// converged tells how long the generations took that every node has answered by now.
func (e *Engine) converged(c *crank) {
	answered := e.config.Answered()
	for len(c.underWay) > 0 && c.underWay[0].generation <= answered {
		e.config.Converged(time.Since(c.underWay[0].at))
		c.underWay = c.underWay[1:]
	}
	const most = 1000 // while a node is away nothing converges
	c.underWay = c.underWay[max(0, len(c.underWay)-most):]
}
