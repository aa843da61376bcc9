//go:build e2e

package e2e

import (
	"flag"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
	"github.com/weftmesh/weft/test/load"
)

var (
	kills   = flag.Int("kills", 6, "times that an agent is killed under load (make soak: 100)")
	crashes = flag.Int("crashes", 4, "times that Envoy is killed under load (make soak: 100)")
	away    = flag.Duration("away", 30*time.Second, "how long all controllers stay away under load (make soak: 10m)")
)

// newEnrolledShop is the shop under its usual load, all of it in the mesh, with Strict callees under policies.
func newEnrolledShop(t *testing.T) shop {
	t.Helper()
	s := newShop(t)
	apply(t, guarded)
	s.label(callers, true) // a Strict callee would refuse those that are not in yet
	s.label(callees, true)
	return s
}

// leave takes the shop out of the mesh, and counts.
func (s shop) leave() load.Stats {
	s.Helper()
	s.label(callees, false)
	s.label(callers, false)
	return s.lossless()
}

// TestAgentKilled: an agent that is killed again and again under load changes nothing for traffic.
func TestAgentKilled(t *testing.T) {
	s := newEnrolledShop(t)
	for i := range *kills {
		s.killAgent(placements[i%2].node)
		s.dwell(200)
	}
	// What changes meanwhile is put into force by the agents that came after.
	if err := k8s.UntilCondition(t.Context(), time.Minute, "shop", "app in (catalogue,prices,redis)", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	sum := s.leave()
	t.Logf("%d kills: %d requests, %d connections", *kills, sum.Requests, sum.Connections)
}

// killAgent ends the agent of a node and waits for the next one.
func (s shop) killAgent(node string) {
	s.Helper()
	uid := nodeproxyOn(s.T, node).Metadata.UID
	old := processOf(s.T, uid, "nodeproxy", "agent")
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		s.Fatal(err)
	}
	until(s.T, time.Minute, "the next agent of "+node, func() (bool, string) {
		now, found := findProcess(uid, "nodeproxy", "agent")
		is := found && now != old
		for _, p := range pods(s.T, system, "app=weft-nodeproxy") {
			is = is && (p.Node != node || p.Ready)
		}
		return is, "it is not there, or not ready"
	})
}

// TestControllersAwayForLong: while no controller runs, agents are killed and containers restart, traffic goes on; a pod that is new
// waits, and starts when a controller is back.
func TestControllersAwayForLong(t *testing.T) {
	s := newEnrolledShop(t)
	apply(t, podOn("steady", "n2", "mesh", "", `args: [serve], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`))
	inMesh(t, "app=steady", "Captured")
	ready(t, "app=steady")
	scale(t, 0)
	t.Cleanup(func() { scale(t, 1) })
	apply(t, podOn("late", "n1", "mesh", "", `args: [serve], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`))
	until(t, time.Minute, "the new pod's refusal", func() (bool, string) {
		out, err := k8s.Kubectl(t.Context(), "get", "pod", "-n", "mesh", "late", "-o", "jsonpath={.status.containerStatuses[0].state}")
		return err == nil && strings.Contains(out, "weft: the pod is not in the mesh yet: "), out
	})
	for began, i := time.Now(), 0; time.Since(began) < *away; i++ {
		s.killAgent(placements[i%2].node)
		was := pod(t, "mesh", "steady", "n2").Restarts
		if out, err := k8s.Kubectl(t.Context(), "exec", "-n", "mesh", "steady", "--", "kill", "1"); err != nil {
			t.Fatal(err, out)
		}
		until(t, time.Minute, "the container to be ready again", func() (bool, string) {
			p := pods(t, "mesh", "app=steady")
			return len(p) == 1 && p[0].Ready && p[0].Restarts > was, fmt.Sprint(p)
		})
		s.dwell(200)
	}
	// Whenever its node's agent is away the runtime makes its container, behind the gate that the kernel keeps closed.
	if p := pods(t, "mesh", "app=late"); len(p) != 1 || p[0].Ready {
		t.Errorf("a new pod is ready without a controller: %+v", p)
	}
	scale(t, 1)
	ready(t, "app=late")
	inMesh(t, "app=late", "Captured")
	sum := s.leave()
	t.Logf("away for %v: %d requests, %d connections", *away, sum.Requests, sum.Connections)
}

// TestEnvoyKilledUnderLoad: with an Envoy only what it had in hand is lost, at most one request of each client; connections that
// come while it is away wait.
func TestEnvoyKilledUnderLoad(t *testing.T) {
	s := newEnrolledShop(t)
	clients := uint64(0)
	for range s.traffic.ByPod() {
		clients += 15 // examples/shop/load.yaml
	}
	for i := range *crashes {
		before := s.fresh()
		node := placements[i%2].node
		if err := syscall.Kill(processOf(t, nodeproxyOn(t, node).Metadata.UID, "envoy", ""), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s.dwell(300)
		lost := kube.Between(before, s.fresh())
		t.Logf("Envoy of %s killed: %d requests failed, %d connections broke, of %d clients", node, lost.Failed, lost.Broken, clients)
		if lost.Failed > clients {
			t.Errorf("%d requests failed, want those at most that the killed Envoy had", lost.Failed)
		}
	}
	for _, e := range s.fresh().Errors {
		if strings.Contains(e, "refused") || strings.Contains(e, "timeout") {
			t.Error(e)
		}
	}
}
