//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
	"github.com/weftmesh/weft/test/load"
)

// window is the settled part of half a cycle: from when each client whose connections are renewed has made a new one
// since the condition was reached, to the last counters before the next label.
type window struct {
	mesh     bool
	from, to time.Time
	// stats are by pod and target.
	stats map[string]map[string]load.Stats
}

// renewing are the clients of every kind that end their connections themselves and make new ones, by their names in
// load.yaml; the others keep theirs for ever. The front end's is not among them: it is caller and callee.
var renewing = []string{"catalogue-100", "catalogue-20", "catalogue-one", "stream-20", "unary-20", "redis-10"}

func renews(target string) bool { return slices.Contains(renewing, target) }

// window opens when everything is settled and lets each renewing client make some requests, n in all.
func (s shop) window(mesh bool, n uint64) window {
	s.Helper()
	reached := time.Now()
	s.await("new connections of every client", func(pod, target string, now load.Stats) (bool, string) {
		opened := now.At.Add(-time.Duration(now.Oldest * float64(time.Second)))
		return now.At.After(reached) && (!renews(target) || opened.After(reached)), fmt.Sprintf("one is %.1f s old", now.Oldest)
	})
	s.fresh() // the pods' lines come at different times
	from := s.traffic.ByPod()
	s.await("requests of every client", func(pod, target string, now load.Stats) (bool, string) {
		passed := now.Requests - from[pod][target].Requests
		return passed >= 20 || !renews(target), fmt.Sprintf("%d requests", passed)
	})
	s.dwell(n)
	s.fresh()
	w := window{mesh: mesh, stats: map[string]map[string]load.Stats{}}
	for pod, targets := range s.traffic.ByPod() {
		w.stats[pod] = map[string]load.Stats{}
		for target, to := range targets {
			before := from[pod][target]
			w.stats[pod][target] = kube.Between(before, to)
			if before.At.After(w.from) {
				w.from = before.At
			}
			if w.to.IsZero() || to.At.Before(w.to) {
				w.to = to.At
			}
		}
	}
	return w
}

// await waits until so holds for each target of each load pod.
func (s shop) await(what string, so func(pod, target string, now load.Stats) (bool, string)) {
	s.Helper()
	if err := kube.Until(s.Context(), 2*time.Minute, what, nil, func(context.Context) (bool, string) {
		for pod, targets := range s.traffic.ByPod() {
			for target, now := range targets {
				if ok, detail := so(pod, target, now); !ok {
					return false, fmt.Sprintf("%s of %s: %s; failed: %d %v", target, pod, detail, now.Failed, now.Errors)
				}
			}
		}
		return true, ""
	}); err != nil {
		s.Fatal(err)
	}
}

// states counts requests by what the callee saw.
type states struct{ plain, mesh uint64 }

// tally adds up the windows of a run by client and placement.
type tally struct {
	node    map[string]string     // of pods by name, and by address
	callers map[netip.Addr]string // names of load pods
	callees map[netip.Addr]bool
	seen    map[string]*states
	windows []window
}

func (s shop) tally() *tally {
	s.Helper()
	c := &tally{node: map[string]string{}, callers: map[netip.Addr]string{}, callees: map[netip.Addr]bool{}, seen: map[string]*states{}}
	pods, err := k8s.Pods(s.Context(), s.namespace, "")
	if err != nil {
		s.Fatal(err)
	}
	for _, p := range pods {
		c.node[p.Name] = p.Node
		for _, a := range p.IPs {
			address := netip.MustParseAddr(a)
			c.node[address.String()] = p.Node
			switch p.Labels["app"] {
			case "load":
				c.callers[address] = p.Name
			case "catalogue", "prices", "redis":
				c.callees[address] = true
			}
		}
	}
	return c
}

// add counts a window. The callee's app tells who reached it directly; whether what came by its Envoy was encrypted is
// Envoy's word for the whole window (verify), so that here each such request has the window's state.
func (c *tally) add(t *testing.T, w window, calleeOut bool) {
	t.Helper()
	c.windows = append(c.windows, w)
	for pod, targets := range w.stats {
		for target, stats := range targets {
			if !renews(target) {
				continue
			}
			for callee, v := range stats.Callees {
				placement := "across nodes"
				if c.node[pod] == c.node[callee] {
					placement = "same node"
				}
				k := target + ", " + placement
				if c.seen[k] == nil {
					c.seen[k] = &states{}
				}
				c.seen[k].plain += v.Direct
				if w.mesh {
					c.seen[k].mesh += v.Proxied
				} else {
					c.seen[k].plain += v.Proxied
				}
			}
			if w.mesh && stats.Direct > 0 {
				t.Errorf("in the mesh %d requests of %s on %s went past the callee's Envoy", stats.Direct, target, pod)
			}
			if !w.mesh && calleeOut && stats.Proxied > 0 {
				t.Errorf("outside the mesh %d requests of %s on %s came by the callee's Envoy", stats.Proxied, target, pod)
			}
		}
	}
}

// verify compares every window with what the callees' Envoys logged: connections and parsed requests of the load pods
// that began in it have a peer's certificate if it is in the mesh, and none if it is not.
func (c *tally) verify(t *testing.T, logs *kube.AccessLogs) (secure map[string]int) {
	t.Helper()
	// Redis is called over new connections in each window: when the line of one has come, so have those before it.
	until(t, time.Minute, "the access log of every window", func() (bool, string) {
		heard := logs.Heard()
		for i, w := range c.windows {
			if w.mesh && !slices.ContainsFunc(heard, func(m kube.Meeting) bool { return m.Callee.Port() == 6379 && m.Secure() && w.holds(m) }) {
				return false, fmt.Sprintf("%d lines; no connection to redis with a peer's certificate began in window %d, %s to %s",
					len(heard), i, w.from.Format(time.StampMilli), w.to.Format(time.StampMilli))
			}
		}
		return true, ""
	})
	secure = map[string]int{}
	for _, m := range logs.Heard() {
		caller := c.callers[m.Caller]
		if caller == "" || !c.callees[m.Callee.Addr()] {
			continue
		}
		if m.Secure() && m.At.After(c.windows[0].from) {
			secure[fmt.Sprintf("from %s to port %d", c.node[caller], m.Callee.Port())]++
		}
		for _, w := range c.windows {
			if w.holds(m) && w.mesh != m.Secure() {
				t.Errorf("in the mesh: %v, but %s was seen: %+v", w.mesh, caller, m)
			}
		}
	}
	t.Logf("connections and parsed requests with a peer's certificate: %v", secure)
	return secure
}

// everywhere fails unless peers' certificates were seen from each node to each port. A connection is logged when it ends, and Envoys keep
// those that carry HTTP for as long as callers stay: a few cycles alone may show none.
func everywhere(t *testing.T, secure map[string]int) {
	t.Helper()
	for _, at := range placements {
		for _, port := range []string{"6379", "8080", "9000"} {
			if secure["from "+at.node+" to port "+port] == 0 {
				t.Errorf("no peer's certificate was seen from %s to port %s: %v", at.node, port, secure)
			}
		}
	}
}

func (w window) holds(m kube.Meeting) bool { return m.At.After(w.from) && m.At.Before(w.to) }

// join adds another tally's states.
func (c *tally) join(other *tally) {
	c.windows = append(c.windows, other.windows...)
	for k, v := range other.seen {
		if c.seen[k] == nil {
			c.seen[k] = &states{}
		}
		c.seen[k].plain += v.plain
		c.seen[k].mesh += v.mesh
	}
}

// enough windows for each client to meet each callee often in both states: in some it makes one or two connections.
const enough = 24

// report prints each client's states, and fails if one has less than 10 % of its requests.
func (c *tally) report(t *testing.T) {
	t.Helper()
	for _, k := range slices.Sorted(maps.Keys(c.seen)) {
		v := c.seen[k]
		t.Logf("%-30s %7d plain %7d mTLS", k, v.plain, v.mesh)
		if all := v.plain + v.mesh; len(c.windows) >= enough && (v.plain*10 < all || v.mesh*10 < all) {
			t.Errorf("%s: a state has less than 10 %% of %d requests", k, all)
		}
	}
	if want := 2 * len(renewing); len(c.windows) >= enough && len(c.seen) != want {
		t.Errorf("%d clients and placements were seen, want %d", len(c.seen), want)
	}
}
