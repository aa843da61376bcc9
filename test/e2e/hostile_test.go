//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/hostile"
	"github.com/weftmesh/weft/test/hostile/attack"
	"github.com/weftmesh/weft/test/kube"
)

var hostileForm = flag.String("hostile", "short", "short or full: all ports, the throughput of others, and what forged packets do to pods without weft (make soak: full)")

// Where they are: in the mesh, and outside it.
const (
	hostileMesh    = "hostile"
	hostileOutside = "hostile-outside"
)

// nodePorts of the Services of the attacked pod, and of the one without weft.
var nodePorts = map[string]int{"target": 30990, "bare": 30991}

// hostiles are the pods that attack, the one that is attacked, and one without weft that must be reached in the same way.
type hostiles struct {
	*testing.T
	target, bare kube.Pod
	// attackers by who they are and their node.
	attackers map[hostile.Attacker]map[string]kube.Pod
	// names are what {names} in attempts stand for, by the attacked pod.
	names map[string]map[string]string
	made  *sync.Map
	nonce uint32
	marks *atomic.Int32
}

// hostilePod is a pod that runs as root with a container's default capabilities.
func hostilePod(namespace, app, account, node string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %[2]s, namespace: %[1]s, labels: {app: %[2]s}}\nspec: {nodeName: %[4]s, %[3]s}\n", namespace, app, hostileSpec(account), node)
}

func hostileSpec(account string) string {
	if account != "" {
		account = "serviceAccountName: " + account + ", "
	}
	return account + `terminationGracePeriodSeconds: 1, containers: [{name: load, image: "weft.dev/test-load:dev", args: [target], securityContext: {runAsUser: 0}}]`
}

func hostileEverywhere(namespace, app, account string) string {
	return fmt.Sprintf("---\napiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: %[2]s, namespace: %[1]s}\nspec: {selector: {matchLabels: {app: %[2]s}}, template: {metadata: {labels: {app: %[2]s}}, spec: {%[3]s}}}\n", namespace, app, hostileSpec(account))
}

// hostileServices are the ways to a pod, as fixtures.yaml has them.
func hostileServices(namespace, app string) string {
	const service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: %s}\nspec: {selector: {app: %s}, %s}\n"
	ports := func(web, http, first string) string {
		return fmt.Sprintf("ports: [{name: http, port: %s, targetPort: 8080, appProtocol: %s}, {name: tcp-echo, port: 9000}, {name: greet, port: 9001%s}]", web, http, first)
	}
	return fmt.Sprintf(service, app, namespace, app, "ipFamilyPolicy: PreferDualStack, "+ports("80", "http", ", appProtocol: mysql")) +
		fmt.Sprintf(service, app+"-second", namespace, app, "ipFamilyPolicy: PreferDualStack, "+ports("80", "tcp", "")) +
		fmt.Sprintf(service, app+"-headless", namespace, app, "clusterIP: None, "+ports("8080", "http", "")) +
		fmt.Sprintf(service, app+"-node", namespace, app, fmt.Sprintf("type: NodePort, ipFamilyPolicy: PreferDualStack, ports: [{name: http, port: 80, targetPort: 8080, nodePort: %d}]", nodePorts[app]))
}

// newHostiles makes the pods and waits until the policies are in force.
func newHostiles(t *testing.T, more ...string) *hostiles {
	t.Helper()
	if _, err := k8s.Kubectl(t.Context(), "delete", "namespace", hostileMesh, hostileOutside, "--ignore-not-found"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := k8s.Kubectl(ctx, "delete", "namespace", hostileMesh, hostileOutside, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	if err := k8s.ApplyFile(t.Context(), filepath.Join(root, "test/e2e/testdata/hostile.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := k8s.Apply(t.Context(), hostilePod(hostileMesh, "target", "target", "n1")+hostilePod(hostileOutside, "bare", "", "n1")+
		hostileEverywhere(hostileMesh, "allowed", "allowed")+hostileEverywhere(hostileMesh, "barred", "barred")+hostileEverywhere(hostileOutside, "stranger", "")+
		hostileServices(hostileMesh, "target")+hostileServices(hostileOutside, "bare")+strings.Join(more, "")); err != nil {
		t.Fatal(err)
	}
	for _, namespace := range []string{hostileMesh, hostileOutside} {
		if err := k8s.UntilReady(t.Context(), time.Minute, namespace, "", nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := k8s.UntilCondition(t.Context(), time.Minute, hostileMesh, "", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	for kind, names := range map[string][]string{"authenticationpolicy": {"strict"}, "accesspolicy": {"allow", "deny"}} {
		for _, name := range names {
			programmedIn(t, hostileMesh, kind, name)
		}
	}
	h := &hostiles{T: t, target: pod(t, hostileMesh, "target", "n1"), bare: pod(t, hostileOutside, "bare", "n1"), attackers: map[hostile.Attacker]map[string]kube.Pod{},
		names: map[string]map[string]string{}, made: &sync.Map{}, nonce: uint32(time.Now().UnixMilli()), marks: &atomic.Int32{}}
	for who, c := range map[hostile.Attacker]caller{hostile.Stranger: {hostileOutside, "stranger"}, hostile.Barred: {hostileMesh, "barred"}, hostile.Allowed: {hostileMesh, "allowed"}} {
		h.attackers[who] = map[string]kube.Pod{}
		for _, at := range placements {
			h.attackers[who][at.node] = pod(t, c.namespace, c.app, at.node)
		}
	}
	for _, p := range []kube.Pod{h.target, h.bare} {
		h.names[p.Name] = h.namesOf(p)
	}
	return h
}

// byFamily are the IPv4 and the IPv6 address among some.
func byFamily(t *testing.T, texts []string) (four, six string) {
	t.Helper()
	for _, text := range texts {
		if a, err := netip.ParseAddr(text); err == nil && a.Is4() {
			four = text
		} else if err == nil {
			six = text
		}
	}
	if four == "" || six == "" {
		t.Fatalf("the addresses are %v, want one of each family", texts)
	}
	return four, six
}

// namesOf are the ways to a pod.
func (h *hostiles) namesOf(p kube.Pod) map[string]string {
	h.Helper()
	names := map[string]string{"headless": fmt.Sprintf("%s-headless.%s.svc.cluster.local", p.Name, p.Namespace), "nodeport": strconv.Itoa(nodePorts[p.Name])}
	both := func(name string, addresses []string) { names[name+"4"], names[name+"6"] = byFamily(h.T, addresses) }
	service := func(service string) []string {
		out, err := k8s.Kubectl(h.Context(), "get", "service", service, "-n", p.Namespace, "-o", "jsonpath={.spec.clusterIPs[*]}")
		if err != nil {
			h.Fatal(err)
		}
		return strings.Fields(out)
	}
	both("vip", service(p.Name))
	both("second", service(p.Name+"-second"))
	both("pod", p.IPs)
	both("allowed", h.attackers[hostile.Allowed]["n1"].IPs)
	both("bare", h.bare.IPs)
	names["node1"], names["node2"], names["node6"] = machine(h.T, "n1").IPv4.String(), machine(h.T, "n2").IPv4.String(), machine(h.T, "n1").IPv6.String()
	for _, prefix := range h.seen(p, 0).Addresses {
		if a, err := netip.ParsePrefix(prefix); err == nil && a.Addr().IsLinkLocalUnicast() && a.Addr().Is6() {
			names["local6"] = a.Addr().String()
		}
	}
	return names
}

// mark returns a text that no other attempt has.
func (h *hostiles) mark() string {
	return fmt.Sprintf("m%08xx%04d", h.nonce, h.marks.Add(1))
}

// fill puts names and a mark into an attempt against a pod.
func (h *hostiles) fill(a attack.Attempt, by, against kube.Pod, mark string) attack.Attempt {
	h.Helper()
	own4, own6 := byFamily(h.T, by.IPs)
	names := maps.Clone(h.names[against.Name])
	names["mark"], names["own4"], names["own6"] = mark, own4, own6
	a = hostile.Fill(a, names)
	for _, text := range []string{a.To, a.From, string(a.Send)} {
		if strings.Contains(text, "{") {
			h.Fatalf("%s: %q has a name that is not known", a.ID, text)
		}
	}
	return a
}

// attack makes attempts from a pod, some side by side.
func (h *hostiles) attack(by kube.Pod, atOnce int, attempts ...attack.Attempt) []attack.Outcome {
	h.Helper()
	outcomes, err := attackFrom(h.Context(), by, atOnce, attempts)
	if err != nil {
		h.Fatal(err)
	}
	return outcomes
}

func attackFrom(ctx context.Context, by kube.Pod, atOnce int, attempts []attack.Attempt) ([]attack.Outcome, error) {
	in, err := json.Marshal(attempts)
	if err != nil {
		return nil, err
	}
	run := func() (string, error) {
		return k8s.Pipe(ctx, string(in), "exec", "-i", "-n", by.Namespace, by.Name, "--", "/usr/local/bin/load", "attack", "-at-once", strconv.Itoa(atOnce))
	}
	out, err := run()
	if err != nil && strings.Contains(err.Error(), "abnormal closure") {
		out, err = run() // kubelet may reset the stream as it ends, and what was in it is lost
	}
	if err != nil {
		return nil, err
	}
	var outcomes []attack.Outcome
	if err := json.Unmarshal([]byte(out), &outcomes); err != nil || len(outcomes) != len(attempts) {
		return nil, fmt.Errorf("read what became of attempts from %s: %w: %.500s", by.Name, err, out)
	}
	return outcomes, nil
}

// background makes one attempt beside what follows.
func (h *hostiles) background(by kube.Pod, atOnce int, a attack.Attempt) <-chan attack.Outcome {
	done := make(chan attack.Outcome, 1)
	ctx := h.Context()
	go func() {
		outcomes, err := attackFrom(ctx, by, atOnce, []attack.Attempt{a})
		if err != nil {
			done <- attack.Outcome{ID: a.ID, Error: err.Error()}
			return
		}
		done <- outcomes[0]
	}()
	return done
}

// seen asks a pod's app what it saw from a number on.
func (h *hostiles) seen(p kube.Pod, since int) attack.Report {
	h.Helper()
	out, err := k8s.Kubectl(h.Context(), "exec", "-n", p.Namespace, p.Name, "--", "/usr/local/bin/load", "seen", "-since", strconv.Itoa(since))
	if err != nil {
		h.Fatal(err)
	}
	var r attack.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		h.Fatal(err)
	}
	return r
}

// saw: a pod's app saw a text, in a request or a connection.
func (h *hostiles) saw(p kube.Pod, text string) bool {
	h.Helper()
	for _, s := range h.seen(p, 0).All {
		if strings.Contains(s.Request, text) || strings.Contains(string(s.Bytes), text) {
			return true
		}
	}
	return false
}

// did notes attempts that have code of their own here.
func (h *hostiles) did(ids ...string) {
	for _, id := range ids {
		h.made.Store(id, true)
	}
}

// complete: every attempt of the list that this test is to make has been made.
func (h *hostiles) complete(test string) {
	h.Helper()
	n := 0
	for _, a := range hostile.All() {
		if a.Shown != test {
			continue
		}
		n++
		if _, made := h.made.Load(a.ID); !made {
			h.Errorf("%s: %s was not tried", a.ID, a.What)
		}
	}
	h.Logf("%d attempts of the list", n)
}

// served: the allowed pods reach the server by every way, which shows that what is closed is not closed to all.
func (h *hostiles) served() {
	h.Helper()
	for _, at := range placements {
		by := h.attackers[hostile.Allowed][at.node]
		until(h.T, 30*time.Second, "allowed pods to be served, "+at.name, func() (bool, string) {
			var all []attack.Attempt
			for to, send := range map[string]string{
				"{vip4}:80": "GET /ok?{mark} HTTP/1.1\r\nHost: target\r\nConnection: close\r\n\r\n", "[{vip6}]:80": "GET /ok?{mark} HTTP/1.1\r\nHost: target\r\nConnection: close\r\n\r\n",
				"{pod4}:8080": "GET /ok?{mark} HTTP/1.1\r\nHost: target\r\nConnection: close\r\n\r\n", "{pod4}:9000": "{mark}\n", "[{pod6}]:9000": "{mark}\n", "{vip4}:9001": "", "[{pod6}]:9001": "", "{pod4}:9002": "{mark}\n",
			} {
				all = append(all, h.fill(attack.Attempt{ID: to, Kind: "dial", To: to, Send: []byte(send)}, by, h.target, h.mark()))
			}
			for _, o := range h.attack(by, 8, all...) {
				if !strings.Contains(string(o.Got), "app: ") {
					return false, fmt.Sprintf("%s: %+v, %s", o.ID, o, o.Got)
				}
			}
			return true, ""
		})
	}
}

// envoyOn is the process of a node's Envoy.
func envoyOn(t *testing.T, node string) int {
	t.Helper()
	return processOf(t, nodeproxyOn(t, node).Metadata.UID, "envoy", "")
}

// residentKiB is a process's memory.
func residentKiB(t *testing.T, pid int) int {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(raw)) {
		if f := strings.Fields(l); len(f) == 3 && f[0] == "VmRSS:" {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("process %d has no memory", pid)
	return 0
}
