//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/cluster/snapshot"
	"github.com/weftmesh/weft/test/kube"
)

// TestNamespaceDeleted: weft is deleted without the order to go (docs/OPERATE.md, "Removing"): its CRDs, then its namespace. Without the
// CRDs all goes on. Without the namespace pods that take plaintext are as without weft after a while, and Strict ones stay
// closed, until nodeproxy release has run on the node.
func TestNamespaceDeleted(t *testing.T) {
	w := newCrashWorld(t)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := errors.Join(awaitNamespace(ctx), start(ctx)); err != nil {
			t.Errorf("install weft again: %v", err)
		}
	})
	w.settle(t)
	knocks := w.knock(t)
	t.Run("the CRDs", func(t *testing.T) {
		var connections []*held
		for _, at := range placements {
			connections = append(connections, hold(t, client, at, w.closed.IPs[0]+":9000"), hold(t, client, at, w.open.IPs[0]+":9000"), hold(t, stranger, at, w.open.IPs[0]+":9000"))
		}
		live := func(more int) {
			t.Helper()
			for _, h := range connections {
				from, _, _ := h.state()
				until(t, time.Minute, h.name, func() (bool, string) {
					lines, _, how := h.state()
					if how != "" {
						t.Fatalf("%s: the connection ended: %s", h.name, how)
					}
					return lines >= from+more, fmt.Sprintf("%d lines, before %d", lines, from)
				})
			}
		}
		live(3)
		if _, err := k8s.Helm(t.Context(), "uninstall", "weft-crds", "--wait"); err != nil {
			t.Fatal(err)
		}
		until(t, time.Minute, "the CRDs to go", func() (bool, string) {
			out, err := k8s.Kubectl(t.Context(), "get", "crds", "-o", "name")
			return err == nil && !strings.Contains(out, ".weft.dev"), out
		})
		live(3)
		// The next controllers know what was there.
		leader, follower := replicas(t)
		kill(t, leader)
		kill(t, follower)
		replicas(t)
		apply(t, podOn("late", "n1", "mesh", "", `args: [serve], readinessProbe: {httpGet: {path: /pod, port: 8080}, periodSeconds: 1}`))
		ready(t, "app=late")
		inMesh(t, "app=late", "Captured")
		w.settle(t)
		live(3)
	})
	t.Run("the namespace", func(t *testing.T) {
		if _, err := k8s.Kubectl(t.Context(), "delete", "namespace", system, "--wait=false"); err != nil {
			t.Fatal(err)
		}
		until(t, 2*time.Minute, "weft's pods to go", func() (bool, string) {
			left := pods(t, system, "")
			return len(left) == 0, fmt.Sprintf("%d pods", len(left))
		})
		for _, c := range w.cells {
			if c.fates[weftGone] == nothing {
				continue
			}
			until(t, time.Minute, c.name+", "+c.at.name+", without weft", func() (bool, string) {
				out, err := c.from.batch(t.Context(), c.calls)
				if err != nil {
					return false, err.Error()
				}
				return out[0].fate(c.to) == plain && out[1].fate(c.to) == plain, fmt.Sprintf("%+v", out)
			})
		}
		w.run(t, weftGone)
	})
	t.Logf("strangers called the Strict pod %d times", knocks())
	t.Run("nodeproxy release", func(t *testing.T) {
		apply(t, releasing(t))
		until(t, time.Minute, "its end on both nodes", func() (bool, string) {
			done, all := 0, pods(t, "outside", "app=release")
			for _, p := range all {
				if p.Phase == "Succeeded" {
					done++
				}
			}
			return done == len(k8s.Nodes), fmt.Sprintf("%+v", all)
		})
		for _, c := range w.cells {
			t.Run(c.name+"/"+c.at.name, func(t *testing.T) {
				out, err := c.from.batch(t.Context(), c.calls)
				if err != nil {
					t.Fatal(err)
				}
				for i, o := range out {
					if got := o.fate(c.to); got != plain {
						t.Errorf("%+v: %s, want %s: %+v", c.calls[i], got, plain, o)
					}
				}
			})
		}
		for _, n := range k8s.Nodes {
			pins := fmt.Sprintf("/proc/%d/root/sys/fs/bpf/weft", n.PID)
			if _, err := os.Stat(pins); !os.IsNotExist(err) {
				t.Errorf("%s: pins are left: %v", n.Name, err)
			}
		}
		until(t, time.Minute, "weft's hooks and maps to go", func() (bool, string) {
			now, err := snapshot.Take(t.Context())
			if err != nil {
				return false, err.Error()
			}
			var left []string
			for _, change := range snapshot.Diff(before, now) {
				if (change.Kind == snapshot.BPFLink || change.Kind == snapshot.BPFMap) && change.Before == "" {
					left = append(left, change.String())
				}
			}
			return len(left) == 0, strings.Join(left, "\n")
		})
	})
}

// awaitNamespace waits until weft's namespace is gone, if it is to go. Kubernetes looks again after half of its pods' grace period, or
// when the namespace changes.
func awaitNamespace(ctx context.Context) error {
	return kube.Every(ctx, time.Second, 2*time.Minute, "the namespace to go", func(ctx context.Context) (bool, string) {
		out, err := k8s.Kubectl(ctx, "get", "namespace", system, "--ignore-not-found", "-o", "jsonpath={.metadata.name} {.metadata.deletionTimestamp}")
		if f := strings.Fields(out); err != nil || len(f) == 2 {
			_, err = k8s.Kubectl(ctx, "annotate", "namespace", system, "weft.dev/look="+fmt.Sprint(time.Now().UnixNano()), "--overwrite")
			return false, fmt.Sprint(out, err)
		}
		return true, ""
	})
}

// releasing runs nodeproxy release on every node, as docs/OPERATE.md says.
func releasing(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs/OPERATE.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, manifest, found := strings.Cut(string(text), "```yaml\n# nodeproxy release\n")
	if !found {
		t.Fatal("docs/OPERATE.md does not say how to run nodeproxy release")
	}
	manifest, _, _ = strings.Cut(manifest, "```")
	all := ""
	for _, n := range k8s.Nodes {
		all += "---\n" + strings.NewReplacer("NODE", n.Name, "IMAGE", "weft.dev/nodeproxy:"+*images, "NAMESPACE", "outside").Replace(manifest)
	}
	return all
}

// knock lets strangers of both nodes call the Strict pod until calls is asked how often they did: no byte may come back.
func (w crashWorld) knock(t *testing.T) (calls func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	n := 0
	var mu sync.Mutex
	for _, c := range w.cells {
		if c.row.from != stranger || c.row.to != "closed" {
			continue
		}
		done.Go(func() {
			for ctx.Err() == nil {
				out, err := c.from.batch(ctx, c.calls)
				if err != nil {
					continue // told to end
				}
				mu.Lock()
				n += len(out)
				mu.Unlock()
				for _, o := range out {
					if o.fate(c.to) != nothing {
						t.Errorf("a stranger, %s, calls the Strict pod: %+v", c.at.name, o)
					}
				}
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
			}
		})
	}
	stop := sync.OnceFunc(func() { cancel(); done.Wait() })
	t.Cleanup(stop)
	return func() int { stop(); return n }
}
