//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"
)

// shown are the ways to a pod of the test's own: connections to another could have been made before, under another MeshConfig.
const shown = `
---
apiVersion: v1
kind: Service
metadata: {name: shown, namespace: mesh}
spec: {selector: {app: shown}, ipFamilyPolicy: PreferDualStack, ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: shown-tcp, namespace: mesh}
spec: {selector: {app: shown}, ports: [{name: http, port: 80, targetPort: 8080, appProtocol: tcp}]}
---
apiVersion: v1
kind: Service
metadata: {name: shown-headless, namespace: mesh}
spec: {clusterIP: None, selector: {app: shown}, ports: [{name: http, port: 8080}]}
`

// TestClientAddress: by default the app sees its client's address on every way to it, whether the client is in the mesh or
// not.
func TestClientAddress(t *testing.T) {
	meshConfig(t, "")
	apply(t, podOn("shown", "n1", "mesh", "", `args: [serve], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`)+shown)
	if err := k8s.UntilCondition(t.Context(), time.Minute, "mesh", "app=shown", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	if err := k8s.UntilReady(t.Context(), time.Minute, "mesh", "app=shown", nil); err != nil {
		t.Fatal(err)
	}
	server := pod(t, "mesh", "shown", "n1")
	for _, at := range placements {
		for _, from := range []caller{client, stranger} {
			own := pod(t, from.namespace, from.app, at.node).IPs
			calls := []call{{URL: "http://shown.mesh.svc.cluster.local/"}, {URL: "http://shown-tcp.mesh.svc.cluster.local/"}, {URL: "http://shown-headless.mesh.svc.cluster.local:8080/"}}
			for _, ip := range server.IPs {
				calls = append(calls, call{URL: "http://" + net.JoinHostPort(ip, "8080") + "/"})
			}
			until(t, 30*time.Second, from.app+", "+at.name+", every way to show one of "+fmt.Sprint(own), func() (bool, string) {
				for i, o := range from.ask(t, at.node, calls...) {
					var answer struct{ Remote string }
					err := json.Unmarshal([]byte(o.Body), &answer)
					seen, _, _ := net.SplitHostPort(answer.Remote)
					if err != nil || !slices.Contains(own, seen) {
						return false, fmt.Sprintf("%s: %+v: the app sees %q", calls[i].URL, o, answer.Remote)
					}
				}
				return true, ""
			})
		}
	}
}
