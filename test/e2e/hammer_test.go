//go:build e2e

package e2e

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

var updates = flag.Int("updates", 1000, "updates of one policy")

// barred is an account that a policy of its own denies while another policy changes.
const barred = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: barred, namespace: mesh}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: barred, namespace: mesh}
spec:
  selector: {matchLabels: {app: barred}}
  template:
    metadata: {labels: {app: barred}}
    spec:
      serviceAccountName: barred
      terminationGracePeriodSeconds: 1
      containers: [{name: toolbox, image: "docker.io/weft/toolbox:1", args: [serve]}]
---
apiVersion: weft.dev/v1alpha1
kind: AccessPolicy
metadata: {name: steady, namespace: mesh}
spec: {selector: {matchLabels: {app: server}}, action: Deny, rules: [{from: [{serviceAccounts: [{name: barred}]}]}]}
`

// TestHammer: a policy that changes all the time never lets through whom each of its forms denies, nor whom another
// policy denies, and never stops whom nobody denies.
func TestHammer(t *testing.T) {
	alone(t, "mesh")
	apply(t, barred)
	apply(t, manifest([]string{`action: Deny, rules: [{` + byOther + `}]`}))
	if err := k8s.UntilReady(t.Context(), time.Minute, "mesh", "app=barred", nil); err != nil {
		t.Fatal(err)
	}
	if err := k8s.UntilCondition(t.Context(), time.Minute, "mesh", "app=barred", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"case-0", "steady"} {
		programmed(t, "accesspolicy", name)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	server := pod(t, "mesh", "server", "n1").IPs[0]
	var watches []*watch
	for _, from := range []struct {
		caller
		let bool
	}{{other, false}, {caller{"mesh", "barred"}, false}, {client, true}} {
		for _, at := range placements {
			for _, url := range []string{"http://server.mesh/pod", "http://" + server + ":8080/pod"} {
				watches = append(watches, &watch{name: from.app + ", " + at.name + ", " + url, let: from.let, pod: pod(t, "mesh", from.app, at.node).Name, url: url})
			}
		}
	}
	var running sync.WaitGroup
	for _, w := range watches {
		running.Go(func() { w.run(ctx) })
	}
	started := time.Now()
	hammer(t)
	took := time.Since(started).Round(time.Second)
	before := map[*watch]int{}
	for _, w := range watches {
		before[w] = w.count()
	}
	// Each caller has seen the last form, too.
	until(t, time.Minute, "calls of everybody", func() (bool, string) {
		for _, w := range watches {
			if n := w.count() - before[w]; n < 100 {
				return false, fmt.Sprintf("%s: %d calls", w.name, n)
			}
		}
		return true, ""
	})
	cancel()
	running.Wait()
	tried := 0
	for _, w := range watches {
		tried += w.tried
		if len(w.wrong) > 0 {
			t.Errorf("%s: %d of %d calls went wrong, such as %s", w.name, len(w.wrong), w.tried, w.wrong[0])
		}
	}
	t.Logf("%d updates in %v; %d calls", *updates, took, tried)
}

// hammer updates one policy. The rule moves between being about connections and about requests; the caller is denied by
// each form.
func hammer(t *testing.T) {
	t.Helper()
	config := rest.CopyConfig(k8s.Config)
	config.QPS, config.Burst = 100, 100
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	policies := client.Resource(schema.GroupVersionResource{Group: "weft.dev", Version: "v1alpha1", Resource: "accesspolicies"}).Namespace("mesh")
	for i := range *updates {
		rules := fmt.Sprintf(`{"spec":{"rules":[{"from":[{"serviceAccounts":[{"name":"other"}]}]},{"from":[{"serviceAccounts":[{"name":"nobody-%d"}]}]}]}}`, i)
		if i%10 == 9 {
			rules = `{"spec":{"rules":[{"from":[{"serviceAccounts":[{"name":"other"}]}],"to":[{"paths":[{"type":"Prefix","value":"/"}]}]}]}}`
		}
		if _, err := policies.Patch(t.Context(), "case-0", types.MergePatchType, []byte(rules), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	programmed(t, "accesspolicy", "case-0")
}

// watch calls without pause, each time on a new connection, and keeps what it must not have seen.
type watch struct {
	name, pod, url string
	let            bool

	mu    sync.Mutex
	tried int
	wrong []string
}

func (w *watch) run(ctx context.Context) {
	for ctx.Err() == nil {
		out, _ := k8s.Kubectl(ctx, "exec", "-n", "mesh", w.pod, "--", "toolbox", "get", "-new", "-n", "50", "-interval", "20ms", w.url)
		w.mu.Lock()
		for l := range strings.Lines(out) {
			if !strings.HasSuffix(l, "\n") {
				break // the end of the test cut it
			}
			if strings.Contains(l, ": lookup ") {
				continue // the name server did not answer: nothing was called
			}
			w.tried++
			if strings.HasPrefix(l, "200 ") != w.let {
				w.wrong = append(w.wrong, l)
			}
		}
		w.mu.Unlock()
	}
}

func (w *watch) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tried
}
