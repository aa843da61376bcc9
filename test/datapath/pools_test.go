package datapath

import (
	"net/http"
	"testing"

	"github.com/weftmesh/weft/test/datapath/lab"
)

// workers is the number of threads of the lab's Envoys; each has pools of its own, and one for each family's address.
const workers, families = 2, 2

// pooled: however many connections a pod's apps make, calls over HTTP/2 share one connection of each of Envoy's workers, to the
// callee and to its app.
func (m *mesh) pooled(t *testing.T) {
	for _, server := range []string{"near", "far"} {
		m.policy(strict(allowAll(h2Port)))
		made := func() (toCallee, toApp uint64) {
			for counter, at := range map[string]struct {
				node int
				to   *uint64
			}{"cluster.svc/shop/" + server + "/90.upstream_cx_total": {0, &toCallee}, "cluster.local.upstream_cx_http2_total": {node(server), &toApp}} {
				n, err := m.Stat(at.node, counter)
				if err != nil {
					t.Fatal(err)
				}
				*at.to = n
			}
			return toCallee, toApp
		}
		// Connections under the policy before are told to go, and their calls might count.
		calleeBefore, appBefore := made()
		var open []*http.Client
		for _, pod := range []*lab.Pod{m.Pod("client"), m.Pod("other")} {
			for range 24 {
				c := client(pod, true)
				open = append(open, c)
				if status, _, err := ask(c, m.Address(server, 90, false), "/items"); err != nil || status != http.StatusOK {
					t.Errorf("%s: %d %v", server, status, err)
				}
			}
		}
		callee, app := made()
		for _, c := range open {
			c.CloseIdleConnections()
		}
		if got, most := callee-calleeBefore, uint64(2*workers*families); got == 0 || got > most {
			t.Errorf("%s: 48 connections of two pods made %d to the callee, want 1 to %d", server, got, most)
		}
		// Each client's calls go over connections of their own.
		if got, most := app-appBefore, uint64(2*workers*families); got == 0 || got > most {
			t.Errorf("%s: they made %d to the app, want 1 to %d", server, got, most)
		}
		m.policy(strict())
	}
}
