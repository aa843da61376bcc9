//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

// probed are pods on both nodes with a probe of every kind and both lifecycle hooks; the app counts what reaches it. kubelet calls
// an HTTP hook once, whether or not its container listens by then: the second container's finds the first one listening.
const probed = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: probed, namespace: mesh}
spec:
  selector: {matchLabels: {app: probed}}
  template:
    metadata: {labels: {app: probed}}
    spec:
      serviceAccountName: server
      terminationGracePeriodSeconds: 10
      containers:
        - name: app
          image: docker.io/weft/toolbox:1
          args: [serve]
          readinessProbe: {grpc: {port: 9002}, periodSeconds: 1, timeoutSeconds: 10}
          livenessProbe: {tcpSocket: {port: 9000}, periodSeconds: 1, timeoutSeconds: 10}
          lifecycle:
            postStart: {exec: {command: [sh, -c, "until toolbox get -timeout 1s http://127.0.0.1:8080/pod; do sleep 0.1; done"]}}
            preStop: {httpGet: {path: /hit/prestop, port: 8080}}
        - name: beside
          image: docker.io/weft/toolbox:1
          command: [sh, -c, "trap exit TERM; while :; do sleep 0.2; done"]
          lifecycle: {postStart: {httpGet: {path: /hit/poststart, port: 8080}}}
          readinessProbe: {exec: {command: [toolbox, get, "http://127.0.0.1:8080/hit/exec"]}, periodSeconds: 1, timeoutSeconds: 10}
          livenessProbe: {httpGet: {path: /hit/http, port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
`

// TestProbes: §4. Under Strict kubelet's probes of every kind and its hooks reach the app on both nodes; a stranger and a
// pod of the host's network get nothing on the same ports.
func TestProbes(t *testing.T) {
	alone(t, "mesh")
	enterStrict(t)
	apply(t, probed)
	if err := k8s.UntilCondition(t.Context(), time.Minute, "mesh", "app=probed", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	if err := k8s.UntilReady(t.Context(), time.Minute, "mesh", "app=probed", nil); err != nil {
		t.Fatal(err)
	}
	for _, at := range placements {
		t.Run("on "+at.node, func(t *testing.T) {
			old := pod(t, "mesh", "probed", at.node)
			first := hitsOf(t, old, "app")["poststart"]
			p := restart(t, old)
			before, counted := hitsOf(t, p, "app"), hookEvents(t, at.node, "probe")
			if n := before["poststart"] - first; n != p.Restarts-old.Restarts {
				t.Errorf("the app saw %d calls of the restarted container's postStart hook, want %d", n, p.Restarts-old.Restarts)
			}
			until(t, time.Minute, "probes of every kind", func() (bool, string) {
				now := hitsOf(t, p, "app")
				for _, kind := range []string{"http", "tcp", "grpc", "exec"} {
					if now[kind]-before[kind] < 5 {
						return false, fmt.Sprintf("the app saw %v, before %v", now, before)
					}
				}
				return true, ""
			})
			// Of the four kinds an exec probe does not cross the pod's border.
			if n := hookEvents(t, at.node, "probe") - counted; n < 15 {
				t.Errorf("the kernel let %d probes pass, want at least 15", n)
			}
			if now := pod(t, "mesh", "probed", at.node); now.Restarts != p.Restarts || now.UID != p.UID {
				t.Errorf("a probe failed under Strict: %d restarts, before %d", now.Restarts, p.Restarts)
			}
			for _, port := range []int{8080, 9000, 9001, 9002} {
				letIn(t, p.IPs[0], port)
			}
			stop(t, p)
		})
	}
}

// restart ends a pod's second container under Strict and waits until its probes have made it ready again.
func restart(t *testing.T, old kube.Pod) kube.Pod {
	t.Helper()
	if out, err := k8s.Kubectl(t.Context(), "exec", "-n", "mesh", old.Name, "-c", "beside", "--", "kill", "1"); err != nil {
		t.Fatalf("end the container: %v: %s", err, out)
	}
	until(t, 2*time.Minute, "the container to be ready again", func() (bool, string) {
		pods, err := k8s.Pods(t.Context(), "mesh", "app=probed")
		if err != nil {
			return false, err.Error()
		}
		for _, p := range pods {
			if p.UID == old.UID {
				return p.Ready && p.Restarts > old.Restarts, fmt.Sprintf("ready: %v, %d restarts, before %d", p.Ready, p.Restarts, old.Restarts)
			}
		}
		return false, "the pod is gone"
	})
	return pod(t, "mesh", "probed", old.Node)
}

// hitsOf asks the app, inside its pod, what reached it.
func hitsOf(t *testing.T, p kube.Pod, container string) map[string]int {
	t.Helper()
	out, err := k8s.Kubectl(t.Context(), "exec", "-n", p.Namespace, p.Name, "-c", container, "--", "toolbox", "get", "http://127.0.0.1:8080/hits")
	if err != nil {
		t.Fatal(err)
	}
	hits := map[string]int{}
	if err := json.Unmarshal([]byte(strings.TrimPrefix(out, "200 ")), &hits); err != nil {
		t.Fatalf("read hits: %v: %s", err, out)
	}
	return hits
}

// letIn asks a port from both nodes: an enrolled pod is served; a stranger and the host's network get no byte.
func letIn(t *testing.T, ip string, port int) {
	t.Helper()
	c := call{Address: fmt.Sprintf("%s:%d", ip, port), Line: "x"}
	switch port {
	case 8080, 9002:
		// No HTTP server answers a line; that it answers with bytes of its own is what matters.
		c = call{URL: "http://" + c.Address + "/pod", H2C: port == 9002}
	case 9001:
		c.Line = ""
	}
	for _, from := range []struct {
		caller
		let bool
	}{{stranger, false}, {caller{"outside", "host"}, false}, {client, true}} {
		for _, at := range placements {
			o := from.ask(t, at.node, c)[0]
			if served := o.allowed() || port == 9002 && o.Status != 0; served != from.let || !from.let && !o.closed() {
				t.Errorf("%s, from %s, port %d: %+v, want served: %v", from.app, at.node, port, o, from.let)
			}
		}
	}
}

// stop deletes the pod under Strict: the app hears of it by its preStop hook first.
func stop(t *testing.T, p kube.Pod) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var log strings.Builder
	follow := k8s.Command(ctx, "logs", "-n", "mesh", "-c", "app", "-f", "--tail=-1", p.Name)
	follow.Stdout, follow.Stderr = &log, &log
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := k8s.Kubectl(ctx, "delete", "pod", "-n", "mesh", p.Name); err != nil {
		t.Error(err)
	}
	_ = follow.Wait()
	if !strings.Contains(log.String(), "name=prestop") {
		t.Errorf("the app saw no call of its preStop hook on %s:\n%s", p.Node, log.String())
	}
}

func restarts(t *testing.T) map[string]int {
	t.Helper()
	pods, err := k8s.Pods(t.Context(), "mesh", "")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]int{}
	for _, p := range pods {
		all[p.Name] = p.Restarts
	}
	return all
}

// hookEvents reads one of the kernel's counters from the agent's metrics.
func hookEvents(t *testing.T, node, kind string) int {
	t.Helper()
	pods, err := k8s.Pods(t.Context(), system, "app=weft-nodeproxy")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if p.Node != node {
			continue
		}
		out, err := k8s.Kubectl(t.Context(), "get", "--raw", fmt.Sprintf("/api/v1/namespaces/%s/pods/%s:15021/proxy/metrics", system, p.Name))
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`weft_redirect_events_total\{kind="` + kind + `"\} (\S+)`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("no counter %s on %s", kind, node)
		}
		f, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return int(f)
	}
	t.Fatalf("no agent on %s", node)
	return 0
}
