//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

// route is a way from a caller to the server's pod. Every policy must judge all of them alike.
type route struct {
	name string
	// host of the address that a caller dials, and how the port of the pod is called there; a way may lack ports.
	host  string
	ports map[int]int
	// http: the caller's Envoy parses HTTP on this way.
	http bool
}

// routes lists the ways to the server. The foreign slice is a Service without selector whose slice names the pod.
func routes(t *testing.T) []route {
	t.Helper()
	server := pod(t, "mesh", "server", "n1")
	same := map[int]int{8080: 8080, 9000: 9000, 9001: 9001}
	vip := map[int]int{8080: 80, 9000: 9000, 9001: 9001}
	all := []route{
		{"VIP", "server.mesh.svc.cluster.local", vip, true},
		{"second Service", "server-tcp.mesh.svc.cluster.local", vip, false},
		{"headless", "server-headless.mesh.svc.cluster.local", same, false},
		{"pod address", server.IPs[0], same, false},
		{"foreign slice", "server-slice.mesh.svc.cluster.local", vip, true},
		{"weighted route", "server-weighted.mesh.svc.cluster.local", map[int]int{8080: 80}, true},
	}
	for _, address := range server.IPs {
		if netip.MustParseAddr(address).Is6() {
			all = append(all, route{"pod address, IPv6", "[" + address + "]", same, false})
		}
	}
	return all
}

// ways makes what routes needs: a Service without selector that leads to the server's pod, and one whose route spreads
// its requests over two others.
func ways(t *testing.T) []route {
	t.Helper()
	apply(t, sliceIn("mesh", pod(t, "mesh", "server", "n1").IPs[0]))
	apply(t, `
apiVersion: v1
kind: Service
metadata: {name: server-weighted, namespace: mesh}
spec: {selector: {app: nobody}, ports: [{name: http, port: 80, appProtocol: http}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server-weighted, namespace: mesh}
spec:
  parentRefs: [{group: "", kind: Service, name: server-weighted, port: 80}]
  rules: [{backendRefs: [{name: server, port: 80, weight: 1}, {name: server-slice, port: 80, weight: 1}]}]
`)
	accepted(t, "server-weighted")
	all := routes(t)
	until(t, time.Minute, "every way to lead to the server", func() (bool, string) {
		for _, v := range try(t, accessCase{}, []ask{get(client, "/pod", true), get(stranger, "/pod", true)}, all) {
			// Outside the mesh no route spreads anything.
			if !v.outcome.allowed() && (v.from != stranger || v.route.name != "weighted route") {
				return false, v.String()
			}
		}
		return true, ""
	})
	return all
}

// sliceIn is a Service without selector in a namespace, whose slice names an address.
func sliceIn(namespace, address string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: server-slice, namespace: %[1]s}
spec:
  ports:
    - {name: http, port: 80, targetPort: 8080, appProtocol: http}
    - {name: tcp-echo, port: 9000}
    - {name: greet, port: 9001, appProtocol: mysql}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: server-slice-1, namespace: %[1]s, labels: {kubernetes.io/service-name: server-slice}}
addressType: IPv4
endpoints: [{addresses: [%[2]q], conditions: {ready: true}, nodeName: n1}]
ports: [{name: http, port: 8080}, {name: tcp-echo, port: 9000}, {name: greet, port: 9001}]
`, namespace, address)
}

func (a ask) over(r route, marker string) call {
	address := fmt.Sprintf("%s:%d", r.host, r.ports[a.port])
	if a.port != 8080 {
		c := call{Address: address}
		if a.port == 9000 {
			c.Line = marker
		}
		return c
	}
	c := call{URL: "http://" + address + a.path + "?" + marker, Method: a.method, H2C: a.h2c, Headers: map[string]string{}}
	if name, value, ok := strings.Cut(a.header, ":"); ok {
		c.Headers[name] = value
	}
	return c
}

// trial is one ask over one route from one node.
type trial struct {
	ask
	route
	placement
	want verdict
	// parsed: the callee's chain parses requests.
	parsed bool
	marker string
	outcome
}

func (v trial) String() string {
	return fmt.Sprintf("%s, %s, %s: got %d %q %s, want it %s", v.ask, v.placement.name, v.route.name, v.Status, v.Body, v.Error, v.want)
}

// try makes every ask over every route on both placements.
func try(t *testing.T, c accessCase, asks []ask, over []route) []trial {
	t.Helper()
	type job struct {
		from kube.Pod
		all  []*trial
	}
	jobs := map[string]*job{}
	var trials []*trial
	for i, a := range asks {
		for j, r := range over {
			if r.ports[a.port] == 0 || a.from == stranger && r.name == "weighted route" {
				continue // the Service alone leads nowhere
			}
			for _, at := range placements {
				key := a.from.app + at.node
				if jobs[key] == nil {
					jobs[key] = &job{from: pod(t, a.from.namespace, a.from.app, at.node)}
				}
				v := &trial{ask: a, route: r, placement: at, want: c.verdict(a, r), parsed: c.requests && a.port == 8080, marker: fmt.Sprintf("m=%d.%d.%s.%d", i, j, at.node, time.Now().UnixNano())}
				trials = append(trials, v)
				jobs[key].all = append(jobs[key].all, v)
			}
		}
	}
	var wait sync.WaitGroup
	for _, j := range jobs {
		wait.Go(func() {
			var calls []call
			for _, v := range j.all {
				calls = append(calls, v.ask.over(v.route, v.marker))
			}
			outcomes, err := batch(t.Context(), j.from, calls)
			if err != nil {
				t.Error(err)
				return
			}
			for i, v := range j.all {
				v.outcome = outcomes[i]
			}
		})
	}
	wait.Wait()
	done := make([]trial, len(trials))
	for i, v := range trials {
		done[i] = *v
	}
	return done
}

// TestAccessPolicy: §5.1, one verdict whatever the way to the pod; §5.3, identity rules under Permissive.
func TestAccessPolicy(t *testing.T) {
	alone(t, "mesh")
	all, log := ways(t), follow(t)
	asked := 0
	for _, c := range accessCases {
		t.Run(c.name, func(t *testing.T) { c.run(t, all, log) })
		asked += len(c.asks)
	}
	if asked < 60 {
		t.Errorf("%d cases, want at least 60", asked)
	}
	t.Logf("%d cases over %d ways", asked, len(all))
}

func (c accessCase) run(t *testing.T, all []route, logged *followed) {
	server := pod(t, "mesh", "server", "n1")
	if c.strict {
		enterStrict(t)
	}
	policies := c.manifest()
	if err := k8s.Apply(t.Context(), policies); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k8s.Delete(context.Background(), policies) })
	for i := range c.policy {
		programmed(t, "accesspolicy", fmt.Sprintf("case-%d", i))
	}
	before := denialsOf(t, server)
	_, first := logged.since(0)
	trials := try(t, c, c.asks, all)
	for _, v := range trials {
		if problem := v.problem(server); problem != "" {
			t.Errorf("%v: %s", v, problem)
		}
	}
	until(t, 30*time.Second, "the lines of every call", func() (bool, string) {
		lines, _ := logged.since(first)
		log := readRecords(lines, trials)
		for _, v := range trials {
			if problem := v.unlogged(log); problem != "" {
				return false, fmt.Sprintf("%v: %s", v, problem)
			}
		}
		return true, ""
	})
	counted := denialsOf(t, server)
	count(trials).compare(t, counted.requests-before.requests, counted.connections-before.connections)

	if err := k8s.Delete(t.Context(), policies); err != nil {
		t.Fatal(err)
	}
	var denied []ask
	for _, a := range c.asks {
		if !a.allowed && !(c.strict && a.from == stranger) {
			denied = append(denied, a)
		}
	}
	until(t, 30*time.Second, "every call to pass without the policy", func() (bool, string) {
		for _, v := range try(t, accessCase{}, denied, all) {
			// Whatever the app itself answers is an answer.
			if !v.outcome.allowed() && (v.Status == 0 || v.Status == 403 || v.Status == 503) {
				return false, v.String()
			}
		}
		return true, ""
	})
}

// TestForeignSlice: §5.9, a slice in another namespace makes no way to the pod, for whomever.
func TestForeignSlice(t *testing.T) {
	alone(t, "mesh")
	apply(t, sliceIn("outside", pod(t, "mesh", "server", "n1").IPs[0]))
	until(t, time.Minute, "the Service's condition", func() (bool, string) {
		out, err := k8s.Kubectl(t.Context(), "get", "service", "-n", "outside", "server-slice", "-o", `jsonpath={.status.conditions[?(@.type=="weft.dev/Captured")]}`)
		return err == nil && strings.Contains(out, "ForeignEndpoint"), out
	})
	calls := []call{{URL: "http://server-slice.outside/pod"}, {Address: "server-slice.outside:9000", Line: "x"}, {Address: "server-slice.outside:9001"}}
	for _, at := range placements {
		until(t, 30*time.Second, "the server to be out of reach, "+at.name, func() (bool, string) {
			o := client.ask(t, at.node, calls...)
			return (o[0].Status == 503 || o[0].closed()) && !strings.HasPrefix(o[0].Body, "server") && o[1].closed() && o[2].closed(), fmt.Sprintf("%+v", o)
		})
	}
}
