package barrier

import (
	"fmt"
	"math/rand/v2"
	"testing"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// random is a world in which everything happens in any order, and what the pod's node has done.
type random struct {
	*world
	*rand.Rand
	last resolve.Decision
	// gated: nothing goes in or out of the pod; heard is the goal that its node knew last.
	gated bool
	heard ir.Stage
	// strange: the controller has not had a word of the pod's node yet. closed: no plaintext to a Strict pod.
	strange, closed bool
	// published is when MTLS became what it is, policyPublished when Policy did.
	published       map[bool]uint64
	policyPublished uint64
}

// happens lets one thing happen; its error is a step of the node's that it should not have been told to take.
func (r *random) happens() error {
	switch r.IntN(11) {
	case 0:
		r.goal = []ir.Stage{ir.Out, ir.Enforced}[r.IntN(2)]
	case 1, 2:
		if r.silent {
			r.silent = false
			break
		}
		r.heard = r.goal
		return r.obey()
	case 3, 4:
		r.answered = r.generation
	case 5:
		r.gated = r.silent || r.IntN(2) == 0
		r.node(preparing)
		r.report.Sandbox, r.report.StartedUnheld = fmt.Sprint("s", r.generation), !r.gated
	case 6, 7:
		if r.gated && r.heard == ir.Enforced {
			r.node([]meshv1.PodState{preparing, failed, enforces}[r.IntN(3)])
		}
	case 8:
		r.heard = r.goal
	case 9:
		if r.IntN(4) == 0 {
			r.restart()
		}
	}
	return nil
}

// settles lets everybody do what is to be done, one after the other.
func (r *random) settles(turn int) error {
	r.goal, r.silent = ir.Enforced, false
	if turn%2 == 0 || r.report.State == enforces {
		r.answered = r.generation
		return nil
	}
	return r.obey()
}

// node does something, and reports it.
func (r *random) node(s meshv1.PodState) {
	r.report = &meshv1.PodReport{Uid: uid, Sandbox: r.report.Sandbox, State: s, StartedUnheld: r.report.StartedUnheld}
	switch s {
	case enforces:
		r.gated, r.report.InboundPolicy = false, fmt.Sprint("p", r.IntN(2))
	case permits:
		r.gated = false
	case out: // what runs outside the mesh is held no more
		r.gated, r.report.StartedUnheld = false, true
	}
}

// obey does as the node is told: but a gated pod goes straight to its goal, and one that enforces goes on while it is to be in.
func (r *random) obey() error {
	to := r.last.Stage
	if r.goal == ir.Enforced && (r.gated || r.report.State == enforces) {
		to = ir.Enforced
	}
	was, gated := r.report.State, r.gated
	r.node([]meshv1.PodState{out, permits, enforces}[to])
	switch {
	case to == ir.Out && was == enforces:
		return fmt.Errorf("it leaves and was not Permissive before")
	case to == ir.Out && was == permits && r.some(true):
		return fmt.Errorf("it leaves while peers speak mTLS to it")
	case to == ir.Enforced && was != enforces && !gated && r.some(false):
		return fmt.Errorf("it enforces while peers speak plaintext to it")
	}
	return nil
}

// restart replaces the controller. The next knows what conditions tell, if they were written in time.
func (r *random) restart() {
	seed := map[string]resolve.Decision{}
	if r.IntN(2) == 0 {
		switch r.report.State {
		case permits:
			seed[uid] = resolve.Decision{Stage: ir.Captured}
		case enforces:
			seed[uid] = resolve.Decision{Stage: ir.Enforced, MTLS: true, Policy: r.report.InboundPolicy}
		}
	}
	r.barrier, r.fresh, r.strange, r.silent, r.closed = New(seed), true, true, r.IntN(2) == 0, false
}

// judge holds a decision against the MUSTs.
func (r *random) judge() error {
	was, d := r.last, r.step()
	r.last = d
	strange := r.strange // it may take over what another had brought about
	r.strange = r.silent
	if d.MTLS != was.MTLS {
		r.published[d.MTLS] = r.generation
	}
	if d.Policy != was.Policy {
		r.policyPublished = r.generation
	}
	switch s := r.report.State; {
	case r.goal == ir.Out, s == permits:
		r.closed = false
	case !r.silent && (r.gated || s == enforces):
		r.closed = true
	}
	switch {
	case d.Stage == ir.Enforced && was.Stage != ir.Enforced && !strange && r.answered < r.published[true]:
		return fmt.Errorf("enforced before all nodes had answered")
	case d.MTLS && !was.MTLS && !captured(r.report):
		return fmt.Errorf("peers speak mTLS to a pod that is not captured")
	case was.MTLS && !d.MTLS && r.report.State == enforces && !strange:
		return fmt.Errorf("peers speak plaintext to a pod that enforces")
	case d.Stage == ir.Out && was.Stage != ir.Out && d.MTLS:
		return fmt.Errorf("out while peers speak mTLS to it")
	case d.Stage == ir.Out && was.Stage != ir.Out && !strange && r.answered < r.published[false]:
		return fmt.Errorf("out before all nodes had answered")
	case d.Moved != "" && !strange && (d.Moved != d.Policy || r.answered < r.policyPublished):
		return fmt.Errorf("callers have moved to %q before all nodes had answered", d.Moved)
	case d.Stage == ir.Enforced && !d.MTLS:
		return fmt.Errorf("enforced while peers speak plaintext")
	case r.closed && !d.MTLS && !d.Lost:
		return fmt.Errorf("peers speak plaintext to it if it is Strict")
	}
	return nil
}

// TestInvariants lets everything happen in any order, to pods that are held when they are new and to others.
func TestInvariants(t *testing.T) {
	for seed := range uint64(1000) {
		r := &random{world: &world{barrier: New(nil), goal: ir.Enforced}, Rand: rand.New(rand.NewPCG(seed, 1)), published: map[bool]uint64{}}
		r.says(out)
		for i := range 220 {
			was, state := r.last, r.report.State
			var err error
			if i < 200 {
				err = r.happens()
			} else { // nothing hinders it any more
				err = r.settles(i)
			}
			if err == nil {
				err = r.judge()
			}
			if err != nil {
				t.Fatalf("seed %d step %d: goal %d, %s after %s, %+v after %+v: %v", seed, i, r.goal, r.report.State, state, r.last, was, err)
			}
		}
		if r.report.State != enforces || r.last.Stage != ir.Enforced || r.last.Moved != r.last.Policy {
			t.Fatalf("seed %d: it ends %s, %+v", seed, r.report.State, r.last)
		}
	}
}
