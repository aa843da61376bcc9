// Command bench measures weft on the embedded Kubernetes: the time from a pod's label to its enrolment; the time from a
// change of a policy or route to every Envoy's having it, to the last new request that is judged by the old form, and to
// Programmed; and Envoy's memory per pod. It prints medians with minimum and maximum, and writes them as JSON. The machine
// is shared and noisy: look at the range as well.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/weftmesh/weft/test/kube"
)

const (
	system    = "weft-system"
	namespace = "bench"
	enrolled  = "weft.dev/Enrolled"
	enforced  = "weft.dev/Enforced"
)

type bench struct {
	root    string
	runs    int
	pods    int
	cluster *kube.Cluster
	objects dynamic.Interface
	results []result
}

// result is one figure: the median of its runs, with their range.
type result struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Runs   int     `json:"runs"`
}

var (
	podKind    = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	policyKind = schema.GroupVersionResource{Group: "weft.dev", Version: "v1alpha1", Resource: "accesspolicies"}
	routeKind  = schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: "httproutes"}
)

func main() {
	b := bench{}
	flag.StringVar(&b.root, "root", ".", "the clone")
	flag.IntVar(&b.runs, "runs", 15, "runs of each measurement")
	flag.IntVar(&b.pods, "pods", 100, "pods on one node for the measurement of memory; the node takes 110")
	only := flag.String("only", "enrolment,propagation,memory", "parts to run")
	out := flag.String("out", "", "file for the results as JSON")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx, strings.Split(*only, ","), *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context, only []string, out string) error {
	var err error
	if b.cluster, err = kube.Open(b.root); err != nil {
		return err
	}
	config := rest.CopyConfig(b.cluster.Config)
	config.QPS, config.Burst = 200, 200
	if b.objects, err = dynamic.NewForConfig(config); err != nil {
		return fmt.Errorf("make client: %w", err)
	}
	if err := b.install(ctx); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
		defer cancel()
		_, _ = b.cluster.Kubectl(ctx, "delete", "namespace", namespace, "--ignore-not-found")
	}()
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{{"enrolment", b.enrolment}, {"propagation", b.propagation}, {"memory", b.memory}} {
		if !slices.Contains(only, part.name) {
			continue
		}
		if err := part.run(ctx); err != nil {
			return fmt.Errorf("measure %s: %w", part.name, err)
		}
	}
	if out == "" {
		return nil
	}
	report := map[string]any{"machine": fmt.Sprintf("%d processors, %s, %s", runtime.NumCPU(), runtime.GOARCH, kernel()), "results": b.results}
	raw, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return fmt.Errorf("write results: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return fmt.Errorf("write results: %w", err)
	}
	return os.WriteFile(out, append(raw, '\n'), 0o644)
}

func kernel() string {
	raw, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return "Linux " + strings.TrimSpace(string(raw))
}

func (b *bench) install(ctx context.Context) error {
	fmt.Println("installing weft and 11 pods")
	if _, err := b.cluster.Helm(ctx, "upgrade", "--install", "weft-crds", filepath.Join(b.root, "charts/weft-crds")); err != nil {
		return err
	}
	if _, err := b.cluster.Helm(ctx, "upgrade", "--install", "weft", filepath.Join(b.root, "charts/weft"), "-n", system, "--create-namespace",
		"-f", filepath.Join(b.root, "test/cluster/values.yaml"), "--set", "host.cgroup="+b.cluster.HostCgroup); err != nil {
		return err
	}
	if err := b.cluster.UntilReady(ctx, 3*time.Minute, system, "", nil); err != nil {
		return err
	}
	objects := fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n---\n", namespace)
	for i := range 11 {
		objects += podManifest(fmt.Sprintf("pod-%d", i))
	}
	objects += fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: bench, namespace: %s}\nspec: {selector: {app: bench}, ports: [{name: http, port: 80, targetPort: 8080}]}\n", namespace)
	if err := b.cluster.Apply(ctx, objects); err != nil {
		return err
	}
	if err := b.cluster.UntilReady(ctx, 3*time.Minute, namespace, "", nil); err != nil {
		return err
	}
	for i := range 10 {
		if err := b.label(ctx, fmt.Sprintf("pod-%d", i), "enabled"); err != nil {
			return err
		}
	}
	return kube.Until(ctx, time.Minute, "ten enrolled pods", nil, func(ctx context.Context) (bool, string) {
		pods, err := b.cluster.Pods(ctx, namespace, "")
		if err != nil {
			return false, err.Error()
		}
		in := 0
		for _, p := range pods {
			if p.Conditions[enforced].Status == "True" {
				in++
			}
		}
		return in == 10, fmt.Sprintf("%d of 10", in)
	})
}

func podManifest(name string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: bench}}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [{name: toolbox, image: "docker.io/weft/toolbox:1", args: [serve]}]
---
`, name, namespace)
}

func (b *bench) label(ctx context.Context, name, value string) error {
	patch := fmt.Sprintf(`{"metadata":{"labels":{"weft.dev/mesh":%q}}}`, value)
	_, err := b.objects.Resource(podKind).Namespace(namespace).Patch(ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

// comer is the one of the eleven pods that enters and leaves.
const comer = "pod-10"

// after makes a change and measures the time until the object is as it should be.
func (b *bench) after(ctx context.Context, kind schema.GroupVersionResource, name string, change func() error, so func(*unstructured.Unstructured) bool) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	w, err := b.objects.Resource(kind).Namespace(namespace).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return 0, fmt.Errorf("watch %s: %w", name, err)
	}
	defer w.Stop()
	started := time.Now()
	if err := change(); err != nil {
		return 0, fmt.Errorf("change %s: %w", name, err)
	}
	for {
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for %s: %w", name, ctx.Err())
		case e, open := <-w.ResultChan():
			if !open {
				return 0, fmt.Errorf("wait for %s: the watch ended", name)
			}
			if o, ok := e.Object.(*unstructured.Unstructured); ok && time.Since(started) > 0 && so(o) {
				return time.Since(started), nil
			}
		}
	}
}

func condition(o *unstructured.Unstructured, kind string, path ...string) (status string, generation int64) {
	list, _, _ := unstructured.NestedSlice(o.Object, path...)
	for _, raw := range list {
		c, _ := raw.(map[string]any)
		if c["type"] == kind {
			status, _ = c["status"].(string)
			generation, _ = c["observedGeneration"].(int64)
			return status, generation
		}
	}
	return "", 0
}

func (b *bench) enrolment(ctx context.Context) error {
	is := func(kind, status string) func(*unstructured.Unstructured) bool {
		return func(o *unstructured.Unstructured) bool {
			s, _ := condition(o, kind, "status", "conditions")
			return s == status
		}
	}
	var in, all, out []float64
	for range b.runs {
		took, err := b.after(ctx, podKind, comer, func() error { return b.label(ctx, comer, "enabled") }, is(enrolled, "True"))
		if err != nil {
			return err
		}
		in = append(in, milliseconds(took))
		rest, err := b.after(ctx, podKind, comer, func() error { return nil }, is(enforced, "True"))
		if err != nil {
			return err
		}
		all = append(all, milliseconds(took+rest))
		if took, err = b.after(ctx, podKind, comer, func() error { return b.label(ctx, comer, "disabled") }, is(enrolled, "False")); err != nil {
			return err
		}
		out = append(out, milliseconds(took))
		// The listeners go after the settle time: the next run begins on a clean pod.
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(1500 * time.Millisecond):
		}
	}
	b.add("one pod's label to Enrolled=True, 10 enrolled pods on the node", "ms", in)
	b.add("one pod's label to Enforced=True", "ms", all)
	b.add("one pod's label to Enrolled=False", "ms", out)
	return nil
}

func milliseconds(d time.Duration) float64 { return math.Round(float64(d.Microseconds())/100) / 10 }

func (b *bench) add(name, unit string, values []float64) {
	sorted := slices.Sorted(slices.Values(values))
	r := result{name, unit, sorted[len(sorted)/2], sorted[0], sorted[len(sorted)-1], len(sorted)}
	b.results = append(b.results, r)
	fmt.Printf("%-75s %8.1f %s (%.1f - %.1f, %d runs)\n", name, r.Median, unit, r.Min, r.Max, r.Runs)
}
