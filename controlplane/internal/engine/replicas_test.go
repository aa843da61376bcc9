package engine

import (
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/replica"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

func orders(term, number, pods uint64, d resolve.Decision) replica.Orders {
	return replica.Orders{Orders: epoch.Orders{Term: term, Number: number}, Decided: number, Covers: epoch.Kinds{"pods": pods}, Decisions: map[string]resolve.Decision{"u": d}}
}

// read is a world that was read up to a resource version.
func read(in *resolve.Input, version uint64) *resolve.Input {
	in.Made, in.Seen = epoch.Kinds{"pods": version}, epoch.Kinds{"pods": version}
	return in
}

func TestAFollowerServesWhatItHasRead(t *testing.T) {
	n := &nodes{}
	e := n.engine()
	turn := func(in *resolve.Input) {
		if in != nil {
			e.Input(*in)
		}
		e.Turn()
	}
	turn(read(world(names.MeshEnabled), 5))
	if len(n.served) != 0 {
		t.Fatal("an empty mesh would look like an order to withdraw")
	}
	e.Take(orders(7, 1, 6, resolve.Decision{Stage: ir.Captured}))
	turn(nil)
	if len(n.served) != 0 {
		t.Fatal("the orders may be about what it has not read")
	}
	turn(read(world(names.MeshEnabled), 6))
	if p := n.pod(); p.Stage != ir.Captured || n.marks[0].String() != "7.1 pods=6" {
		t.Errorf("it has read it: %+v, %v", p, n.marks)
	}
	// Another number of the same orders is no other snapshot.
	same := orders(7, 2, 6, resolve.Decision{Stage: ir.Captured})
	same.Decided = 1
	e.Take(same)
	turn(nil)
	if len(n.served) != 1 || len(n.marks) != 2 || n.marks[1].Number != 1 {
		t.Errorf("served %d times, marks %v", len(n.served), n.marks)
	}
	e.Take(orders(7, 1, 6, resolve.Decision{}))
	e.Take(orders(6, 9, 6, resolve.Decision{}))
	turn(nil)
	if len(n.served) != 1 {
		t.Error("older orders are followed")
	}
	// New objects are served under the orders that there are, while newer ones cannot be.
	e.Take(orders(7, 3, 9, resolve.Decision{Stage: ir.Enforced, MTLS: true}))
	turn(read(world(names.MeshDisabled), 8))
	if p := n.pod(); p.Stage != ir.Captured || p.Goal != ir.Out || n.marks[2].String() != "7.1 pods=8" {
		t.Errorf("%+v, %v", p, n.marks)
	}
	if slices.Contains(n.events, "give") || slices.Contains(n.events, "expect") || n.told != 0 {
		t.Errorf("it acts as a leader: %v", n.events)
	}
}

func TestANewLeaderHearsTheNodesFirst(t *testing.T) {
	for _, c := range []struct {
		name string
		says bool
		want time.Duration
	}{{"they report", true, 0}, {"one is gone", false, hearLimit}} {
		synctest.Test(t, func(t *testing.T) {
			n := &nodes{}
			e := n.engine()
			in := read(world(names.MeshEnabled, enrolled), 5) // the condition is older than the orders
			e.Input(*in)
			e.Take(orders(7, 3, 5, resolve.Decision{Stage: ir.Enforced, MTLS: true}))
			e.Turn()
			e.Lead(8, true)
			e.Turn()
			e.Turn()
			if len(n.given) != 0 || !slices.Equal(n.events, []string{"serve", "expect", "n1"}) {
				t.Errorf("%s: decided before: %v", c.name, n.events)
			}
			e.Input(*read(world(names.MeshEnabled, enrolled), 6))
			e.Turn()
			if last := n.marks[len(n.marks)-1].String(); len(n.served) != 2 || last != "7.3 pods=6" || n.told != 0 {
				t.Errorf("%s: meanwhile the objects go on under the last orders: %d, %s", c.name, len(n.served), last)
			}
			if c.says {
				n.says("n1", "u", meshv1.PodState_POD_STATE_ENFORCED)
			}
			time.Sleep(c.want)
			e.Turn()
			if len(n.given) == 0 || n.given[0].Term != 8 || n.told == 0 {
				t.Fatalf("%s: it does not decide: %v", c.name, n.events)
			}
			if p := n.pod(); p.Stage != ir.Enforced || !p.MTLS {
				t.Errorf("%s: it took the pod back: %+v", c.name, p)
			}
			if o := n.given[0]; !maps.Equal(o.Covers, epoch.Kinds{"pods": 6}) || o.Decided != o.Number {
				t.Errorf("%s: gave %+v", c.name, o)
			}
			// It loses the Lease: its own orders are the newest that it knows.
			given := len(n.given)
			e.Lead(0, false)
			e.Input(*read(world(names.MeshDisabled), 7))
			e.Turn()
			if p := n.pod(); p.Stage != ir.Enforced || len(n.given) != given || n.marks[len(n.marks)-1].Term != 8 {
				t.Errorf("%s: as a follower: %+v, %v", c.name, p, n.marks)
			}
		})
	}
}

// TestStatusWaitsForEveryReplica: what their nodes have not answered cannot be known before they serve it.
func TestStatusWaitsForEveryReplica(t *testing.T) {
	n := &nodes{behind: true}
	e := n.engine()
	e.Input(*read(world(names.MeshDisabled), 5))
	e.Lead(1, true)
	e.Turn()
	e.Input(*read(world(names.MeshEnabled), 6))
	e.Turn()
	if n.told != 0 {
		t.Fatal("told before another replica served it")
	}
	n.behind = false
	e.Turn()
	if n.told == 0 {
		t.Error("not told after it")
	}
	e.Turn()
	if n.picture.Input.Made["pods"] != 6 {
		t.Errorf("the newest is not told: %v", n.picture.Input.Made)
	}
}

// TestALeaderThatWasBehindBeginsFromTheConditions: its own orders may be older.
func TestALeaderThatWasBehindBeginsFromTheConditions(t *testing.T) {
	n := &nodes{}
	e := n.engine()
	e.Input(*read(world(names.MeshEnabled, enrolled, enforced), 5))
	e.Take(orders(7, 3, 5, resolve.Decision{Stage: ir.Captured}))
	e.Turn()
	e.Lead(8, false)
	e.Turn()
	if p := n.pod(); p.Stage != ir.Enforced || !p.MTLS || len(n.given) != 1 || n.given[0].Term != 8 {
		t.Errorf("%+v, gave %v", p, n.given)
	}
}
