//go:build e2e

package e2e

import (
	"fmt"
	"sync"
	"testing"

	"github.com/weftmesh/weft/test/hostile"
	"github.com/weftmesh/weft/test/hostile/attack"
	"github.com/weftmesh/weft/test/kube"
)

// TestHostile makes the attempts of docs/HOSTILE.md that do not disturb other tests.
func TestHostile(t *testing.T) {
	alone(t, hostileMesh)
	h := newHostiles(t)
	h.served()
	for _, part := range []struct {
		name string
		run  func(*hostiles)
	}{
		{"the list", (*hostiles).list}, {"own namespaces", (*hostiles).nested}, {"processes", (*hostiles).processes}, {"packets", (*hostiles).packets},
		{"objects", (*hostiles).objects},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(h.in(t)) })
	}
	h.served()
	h.complete(hostile.Here)
}

// in is the same for a subtest.
func (h *hostiles) in(t *testing.T) *hostiles {
	sub := *h
	sub.T = t
	return &sub
}

// tried is an attempt of the list at a place.
type tried struct {
	hostile.Try
	at placement
}

// list makes the attempts that stand whole in the list.
func (h *hostiles) list() {
	var all []*tried
	var wait sync.WaitGroup
	for _, at := range placements {
		for _, by := range []hostile.Attacker{hostile.Stranger, hostile.Barred, hostile.Allowed} {
			tries := h.tries(at, by)
			all = append(all, tries...)
			from := h.attackers[by][at.node]
			var attempts []attack.Attempt
			for _, v := range tries {
				against := h.target
				a := *v.Make
				a.ID, a.To = v.ID, v.Way
				if v.Control {
					against = h.bare
					a.Millis = 5000 // what is silent is as silent here
				}
				attempts = append(attempts, h.fill(a, from, against, v.Mark))
				h.did(v.ID)
			}
			wait.Go(func() {
				outcomes, err := attackFrom(h.Context(), from, 24, attempts)
				if err != nil {
					h.Error(err)
					return
				}
				for i := range tries {
					tries[i].Done = outcomes[i]
				}
			})
		}
	}
	wait.Wait()
	saw := map[bool][]attack.Sight{false: h.seen(h.target, 0).All, true: h.seen(h.bare, 0).All}
	controls := 0
	for _, v := range all {
		for _, s := range saw[v.Control] {
			v.Sight(s)
		}
		if problem := v.Problem(); problem != "" {
			h.Errorf("%s, %v: %s", v.at.name, v.Try, problem)
		}
		if v.Control {
			controls++
		}
	}
	h.Logf("%d tries and %d controls", len(all)-controls, controls)
}

// tries are what one attacker does from one node. What strangers and allowed pods try is controlled by a stranger.
func (h *hostiles) tries(at placement, by hostile.Attacker) []*tried {
	var all []*tried
	add := func(a hostile.Attempt, control bool) {
		if a.Where == hostile.SameNode && at.node != "n1" || a.Where == hostile.Across && at.node == "n1" {
			return
		}
		ways := a.Over
		if len(ways) == 0 {
			ways = []string{a.Make.To}
		}
		for _, way := range ways {
			all = append(all, &tried{hostile.Try{Attempt: a, By: by, Way: way, Control: control, Mark: h.mark()}, at})
		}
	}
	for _, a := range hostile.Made(by) {
		add(a, false)
	}
	if by != hostile.Stranger {
		return all
	}
	for _, a := range hostile.All() {
		if a.Make != nil && a.Uncontrolled == "" {
			add(a, true)
		}
	}
	return all
}

// everywhere makes the same attempts by each pod of some attackers on both nodes, side by side.
func (h *hostiles) everywhere(by []hostile.Attacker, attempts func(p kube.Pod) []attack.Attempt, judge func(who string, o attack.Outcome)) {
	h.Helper()
	var mu sync.Mutex
	var wait sync.WaitGroup
	for _, who := range by {
		for _, at := range placements {
			p := h.attackers[who][at.node]
			all := attempts(p)
			wait.Go(func() {
				outcomes, err := attackFrom(h.Context(), p, 8, all)
				if err != nil {
					h.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				for _, o := range outcomes {
					judge(fmt.Sprintf("%s on %s, %s", who, at.node, o.ID), o)
				}
			})
		}
	}
	wait.Wait()
}
