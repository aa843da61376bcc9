//go:build e2e

package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
	"github.com/weftmesh/weft/test/load"
)

var (
	cycles  = flag.Int("cycles", 100, "enrolments and withdrawals in all (make soak: 600)")
	changes = flag.Int("changes", 50, "policy changes under load")
)

const enrolled, enforced = "weft.dev/Enrolled", "weft.dev/Enforced"

// shop is the example under load, outside the mesh.
type shop struct {
	*testing.T
	namespace string
	traffic   *kube.Traffic
	// before is what was counted before this test.
	before load.Stats
}

// in puts the shop into another namespace than its own.
func (s shop) in(manifest string) string {
	return strings.NewReplacer("namespace: shop}", "namespace: "+s.namespace+"}", "namespace: shop,", "namespace: "+s.namespace+",", "metadata: {name: shop}", "metadata: {name: "+s.namespace+"}").Replace(manifest)
}

func newShop(t *testing.T) shop {
	t.Helper()
	return newShopWith(t, "shop", "load", example(t, "load.yaml"))
}

// example is a file of the example.
func example(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "examples/shop", file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// newShopWith is the example in a namespace, under the load of an app that a manifest makes.
func newShopWith(t *testing.T, namespace, app, manifest string) shop {
	t.Helper()
	ctx, s := t.Context(), shop{T: t, namespace: namespace}
	for _, manifest := range []string{example(t, "shop.yaml"), loadAccount + manifest} {
		if err := k8s.Apply(ctx, s.in(manifest)); err != nil {
			t.Fatal(err)
		}
		if err := k8s.UntilReady(ctx, 3*time.Minute, namespace, "", nil); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if _, err := k8s.Kubectl(ctx, "delete", "namespace", namespace, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	s.follow("app=" + app)
	return s
}

// loadAccount is that of whatever load.
const loadAccount = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: load, namespace: shop}\n---\n"

// till is another shop's namespace, for tests beside those of the first.
const till = "till"

// sub is the shop for a part of its test, which counts from now.
func (s shop) sub(t *testing.T) shop { return shop{T: t, namespace: s.namespace, traffic: s.traffic} }

func (s *shop) follow(selector string) {
	s.Helper()
	traffic, err := k8s.Follow(s.Context(), s.namespace, selector)
	if err != nil {
		s.Fatal(err)
	}
	s.traffic = traffic
	s.Cleanup(traffic.Stop)
}

// label brings pods in or out, and waits until it is done.
func (s shop) label(selector string, in bool) {
	s.Helper()
	value, condition, status := "enabled", enforced, "True"
	if !in {
		value, condition, status = "disabled", enrolled, "False"
	}
	if _, err := k8s.Kubectl(s.Context(), "label", "pods", "-n", s.namespace, "-l", selector, "weft.dev/mesh="+value, "--overwrite"); err != nil {
		s.Fatal(err)
	}
	if err := k8s.UntilCondition(s.Context(), time.Minute, s.namespace, selector, condition, status, nil); err != nil {
		s.Fatal(err)
	}
}

// dwell lets n requests pass and returns what they were.
func (s shop) dwell(n uint64) load.Stats {
	s.Helper()
	from := load.Sum(s.traffic.ByTarget())
	if err := kube.Until(s.Context(), 2*time.Minute, "traffic", nil, func(context.Context) (bool, string) {
		passed := kube.Between(from, load.Sum(s.traffic.ByTarget())).Requests
		return passed >= n, fmt.Sprintf("%d of %d requests", passed, n)
	}); err != nil {
		s.Fatal(err)
	}
	return kube.Between(from, load.Sum(s.traffic.ByTarget()))
}

// fresh sums what the load's pods have counted in this test by now.
func (s shop) fresh() load.Stats {
	s.Helper()
	all, err := s.traffic.Fresh(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	return kube.Between(s.before, load.Sum(all))
}

// lossless fails the test if anything was lost in it.
func (s shop) lossless() load.Stats {
	s.Helper()
	sum := s.fresh()
	if sum.Failed != 0 || sum.Broken != 0 {
		s.Errorf("%d requests failed, %d connections broke:\n%s", sum.Failed, sum.Broken, strings.Join(sum.Errors, "\n"))
	}
	return sum
}

const (
	everybody = "app in (load,inside,front,catalogue,prices,redis)"
	callers   = "app in (load,inside,front)"
	callees   = "app in (catalogue,prices,redis)"
)

const guarded = `
apiVersion: weft.dev/v1alpha1
kind: AuthenticationPolicy
metadata: {name: strict, namespace: shop}
spec:
  selector: {matchExpressions: [{key: app, operator: In, values: [catalogue, prices, redis]}]}
  mtls: {mode: Strict}
---
apiVersion: weft.dev/v1alpha1
kind: AccessPolicy
metadata: {name: known-requests, namespace: shop}
spec:
  selector: {matchExpressions: [{key: app, operator: In, values: [catalogue, prices]}]}
  rules: [{from: [{serviceAccounts: [{name: load}, {name: front}]}], to: [{methods: [GET, POST]}]}]
---
apiVersion: weft.dev/v1alpha1
kind: AccessPolicy
metadata: {name: known-connections, namespace: shop}
spec:
  selector: {matchLabels: {app: redis}}
  rules: [{from: [{serviceAccounts: [{name: load}, {name: front}]}]}]
`

// outliving opens its connections when it is told to, and never gives them up.
var outliving = heldLoad("inside", `[{"name": "catalogue-kept", "kind": "http-keepalive", "address": "catalogue:80", "count": 2, "pause": "50ms"},
                 {"name": "stream-kept",    "kind": "grpc-stream",    "address": "prices:9000",  "count": 4, "pause": "50ms"},
                 {"name": "unary-kept",     "kind": "grpc-unary",     "address": "prices:9000",  "count": 2, "pause": "50ms"},
                 {"name": "redis-kept",     "kind": "redis",          "address": "redis:6379",   "count": 2, "pause": "100ms"}]`)

// variant is a row of the matrix: who enters and leaves, who is in the mesh all the time, under which policies.
type variant struct {
	name            string
	toggled, always string
	policies        string
}

var variants = []variant{
	{"both ends", everybody, "", ""},
	{"the caller alone", callers, callees, ""},
	{"the callee alone", callees, callers, ""},
	{"a Strict callee with an AccessPolicy", callees, callers, guarded},
}

// TestCycles: pods enter and leave under load without a lost request or connection.
func TestCycles(t *testing.T) {
	alone(t, "shop")
	s := newShop(t)
	total := s.tally()
	logs, err := k8s.FollowAccessLogs(t.Context(), system)
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Stop()
	secure := map[string]int{}
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			s, run := s.sub(t), s.tally()
			apply(t, outliving)
			if err := k8s.UntilReady(t.Context(), time.Minute, "shop", "app=inside", nil); err != nil {
				t.Fatal(err)
			}
			if v.policies != "" {
				apply(t, v.policies)
			}
			if v.always != "" {
				s.label(v.always, true)
			}
			const last = 2
			each := max(1, *cycles/len(variants)-last)
			for i := range each {
				look := i%4 == 0 // a window takes longer than a cycle
				for _, in := range []bool{true, false} {
					s.label(v.toggled, in)
					if i == 0 && in && v.toggled != callees {
						s.counted("app=load")
					}
					if look {
						run.add(t, s.window(in, 200), !in && v.toggled != callers)
					} else {
						s.dwell(150)
					}
				}
			}
			s.outlive(v, last)
			if v.always != "" {
				s.label(v.always, false)
			}
			for from, n := range run.verify(t, logs) {
				secure[from] += n
			}
			run.report(t)
			total.join(run)
			sum := s.lossless()
			t.Logf("%d cycles; since the start %d requests, %d connections", each+last, sum.Requests, sum.Connections)
		})
	}
	total.report(t)
	everywhere(t, secure)
	if sum := s.lossless(); *cycles >= 100 && (sum.Requests < 200_000 || sum.Connections < 5_000) {
		t.Errorf("only %d requests and %d connections, want 200,000 and 5,000", sum.Requests, sum.Connections)
	}
}

// counted: the condition of pods that were enrolled under load names the connections that they had.
func (s shop) counted(selector string) {
	s.Helper()
	pods, err := k8s.Pods(s.Context(), s.namespace, selector)
	if err != nil {
		s.Fatal(err)
	}
	for _, p := range pods {
		if said := p.Conditions[enrolled].Message; !regexp.MustCompile(`connections from before that, .*: [1-9]`).MatchString(said) {
			s.Errorf("%s: Enrolled says %q, want the number of connections that are older", p.Name, said)
		}
	}
}

// outlive opens connections inside the mesh that must go on through withdrawals and enrolments.
func (s shop) outlive(v variant, cycles int) {
	s.Helper()
	old := s.sub(s.T)
	old.follow("app=inside")
	var opened map[string]load.Stats
	for range cycles {
		s.label(v.toggled, true)
		if opened == nil {
			opened = old.begin("app=inside")
		}
		old.dwell(200)
		s.label(v.toggled, false)
		old.dwell(200)
	}
	sum := old.lossless()
	for target, stats := range old.traffic.ByTarget() {
		then := kube.Between(opened[target], stats)
		if then.Connections != then.Closed {
			s.Errorf("%s: %d connections were made anew and %d closed by announcement", target, then.Connections, then.Closed)
		}
		if streams := target == "stream-kept" || target == "redis-kept"; streams && (then.Connections > 0 || then.Direct > 0 || then.Proxied == 0) {
			s.Errorf("%s: a stream that was opened in the mesh did not go on as it was: %+v", target, then)
		}
	}
	s.Logf("opened in the mesh: %d requests on %d connections, %d closed by announcement", sum.Requests, sum.Connections, sum.Closed)
}

// begin lets held load pods open their connections, which must lead through the callees' Envoys, and returns the
// counters as they are when each client has one.
func (s shop) begin(selector string) map[string]load.Stats {
	s.Helper()
	pods, err := k8s.Pods(s.Context(), s.namespace, selector)
	if err != nil {
		s.Fatal(err)
	}
	for _, p := range pods {
		if _, err := k8s.Kubectl(s.Context(), "exec", "-n", s.namespace, p.Name, "--", "/usr/local/bin/load", "-begin"); err != nil {
			s.Fatal(err)
		}
	}
	s.await("connections of every client", func(_, _ string, now load.Stats) (bool, string) {
		return now.Requests >= 20, fmt.Sprintf("%d requests", now.Requests)
	})
	all, err := s.traffic.Fresh(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	for target, stats := range all {
		if stats.Direct > 0 {
			s.Errorf("%s: %d requests went past the callee's Envoy, on connections made in the mesh", target, stats.Direct)
		}
	}
	return all
}

// hasty opens connections as fast as it can: some are always on their way.
const hasty = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: hasty, namespace: shop}
spec:
  selector: {matchLabels: {app: hasty}}
  template:
    metadata: {labels: {app: hasty}}
    spec:
      serviceAccountName: load
      terminationGracePeriodSeconds: 3
      containers:
        - name: load
          image: weft.dev/test-load:dev
          args: [-every=200ms]
          env:
            - name: LOAD_TARGETS
              value: '[{"name": "catalogue-one", "kind": "http-new", "address": "catalogue:80", "count": 24},
                       {"name": "redis-8", "kind": "redis", "address": "redis:6379", "count": 4, "perConnection": 8}]'
`

// hurried lets everybody enter and leave the mesh under hasty load, until something is lost or so many cycles are over.
func (s shop) hurried(cycles int) (n int, seen load.Stats) {
	s.Helper()
	if err := k8s.Apply(s.Context(), hasty); err != nil {
		s.Fatal(err)
	}
	defer func() {
		if err := k8s.Delete(context.WithoutCancel(s.Context()), hasty); err != nil {
			s.Error(err)
		}
	}()
	if err := k8s.UntilReady(s.Context(), time.Minute, "shop", "app=hasty", nil); err != nil {
		s.Fatal(err)
	}
	all := s.sub(s.T)
	all.follow("app in (load,hasty)")
	defer all.traffic.Stop()
	all.before = all.fresh() // Envoys that ended may have had connections from the mesh
	for n = range cycles {
		for _, in := range []bool{true, false} {
			all.label("app in (load,hasty,front,catalogue,prices,redis)", in)
			all.dwell(400)
		}
		if seen = kube.Between(all.before, load.Sum(all.traffic.ByTarget())); seen.Failed+seen.Broken > 0 {
			break
		}
	}
	return n + 1, seen
}

// reinstall changes weft's values; nothing may be enrolled but the fixtures, whose connections end.
func reinstall(t *testing.T, values ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := install(ctx, values...); err != nil {
		t.Fatal(err)
	}
	restartAgents(t)
}

// restartAgents replaces the nodes' pods, Envoy's included, and waits until the fixtures are in the mesh again.
func restartAgents(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if _, err := k8s.Kubectl(ctx, "delete", "pod", "-n", system, "-l", "app=weft-nodeproxy", "--grace-period=1"); err != nil {
		t.Fatal(err)
	}
	if err := k8s.UntilReady(ctx, 2*time.Minute, system, "", nil); err != nil {
		t.Fatal(err)
	}
	if err := k8s.UntilCondition(ctx, time.Minute, "mesh", "", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
}

// busy is load without streams that outlive a policy: those are cut, as documented. It is held until all are in the mesh.
var busy = heldLoad("busy", `[{"name": "kept",  "kind": "http-keepalive", "address": "catalogue:80", "count": 4, "pause": "25ms"},
                 {"name": "one",   "kind": "http-new",       "address": "catalogue:80", "count": 1, "pause": "40ms"},
                 {"name": "unary", "kind": "grpc-unary",     "address": "prices:9000",  "count": 2, "pause": "25ms"}]`)

// heldLoad is a load pod on every node that opens its connections when it is told to.
func heldLoad(name, targets string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: %[1]s, namespace: shop}
spec:
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      serviceAccountName: load
      terminationGracePeriodSeconds: 3
      containers:
        - name: load
          image: weft.dev/test-load:dev
          args: [-held, -every=200ms]
          env:
            - name: LOAD_TARGETS
              value: |
                %[2]s
`, name, targets)
}

// forms of one policy: wider, narrower, about connections and about requests.
var forms = []string{
	`action: Allow, rules: [{from: [{serviceAccounts: [{name: load}, {name: front}]}]}]`,
	`action: Allow, rules: [{from: [{namespaces: [till]}], to: [{methods: [GET, POST]}]}]`,
	`action: Allow, rules: [{from: [{namespaces: [till]}]}]`,
	`action: Deny, rules: [{to: [{paths: [{type: Prefix, value: /nothing}]}]}]`,
	`action: Allow, rules: [{from: [{serviceAccounts: [{name: load}]}]}]`,
	`action: Deny, rules: [{from: [{serviceAccounts: [{name: nobody}]}]}]`,
}

// TestPolicyChanges: §9, a policy changes its kind and its width under keep-alive and HTTP/2 load, and nothing is lost.
func TestPolicyChanges(t *testing.T) {
	alone(t, till)
	s := newShopWith(t, till, "busy", busy)
	s.label("app in (busy,catalogue,prices)", true)
	s.begin("app=busy")
	var slowest time.Duration
	for i := range *changes {
		spec := forms[i%len(forms)]
		policy := fmt.Sprintf("apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: turning, namespace: %s}\nspec: {selector: {matchExpressions: [{key: app, operator: In, values: [catalogue, prices]}]}, %s}\n", till, spec)
		started := time.Now()
		if err := k8s.Apply(t.Context(), policy); err != nil {
			t.Fatal(err)
		}
		programmedIn(t, till, "accesspolicy", "turning")
		slowest = max(slowest, time.Since(started))
		s.dwell(100)
		if sum := load.Sum(s.traffic.ByTarget()); sum.Failed+sum.Broken > 0 {
			t.Errorf("change %d to %q lost something", i, spec)
			break
		}
	}
	sum := s.lossless()
	if sum.Direct > 0 {
		t.Errorf("%d requests went past the callee's Envoy", sum.Direct)
	}
	t.Logf("%d changes, the slowest in force after %v; %d requests on %d connections, %d closed by announcement", *changes, slowest.Round(time.Millisecond), sum.Requests, sum.Connections, sum.Closed)
}
