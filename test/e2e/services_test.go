//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// kinds are Services of every kind for the server, and for the callers' own pods, which are on both nodes.
const kinds = `
apiVersion: v1
kind: Service
metadata: {name: by-node-port, namespace: mesh}
spec: {type: NodePort, selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: by-name, namespace: mesh}
spec: {type: ExternalName, externalName: server.mesh.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: local, namespace: mesh}
spec: {internalTrafficPolicy: Local, selector: {app: client}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: local-one, namespace: mesh}
spec: {internalTrafficPolicy: Local, selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: mesh}
spec: {sessionAffinity: ClientIP, selector: {app: client}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: external, namespace: mesh}
spec: {externalIPs: [192.0.2.10], selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: balanced, namespace: mesh}
spec: {type: LoadBalancer, selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: mesh}
spec: {selector: {app: nobody}, ports: [{name: http, port: 80, targetPort: 8080}]}
`

// TestServices: each kind behaves from an enrolled pod as it does from one outside, which goes through kube-proxy.
func TestServices(t *testing.T) {
	alone(t, "mesh")
	apply(t, kinds)
	if _, err := k8s.Kubectl(t.Context(), "patch", "service", "-n", "mesh", "balanced", "--subresource=status", "--type=merge", "-p", `{"status":{"loadBalancer":{"ingress":[{"ip":"192.0.2.20"}]}}}`); err != nil {
		t.Fatal(err)
	}
	n1 := machine(t, "n1").IPv4.String()
	for _, kind := range []struct{ name, url, body string }{
		{"ClusterIP", "http://server.mesh/pod", "server"},
		{"headless", "http://server-headless.mesh:8080/pod", "server"},
		{"NodePort", "http://" + n1 + ":30080/pod", "server"},
		{"NodePort's ClusterIP", "http://by-node-port.mesh/pod", "server"},
		{"ExternalName", "http://by-name.mesh/pod", "server"},
		{"externalIP", "http://192.0.2.10/pod", "server"},
		{"LoadBalancer from inside", "http://192.0.2.20/pod", "server"},
		{"without endpoints", "http://nobody.mesh/pod", ""},
	} {
		t.Run(kind.name, func(t *testing.T) {
			for _, at := range placements {
				until(t, 30*time.Second, kind.name+", "+at.name, func() (bool, string) {
					in, out := other.ask(t, at.node, call{URL: kind.url})[0], stranger.ask(t, at.node, call{URL: kind.url})[0]
					good := in.allowed() && out.allowed() && in.Body == kind.body && out.Body == kind.body
					if kind.body == "" {
						good = in.unserved() && out.unserved()
					}
					return good, fmt.Sprintf("from the mesh %+v, from outside %+v, want %q", in, out, kind.body)
				})
			}
		})
	}
	t.Run("internalTrafficPolicy Local", func(t *testing.T) {
		for _, at := range placements {
			want := pod(t, "mesh", "client", at.node).Name
			until(t, 30*time.Second, "the Service", func() (bool, string) {
				o := other.ask(t, at.node, call{URL: "http://local.mesh/pod"})[0]
				return o.allowed(), fmt.Sprintf("%+v", o)
			})
			for i, o := range other.ask(t, at.node, repeat(call{URL: "http://local.mesh/pod"}, 40)...) {
				if o.Body != want {
					t.Errorf("%s, call %d: %+v, want %s", at.name, i, o, want)
				}
			}
		}
		// The server is on n1 alone: on n2 the Service has no endpoint, whoever asks.
		until(t, 30*time.Second, "the Service with one endpoint, on its node", func() (bool, string) {
			o := other.ask(t, "n1", call{URL: "http://local-one.mesh/pod"})[0]
			return o.Body == "server", fmt.Sprintf("%+v", o)
		})
		byAddress := repeat(call{URL: "http://" + clusterIPs(t, "mesh", "local-one")[0] + "/pod"}, 10) // no name to look up in vain
		for _, o := range other.ask(t, "n2", byAddress...) {
			if !o.unserved() {
				t.Errorf("from the mesh on n2: %+v, want 503 at once: there is no local endpoint", o)
			}
		}
		for _, o := range stranger.ask(t, "n2", byAddress...) {
			if !o.unserved() && !strings.Contains(o.Error, "deadline exceeded") { // kube-proxy drops what it has no local endpoint for
				t.Errorf("from outside on n2: %+v, want no connection: there is no local endpoint", o)
			}
		}
	})
	t.Run("ClientIP affinity", func(t *testing.T) {
		for _, at := range placements {
			until(t, 30*time.Second, "one pod for one client", func() (bool, string) {
				seen := map[string]int{}
				for _, o := range other.ask(t, at.node, repeat(call{URL: "http://sticky.mesh/pod"}, 20)...) {
					seen[o.Body+o.Error]++
				}
				return len(seen) == 1 && seen[""] == 0, fmt.Sprint(seen)
			})
		}
	})
	t.Run("balanced over both nodes", func(t *testing.T) {
		apply(t, "apiVersion: v1\nkind: Service\nmetadata: {name: spread, namespace: mesh}\nspec: {selector: {app: client}, ports: [{name: http, port: 80, targetPort: 8080}]}\n")
		until(t, 30*time.Second, "both pods to answer", func() (bool, string) {
			seen := map[string]int{}
			for _, o := range other.ask(t, "n1", repeat(call{URL: "http://spread.mesh/pod"}, 40)...) {
				seen[o.Body+o.Error]++
			}
			n1, n2 := pod(t, "mesh", "client", "n1").Name, pod(t, "mesh", "client", "n2").Name
			return len(seen) == 2 && seen[n1] > 0 && seen[n2] > 0, fmt.Sprint(seen)
		})
	})
}

// TestHTTPRoute: producer routes of the standard channel, by real requests.
func TestHTTPRoute(t *testing.T) {
	alone(t, "mesh")
	apply(t, `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server, namespace: mesh}
spec:
  parentRefs: [{group: "", kind: Service, name: server, port: 80}]
  rules:
    - matches: [{path: {type: Exact, value: /old}}]
      filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: /new}, statusCode: 302}}]
    - matches: [{path: {type: PathPrefix, value: /rewritten}}]
      filters:
        - {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /seen}}}
        - {type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: x-added, value: "yes"}], remove: [x-removed]}}
      backendRefs: [{name: server, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /delay}}]
      timeouts: {request: 300ms}
      backendRefs: [{name: server, port: 80}]
    - matches: [{headers: [{name: x-to, value: nowhere}]}]
      backendRefs: [{name: missing, port: 80}]
    - backendRefs: [{name: server, port: 80}]
`)
	// One of its backends is missing: it is accepted all the same.
	until(t, time.Minute, "the route to be in force", func() (bool, string) {
		out, err := k8s.Kubectl(t.Context(), "get", "httproute", "server", "-n", "mesh", "-o", `jsonpath={range .status.parents[*].conditions[*]}{.type}={.status} {.reason}{"\n"}{end}`)
		return err == nil && strings.Contains(out, "Accepted=True") && strings.Contains(out, "Programmed=True") && strings.Contains(out, "ResolvedRefs=False BackendNotFound"), out
	})
	for _, at := range placements {
		until(t, 30*time.Second, "the routes, "+at.name, func() (bool, string) {
			o, err := batch(t.Context(), pod(t, "mesh", "client", at.node), []call{
				{URL: "http://server.mesh/old"}, {URL: "http://server.mesh/rewritten/x", Headers: map[string]string{"X-Removed": "1"}},
				{URL: "http://server.mesh/delay/3s"}, {URL: "http://server.mesh/pod", Headers: map[string]string{"X-To": "nowhere"}}, {URL: "http://server.mesh/pod"},
				{URL: "http://server.mesh/headers", Headers: map[string]string{"X-Envoy-Foo": "1", "X-Weft-Source-Namespace": "forged", "X-Forwarded-Client-Cert": "forged"}},
			})
			if err != nil {
				return false, err.Error()
			}
			forged := strings.ToLower(o[5].Body)
			good := o[0].Status == 302 && o[1].Status == 200 && strings.Contains(o[1].Body, "/seen/x") && strings.Contains(o[1].Body, "X-Added") && !strings.Contains(o[1].Body, "X-Removed") &&
				o[2].Status == 504 && o[3].Status == 500 && o[4].Status == 200 && o[5].Status == 200 &&
				!strings.Contains(forged, "x-envoy") && !strings.Contains(forged, "x-weft") && !strings.Contains(forged, "x-forwarded-client-cert")
			return good, fmt.Sprintf("%+v", o)
		})
	}
}
