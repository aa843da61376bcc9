//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/hostile"
	"github.com/weftmesh/weft/test/hostile/attack"
	"github.com/weftmesh/weft/test/kube"
	"github.com/weftmesh/weft/test/load"
)

// TestHostileAlone makes the attempts of docs/HOSTILE.md that are felt beside it: full limits, killed Envoys, and addresses
// that pods get again.
func TestHostileAlone(t *testing.T) {
	h := newHostiles(t, hostilePod(hostileMesh, "lax", "barred", "n1"), bounded(hostilePod(hostileMesh, "flood", "barred", "n2")+hostilePod(hostileOutside, "flood", "", "n2")), steady)
	h.served()
	for _, part := range []struct {
		name string
		run  func(*hostiles)
	}{
		{"port scans", (*hostiles).scans}, {"hosts without end", (*hostiles).hosts}, {"20,000 connections from a pod", (*hostiles).holdOut},
		{"20,000 connections to a pod", (*hostiles).holdIn}, {"theft while Envoy is killed", (*hostiles).theft}, {"addresses again", (*hostiles).reuse},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(h.in(t)) })
	}
	h.served()
	h.complete(hostile.Alone)
}

// bounded gives pods a limit of processor time, which all on this machine share: what others have left of that is no matter of
// weft's.
func bounded(manifest string) string {
	return strings.ReplaceAll(manifest, "securityContext:", `resources: {limits: {cpu: 200m}}, securityContext:`)
}

// steady is traffic of others: on each node some requests at a time, on connections that are kept and on new ones.
const steady = `---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: steady, namespace: hostile}
spec:
  selector: {matchLabels: {app: steady}}
  template:
    metadata: {labels: {app: steady}}
    spec:
      serviceAccountName: allowed
      terminationGracePeriodSeconds: 1
      containers:
        - name: load
          image: weft.dev/test-load:dev
          args: [-every=100ms, '-targets=[{"name":"kept","kind":"http-keepalive","address":"target:80","path":"/ok","count":2,"pause":"10ms"},{"name":"new","kind":"http-new","address":"target:80","path":"/ok","count":2,"pause":"40ms"}]']
`

// flat runs something and compares what both nodes' Envoys hold before and after it.
func (h *hostiles) flat(what string, run func()) {
	h.Helper()
	type held struct{ kib, clusters, stats int }
	look := func(node string) held {
		all := admin(h.T, node, "/stats?format=text")
		clusters := 0
		for l := range strings.Lines(all) {
			if name, value, ok := strings.Cut(l, ": "); ok && name == "cluster_manager.active_clusters" {
				_, _ = fmt.Sscan(value, &clusters)
			}
		}
		return held{residentKiB(h.T, envoyOn(h.T, node)), clusters, strings.Count(all, "\n")}
	}
	before := map[string]held{}
	for _, at := range placements {
		before[at.node] = look(at.node)
	}
	run()
	for _, at := range placements {
		b, a := before[at.node], look(at.node)
		h.Logf("%s, Envoy on %s: %d KiB, then %d; %d clusters, then %d; %d statistics, then %d", what, at.node, b.kib, a.kib, b.clusters, a.clusters, b.stats, a.stats)
		if a.kib-b.kib > 24<<10 || a.clusters-b.clusters > 4 || a.stats-b.stats > 200 {
			h.Errorf("%s: Envoy on %s holds %+v, before %+v", what, at.node, a, b)
		}
	}
}

// scans: every port of the Strict pod. What a first scan makes Envoy take, a second finds there.
func (h *hostiles) scans() {
	target := h.names["target"]["pod4"]
	ports := map[hostile.Attacker]int{hostile.Stranger: 1024, hostile.Barred: 384}
	if *hostileForm == "full" {
		ports[hostile.Stranger], ports[hostile.Barred] = 65535, 65535
	}
	scan := func(who hostile.Attacker, last int) {
		h.everywhere([]hostile.Attacker{who}, func(kube.Pod) []attack.Attempt {
			return []attack.Attempt{{ID: "scan", Kind: "scan", To: target, First: 1, Last: last, Count: 64, Send: []byte("x\n")}}
		}, func(who string, o attack.Outcome) {
			if last > 128 {
				h.Logf("%s: %v", who, o.Counts)
			}
			if o.Counts["answered"] > 0 || len(o.Counts) == 0 {
				h.Errorf("%s: %v, %s", who, o.Counts, o.Error)
			}
		})
	}
	for id, who := range map[string]hostile.Attacker{"scan-stranger": hostile.Stranger, "scan-barred": hostile.Barred} {
		scan(who, 128) // what is made at the first use
		h.flat(id, func() { scan(who, ports[who]) })
		h.did(id)
	}
	control := h.attack(h.attackers[hostile.Stranger]["n2"], 1, attack.Attempt{ID: "scan", Kind: "scan", To: h.address(h.bare, "4"), First: 8990, Last: 9010, Count: 8, Send: []byte("x\n")})[0]
	if control.Counts["answered"] != 3 {
		h.Errorf("control: %+v, want the three ports of the pod without weft to answer", control)
	}
}

// hosts: names that a client makes up cost nothing that stays.
func (h *hostiles) hosts() {
	names := func(n int) func(kube.Pod) []attack.Attempt {
		return func(p kube.Pod) []attack.Attempt {
			var all []attack.Attempt
			for i := range n {
				all = append(all, h.fill(attack.Attempt{ID: "hosts", Kind: "dial", To: "{vip4}:80",
					Send: fmt.Appendf(nil, "GET /%d HTTP/1.1\r\nHost: host-%d.example\r\nConnection: close\r\n\r\n", i, i)}, p, h.target, ""))
			}
			return all
		}
	}
	judge := func(who string, o attack.Outcome) {
		if !bytes.HasPrefix(o.Got, []byte("HTTP/1.1 403")) {
			h.Errorf("%s: %.100q, %s", who, o.Got, o.Error)
		}
	}
	barred := []hostile.Attacker{hostile.Barred}
	h.everywhere(barred, names(50), judge)
	h.flat("hosts", func() { h.everywhere(barred, names(1000), judge) })
	h.did("hosts")

	from := h.attackers[hostile.Barred]["n1"]
	done := h.background(from, 1, h.fill(attack.Attempt{ID: "slow-heads", Kind: "hold", To: "{vip4}:80", Count: 500, Send: []byte("GET /slow HTTP/1.1\r\nHost: target\r\nx-slow: "), Millis: 3000}, from, h.target, ""))
	time.Sleep(time.Second)
	h.served()
	if o := <-done; o.Counts["open"] != 500 || o.Counts["answered"] > 0 {
		h.Errorf("slow-heads: %+v", o)
	}
	h.did("slow-heads")
}

// What one pod tries to hold, in processes that each may have so many files.
const (
	tooMany   = 20000
	processes = 4
	limit     = 4000 // MeshConfig's default
)

// flood has one pod make 20,000 connections and hold them while something else runs, and sums what became of them.
func (h *hostiles) flood(id string, by kube.Pod, to string, during func()) map[string]int {
	h.Helper()
	var all []<-chan attack.Outcome
	for range processes {
		all = append(all, h.background(by, 1, attack.Attempt{ID: id, Kind: "hold", To: to, Count: tooMany / processes, Millis: 12000}))
	}
	during()
	sum := map[string]int{}
	for _, done := range all {
		o := <-done
		if o.Error != "" {
			h.Errorf("%s: %+v", id, o)
		}
		for name, n := range o.Counts {
			sum[name] += n
		}
	}
	h.Logf("%s: %v", id, sum)
	return sum
}

// descriptors are the open files of a process, and how many it may have.
func descriptors(t *testing.T, pid int) (open, most int) {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(limits)) {
		if rest, ok := strings.CutPrefix(l, "Max open files"); ok {
			_, _ = fmt.Sscan(rest, &most)
		}
	}
	return len(files), most
}

// holdOut: from a pod of the mesh, whose own Envoy captures what it dials.
func (h *hostiles) holdOut() {
	by, counted := pod(h.T, hostileMesh, "flood", "n2"), hookEvents(h.T, "n2", "out_refused_limit")
	var sum map[string]int
	h.unharmed("hold-out", "n2", func(during func()) { sum = h.flood("hold-out", by, h.names["target"]["vip4"]+":80", during) })
	refused := hookEvents(h.T, "n2", "out_refused_limit") - counted
	if sum["open"] < limit || sum["open"] > limit+limit/20 || sum["EAGAIN"] != tooMany-sum["open"] {
		h.Errorf("hold-out: %v, want %d open and EAGAIN for the rest", sum, limit)
	}
	if refused < sum["EAGAIN"] {
		h.Errorf("hold-out: the counter rose by %d, %d were refused", refused, sum["EAGAIN"])
	}
	h.did("hold-out", "hold-fds")
}

// holdIn: from a stranger to a pod that takes plaintext.
func (h *hostiles) holdIn() {
	lax, counted := pod(h.T, hostileMesh, "lax", "n1"), hookEvents(h.T, "n1", "in_refused_limit")
	var sum map[string]int
	h.unharmed("hold-in", "n1", func(during func()) {
		sum = h.flood("hold-in", pod(h.T, hostileOutside, "flood", "n2"), h.address(lax, "4")+":"+linePort, during)
	})
	refused := hookEvents(h.T, "n1", "in_refused_limit") - counted
	if sum["open"] < limit || sum["open"] > tooMany/2 || sum["still open"] > limit+limit/20 {
		h.Errorf("hold-in: %v, want some %d held", sum, limit)
	}
	if refused < tooMany-sum["open"]-limit/20 {
		h.Errorf("hold-in: the counter rose by %d, %d were refused", refused, tooMany-sum["open"])
	}
	h.did("hold-in")
}

// unharmed compares the traffic of others before and during a flood, and counts the descriptors of a node's Envoy.
func (h *hostiles) unharmed(id, node string, flood func(during func())) {
	h.Helper()
	traffic, err := k8s.Follow(h.Context(), hostileMesh, "app=steady")
	if err != nil {
		h.Fatal(err)
	}
	defer traffic.Stop()
	measure := func(limit time.Duration, meanwhile func()) (rate float64, lost load.Stats) {
		fresh := func() load.Stats {
			all, err := traffic.Fresh(h.Context())
			if err != nil {
				h.Fatal(err)
			}
			return load.Sum(all)
		}
		first := fresh()
		for began := time.Now(); time.Since(began) < limit; time.Sleep(200 * time.Millisecond) {
			meanwhile()
		}
		last := fresh()
		lost = kube.Between(first, last)
		return float64(lost.Requests) / last.At.Sub(first.At).Seconds(), lost
	}
	open, most := 0, 0
	before, _ := measure(5*time.Second, func() {})
	flood(func() {
		rate, lost := measure(8*time.Second, func() {
			n, limit := descriptors(h.T, envoyOn(h.T, node))
			open, most = max(open, n), limit
		})
		h.Logf("%s: others made %.1f requests a second before and %.1f meanwhile, %d failed, %d connections broke; Envoy had %d of %d descriptors", id, before, rate, lost.Failed, lost.Broken, open, most)
		if lost.Failed > 0 || lost.Broken > 0 || lost.Requests == 0 {
			h.Errorf("%s: others lost requests: %+v", id, lost)
		}
		if *hostileForm == "full" && rate < 0.95*before {
			h.Errorf("%s: others made %.1f requests a second, before %.1f, want 95 %% of that", id, rate, before)
		}
	})
	if open <= limit || open >= most {
		h.Errorf("%s: Envoy had %d descriptors of %d, want more than the connections that are held", id, open, most)
	}
}

// theft: an app binds Envoy's ports while it is killed, and nobody gets past it meanwhile.
func (h *hostiles) theft() {
	barred := h.attackers[hostile.Barred]
	four := h.background(barred["n1"], 1, attack.Attempt{ID: "theft4", Kind: "bind", To: "0.0.0.0", First: 15000, Last: 15019, Options: []string{"reuseport"}, Millis: 6000})
	six := h.background(barred["n1"], 1, attack.Attempt{ID: "theft6", Kind: "bind", To: "::", First: 15000, Last: 15019, Options: []string{"reuseport"}, Millis: 6000})
	ctx, cancel := context.WithCancel(h.Context())
	defer cancel()
	var dialling sync.WaitGroup
	var mu sync.Mutex
	tried := 0
	for _, by := range []kube.Pod{h.attackers[hostile.Stranger]["n1"], h.attackers[hostile.Stranger]["n2"], barred["n1"], barred["n2"]} {
		var all []attack.Attempt
		for range 10 {
			for _, a := range []attack.Attempt{{Kind: "dial", To: "{pod4}:9000", Send: []byte("x\n")}, {Kind: "dial", To: "[{pod6}]:9000", Send: []byte("x\n")}, {Kind: "dial", To: "{pod4}:9001"}, {Kind: "dial", To: "{vip4}:9001"}} {
				a.ID, a.Millis = "theft-dial", 3000
				all = append(all, h.fill(a, by, h.target, ""))
			}
		}
		dialling.Go(func() {
			for ctx.Err() == nil {
				outcomes, err := attackFrom(ctx, by, 8, all)
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					h.Error(err)
					return
				}
				mu.Lock()
				tried += len(outcomes)
				mu.Unlock()
				for _, o := range outcomes {
					if len(o.Got) > 0 {
						h.Errorf("theft-dial from %s: %+v", by.Name, o)
					}
				}
			}
		})
	}
	for range 2 {
		time.Sleep(1500 * time.Millisecond)
		killed := envoyOn(h.T, "n1")
		if err := syscall.Kill(killed, syscall.SIGKILL); err != nil {
			h.Fatal(err)
		}
		until(h.T, 20*time.Second, "another Envoy", func() (bool, string) {
			pid, found := findProcess(nodeproxyOn(h.T, "n1").Metadata.UID, "envoy", "")
			return found && pid != killed, fmt.Sprint(pid, found)
		})
	}
	h.served()
	for _, done := range []<-chan attack.Outcome{four, six} {
		o := <-done
		if o.Counts["EPERM"] < 1000 || len(o.Counts) != 1 {
			h.Errorf("%s: %+v, want EPERM alone", o.ID, o)
		}
		h.Logf("%s: %v", o.ID, o.Counts)
	}
	cancel()
	dialling.Wait()
	if tried < 200 {
		h.Errorf("theft-dial: %d attempts", tried)
	}
	h.Logf("theft-dial: %d attempts", tried)
	h.did("theft4", "theft6", "theft-dial")
}

// reuse: the CNI plugin gives an address again that another pod had.
func (h *hostiles) reuse() {
	service := "---\napiVersion: v1\nkind: Service\nmetadata: {name: phoenix, namespace: hostile}\nspec: {selector: {app: phoenix}, ports: [{name: tcp-echo, port: 9000}]}\n"
	if err := k8s.Apply(h.Context(), service); err != nil {
		h.Fatal(err)
	}
	vip, err := k8s.Kubectl(h.Context(), "get", "service", "-n", hostileMesh, "phoenix", "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		h.Fatal(err)
	}
	first := h.phoenix(hostileMesh, "allowed")
	mark := h.mark()
	until(h.T, 30*time.Second, "the server to be served by its Service", func() (bool, string) {
		for _, at := range placements {
			if o := h.attack(h.attackers[hostile.Allowed][at.node], 1, attack.Attempt{ID: "before", Kind: "dial", To: vip + ":9000", Send: []byte(mark + "\n"), Millis: 2000})[0]; !bytes.Contains(o.Got, []byte("app: ")) {
				return false, fmt.Sprintf("%s: %+v", at.name, o)
			}
		}
		return true, ""
	})
	h.dials(first, true)
	for _, next := range []struct{ id, namespace, account string }{{"reuse-stranger", hostileOutside, ""}, {"reuse-barred", hostileMesh, "barred"}} {
		h.gone(first)
		second := h.again(first, next.namespace, next.account)
		h.dials(second, false)
		if next.account == "" {
			mark := h.mark()
			for range 5 {
				h.everywhere([]hostile.Attacker{hostile.Allowed}, func(kube.Pod) []attack.Attempt {
					return []attack.Attempt{{ID: "reuse-server", Kind: "dial", To: vip + ":9000", Send: []byte(mark + "\n"), Millis: 2000}}
				}, func(who string, o attack.Outcome) {
					if len(o.Got) > 0 {
						h.Errorf("%s: %+v", who, o)
					}
				})
			}
			if h.saw(second, mark) {
				h.Error("reuse-server: the stranger saw what was meant for the server")
			}
			h.did("reuse-server")
		}
		h.did(next.id)
		first = second
	}
}

// phoenix makes a pod whose addresses another gets.
func (h *hostiles) phoenix(namespace, account string) kube.Pod {
	h.Helper()
	if err := k8s.Apply(h.Context(), hostilePod(namespace, "phoenix", account, "n1")); err != nil {
		h.Fatal(err)
	}
	if err := k8s.UntilReady(h.Context(), time.Minute, namespace, "app=phoenix", nil); err != nil {
		h.Fatal(err)
	}
	if namespace == hostileMesh {
		if err := k8s.UntilCondition(h.Context(), time.Minute, namespace, "app=phoenix", enforced, "True", nil); err != nil {
			h.Fatal(err)
		}
	}
	return pod(h.T, namespace, "phoenix", "n1")
}

func (h *hostiles) gone(p kube.Pod) {
	h.Helper()
	if _, err := k8s.Kubectl(h.Context(), "delete", "pod", p.Name, "-n", p.Namespace, "--wait"); err != nil {
		h.Fatal(err)
	}
}

// again makes a pod with the addresses of one that is gone, by what the plugin notes as the last that it gave.
func (h *hostiles) again(before kube.Pod, namespace, account string) kube.Pod {
	h.Helper()
	four, six := byFamily(h.T, before.IPs)
	for i, address := range []string{four, six} {
		previous := netip.MustParseAddr(address).Prev().String()
		file := filepath.Join(fmt.Sprintf("/proc/%d/root/run/cni/ipam/weft-test", machine(h.T, "n1").PID), fmt.Sprintf("last_reserved_ip.%d", i))
		if err := os.WriteFile(file, []byte(previous), 0o644); err != nil {
			h.Fatal(err)
		}
	}
	p := h.phoenix(namespace, account)
	if a, b := byFamily(h.T, p.IPs); a != four || b != six {
		h.Fatalf("the new pod has %v, want %v", p.IPs, before.IPs)
	}
	return p
}

// dials: a pod with those addresses reaches the server, or not.
func (h *hostiles) dials(by kube.Pod, let bool) {
	h.Helper()
	names := h.names["target"]
	var all []attack.Attempt
	for _, to := range []string{net.JoinHostPort(names["vip4"], "9000"), net.JoinHostPort(names["vip6"], "9000"), net.JoinHostPort(names["pod4"], "9000"), net.JoinHostPort(names["pod6"], "9000")} {
		for range 5 {
			all = append(all, attack.Attempt{ID: to, Kind: "dial", To: to, Send: []byte("x\n"), Millis: 3000})
		}
	}
	for _, o := range h.attack(by, 4, all...) {
		if bytes.Contains(o.Got, []byte("app: ")) != let || !let && len(o.Got) > 0 {
			h.Errorf("from %s/%s with the addresses %v to %s: %+v, want it let: %v", by.Namespace, by.Name, by.IPs, o.ID, o, let)
		}
	}
}
