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

// TestClientAddress: by default the app sees its client's address on every way to it, whether the client is in the mesh or
// not.
func TestClientAddress(t *testing.T) {
	meshConfig(t, "")
	server := pod(t, "mesh", "server", "n1")
	for _, at := range placements {
		for _, from := range []caller{client, stranger} {
			own := pod(t, from.namespace, from.app, at.node).IPs
			calls := []call{{URL: "http://server.mesh.svc.cluster.local/"}, {URL: "http://server-tcp.mesh.svc.cluster.local/"}, {URL: "http://server-headless.mesh.svc.cluster.local:8080/"}}
			for _, ip := range server.IPs {
				calls = append(calls, call{URL: "http://" + net.JoinHostPort(ip, "8080") + "/"})
			}
			// Envoy may keep a connection from before, for 10 s without a request.
			until(t, 90*time.Second, from.app+", "+at.name+", every way to show one of "+fmt.Sprint(own), func() (bool, string) {
				for i, o := range from.ask(t, at.node, calls...) {
					var answer struct{ Remote string }
					err := json.Unmarshal([]byte(o.Body), &answer)
					seen, _, _ := net.SplitHostPort(answer.Remote)
					if err != nil || !slices.Contains(own, seen) {
						time.Sleep(11 * time.Second)
						return false, fmt.Sprintf("%s: %+v: the app sees %q", calls[i].URL, o, answer.Remote)
					}
				}
				return true, ""
			})
		}
	}
}
