package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/weftmesh/weft/api/names"
)

// kind is one kind of objects that carry conditions of weft.
type kind struct {
	name       string
	resource   schema.GroupVersionResource
	conditions []string
	// cluster: it has no namespace, and concerns all of them.
	cluster bool
	// always: the controller speaks of every object of the kind, not only of those that have to do with the mesh.
	always bool
}

// kinds in the order in which they are shown.
var kinds = []kind{
	{name: "Pod", resource: schema.GroupVersionResource{Version: "v1", Resource: "pods"}, conditions: []string{names.ConditionEnrolled, names.ConditionEnforced, names.ConditionShortcut}},
	{name: "Service", resource: schema.GroupVersionResource{Version: "v1", Resource: "services"}, conditions: []string{names.Group + "/Captured"}},
	{name: "MeshConfig", resource: weft("meshconfigs"), conditions: []string{"Accepted", "Programmed"}, cluster: true, always: true},
	{name: "AuthenticationPolicy", resource: weft("authenticationpolicies"), conditions: []string{"Accepted", "Programmed"}, always: true},
	{name: "AccessPolicy", resource: weft("accesspolicies"), conditions: []string{"Accepted", "Programmed"}, always: true},
	{name: "HTTPRoute", resource: gateway("httproutes"), conditions: []string{"Accepted", "ResolvedRefs", "Programmed"}},
	{name: "GRPCRoute", resource: gateway("grpcroutes"), conditions: []string{"Accepted", "ResolvedRefs", "Programmed"}},
}

func weft(resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: names.Group, Version: "v1alpha1", Resource: resource}
}

func gateway(resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "gateway.networking.k8s.io", Version: "v1", Resource: resource}
}

// line is one object.
type line struct {
	kind, namespace, name, node string
	// good: all of its conditions are True; else why says which is not.
	good bool
	why  string
}

type status struct {
	lines []line
	wrong int
	// leader tells which replica of the controller leads; empty: its Lease cannot be read.
	leader string
}

// leads tells who holds the Lease of weft's namespace.
func leads(ctx context.Context, client dynamic.Interface, system string, now time.Time) string {
	lease, err := client.Resource(schema.GroupVersionResource{Group: "coordination.k8s.io", Version: "v1", Resource: "leases"}).Namespace(system).Get(ctx, "weft-controlplane", metav1.GetOptions{})
	if err != nil {
		return ""
	}
	holder, _, _ := unstructured.NestedString(lease.Object, "spec", "holderIdentity")
	text, _, _ := unstructured.NestedString(lease.Object, "spec", "renewTime")
	life, _, _ := unstructured.NestedInt64(lease.Object, "spec", "leaseDurationSeconds")
	renewed, err := time.Parse(time.RFC3339, text)
	if holder == "" || err != nil || now.Sub(renewed) > time.Duration(life)*time.Second+clockSkew {
		return "no replica of the controller leads: what is known goes on, and nothing changes"
	}
	pod, _, _ := strings.Cut(holder, "_")
	return pod + " leads"
}

// clockSkew is how much this machine's clock may differ from the controller's.
const clockSkew = 10 * time.Second

// read collects every object that has to do with the mesh. Kinds that are not installed are left out.
func read(ctx context.Context, client dynamic.Interface, namespace string) (*status, error) {
	s := &status{}
	for _, k := range kinds {
		in := namespace
		if k.cluster {
			in = ""
		}
		list, err := client.Resource(k.resource).Namespace(in).List(ctx, metav1.ListOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", k.resource.Resource, err)
		}
		for _, o := range list.Items {
			l, concerned := judge(k, o)
			if !concerned {
				continue
			}
			s.lines = append(s.lines, l)
			if !l.good {
				s.wrong++
			}
		}
	}
	return s, nil
}

// judge tells what an object's conditions say. A pod, a Service or a route that weft has not spoken of is not concerned, nor
// is a pod that has left.
func judge(k kind, o unstructured.Unstructured) (line, bool) {
	l := line{kind: k.name, namespace: o.GetNamespace(), name: o.GetName(), good: true}
	l.node, _, _ = unstructured.NestedString(o.Object, "spec", "nodeName")
	conditions, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	parents, _, _ := unstructured.NestedSlice(o.Object, "status", "parents")
	for _, raw := range parents {
		if p, ok := raw.(map[string]any); ok && p["controllerName"] == names.Group+"/controlplane" {
			own, _, _ := unstructured.NestedSlice(p, "conditions")
			conditions = append(conditions, own...)
		}
	}
	seen := 0
	for _, name := range k.conditions {
		for _, raw := range conditions {
			c, ok := raw.(map[string]any)
			if !ok || c["type"] != name || c["reason"] == names.ReasonOff {
				continue
			}
			seen++
			if c["reason"] == "Withdrawn" {
				return l, false
			}
			if c["status"] != "True" && l.good {
				l.good, l.why = false, fmt.Sprintf("%s: %v, %v", name, c["reason"], c["message"])
			}
		}
	}
	if seen == 0 && k.always {
		l.good, l.why = false, "the controller has not spoken of it: see that weft-controlplane runs"
		return l, true
	}
	return l, seen > 0
}

func (s *status) print(out io.Writer) {
	if s.leader != "" {
		defer fmt.Fprintln(out, s.leader)
	}
	if len(s.lines) == 0 {
		fmt.Fprintln(out, "nothing here has to do with the mesh: label a namespace or pod "+names.LabelMesh+"="+names.MeshEnabled)
		return
	}
	t := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "KIND\tNAMESPACE\tNAME\tNODE\tIN FORCE\tWHY NOT")
	for _, l := range s.lines {
		state := "yes"
		if !l.good {
			state = "no"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", l.kind, l.namespace, l.name, l.node, state, l.why)
	}
	_ = t.Flush()
}

func plural(n int, one, many string) string {
	if n == 1 {
		return fmt.Sprintf("%d %s", n, one)
	}
	return fmt.Sprintf("%d %s", n, many)
}
