//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weftmesh/weft/test/kube"
)

var (
	rollouts  = flag.Int("rollouts", 1, "rolling restarts of each Deployment under load (make soak: 10)")
	comeAndGo = flag.Int("pods", 24, "pods that are made and deleted (make soak: 200)")
)

// everyKind is one pod of each kind of workload. Each container calls the server once, the first thing that it does.
const everyKind = `
apiVersion: batch/v1
kind: Job
metadata: {name: new-job, namespace: mesh}
spec:
  backoffLimit: 0
  template:
    metadata: {labels: {app: new, kind: job}}
    spec:
      restartPolicy: Never
      serviceAccountName: other
      nodeName: n2
      initContainers: [{name: init, image: "docker.io/weft/toolbox:1", args: [get, "http://server.mesh/pod?job-init"]}]
      containers: [{name: main, image: "docker.io/weft/toolbox:1", args: [get, "http://server.mesh/pod?job"]}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: new-cron, namespace: mesh}
spec:
  schedule: "0 0 1 1 *"
  suspend: true
  jobTemplate:
    spec:
      backoffLimit: 0
      template:
        metadata: {labels: {app: new, kind: cron}}
        spec:
          restartPolicy: Never
          serviceAccountName: other
          nodeName: n1
          containers: [{name: main, image: "docker.io/weft/toolbox:1", args: [get, "http://server.mesh/pod?cron"]}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: new-set, namespace: mesh}
spec:
  serviceName: new
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: new, kind: set}}
  template:
    metadata: {labels: {app: new, kind: set}}
    spec:
      serviceAccountName: other
      terminationGracePeriodSeconds: 1
      initContainers:
        - {name: first, image: "docker.io/weft/toolbox:1", args: [get, "http://server.mesh/pod?set-init"]}
        - {name: sidecar, image: "docker.io/weft/toolbox:1", restartPolicy: Always, args: [get, -n, "1000000", -interval, 1h, "http://server.mesh/pod?set-sidecar"]}
      containers: [{name: main, image: "docker.io/weft/toolbox:1", args: [serve]}]
`

// TestNewPods: no container of a new pod runs outside the mesh, of whatever kind of workload.
func TestNewPods(t *testing.T) {
	alone(t, "mesh")
	began := time.Now()
	apply(t, everyKind)
	t.Cleanup(func() {
		_, _ = k8s.Kubectl(context.Background(), "delete", "job", "-n", "mesh", "new-cron-now", "--ignore-not-found")
	})
	if _, err := k8s.Kubectl(t.Context(), "create", "job", "-n", "mesh", "--from=cronjob/new-cron", "new-cron-now"); err != nil {
		t.Fatal(err)
	}
	for _, job := range []string{"new-job", "new-cron-now"} {
		if out, err := k8s.Kubectl(t.Context(), "wait", "-n", "mesh", "--for=condition=complete", "--timeout=90s", "job/"+job); err != nil {
			t.Fatal(job, err, out)
		}
	}
	if err := k8s.UntilReady(t.Context(), 2*time.Minute, "mesh", "app=new,kind=set", nil); err != nil {
		t.Fatal(err)
	}
	if err := k8s.UntilCondition(t.Context(), time.Minute, "mesh", "app=new,kind=set", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	pods, err := k8s.Pods(t.Context(), "mesh", "app=new,kind=set")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if k := p.Conditions[enrolled]; k.Status != "True" || k.Reason != "Captured" {
			t.Errorf("%s: %+v, want it in the mesh since before its start", p.Name, k)
		}
	}
	want := map[string]int{"job-init": 1, "job": 1, "cron": 1, "set-init": 2, "set-sidecar": 2}
	until(t, 30*time.Second, "the first call of every container in Envoy's log", func() (bool, string) {
		seen := map[string]int{}
		for _, at := range placements {
			for _, l := range accessLog(t, at.node, began) {
				if _, marker, ok := strings.Cut(l.Path, "/pod?"); ok && l.Direction == "out" && fmt.Sprint(l.Status) == "200" {
					seen[marker]++
				}
			}
		}
		missing := slices.DeleteFunc(slices.Sorted(maps.Keys(want)), func(m string) bool { return seen[m] >= want[m] })
		return len(missing) == 0, fmt.Sprintf("missing %v, seen %v", missing, seen)
	})
}

// TestNewPodWithoutController: without a controller there is no SVID for a new pod, so no container of it is made, and kubelet says why.
func TestNewPodWithoutController(t *testing.T) {
	scale(t, 0)
	t.Cleanup(func() { scale(t, controllers) })
	apply(t, podOn("early", "n2", "mesh", "", `args: [get, -n, "1000000", -interval, 1h, "http://server.mesh/pod?early"]`))
	notMade(t, "early", "weft: the pod is not in the mesh yet: ")
	scale(t, controllers)
	if err := k8s.UntilReady(t.Context(), 2*time.Minute, "mesh", "app=early", nil); err != nil {
		t.Fatal(err)
	}
	condition(t, "mesh", "pod", "early", `weft.dev/Enrolled=True Captured: `)
}

// notMade waits until the runtime does not make a pod's container, for a reason.
func notMade(t *testing.T, pod, reason string) {
	t.Helper()
	until(t, time.Minute, "the refusal", func() (bool, string) {
		out, err := k8s.Kubectl(t.Context(), "get", "pod", "-n", "mesh", pod, "-o", "jsonpath={.status.containerStatuses[0].state}")
		return err == nil && strings.Contains(out, "CreateContainerError") && strings.Contains(out, reason), out
	})
}

// rolling asks, by requests, what can be replaced without a loss: a stream or a session ends with the app at its other end.
var rolling = heldLoad("rolling", `[{"name": "front-20",       "kind": "http-keepalive", "address": "front:80",     "perConnection": 20, "pause": "50ms"},
                 {"name": "catalogue-kept", "kind": "http-keepalive", "address": "catalogue:80", "count": 2, "pause": "25ms"},
                 {"name": "catalogue-one",  "kind": "http-new",       "address": "catalogue:80", "count": 2, "pause": "40ms"},
                 {"name": "unary-kept",     "kind": "grpc-unary",     "address": "prices:9000",  "count": 2, "pause": "25ms"},
                 {"name": "unary-20",       "kind": "grpc-unary",     "address": "prices:9000",  "perConnection": 20, "pause": "25ms"}]`)

// TestRollingRestarts: every Deployment of the shop is replaced under load from both nodes, callees Strict with AccessPolicies,
// and no request is lost. No new pod has started outside the mesh.
func TestRollingRestarts(t *testing.T) {
	alone(t, till)
	s := newShopWith(t, till, "rolling", rolling)
	apply(t, s.in(guarded))
	if _, err := k8s.Kubectl(t.Context(), "label", "namespace", till, "weft.dev/mesh=enabled"); err != nil {
		t.Fatal(err)
	}
	if err := k8s.UntilCondition(t.Context(), time.Minute, till, "", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	before, err := k8s.Pods(t.Context(), till, "app notin (rolling)")
	if err != nil {
		t.Fatal(err)
	}
	s.begin("app=rolling")
	for range *rollouts {
		for _, d := range []string{"front", "catalogue-v1", "catalogue-v2", "prices", "redis"} {
			s.dwell(200)
			for _, step := range []string{"restart", "status"} {
				if out, err := k8s.Kubectl(t.Context(), "rollout", step, "-n", till, "deployment/"+d); err != nil {
					t.Fatal(err, out)
				}
			}
		}
	}
	s.dwell(200)
	if err := k8s.UntilCondition(t.Context(), time.Minute, till, "", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	now, err := k8s.Pods(t.Context(), till, "app notin (rolling)")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range now {
		if p.Deleting {
			continue
		}
		if k := p.Conditions[enrolled]; k.Reason != "Captured" {
			t.Errorf("%s: %+v, want it in the mesh since before its start", p.Name, k)
		}
		if slices.ContainsFunc(before, func(old kube.Pod) bool { return old.UID == p.UID }) {
			t.Errorf("%s was not replaced", p.Name)
		}
	}
	sum := s.lossless()
	t.Logf("%d rolling restarts: %d requests, %d connections", 5**rollouts, sum.Requests, sum.Connections)
}

// TestStrangersAndNewPods: strangers on both nodes try without pause every address that the next pods may get, and a pod under
// Strict never gives them a byte, nor gets one from them, since before it starts.
func TestStrangersAndNewPods(t *testing.T) {
	const fresh = 8
	enterStrict(t)
	control := podOn("open", "n2", "mesh", "weft.dev/mesh: disabled, group: new", `args: [serve]`)
	apply(t, podOn("last", "n2", "outside", "", `args: [serve]`))
	if err := k8s.UntilReady(t.Context(), time.Minute, "outside", "app=last", nil); err != nil {
		t.Fatal(err)
	}
	last := netip.MustParseAddr(pod(t, "outside", "last", "n2").IPs[0])
	heard := bytesTo(t, "n2", pod(t, "outside", "stranger", "n1"), pod(t, "outside", "stranger", "n2"))
	defer knock(t, last, fresh+8, "n1", "n2")()
	manifest := control
	for i := range fresh {
		manifest += podOn(fmt.Sprintf("fresh-%d", i), "n2", "mesh", "group: new", `args: [serve]`)
	}
	apply(t, manifest)
	if err := k8s.UntilReady(t.Context(), 2*time.Minute, "mesh", "group=new", nil); err != nil {
		t.Fatal(err)
	}
	hits := func(name string) int { return hitsOf(t, pod(t, "mesh", name, "n2"), "toolbox")["stranger"] }
	open := pod(t, "mesh", "open", "n2")
	until(t, time.Minute, "strangers to reach a pod outside the mesh", func() (bool, string) {
		n := heard.from(open.IPs[0])
		return hits("open") > 20 && n > 20, fmt.Sprintf("%d hits, %d packets with bytes", hits("open"), n)
	})
	for i := range fresh {
		p := pod(t, "mesh", fmt.Sprintf("fresh-%d", i), "n2")
		if n := hits(p.Name); n > 0 {
			t.Errorf("%s was asked %d times by a stranger", p.Name, n)
		}
		if n := heard.from(p.IPs[0]); n > 0 {
			t.Errorf("%s sent a stranger %d packets with bytes", p.Name, n)
		}
	}
}

// knock lets strangers on some nodes call the addresses after one, without pause, until stop is called.
func knock(t *testing.T, last netip.Addr, addresses int, nodes ...string) (stop func()) {
	t.Helper()
	var calls []call
	for next := last.Next(); len(calls) < 2*addresses; next = next.Next() {
		calls = append(calls, call{URL: "http://" + next.String() + ":8080/hit/stranger", Timeout: 300}, call{Address: next.String() + ":9000", Line: "x", Timeout: 300})
	}
	ctx, cancel := context.WithCancel(t.Context())
	var tries sync.WaitGroup
	for _, node := range nodes {
		from := pod(t, "outside", "stranger", node)
		for range 2 { // one is always under way
			tries.Go(func() {
				for ctx.Err() == nil {
					if _, err := batch(ctx, from, calls); err != nil && ctx.Err() == nil {
						t.Error(err)
					}
				}
			})
		}
	}
	return func() { cancel(); tries.Wait() }
}

// answers counts packets with a payload by the address that sent them.
type answers struct {
	mu sync.Mutex
	by map[string]int
}

func (a *answers) from(ip string) int { a.mu.Lock(); defer a.mu.Unlock(); return a.by[ip] }

var sender = regexp.MustCompile(`IP (\d+\.\d+\.\d+\.\d+)\.\d+ > `)

// bytesTo listens on every interface of a node for TCP payload to some pods.
func bytesTo(t *testing.T, node string, to ...kube.Pod) *answers {
	t.Helper()
	var hosts []string
	for _, p := range to {
		hosts = append(hosts, "dst host "+p.IPs[0])
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := machine(t, node).NetCommand(ctx, "tcpdump", "-i", "any", "--immediate-mode", "-n", "-l", "-q",
		"("+strings.Join(hosts, " or ")+") and tcp and (ip[2:2] - ((ip[0] & 0xf) << 2) - ((tcp[12] & 0xf0) >> 2)) != 0")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a := &answers{by: map[string]int{}}
	read := make(chan struct{})
	t.Cleanup(func() { cancel(); <-read; _ = cmd.Wait() })
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if m := sender.FindStringSubmatch(lines.Text()); m != nil {
				a.mu.Lock()
				a.by[m[1]]++
				a.mu.Unlock()
			}
		}
	}()
	return a
}

// TestPodsComeAndGo: of pods that were made and deleted nothing is left.
func TestPodsComeAndGo(t *testing.T) {
	serve := func(n int) {
		const batch = 24
		for ; n > 0; n -= batch {
			manifest := ""
			for i := range min(n, batch) {
				manifest += podOn(fmt.Sprintf("brief-%d", i), placements[i%2].node, "mesh", "group: brief", `args: [serve]`)
			}
			if err := k8s.Apply(t.Context(), manifest); err != nil {
				t.Fatal(err)
			}
			if err := k8s.UntilReady(t.Context(), 3*time.Minute, "mesh", "group=brief", nil); err != nil {
				t.Fatal(err)
			}
			if out, err := k8s.Kubectl(t.Context(), "delete", "pod", "-n", "mesh", "-l", "group=brief"); err != nil {
				t.Fatal(err, out)
			}
		}
	}
	serve(12) // what is made once is there
	was := map[string]books{}
	for _, at := range placements {
		was[at.node] = look(t, at.node)
	}
	serve(*comeAndGo)
	for _, at := range placements {
		var now books
		until(t, 2*time.Minute, "nothing to be left on "+at.node, func() (bool, string) {
			now = look(t, at.node)
			var more []string
			for what, n := range now.counts {
				if n > was[at.node].counts[what] {
					more = append(more, fmt.Sprintf("%s %d, before %d", what, n, was[at.node].counts[what]))
				}
			}
			return len(more) == 0, strings.Join(more, "; ")
		})
		t.Logf("%s: %v; RSS in MiB %v, before %v", at.node, now.counts, now.memory, was[at.node].memory)
		for process, mib := range now.memory {
			if before := was[at.node].memory[process]; mib > before*5/4+8 {
				t.Errorf("%s on %s has %d MiB, before %d", process, at.node, mib, before)
			}
		}
	}
}

// books are what pods may leave on a node: how much there is of each kind, and MiB by process.
type books struct {
	counts map[string]int
	memory map[string]int
}

func look(t *testing.T, node string) books {
	t.Helper()
	b := books{map[string]int{}, map[string]int{}}
	host := fmt.Sprintf("/proc/%d/root", machine(t, node).PID)
	count := func(what, pattern string) {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("count %s on %s: %s, %v", what, node, pattern, err)
		}
		b.counts[what] = len(found)
	}
	count("network namespaces", host+"/run/netns/*")
	count("pins of pods", host+"/sys/fs/bpf/weft/pods/*")
	out, err := machine(t, node).NetCommand(t.Context(), "ip", "-o", "link").Output()
	if err != nil {
		t.Fatal(err)
	}
	b.counts["links"] = strings.Count(string(out), "\n")
	b.counts["listeners"] = strings.Count(admin(t, node, "/listeners"), "\n")
	uid := nodeproxyOn(t, node).Metadata.UID
	for name, pid := range map[string]int{"agent": processOf(t, uid, "nodeproxy", "agent"), "Envoy": processOf(t, uid, "envoy", "")} {
		count("descriptors of "+name, fmt.Sprintf("/proc/%d/fd/*", pid))
		b.memory[name] = residentKiB(t, pid) >> 10
	}
	for _, name := range []string{"addresses", "handovers", "listeners", "pods", "probes", "proxies", "records", "server_first", "services", "usages"} {
		b.counts["map "+name] = len(entries(t, node, name))
	}
	return b
}

// entries are the values of one of the hooks' hash maps on a node, as the kernel has them.
func entries(t *testing.T, node, name string) (values [][]byte) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(fmt.Sprintf("/proc/%d/root", machine(t, node).PID), "sys/fs/bpf/weft/maps", name), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	found := map[string][]byte{} // what goes meanwhile lets the kernel begin anew
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	all := m.Iterate()
	for all.Next(&key, &value) {
		found[string(key)] = slices.Clone(value)
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		t.Fatalf("read %s on %s: %v", name, node, err)
	}
	return slices.Collect(maps.Values(found))
}
