//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

// TestRefusedPods: a pod that cannot be enrolled says why, stays as it is and is served as before.
func TestRefusedPods(t *testing.T) {
	alone(t, "mesh")
	t.Run("a proxy port in use", func(t *testing.T) {
		// In the mesh from its start it would not get the port.
		apply(t, podOn("occupant", "n2", "mesh", "weft.dev/mesh: disabled", `args: [serve, "-greet=:15001"], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`))
		if err := k8s.UntilReady(t.Context(), time.Minute, "mesh", "app=occupant", nil); err != nil {
			t.Fatal(err)
		}
		if _, err := k8s.Kubectl(t.Context(), "label", "pod", "-n", "mesh", "occupant", "weft.dev/mesh=enabled", "--overwrite"); err != nil {
			t.Fatal(err)
		}
		condition(t, "mesh", "pod", "occupant", `weft.dev/Enrolled=False PortInUse: .*15001`)
		p := pod(t, "mesh", "occupant", "n2")
		for _, from := range []caller{client, stranger} {
			if o := from.ask(t, "n1", call{URL: "http://" + p.IPs[0] + ":8080/pod"})[0]; o.Body != "occupant" {
				t.Errorf("%s: %+v, want the pod's answer", from.app, o)
			}
		}
		if o, err := batch(t.Context(), p, []call{{URL: "http://server.mesh/pod"}}); err != nil || o[0].Body != "server" {
			t.Errorf("from the pod: %+v, %v", o, err)
		}
	})
	t.Run("the host's network", func(t *testing.T) {
		for _, at := range placements {
			condition(t, "outside", "pod", pod(t, "outside", "host", at.node).Name, `weft.dev/Enrolled=False HostNetwork: .*hostNetwork`)
		}
	})
}

// TestPodDeletedDuringEnrolment: pods that go while they are enrolled leave nothing, neither in the kernel nor in Envoy.
func TestPodDeletedDuringEnrolment(t *testing.T) {
	alone(t, "mesh")
	uids := map[string]bool{}
	for i := range 10 {
		name := fmt.Sprintf("brief-%d", i)
		if err := k8s.Apply(t.Context(), podOn(name, "n2", "mesh", "", `args: [serve]`)); err != nil {
			t.Fatal(err)
		}
		// Its sandbox is there: the enrolment begins, or has just begun.
		until(t, time.Minute, name+" to have an address", func() (bool, string) {
			pods, err := k8s.Pods(t.Context(), "mesh", "app="+name)
			if err != nil || len(pods) == 0 {
				return false, fmt.Sprint(err)
			}
			uids[pods[0].UID] = true
			return len(pods[0].IPs) > 0, pods[0].Phase
		})
		if _, err := k8s.Kubectl(t.Context(), "delete", "pod", "-n", "mesh", name, "--grace-period=0", "--force", "--wait=false"); err != nil {
			t.Fatal(err)
		}
	}
	until(t, 2*time.Minute, "nothing to be left of them", func() (bool, string) {
		records, listeners := string(bytes.Join(entries(t, "n2", "records"), nil)), admin(t, "n2", "/config_dump?resource=dynamic_listeners")
		for uid := range uids {
			if strings.Contains(records, uid) { // goes last
				return false, "a record of pod " + uid + " in the kernel"
			}
			if strings.Contains(listeners, uid) {
				return false, "listeners of pod " + uid
			}
		}
		bystander := pod(t, "mesh", "client", "n2").UID
		return strings.Contains(records, bystander) && strings.Contains(listeners, bystander), "neither shows a pod that is there"
	})
	if o := client.ask(t, "n2", call{URL: "http://server.mesh/pod"})[0]; o.Body != "server" {
		t.Errorf("other pods on the node: %+v", o)
	}
}

// TestControllerAway: what is known goes on, the first use of a Service is refused, and all is well again afterwards.
func TestControllerAway(t *testing.T) {
	apply(t, `
apiVersion: v1
kind: Service
metadata: {name: unused, namespace: mesh}
spec:
  selector: {app: server}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-echo, port: 9000}]
`)
	known := []call{{URL: "http://server.mesh/pod"}, {Address: "server.mesh:9000", Line: "x"}, {Address: pod(t, "mesh", "server", "n1").IPs[0] + ":9000", Line: "x"}}
	good := func(node string) (bool, string) {
		o := client.ask(t, node, known...)
		return o[0].Body == "server" && o[1].allowed() && o[2].allowed(), fmt.Sprintf("%+v", o)
	}
	for _, at := range placements {
		until(t, 30*time.Second, "what is to be known, "+at.name, func() (bool, string) { return good(at.node) })
		until(t, 30*time.Second, "the new Service in the index of "+at.node, func() (bool, string) {
			// Envoy's scopes are made of the agent's index; a scope does not ask for routes.
			return strings.Contains(admin(t, at.node, "/config_dump?include_eds"), clusterIPs(t, "mesh", "unused")[0]), "no scope of its address"
		})
	}
	scale(t, 0)
	t.Cleanup(func() { scale(t, controllers) })
	for _, at := range placements {
		for range 5 {
			if ok, detail := good(at.node); !ok {
				t.Errorf("%s, without a controller: %s", at.name, detail)
			}
		}
		o := client.ask(t, at.node, call{URL: "http://unused.mesh/pod", Timeout: 60000}, call{Address: "unused.mesh:9000", Line: "x", Timeout: 60000})
		t.Logf("%s, first use: %+v", at.name, o)
		if o[0].Status != 503 || o[1].Body != "" || o[1].Error == "" {
			t.Errorf("%s, first use of a Service without a controller: %+v, want 503 and no byte", at.name, o)
		}
	}
	scale(t, controllers)
	for _, at := range placements {
		until(t, time.Minute, "the Service, "+at.name, func() (bool, string) {
			o := client.ask(t, at.node, call{URL: "http://unused.mesh/pod"}, call{Address: "unused.mesh:9000", Line: "x"})
			return o[0].Body == "server" && o[1].allowed(), fmt.Sprintf("%+v", o)
		})
	}
}

// scale sets the number of controllers and waits until it is so.
func scale(t *testing.T, replicas int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if _, err := k8s.Kubectl(ctx, "scale", "deployment", "-n", system, "weft-controlplane", fmt.Sprintf("--replicas=%d", replicas)); err != nil {
		t.Fatal(err)
	}
	if err := kube.Until(ctx, time.Minute, fmt.Sprintf("%d controllers", replicas), nil, func(ctx context.Context) (bool, string) {
		pods, err := k8s.Pods(ctx, system, "app=weft-controlplane")
		ready := 0
		for _, p := range pods {
			if p.Ready && !p.Deleting {
				ready++
			}
		}
		return err == nil && len(pods) == replicas && ready == replicas, fmt.Sprintf("%d pods, %d ready, %v", len(pods), ready, err)
	}); err != nil {
		t.Fatal(err)
	}
}

// TestEnvoyKilled: §10. While Envoy is away captured connections are reset and a Strict pod lets nobody in; then it
// serves again.
func TestEnvoyKilled(t *testing.T) {
	enterStrict(t)
	server := pod(t, "mesh", "server", "n1")
	connections := []*held{hold(t, client, placements[0], "server.mesh:9000"), hold(t, client, placements[1], server.IPs[0]+":9000")}
	until(t, time.Minute, "connections in use", func() (bool, string) {
		for _, h := range connections {
			if lines, _, how := h.state(); lines < 3 || how != "" {
				return false, fmt.Sprintf("%s: %d lines, %s", h.name, lines, how)
			}
		}
		return true, ""
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var strangers sync.WaitGroup
	var mu sync.Mutex
	tried := 0
	for _, at := range placements {
		from := pod(t, "outside", "stranger", at.node)
		strangers.Go(func() {
			for ctx.Err() == nil {
				outcomes, err := batch(ctx, from, append(repeat(call{Address: server.IPs[0] + ":9001"}, 10), repeat(call{Address: server.IPs[0] + ":9000", Line: "x"}, 10)...))
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				tried += len(outcomes)
				mu.Unlock()
				if err != nil {
					t.Error(err)
				}
				for _, o := range outcomes {
					if o.Body != "" {
						t.Errorf("a stranger, %s, got %q", at.name, o.Body)
					}
				}
			}
		})
	}
	attempts := func() int { mu.Lock(); defer mu.Unlock(); return tried }
	until(t, time.Minute, "strangers to try", func() (bool, string) { return attempts() >= 40, fmt.Sprint(attempts()) })

	uid := nodeproxyOn(t, "n1").Metadata.UID
	envoy := processOf(t, uid, "envoy", "")
	killed := time.Now()
	if err := syscall.Kill(envoy, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for _, at := range placements {
		until(t, 10*time.Second, "the server to be served again, "+at.name, func() (bool, string) {
			o := client.ask(t, at.node, call{URL: "http://server.mesh/pod"}, call{Address: server.IPs[0] + ":9000", Line: "x"})
			return o[0].Body == "server" && o[1].allowed(), fmt.Sprintf("%+v", o)
		})
		t.Logf("served again, %s, at most %v after the kill", at.name, time.Since(killed).Round(10*time.Millisecond))
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", envoy)); err == nil {
		t.Error("the killed Envoy is still there")
	}
	until(t, 30*time.Second, "captured connections to end", func() (bool, string) {
		for _, h := range connections {
			if _, _, how := h.state(); how == "" {
				return false, h.name
			}
		}
		return true, ""
	})
	after := attempts()
	until(t, time.Minute, "strangers to have tried again", func() (bool, string) { return attempts() >= after+40, fmt.Sprint(attempts()) })
	cancel()
	strangers.Wait()
	t.Logf("%d attempts of strangers", attempts())
}
