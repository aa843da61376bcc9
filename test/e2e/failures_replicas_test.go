//go:build e2e

package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

var apiAway = flag.Duration("api-away", 20*time.Second, "how long the API server stays away under load")

// controllers is how many replicas the chart starts.
const controllers = 2

// gauges reads a controller replica's metrics without labels, by name without "weft_controlplane_". It asks the pod itself: the API
// server may be away.
func gauges(p kube.Pod) (map[string]float64, error) {
	pid, found := findProcess(p.UID, "controlplane", "")
	if !found {
		return nil, fmt.Errorf("%s does not run", p.Name)
	}
	text, err := exec.Command("nsenter", "-t", strconv.Itoa(pid), "-n", "curl", "-sS", "-m", "5", "http://127.0.0.1:15021/metrics").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w: %s", p.Name, err, text)
	}
	out := map[string]float64{}
	for _, line := range strings.Split(string(text), "\n") {
		if name, value, ok := strings.Cut(strings.TrimPrefix(line, "weft_controlplane_"), " "); ok && strings.HasPrefix(line, "weft_controlplane_") {
			if v, err := strconv.ParseFloat(value, 64); err == nil {
				out[name] = v
			}
		}
	}
	return out, nil
}

// replicas waits until one controller leads, the other follows it, and all agents are served; first is the leader.
func replicas(t *testing.T) (leader, follower kube.Pod) {
	t.Helper()
	until(t, 2*time.Minute, "a leader and a follower", func() (bool, string) {
		all := pods(t, system, "app=weft-controlplane")
		leader, follower = kube.Pod{}, kube.Pod{}
		detail, agents := "", 0.0
		for _, p := range all {
			g, err := gauges(p)
			if err != nil {
				return false, err.Error()
			}
			detail += fmt.Sprintf("%s: leader %v, following %v, agents %v, followers %v; ", p.Name, g["leader"], g["following"], g["agents"], g["followers"])
			agents += g["agents"]
			switch {
			case !p.Ready || p.Deleting:
			case g["leader"] == 1 && g["followers"] == controllers-1:
				leader = p
			case g["following"] == 1:
				follower = p
			}
		}
		return len(all) == controllers && leader.Name != "" && follower.Name != "" && agents == float64(len(k8s.Nodes)), detail
	})
	return leader, follower
}

func kill(t *testing.T, p kube.Pod) {
	t.Helper()
	if err := syscall.Kill(processOf(t, p.UID, "controlplane", ""), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// onBoth brings one node's agent to each replica. Which one an agent finds is chance: it is sent to look again until it is so.
func onBoth(t *testing.T) (leader, follower kube.Pod) {
	t.Helper()
	for range 30 {
		leader, follower = replicas(t)
		g, err := gauges(leader)
		if err != nil {
			t.Fatal(err)
		}
		switch g["agents"] {
		case 1:
			return leader, follower
		case 0: // both are the follower's
			kill(t, follower)
		default:
			shop{T: t}.killAgent("n1")
		}
	}
	t.Fatal("both agents are always served by one replica")
	return
}

// replicasServe: two replicas serve different agents, and pods on both nodes leave, join, and speak mTLS.
func (s shop) replicasServe() {
	t := s.T
	leader, follower := onBoth(t)
	t.Logf("%s leads, %s follows, each serves one node", leader.Name, follower.Name)
	for range 3 {
		s.label(callees, false)
		s.label(callers, false)
		s.label(callers, true)
		s.label(callees, true)
		s.dwell(200)
	}
	g, err := gauges(leader)
	if err != nil || g["agents"] != 1 || g["leader"] != 1 || g["nodes"] != float64(len(k8s.Nodes)) {
		t.Errorf("the leader at the end: %v, %v", g, err)
	}
	sum := s.lossless()
	t.Logf("%d requests on %d connections, %d requests lost", sum.Requests, sum.Connections, sum.Failed)
}

// leaderKilled: the leader dies while many pods leave or join, again and again, and nothing is lost. Their nodes have
// used every Service before: the first use waits for a controller (docs/LIMITS.md).
func (s shop) leaderKilled() {
	t := s.T
	s.dwell(400)
	const kills = 5
	for i := range kills {
		in := i%2 == 1
		leader, _ := replicas(t)
		value, condition, status := "enabled", enforced, "True"
		if !in {
			value, condition, status = "disabled", enrolled, "False"
		}
		order := []string{callers, callees}
		if !in {
			order = []string{callees, callers}
		}
		for n, selector := range order {
			if _, err := k8s.Kubectl(t.Context(), "label", "pods", "-n", "shop", "-l", selector, "weft.dev/mesh="+value, "--overwrite"); err != nil {
				t.Fatal(err)
			}
			if n == i/2%2 { // some milliseconds into it, another number of them each time
				time.Sleep(time.Duration(i) * 60 * time.Millisecond)
				kill(t, leader)
			}
			if err := k8s.UntilCondition(t.Context(), 2*time.Minute, "shop", selector, condition, status, nil); err != nil {
				t.Fatal(err)
			}
		}
		s.dwell(100)
	}
	sum := s.lossless()
	t.Logf("the leader was killed %d times: %d requests on %d connections, %d requests lost", kills, sum.Requests, sum.Connections, sum.Failed)
}

// deafen keeps a controller replica from the API server; agents and the other replica reach it as before.
func deafen(t *testing.T, p kube.Pod) (heal func()) {
	t.Helper()
	out, err := k8s.Kubectl(t.Context(), "get", "service", "-n", "default", "kubernetes", "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		t.Fatal(err)
	}
	pid := processOf(t, p.UID, "controlplane", "")
	nft := func(script string) {
		if out, err := exec.Command("nsenter", "-t", strconv.Itoa(pid), "-n", "nft", script).CombinedOutput(); err != nil {
			t.Errorf("nft %s: %v: %s", script, err, out)
		}
	}
	nft("add table ip deaf; add chain ip deaf out { type filter hook output priority 0; }; add chain ip deaf in { type filter hook input priority 0; };" +
		"add rule ip deaf out ip daddr " + out + " drop; add rule ip deaf in ip saddr " + out + " drop")
	healed := false
	heal = func() {
		if !healed {
			healed = true
			nft("delete table ip deaf")
		}
	}
	t.Cleanup(heal)
	return heal
}

// blockedWatches: a replica that does not hear the API server any more serves nobody with what is old: its agents go to
// the other one, nothing is taken away, and pods join and leave meanwhile. Then it serves again.
func (s shop) blockedWatches() {
	t := s.T
	_, follower := onBoth(t)
	heal := deafen(t, follower)
	// It is not known at once that it is behind: only what has changed since can be missing.
	apply(t, podOn("newcomer", "n1", "mesh", "", `args: [serve], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`))
	until(t, time.Minute, "the deaf replica to let its agents go", func() (bool, string) {
		g, err := gauges(follower)
		return err == nil && g["agents"] == 0 && g["following"] == 0, fmt.Sprint(g, err)
	})
	inMesh(t, "app=newcomer", "Captured")
	ready(t, "app=newcomer")
	s.label(callees, false)
	s.label(callees, true)
	for range 2 { // agents that look for a replica anew, wherever they come
		s.killAgent("n1")
		s.killAgent("n2")
		s.dwell(100)
	}
	if g, err := gauges(follower); err != nil || g["agents"] != 0 {
		t.Errorf("the deaf replica serves agents: %v, %v", g, err)
	}
	heal()
	replicas(t)
	sum := s.lossless()
	t.Logf("%d requests on %d connections, %d requests lost", sum.Requests, sum.Connections, sum.Failed)
}

// component finds a process of this cluster's control plane.
func component(t *testing.T, name string) int {
	t.Helper()
	prefix := filepath.Base(filepath.Dir(k8s.Nodes[0].CgroupV2))
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // fails for a bad pattern alone
	for _, file := range files {
		command, err := os.ReadFile(file)
		words := strings.Split(string(command), "\x00")
		if err != nil || len(words) < 2 || words[1] != name {
			continue
		}
		group, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cgroup"))
		if err == nil && strings.Contains(string(group), prefix) {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
				return pid
			}
		}
	}
	t.Fatalf("no process %s of cluster %s", name, prefix)
	return 0
}

// apiServerAway: what is known goes on while the API server does not answer; both replicas go on serving their agents, nobody
// leads, and all is well by itself when it is back.
func (s shop) apiServerAway() {
	t := s.T
	leader, follower := replicas(t)
	api, manager := component(t, "kube-apiserver"), component(t, "kube-controller-manager")
	back := func() {
		_ = syscall.Kill(api, syscall.SIGCONT)
		// One that was asleep takes nodes for dead that it has not heard of; a new one waits for them.
		_ = syscall.Kill(manager, syscall.SIGKILL)
	}
	t.Cleanup(back)
	for _, pid := range []int{manager, api} {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	until(t, time.Minute, "nobody to lead", func() (bool, string) {
		g, err := gauges(leader)
		return err == nil && g["leader"] == 0, fmt.Sprint(g["leader"], err)
	})
	began := time.Now()
	for time.Since(began) < *apiAway {
		served := 0.0
		for _, p := range []kube.Pod{leader, follower} {
			g, err := gauges(p)
			if err != nil {
				t.Error(err)
			}
			served += g["agents"]
		}
		if served != float64(len(k8s.Nodes)) {
			t.Errorf("%v agents are served while the API server is away, want %d", served, len(k8s.Nodes))
		}
		time.Sleep(2 * time.Second)
	}
	back()
	until(t, time.Minute, "the API server", func() (bool, string) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := k8s.Get(ctx, "/readyz")
		return err == nil, fmt.Sprint(err)
	})
	one, other := replicas(t)
	for _, p := range []kube.Pod{leader, follower} {
		for _, now := range []kube.Pod{one, other} {
			if now.UID == p.UID && now.Restarts != p.Restarts {
				t.Errorf("%s has restarted", p.Name)
			}
		}
	}
	s.dwell(200)
	sum := s.lossless()
	t.Logf("the API server was away for %v: %d requests on %d connections, %d requests lost", *apiAway, sum.Requests, sum.Connections, sum.Failed)
}
