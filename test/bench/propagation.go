package main

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weftmesh/weft/test/kube"
)

// target is what the propagation of a change is measured on: ten callees on n1, a caller on n1 and one on n2.
const target = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: caller, namespace: bench}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: caller, namespace: bench}
spec:
  selector: {matchLabels: {app: caller}}
  template:
    metadata: {labels: {app: caller, weft.dev/mesh: enabled}}
    spec:
      serviceAccountName: caller
      terminationGracePeriodSeconds: 0
      containers: [{name: toolbox, image: "docker.io/weft/toolbox:1", args: [serve]}]
---
apiVersion: weft.dev/v1alpha1
kind: AccessPolicy
metadata: {name: bench, namespace: bench}
spec: {selector: {matchLabels: {app: bench}}, rules: [{from: [{serviceAccounts: [{name: caller}]}]}]}
`

const targetRoute = `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: bench, namespace: bench}
spec:
  parentRefs: [{group: "", kind: Service, name: bench, port: 80}]
  rules: [{backendRefs: [{name: bench, port: 80}]}]
`

// change is one kind of change, made again and again between two forms. A form carries a marker that finds it in Envoy's
// configuration, and leads to a status of its own.
type change struct {
	name  string
	kind  schema.GroupVersionResource
	dump  string   // the part of Envoy's configuration that has it
	nodes []string // the nodes whose Envoys must have it
	forms []form
}

type form struct {
	name string
	spec func(marker string) string
	done func(status string) bool
}

func is(status string) func(string) bool { return func(s string) bool { return s == status } }

func accounts(names ...string) func(string) string {
	return func(marker string) string {
		return `{"rules":[{"from":[{"serviceAccounts":[{"name":"` + strings.Join(append(names, marker), `"},{"name":"`) + `"}]}]}]}`
	}
}

func paths(path string) func(string) string {
	return func(marker string) string {
		return `{"rules":[{"from":[{"serviceAccounts":[{"name":"caller"}]}],"to":[{"paths":[{"type":"Exact","value":"` + path + `"},{"type":"Exact","value":"/` + marker + `"}]}]}]}`
	}
}

func redirect(status string) func(string) string {
	return func(marker string) string {
		return `{"rules":[{"filters":[{"type":"RequestRedirect","requestRedirect":{"hostname":"` + marker + `","statusCode":` + status + `}}]}]}`
	}
}

var changes = []change{
	{"an AccessPolicy about connections", policyKind, "dynamic_active_secrets", []string{"n1"}, []form{
		{"narrowed", accounts("somebody"), func(status string) bool { return status != "200" }},
		{"widened", accounts("caller"), is("200")},
	}},
	{"an AccessPolicy about requests", policyKind, "dynamic_listeners", []string{"n1"}, []form{
		{"narrowed", paths("/other"), is("403")},
		{"widened", paths("/pod"), is("200")},
	}},
	{"an HTTPRoute", routeKind, "dynamic_route_configs", []string{"n1", "n2"}, []form{
		{"changed", redirect("301"), is("301")},
		{"changed", redirect("302"), is("302")},
	}},
}

func (b *bench) propagation(ctx context.Context) error {
	// The pod that comes and goes is no callee: outside the mesh nothing judges what it is asked.
	if _, err := b.cluster.Kubectl(ctx, "delete", "pod", "-n", namespace, comer); err != nil {
		return err
	}
	if err := b.cluster.Apply(ctx, target); err != nil {
		return err
	}
	if err := b.cluster.UntilCondition(ctx, 2*time.Minute, namespace, "app=caller", enforced, "True", nil); err != nil {
		return err
	}
	callers, err := b.ask(ctx)
	if err != nil {
		return err
	}
	defer func() {
		for _, c := range callers {
			c.stop()
		}
	}()
	for _, c := range changes {
		if c.kind == routeKind {
			if err := b.cluster.Apply(ctx, targetRoute); err != nil {
				return err
			}
		}
		if err := b.measure(ctx, c, callers); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	_, err = b.cluster.Kubectl(ctx, "delete", "-n", namespace, "accesspolicy/bench", "httproute/bench", "daemonset/caller")
	return err
}

func (b *bench) measure(ctx context.Context, c change, callers []*caller) error {
	configured, judged, programmed := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	var order []string
	// The first change also changes the kind of the policy, and is not counted.
	for i := range b.runs*len(c.forms) + 1 {
		f := c.forms[i%len(c.forms)]
		took, err := b.propagate(ctx, c, f, fmt.Sprintf("marker-%d", i), callers)
		if err != nil {
			return err
		}
		if i == 0 {
			continue
		}
		if !slices.Contains(order, f.name) {
			order = append(order, f.name)
		}
		configured[f.name] = append(configured[f.name], milliseconds(took.configured))
		judged[f.name] = append(judged[f.name], milliseconds(took.judged))
		programmed[f.name] = append(programmed[f.name], milliseconds(took.programmed))
	}
	for _, name := range order {
		b.add(c.name+" "+name+": in every Envoy", "ms", configured[name])
		b.add(c.name+" "+name+": all new requests judged by it, both placements", "ms", judged[name])
		b.add(c.name+" "+name+": Programmed=True", "ms", programmed[name])
	}
	return nil
}

// took is what one change took, each from before it was written.
type took struct{ configured, judged, programmed time.Duration }

func (b *bench) propagate(ctx context.Context, c change, f form, marker string, callers []*caller) (took, error) {
	old, err := b.objects.Resource(c.kind).Namespace(namespace).Get(ctx, "bench", metav1.GetOptions{})
	if err != nil {
		return took{}, fmt.Errorf("read %s: %w", c.kind.Resource, err)
	}
	var t took
	var group sync.WaitGroup
	failures := make([]error, 2)
	started := time.Now()
	t.programmed, err = b.after(ctx, c.kind, "bench", func() error {
		started = time.Now()
		group.Go(func() { t.configured, failures[0] = b.configured(ctx, c, marker, started) })
		group.Go(func() { t.judged, failures[1] = judged(ctx, f, callers, started) })
		_, err := b.objects.Resource(c.kind).Namespace(namespace).Patch(ctx, "bench", types.MergePatchType, []byte(`{"spec":`+f.spec(marker)+`}`), metav1.PatchOptions{})
		return err
	}, newer(c.kind, old.GetGeneration()))
	group.Wait()
	for _, failure := range append(failures, err) {
		if failure != nil {
			return took{}, failure
		}
	}
	return t, nil
}

// newer: a generation after this one is programmed.
func newer(kind schema.GroupVersionResource, generation int64) func(*unstructured.Unstructured) bool {
	return func(o *unstructured.Unstructured) bool {
		holder, path := o, []string{"status", "conditions"}
		if kind == routeKind {
			parents, _, _ := unstructured.NestedSlice(o.Object, "status", "parents")
			if len(parents) == 0 {
				return false
			}
			first, _ := parents[0].(map[string]any)
			holder, path = &unstructured.Unstructured{Object: first}, []string{"conditions"}
		}
		status, seen := condition(holder, "Programmed", path...)
		return status == "True" && seen == o.GetGeneration() && seen > generation
	}
}

// configured waits until the Envoys' own configuration has the marker.
func (b *bench) configured(ctx context.Context, c change, marker string, started time.Time) (time.Duration, error) {
	for _, node := range c.nodes {
		err := kube.Every(ctx, 5*time.Millisecond, 2*time.Minute, marker+" in Envoy on "+node, func(ctx context.Context) (bool, string) {
			text, err := b.cluster.Admin(ctx, node, "/config_dump?resource="+c.dump)
			if err != nil {
				return false, err.Error()
			}
			return strings.Contains(text, marker+`"`), fmt.Sprintf("%d bytes", len(text))
		})
		if err != nil {
			return 0, err
		}
	}
	return time.Since(started), nil
}

// caller asks again and again over new connections.
type caller struct {
	node    string
	stop    func()
	mu      sync.Mutex
	answers []answer
}

type answer struct {
	at     time.Time
	status string
}

// ask starts a caller on each node.
func (b *bench) ask(ctx context.Context) ([]*caller, error) {
	pods, err := b.cluster.Pods(ctx, namespace, "app=caller")
	if err != nil {
		return nil, err
	}
	var callers []*caller
	for _, p := range pods {
		ctx, cancel := context.WithCancel(ctx)
		cmd := b.cluster.Command(ctx, "exec", "-n", namespace, p.Name, "--", "toolbox", "get", "-new", "-n", "100000000", "-interval", "5ms", "-timeout", "2s", "http://bench/pod")
		c := &caller{node: p.Node}
		if err := c.read(cmd); err != nil {
			cancel()
			return nil, err
		}
		c.stop = func() { cancel(); _ = cmd.Wait() }
		callers = append(callers, c)
	}
	return callers, nil
}

func (c *caller) read(cmd *exec.Cmd) error {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start a caller on %s: %w", c.node, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start a caller on %s: %w", c.node, err)
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			status, _, _ := strings.Cut(lines.Text(), " ")
			c.mu.Lock()
			c.answers = append(c.answers, answer{time.Now(), status})
			c.mu.Unlock()
		}
	}()
	return nil
}

// enough answers in a row reach each of the ten callees.
const enough = 60

// since is when the answers began to be done for good, if enough of them are.
func (c *caller) since(started time.Time, done func(string) bool) (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	first, n := time.Time{}, 0
	for _, a := range slices.Backward(c.answers) {
		if a.at.Before(started) || !done(a.status) {
			break
		}
		first, n = a.at, n+1
	}
	return first, n >= enough
}

// heard is what the caller was answered last.
func (c *caller) heard(started time.Time) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	said, n := map[string]int{}, 0
	for _, a := range slices.Backward(c.answers) {
		if a.at.Before(started) || n == enough {
			break
		}
		said[a.status]++
		n++
	}
	return fmt.Sprintf("the last %d answers were %v", n, said)
}

func judged(ctx context.Context, f form, callers []*caller, started time.Time) (time.Duration, error) {
	var slowest time.Duration
	for _, c := range callers {
		err := kube.Every(ctx, 5*time.Millisecond, 2*time.Minute, f.name+" verdicts on "+c.node, func(context.Context) (bool, string) {
			first, ok := c.since(started, f.done)
			if ok {
				slowest = max(slowest, first.Sub(started))
			}
			return ok, c.heard(started)
		})
		if err != nil {
			return 0, err
		}
	}
	return slowest, nil
}
