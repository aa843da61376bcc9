//go:build e2e

package e2e

import (
	"flag"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
	"github.com/weftmesh/weft/test/load"
)

var (
	kills   = flag.Int("kills", 4, "times that an agent is killed under load (make soak: 100)")
	crashes = flag.Int("crashes", 4, "times that Envoy is killed under load (make soak: 100)")
	away    = flag.Duration("away", 15*time.Second, "how long all controllers stay away under load (make soak: 10m)")
)

// enrolledShop brings a shop into the mesh, with Strict callees under policies.
func enrolledShop(s shop) shop {
	s.Helper()
	apply(s.T, guarded)
	s.label(callers, true) // a Strict callee would refuse those that are not in yet
	s.label(callees, true)
	return s
}

// TestFailures: what weft is made of dies or goes away under load. The tests share a shop.
func TestFailures(t *testing.T) {
	all := enrolledShop(newShop(t))
	for _, failure := range []struct {
		name string
		test func(shop)
	}{
		{"Chaos", shop.chaos},
		{"AgentKilled", shop.agentKilled},
		{"ControllersAwayForLong", shop.controllersAway},
		{"ReplicasServe", shop.replicasServe},
		{"LeaderKilledUnderWay", shop.leaderKilled},
		{"ReplicaWithBlockedWatches", shop.blockedWatches},
		{"APIServerAway", shop.apiServerAway},
		{"EnvoyKilledUnderLoad", shop.envoyKilled},
	} {
		t.Run(failure.name, func(t *testing.T) { failure.test(all.again(t)) })
	}
	all.again(t).leave()
}

// again is the shop for another test: all of it in the mesh, and what was lost before counts no more.
func (s shop) again(t *testing.T) shop {
	t.Helper()
	s = s.sub(t)
	s.label(callers, true)
	s.label(callees, true)
	s.before = s.fresh()
	return s
}

// clients is how many run in the load's pods.
func (s shop) clients() uint64 {
	return 14 * uint64(len(s.traffic.ByPod())) // examples/shop/load.yaml
}

// leave takes the shop out of the mesh, and counts.
func (s shop) leave() load.Stats {
	s.Helper()
	s.label(callees, false)
	s.label(callers, false)
	return s.lossless()
}

// agentKilled: an agent that is killed again and again under load changes nothing for traffic.
func (s shop) agentKilled() {
	t := s.T
	for i := range *kills {
		s.killAgent(placements[i%2].node)
		s.dwell(200)
	}
	// What changes meanwhile is put into force by the agents that came after.
	if err := k8s.UntilCondition(t.Context(), time.Minute, "shop", callees, enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	sum := s.lossless()
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

// controllersAway: while no controller runs, agents are killed and containers restart, traffic goes on; a pod that is new
// waits, and starts when a controller is back.
func (s shop) controllersAway() {
	t := s.T
	apply(t, podOn("steady", "n2", "mesh", "", `args: [serve], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`))
	inMesh(t, "app=steady", "Captured")
	ready(t, "app=steady")
	// A client whose connect takes long tries the service's other address, whose first use would need a controller.
	for _, at := range placements {
		for _, ip := range clusterIPs(t, s.namespace, "redis") {
			// Its policy does not let this client in.
			if o := client.ask(t, at.node, call{Address: net.JoinHostPort(ip, "6379"), Line: "PING"})[0]; !o.closed() {
				t.Fatalf("redis by %s, from %s: %+v", ip, at.node, o)
			}
		}
	}
	scale(t, 0)
	t.Cleanup(func() { scale(t, controllers) })
	apply(t, podOn("late", "n1", "mesh", "", `args: [serve], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`))
	notMade(t, "late", "weft: the pod is not in the mesh yet: ")
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
	scale(t, controllers)
	ready(t, "app=late")
	inMesh(t, "app=late", "Captured")
	sum := s.lossless()
	t.Logf("away for %v: %d requests, %d connections", *away, sum.Requests, sum.Connections)
}

// oftenAtOnce is less than how often in a minute an Envoy that dies starts again at once.
const oftenAtOnce = 4

// envoyKilled: with an Envoy only what it had in hand is lost, at most one request of each client; connections that
// come while it is away wait.
func (s shop) envoyKilled() {
	t := s.T
	clients := s.clients()
	kills := map[string][]time.Time{}
	for i := range *crashes {
		node := placements[i%2].node
		if last := kills[node]; len(last) >= oftenAtOnce { // one that dies oftener waits before it starts again
			time.Sleep(time.Until(last[len(last)-oftenAtOnce].Add(time.Minute)))
		}
		kills[node] = append(kills[node], time.Now())
		before := s.fresh()
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
