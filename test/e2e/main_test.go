//go:build e2e

// Package e2e shows weft on the embedded Kubernetes, by real traffic between real pods. `make test-e2e` starts the
// cluster, loads the images and runs it.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/cluster"
	"github.com/weftmesh/weft/test/cluster/snapshot"
	"github.com/weftmesh/weft/test/kube"
)

const system = "weft-system"

var (
	k8s    *kube.Cluster
	root   string
	keep   = flag.Bool("keep", false, "leave weft and the fixtures in the cluster at the end")
	images = flag.String("images", "dev", "tag of weft's images; race: built with the race detector, whose findings fail the run")
)

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	if root, err = cluster.Root(); err != nil {
		return 1, err
	}
	if k8s, err = kube.Open(root); err != nil {
		return 1, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if !*keep {
		// What an earlier run left would hide what this one leaves.
		if _, err := k8s.Kubectl(ctx, "delete", "namespace", "mesh", "outside", "shop", till, hostileMesh, hostileOutside, "--ignore-not-found"); err != nil {
			return 1, err
		}
		if _, err := k8s.Helm(ctx, "uninstall", "weft", "-n", system, "--ignore-not-found", "--wait"); err != nil {
			return 1, err
		}
		if err := kube.Until(ctx, 2*time.Minute, "an earlier weft to go", nil, func(ctx context.Context) (bool, string) {
			pods, err := k8s.Pods(ctx, system, "")
			return err == nil && len(pods) == 0, fmt.Sprintf("%d pods", len(pods))
		}); err != nil {
			return 1, err
		}
	}
	if before, err = snapshot.Take(ctx); err != nil {
		return 1, err
	}
	if err := fixtures(ctx); err != nil {
		return 1, err
	}
	if err := kube.Until(ctx, time.Minute, "addresses that the kernel still probes", nil, func(ctx context.Context) (bool, string) {
		if untouched, err = lookInside(ctx); err != nil {
			return false, err.Error()
		}
		probed := untouched.matching(" tentative ")
		return len(probed) == 0, strings.Join(probed, "\n")
	}); err != nil {
		return 1, err
	}
	if err := start(ctx); err != nil {
		return 1, err
	}
	code = m.Run()
	if *images == "race" && len(races()) > 0 {
		code = 1
	}
	if *keep {
		return code, nil
	}
	ctx, cancel = context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	_, err = k8s.Kubectl(ctx, "delete", "namespace", "mesh", "outside", "--ignore-not-found")
	return code, err
}

// races prints what the race detector found in weft's processes, and returns it by pod.
func races() map[string]string {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	found := map[string]string{}
	pods, err := k8s.Pods(ctx, system, "")
	if err != nil || len(pods) == 0 {
		found["none"] = fmt.Sprintf("weft's pods are not there to be asked: %v", err)
	}
	for _, p := range pods {
		log, err := k8s.Kubectl(ctx, "logs", "-n", system, "--all-containers", "--tail=-1", p.Name)
		if err != nil {
			found[p.Name] = err.Error()
		} else if _, report, raced := strings.Cut(log, "WARNING: DATA RACE"); raced {
			found[p.Name] = report[:min(len(report), 4000)]
		}
	}
	for name, report := range found {
		fmt.Fprintf(os.Stderr, "e2e: race detector, %s: %s\n", name, report)
	}
	return found
}

// fixtures puts the tests' pods into the cluster.
func fixtures(ctx context.Context) error {
	if err := k8s.ApplyFile(ctx, filepath.Join(root, "test/e2e/testdata/fixtures.yaml")); err != nil {
		return err
	}
	for _, namespace := range []string{"mesh", "outside"} {
		if err := k8s.UntilReady(ctx, 2*time.Minute, namespace, "", nil); err != nil {
			return err
		}
	}
	return nil
}

// start installs weft and waits until the fixtures, running already, are in the mesh.
func start(ctx context.Context) error {
	if err := install(ctx); err != nil {
		return err
	}
	if err := fixtures(ctx); err != nil {
		return err
	}
	return k8s.UntilCondition(ctx, time.Minute, "mesh", "", enforced, "True", nil)
}

// install puts weft into the cluster by helm, as a user does.
func install(ctx context.Context, values ...string) error {
	if _, err := k8s.Helm(ctx, "upgrade", "--install", "weft-crds", filepath.Join(root, "charts/weft-crds")); err != nil {
		return err
	}
	if *images == "race" { // the detector needs several times the memory
		values = append(values, "--set", "controlplane.resources.limits.memory=2Gi", "--set", "nodeproxy.agent.resources.limits.memory=2Gi")
	}
	if _, err := k8s.Helm(ctx, append([]string{"upgrade", "--install", "weft", filepath.Join(root, "charts/weft"), "-n", system, "--create-namespace",
		"-f", filepath.Join(root, "test/cluster/values.yaml"), "--set", "host.cgroup=" + k8s.HostCgroup, "--set", "nodeproxy.accessLog=true",
		"--set", "controlplane.image=weft.dev/controlplane:" + *images, "--set", "nodeproxy.image=weft.dev/nodeproxy:" + *images}, values...)...); err != nil {
		return err
	}
	if err := k8s.UntilReady(ctx, 2*time.Minute, system, "", nil); err != nil {
		return err
	}
	return k8s.Apply(ctx, kube.OwnClientAddress)
}

// placement is where a caller stands as the callee on node n1 sees it.
type placement struct{ name, node string }

var placements = []placement{{"same node", "n1"}, {"across nodes", "n2"}}

// pod returns the name of the fixture pod of an app on a node.
func pod(t *testing.T, namespace, app, node string) kube.Pod {
	t.Helper()
	pods, err := k8s.Pods(t.Context(), namespace, "app="+app)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if p.Node == node && p.Ready && !p.Deleting {
			return p
		}
	}
	t.Fatalf("no ready pod of %s/%s on %s", namespace, app, node)
	return kube.Pod{}
}

// namespaces' tests that may run beside another's: they wait more than they work. They come after those that change weft
// itself.
var namespaces = map[string]*sync.Mutex{"mesh": {}, "shop": {}, till: {}, hostileMesh: {}}

// alone lets a test run beside those of another namespace. Those that wait for their turn count for -parallel, too.
func alone(t *testing.T, namespace string) {
	t.Parallel()
	namespaces[namespace].Lock()
	t.Cleanup(namespaces[namespace].Unlock)
}

// apply applies a manifest for the time of one test.
func apply(t *testing.T, manifest string) {
	t.Helper()
	if err := k8s.Apply(t.Context(), manifest); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := k8s.Delete(ctx, manifest); err != nil {
			t.Error(err)
		}
	})
}

// until waits for a condition of one test.
func until(t *testing.T, limit time.Duration, what string, ask func() (bool, string)) {
	t.Helper()
	if err := kube.Until(t.Context(), limit, what, nil, func(context.Context) (bool, string) { return ask() }); err != nil {
		t.Fatal(err)
	}
}
