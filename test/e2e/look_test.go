//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weftmesh/weft/test/cluster"
)

// programmed waits until a policy says that it is in force.
func programmed(t *testing.T, kind, name string) {
	t.Helper()
	programmedIn(t, "mesh", kind, name)
}

func programmedIn(t *testing.T, namespace, kind, name string) {
	t.Helper()
	until(t, time.Minute, kind+" "+name+" to be programmed", func() (bool, string) { return isProgrammed(t, namespace, kind, name) })
}

// plurals of the kinds that isProgrammed knows.
var plurals = map[string]string{"accesspolicy": "accesspolicies", "authenticationpolicy": "authenticationpolicies"}

// isProgrammed: the policy's newest form is in force.
func isProgrammed(t *testing.T, namespace, kind, name string) (bool, string) {
	t.Helper()
	raw, err := k8s.Get(t.Context(), fmt.Sprintf("/apis/weft.dev/v1alpha1/namespaces/%s/%s/%s", namespace, plurals[kind], name))
	if err != nil {
		return false, err.Error()
	}
	var policy struct {
		Metadata metav1.ObjectMeta
		Status   struct{ Conditions []metav1.Condition }
	}
	if err := json.Unmarshal(raw, &policy); err != nil {
		return false, err.Error()
	}
	c := meta.FindStatusCondition(policy.Status.Conditions, "Programmed")
	return c != nil && c.ObservedGeneration == policy.Metadata.Generation && c.Status == metav1.ConditionTrue,
		fmt.Sprintf("generation %d, condition %+v", policy.Metadata.Generation, c)
}

// clusterIPs are a Service's addresses, one of each family that it has.
func clusterIPs(t *testing.T, namespace, service string) []string {
	t.Helper()
	out, err := k8s.Kubectl(t.Context(), "get", "service", service, "-n", namespace, "-o", "jsonpath={.spec.clusterIPs[*]}")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(out)
}

// accepted waits until a route of the namespace mesh is accepted, its references are good and it is in force.
func accepted(t *testing.T, route string) {
	t.Helper()
	until(t, time.Minute, "route "+route+" to be in force", func() (bool, string) {
		out, err := k8s.Kubectl(t.Context(), "get", "httproute", route, "-n", "mesh", "-o", `jsonpath={range .status.parents[*].conditions[*]}{.type}={.status} {.reason} {.message}{"\n"}{end}`)
		return err == nil && strings.Contains(out, "Accepted=True") && strings.Contains(out, "ResolvedRefs=True") && strings.Contains(out, "Programmed=True"), out
	})
}

// logLine is a line of Envoy's access log.
type logLine struct {
	Kind, Direction, Time, Path, Method, Details, Flags, Chain, Remote, Destination, Peer, Local, Failure, Source string
	Status                                                                                                        any
}

// proxy is the nodeproxy pod of a node.
func proxy(t *testing.T, node string) string {
	t.Helper()
	pods, err := k8s.Pods(t.Context(), system, "app=weft-nodeproxy")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		if p.Node == node && !p.Deleting {
			return p.Name
		}
	}
	t.Fatalf("no nodeproxy on %s", node)
	return ""
}

// accessLog reads what a node's Envoy logged since.
func accessLog(t *testing.T, node string, since time.Time) []logLine {
	t.Helper()
	out, err := k8s.Kubectl(t.Context(), "logs", "-n", system, proxy(t, node), "-c", "envoy", "--since-time", since.UTC().Format(time.RFC3339Nano))
	if err != nil {
		t.Fatal(err)
	}
	var lines []logLine
	for raw := range strings.Lines(out) {
		if l, ok := readLine([]byte(raw)); ok {
			lines = append(lines, l)
		}
	}
	return lines
}

func readLine(raw []byte) (l logLine, ok bool) {
	return l, json.Unmarshal(raw, &l) == nil && l.Direction != ""
}

// followed are the lines that both nodes' Envoys have logged since, but those of the shops, which are many.
type followed struct {
	mu    sync.Mutex
	lines []nodeLine
}

type nodeLine struct {
	logLine
	node string
}

func follow(t *testing.T) *followed {
	t.Helper()
	f := &followed{}
	stop, err := k8s.FollowEnvoys(t.Context(), system, func(node string, raw []byte) {
		if bytes.Contains(raw, []byte("/ns/shop/")) || bytes.Contains(raw, []byte("/ns/"+till+"/")) {
			return
		}
		if l, ok := readLine(raw); ok {
			f.mu.Lock()
			f.lines = append(f.lines, nodeLine{l, node})
			f.mu.Unlock()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return f
}

// since returns the lines after the first so many, and how many there are in all.
func (f *followed) since(first int) ([]nodeLine, int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.lines[first:]), len(f.lines)
}

// admin asks a node's Envoy by its admin socket, which only the node's root reaches.
func admin(t *testing.T, node, path string) string {
	t.Helper()
	out, err := k8s.Admin(t.Context(), node, path)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// machine is a node as the test's host sees it.
func machine(t *testing.T, node string) cluster.Node {
	t.Helper()
	for _, n := range k8s.Nodes {
		if n.Name == node {
			return n
		}
	}
	t.Fatalf("no node %s", node)
	return cluster.Node{}
}
