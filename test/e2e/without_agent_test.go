//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/cluster"
	"github.com/weftmesh/weft/test/kube"
)

// TestAgentAway: a pod that starts while its node's agent is away starts outside the mesh, is enrolled live and says so. Where the
// runtime requires the agent it does not start; then a node that reboots sees CoreDNS and weft come up, and after them the pods.
func TestAgentAway(t *testing.T) {
	const calls = `args: [serve], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`
	t.Run("the runtime does not mind", func(t *testing.T) {
		back := withoutAgent(t, "n2")
		apply(t, podOn("early", "n2", "mesh", "", calls))
		ready(t, "app=early")
		back()
		inMesh(t, "app=early", "StartedUnheld")
		if out, err := k8s.Kubectl(t.Context(), "get", "--raw", fmt.Sprintf("/api/v1/namespaces/%s/pods/%s:15021/proxy/metrics", system, proxy(t, "n2"))); err != nil || !strings.Contains(out, "weft_started_unheld_pods ") || strings.Contains(out, "weft_started_unheld_pods 0") {
			t.Errorf("the agent counts no such pod: %v", err)
		}
	})
	if err := cluster.Require(t.Context(), root, "weft"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		began := time.Now().UTC().Format(time.RFC3339)
		if err := cluster.Require(ctx, root); err != nil {
			t.Error(err)
		}
		// The runtimes have started again: until their agents are back, pods start unheld.
		agents, err := k8s.Pods(ctx, system, "app=weft-nodeproxy")
		if err != nil {
			t.Error(err)
		}
		for _, agent := range agents {
			if err := kube.Until(ctx, 30*time.Second, "the agent of "+agent.Node+" to be the runtime's plugin", nil, func(ctx context.Context) (bool, string) {
				log, err := k8s.Kubectl(ctx, "logs", "-n", system, "-c", "agent", "--since-time="+began, agent.Name)
				return err == nil && strings.Contains(log, "Started plugin"), fmt.Sprint(err)
			}); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("the runtime requires it", func(t *testing.T) {
		back := withoutAgent(t, "n2")
		apply(t, podOn("early", "n2", "mesh", "", calls))
		notMade(t, "early", "required plugin")
		back()
		ready(t, "app=early")
		inMesh(t, "app=early", "Captured")
	})
	t.Run("nobody else is exempt", func(t *testing.T) {
		manifest := strings.Replace(podOn("exempt", "n2", "mesh", "", calls), "name: exempt,", `name: exempt, annotations: {weft.dev/tolerate-missing/pod: "true"},`, 1)
		if err := k8s.Apply(t.Context(), manifest); err == nil || !strings.Contains(err.Error(), "weft.dev/tolerate-missing") {
			t.Errorf("a pod with the annotation: %v, want a refusal that names it", err)
			_ = k8s.Delete(t.Context(), manifest)
		}
	})
	t.Run("a reboot", func(t *testing.T) {
		dns, err := k8s.Pods(t.Context(), "kube-system", "k8s-app=kube-dns")
		if err != nil || len(dns) == 0 {
			t.Fatal(dns, err)
		}
		n := machine(t, dns[0].Node)
		namespaces := []string{"kube-system", system, "outside", "mesh"}
		was := map[string]int{}
		for _, namespace := range namespaces {
			for _, p := range pods(t, namespace, "") {
				if p.Node == n.Name {
					was[p.UID] = p.Restarts
				}
			}
		}
		enterStrict(t)
		if err := cluster.StopNode(t.Context(), root, n.Number, true); err != nil {
			t.Fatal(err)
		}
		// A stranger on the other node tries whatever address a pod may get; they are given anew from the first one.
		other := placements[slices.IndexFunc(placements, func(at placement) bool { return at.node != n.Name })].node
		heard := bytesTo(t, other, pod(t, "outside", "stranger", other))
		defer knock(t, n.Pods4.Addr().Next(), 24, other)()
		if err := cluster.StartNode(t.Context(), root, n.Number); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if k8s, err = kube.Open(root); err != nil {
			t.Fatal(err)
		}
		for _, namespace := range namespaces {
			until(t, 5*time.Minute, "the pods of "+namespace, func() (bool, string) {
				for _, p := range pods(t, namespace, "") {
					before, stayed := was[p.UID]
					if !p.Ready || stayed && p.Restarts == before {
						return false, fmt.Sprintf("%s: ready %v, %d restarts, before %d", p.Name, p.Ready, p.Restarts, before)
					}
				}
				return true, ""
			})
			t.Logf("%s: ready %v after the start of %s", namespace, time.Since(began).Round(time.Second), n.Name)
		}
		until(t, time.Minute, "pods in the mesh since before their start", func() (bool, string) {
			for _, p := range pods(t, "mesh", "") {
				if k := p.Conditions[enrolled]; p.Node == n.Name && (k.Status != "True" || k.Reason != "Captured") {
					return false, fmt.Sprintf("%s: %+v", p.Name, k)
				}
			}
			return true, ""
		})
		open := pod(t, "outside", "stranger", n.Name).IPs[0]
		until(t, time.Minute, "the stranger to reach a pod outside the mesh", func() (bool, string) {
			return heard.from(open) > 20, fmt.Sprintf("%d packets with bytes from %s", heard.from(open), open)
		})
		for _, p := range pods(t, "mesh", "") {
			if n := heard.from(p.IPs[0]); p.Node == dns[0].Node && n > 0 {
				t.Errorf("%s sent a stranger %d packets with bytes", p.Name, n)
			}
		}
	})
}

func pods(t *testing.T, namespace, selector string) []kube.Pod {
	t.Helper()
	all, err := k8s.Pods(t.Context(), namespace, selector)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func ready(t *testing.T, selector string) {
	t.Helper()
	if err := k8s.UntilReady(t.Context(), 2*time.Minute, "mesh", selector, nil); err != nil {
		t.Fatal(err)
	}
}

// inMesh waits until a pod is in the mesh, for a reason.
func inMesh(t *testing.T, selector, reason string) {
	t.Helper()
	if err := k8s.UntilCondition(t.Context(), time.Minute, "mesh", selector, enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	for _, p := range pods(t, "mesh", selector) {
		if k := p.Conditions[enrolled]; k.Reason != reason {
			t.Errorf("%s: %+v, want the reason %s", p.Name, k, reason)
		}
	}
}

// withoutAgent takes weft's pod away from a node until back is called.
func withoutAgent(t *testing.T, node string) (back func()) {
	t.Helper()
	patch := func(ctx context.Context, affinity string, want int) error {
		if _, err := k8s.Kubectl(ctx, "patch", "daemonset", "-n", system, "weft-nodeproxy", "--type=merge", "-p", `{"spec": {"template": {"spec": {"affinity": `+affinity+`}}}}`); err != nil {
			return err
		}
		return kube.Until(ctx, 2*time.Minute, fmt.Sprintf("%d agents", want), nil, func(ctx context.Context) (bool, string) {
			all, err := k8s.Pods(ctx, system, "app=weft-nodeproxy")
			ready := 0
			for _, p := range all {
				if p.Ready {
					ready++
				}
			}
			return err == nil && len(all) == want && ready == want, fmt.Sprintf("%d pods, %d ready, %v", len(all), ready, err)
		})
	}
	elsewhere := fmt.Sprintf(`{"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [%q]}]}]}}}`, node)
	if err := patch(t.Context(), elsewhere, len(k8s.Nodes)-1); err != nil {
		t.Fatal(err)
	}
	done := false
	back = func() {
		if done {
			return
		}
		done = true
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if err := patch(ctx, "null", len(k8s.Nodes)); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(back)
	return back
}
