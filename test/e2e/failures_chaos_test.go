//go:build e2e

package e2e

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

var chaosTime = flag.Duration("chaos", 30*time.Second, "how long random processes of weft are killed under load (make soak: 30m)")

// victims are the processes of weft, by where they run.
var victims = []struct {
	name  string
	envoy bool // what Envoy has in hand dies with it
	find  func(t *testing.T) (where string, pid int, found bool)
}{
	{"Envoy", true, onNode("envoy", "")},
	{"supervisor", true, onNode("nodeproxy", "envoy")},
	{"broker", false, onNode("nodeproxy", "envoy-broker")},
	{"agent", false, onNode("nodeproxy", "agent")},
	{"controller", false, func(t *testing.T) (string, int, bool) {
		all := pods(t, system, "app=weft-controlplane")
		p := all[rand.IntN(len(all))]
		pid, found := findProcess(p.UID, "controlplane", "")
		return p.Name, pid, found
	}},
}

// onNode finds a process of the nodeproxy pod of either node.
func onNode(program, argument string) func(*testing.T) (string, int, bool) {
	return func(t *testing.T) (string, int, bool) {
		node := placements[rand.IntN(len(placements))].node
		pid, found := findProcess(nodeproxyOn(t, node).Metadata.UID, program, argument)
		return node, pid, found
	}
}

// live waits until all of weft's processes are there: the nodes' agents say that their Envoys serve.
func (s shop) live() {
	s.Helper()
	until(s.T, time.Minute, "weft on every node", func() (bool, string) {
		for _, p := range pods(s.T, system, "") {
			if !p.Ready {
				return false, p.Name + " is not ready"
			}
		}
		return true, ""
	})
}

// chaos: any process of weft dies at any time. What is lost is what a killed Envoy had in hand: at most one request of each
// client, in the moment of its death.
func (s shop) chaos() {
	t := s.T
	clients := s.clients()
	kills, lostInAll := map[string]int{}, uint64(0)
	for began := time.Now(); time.Since(began) < *chaosTime; {
		s.live() // one process at a time
		v := victims[rand.IntN(len(victims))]
		where, pid, found := v.find(t)
		if !found {
			s.dwell(20) // it is on its way back
			continue
		}
		before := s.fresh()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			continue // gone by itself, with the one it belongs to
		}
		kills[v.name]++
		pause := 10*time.Second + rand.N(20*time.Second)
		if *chaosTime < 10*time.Minute {
			pause /= 4
		}
		for until := time.Now().Add(pause); time.Now().Before(until); {
			s.dwell(100)
		}
		s.live() // what waited for the next one belongs to this kill
		s.dwell(100)
		lost := kube.Between(before, s.fresh())
		lostInAll += lost.Failed
		t.Logf("%s of %s killed: %d requests, %d failed, %d connections broke", v.name, where, lost.Requests, lost.Failed, lost.Broken)
		switch {
		case v.envoy && lost.Failed > clients:
			t.Errorf("%d requests failed with an Envoy, want at most one of each of %d clients", lost.Failed, clients)
		case !v.envoy && lost.Failed+lost.Broken > 0:
			t.Errorf("%d requests failed and %d connections broke with a process that carries none:\n%s", lost.Failed, lost.Broken, strings.Join(s.fresh().Errors, "\n"))
		}
	}
	if err := k8s.UntilCondition(t.Context(), 2*time.Minute, "shop", everybody, enforced, "True", nil); err != nil {
		t.Error(err)
	}
	sum := s.fresh()
	t.Logf("%v: killed %v; %d requests on %d connections, %d requests lost", *chaosTime, fmt.Sprint(kills), sum.Requests, sum.Connections, lostInAll)
}
