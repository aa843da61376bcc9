package resolve

import (
	"cmp"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

var update = flag.Bool("update", false, "rewrite golden files")

func ptr[T any](v T) *T { return &v }

// born gives objects ages: the smaller, the older.
func born(o metav1.Object, minute int) {
	o.SetCreationTimestamp(metav1.NewTime(time.Date(2026, 1, 1, 0, minute, 0, 0, time.UTC)))
}

// world is an Input with namespaces shop (in the mesh) and other (not).
func world(objects ...any) Input {
	in := Input{Namespace: "weft-system", TrustDomain: "cluster.local", Decisions: map[string]Decision{}}
	in.Namespaces = []*corev1.Namespace{
		{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{names.LabelMesh: names.MeshEnabled}}},
		{ObjectMeta: metav1.ObjectMeta{Name: "other"}},
		{ObjectMeta: metav1.ObjectMeta{Name: "kube-system"}},
	}
	for _, o := range objects {
		switch o := o.(type) {
		case *corev1.Namespace: // in the place of the one of its name
			in.Namespaces = slices.DeleteFunc(in.Namespaces, func(n *corev1.Namespace) bool { return n.Name == o.Name })
			in.Namespaces = append(in.Namespaces, o)
		case *corev1.Pod:
			in.Pods = append(in.Pods, o)
		case *corev1.Service:
			in.Services = append(in.Services, o)
		case *discoveryv1.EndpointSlice:
			in.EndpointSlices = append(in.EndpointSlices, o)
		case *gwv1.HTTPRoute:
			in.HTTPRoutes = append(in.HTTPRoutes, o)
		case *gwv1.GRPCRoute:
			in.GRPCRoutes = append(in.GRPCRoutes, o)
		case *gwv1.ReferenceGrant:
			in.ReferenceGrants = append(in.ReferenceGrants, o)
		case *v1alpha1.AuthenticationPolicy:
			in.AuthenticationPolicies = append(in.AuthenticationPolicies, o)
		case *v1alpha1.AccessPolicy:
			in.AccessPolicies = append(in.AccessPolicies, o)
		case *v1alpha1.MeshConfig:
			in.MeshConfig = o
		case map[string]Decision:
			maps.Copy(in.Decisions, o)
		default:
			panic(fmt.Sprintf("world: %T", o))
		}
	}
	return in
}

// meta names an object "namespace/name", shop being the default namespace; its uid is the same text.
func meta(name string) metav1.ObjectMeta {
	namespace, short, ok := strings.Cut(name, "/")
	if !ok {
		namespace, short = "shop", name
	}
	return metav1.ObjectMeta{Namespace: namespace, Name: short, UID: types.UID(namespace + "/" + short), Generation: 1}
}

func pod(name, address string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: meta(name)}
	p.Labels = map[string]string{"app": strings.Split(p.Name, "-")[0]}
	p.Spec.NodeName, p.Spec.ServiceAccountName, p.Status.Phase = "node-1", strings.Split(p.Name, "-")[0], corev1.PodRunning
	for _, a := range strings.Fields(address) {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a})
	}
	for _, f := range change {
		f(p)
	}
	return p
}

// in says that pods are enforced and spoken to by mTLS.
func in(pods ...string) map[string]Decision {
	out := map[string]Decision{}
	for _, p := range pods {
		out[string(meta(p).UID)] = Decision{Stage: ir.Enforced, MTLS: true, Policy: "acked"}
	}
	return out
}

// lost says that pods were in the mesh and that their node no longer says so.
func lost(p string) map[string]Decision {
	return map[string]Decision{string(meta(p).UID): {Stage: ir.Captured, Lost: true}}
}

// service has ports written "name:80>8080", the target being optional.
func service(name, addresses string, ports string, change ...func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{ObjectMeta: meta(name)}
	s.Spec.Selector = map[string]string{"app": s.Name}
	s.Spec.ClusterIPs = strings.Fields(addresses)
	for _, text := range strings.Fields(ports) {
		var p corev1.ServicePort
		name, numbers, _ := strings.Cut(text, ":")
		p.Name = name
		if n, err := fmt.Sscanf(numbers, "%d>%d", &p.Port, &p.TargetPort.IntVal); n == 0 {
			panic(err)
		}
		s.Spec.Ports = append(s.Spec.Ports, p)
	}
	for _, f := range change {
		f(s)
	}
	return s
}

// slice is the endpoint controller's own unless changed; ports are written "name:8080", addresses may end in "!" (not
// ready) or "~" (terminating, still serving).
func slice(service, ports, addresses string, change ...func(*discoveryv1.EndpointSlice)) *discoveryv1.EndpointSlice {
	e := &discoveryv1.EndpointSlice{ObjectMeta: meta(service + "-x"), AddressType: discoveryv1.AddressTypeIPv4}
	e.Labels = map[string]string{discoveryv1.LabelServiceName: meta(service).Name, discoveryv1.LabelManagedBy: endpointSliceController}
	for _, text := range strings.Fields(ports) {
		name, number, _ := strings.Cut(text, ":")
		var n int32
		if _, err := fmt.Sscan(number, &n); err != nil {
			panic(err)
		}
		e.Ports = append(e.Ports, discoveryv1.EndpointPort{Name: &name, Port: &n})
	}
	for _, a := range strings.Fields(addresses) {
		one := discoveryv1.Endpoint{Addresses: []string{strings.TrimRight(a, "!~")}, Conditions: discoveryv1.EndpointConditions{Ready: ptr(!strings.ContainsAny(a, "!~"))}}
		one.Conditions.Serving = ptr(strings.HasSuffix(a, "~") || *one.Conditions.Ready)
		e.Endpoints = append(e.Endpoints, one)
	}
	for _, f := range change {
		f(e)
	}
	return e
}

func byHand(e *discoveryv1.EndpointSlice) { delete(e.Labels, discoveryv1.LabelManagedBy) }

func parent(name string) gwv1.ParentReference {
	m := meta(name)
	return gwv1.ParentReference{Group: ptr(gwv1.Group("")), Kind: ptr(gwv1.Kind("Service")), Namespace: ptr(gwv1.Namespace(m.Namespace)), Name: gwv1.ObjectName(m.Name)}
}

// ref is a backendRef "namespace/name:port*weight"; without a namespace the route's own is meant.
func ref(text string) gwv1.BackendRef {
	var b gwv1.BackendRef
	rest, weight, ok := strings.Cut(text, "*")
	if ok {
		b.Weight = new(int32)
		if _, err := fmt.Sscan(weight, b.Weight); err != nil {
			panic(err)
		}
	}
	rest, port, ok := strings.Cut(rest, ":")
	if ok {
		b.Port = new(gwv1.PortNumber)
		if _, err := fmt.Sscan(port, b.Port); err != nil {
			panic(err)
		}
	}
	if namespace, name, ok := strings.Cut(rest, "/"); ok {
		b.Namespace, rest = ptr(gwv1.Namespace(namespace)), name
	}
	b.Name = gwv1.ObjectName(rest)
	return b
}

func path(kind gwv1.PathMatchType, value string) gwv1.HTTPRouteMatch {
	return gwv1.HTTPRouteMatch{Path: &gwv1.HTTPPathMatch{Type: &kind, Value: &value}}
}

func rule(matches []gwv1.HTTPRouteMatch, refs string, filters ...gwv1.HTTPRouteFilter) gwv1.HTTPRouteRule {
	r := gwv1.HTTPRouteRule{Matches: matches, Filters: filters}
	for _, text := range strings.Fields(refs) {
		r.BackendRefs = append(r.BackendRefs, gwv1.HTTPBackendRef{BackendRef: ref(text)})
	}
	return r
}

func httpRoute(name, to string, rules ...gwv1.HTTPRouteRule) *gwv1.HTTPRoute {
	r := &gwv1.HTTPRoute{ObjectMeta: meta(name)}
	r.Spec.ParentRefs, r.Spec.Rules = []gwv1.ParentReference{parent(to)}, rules
	return r
}

func grpcRoute(name, to string, rules ...gwv1.GRPCRouteRule) *gwv1.GRPCRoute {
	r := &gwv1.GRPCRoute{ObjectMeta: meta(name)}
	r.Spec.ParentRefs, r.Spec.Rules = []gwv1.ParentReference{parent(to)}, rules
	return r
}

func authentication(name string, mode v1alpha1.MTLSMode, change ...func(*v1alpha1.AuthenticationPolicy)) *v1alpha1.AuthenticationPolicy {
	p := &v1alpha1.AuthenticationPolicy{ObjectMeta: meta(name)}
	if mode != "" {
		p.Spec.MTLS = &v1alpha1.MTLS{Mode: mode}
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func access(name string, action v1alpha1.AccessAction, rules ...v1alpha1.AccessRule) *v1alpha1.AccessPolicy {
	p := &v1alpha1.AccessPolicy{ObjectMeta: meta(name)}
	p.Spec.Action, p.Spec.Rules = action, rules
	return p
}

func from(account string, to ...v1alpha1.Operation) v1alpha1.AccessRule {
	return v1alpha1.AccessRule{From: []v1alpha1.Source{{ServiceAccounts: []v1alpha1.ServiceAccountRef{{Name: account}}}}, To: to}
}

func port(n int) intstr.IntOrString { return intstr.FromInt(n) }

// describe writes a result as text that a person can check.
func describe(r *Result) string {
	var b strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	s := r.Snapshot
	for _, name := range slices.Sorted(maps.Keys(s.Namespaces)) {
		if n := s.Namespaces[name]; n.Enrol && name != "shop" {
			line("namespace %s joins", name)
		}
	}
	for _, key := range slices.SortedFunc(maps.Keys(s.Services), byName) {
		service := s.Services[key]
		line("service %s %v", key, service.Addresses)
		for _, p := range service.Ports {
			line("  port %d %s", p.Key.Port, portText(p))
			for _, e := range p.Endpoints {
				line("    -> %s", endpointText(e))
			}
			for _, x := range p.Routes {
				line("    %s", routeText(x))
			}
		}
	}
	for _, at := range slices.SortedFunc(maps.Keys(s.Owners), netip.AddrPort.Compare) {
		line("owner %s: %s port %d", at, s.Owners[at].Service, s.Owners[at].Port)
	}
	for _, uid := range slices.Sorted(maps.Keys(s.Pods)) {
		p := s.Pods[uid]
		owned := slices.DeleteFunc(slices.Clone(p.Addresses), func(a netip.Addr) bool { return s.PodsByAddress[a] != uid })
		line("pod %s goal %s owns %v%s", uid, [...]string{"out", "captured", "enforced"}[p.Goal], owned, podText(p))
		if policy := s.Policies[p.Policy]; policy != nil {
			line("  other ports: %s", policyText(policy.Default))
			for _, q := range policy.Ports {
				line("  port %d: %s", q.Port, policyText(q))
			}
		}
	}
	for _, p := range r.Problems {
		where := ""
		if p.Parent >= 0 {
			where = fmt.Sprintf(" parent %d", p.Parent)
		}
		line("problem %s %s/%s%s %s=%s %s: %s", p.Object.Kind, p.Object.Namespace, p.Object.Name, where, p.Type, p.Status, p.Reason, p.Message)
	}
	return b.String()
}

func byName(a, b ir.Key) int {
	return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
}

func portText(p *ir.ServicePort) string {
	out := [...]string{"", "http", "tcp", "auto"}[p.Class] + "/" + [...]string{"", "http1", "http2", "tcp", "server-first"}[p.Protocol]
	if p.Pass {
		out += " pass"
	}
	if p.Affinity > 0 {
		out += " affinity " + p.Affinity.String()
	}
	if p.LocalOnly {
		out += " local"
	}
	return out
}

func endpointText(e *ir.Endpoint) string {
	out := e.Address.String() + " " + [...]string{"", "plain", "mtls", "refuse"}[e.Transport]
	if e.Identity != "" {
		out += " " + e.Identity
	}
	switch {
	case e.Ready:
	case e.Serving:
		out += " (terminating, serving)"
	default:
		out += " (not ready)"
	}
	return out
}

func matchText(m *ir.StringMatch) string {
	return [...]string{"", "=", "^", "/^", "~", "?"}[m.Kind] + m.Value
}

func routeText(x *ir.Route) string {
	out := x.Source + ":"
	m := x.Match
	if m.SourceNamespace != "" {
		out += " for callers in " + m.SourceNamespace
	}
	if m.GRPC {
		out += " grpc"
	}
	if m.Path != nil {
		out += " path" + matchText(m.Path)
	}
	if m.Method != "" {
		out += " method=" + m.Method
	}
	for _, h := range m.Headers {
		out += " header " + h.Name + matchText(&h.StringMatch)
	}
	for _, q := range m.Query {
		out += " query " + q.Name + matchText(&q.StringMatch)
	}
	out += " ->"
	for _, b := range x.Backends {
		switch {
		case b.Status != 0:
			out += fmt.Sprintf(" status %d*%d", b.Status, b.Weight)
		default:
			out += fmt.Sprintf(" %s:%d*%d", b.Port.Service, b.Port.Port, b.Weight)
		}
		out += editText("request", b.RequestHeaders) + editText("response", b.ResponseHeaders)
	}
	if r := x.Redirect; r != nil {
		out += fmt.Sprintf(" redirect %d %s://%s:%d", r.Status, r.Scheme, r.Hostname, r.Port) + modText(r.Path, r.PrefixPath)
	}
	if r := x.Rewrite; r != nil {
		out += " rewrite host " + r.Hostname + modText(r.Path, r.PrefixPath)
	}
	out += editText("request", x.RequestHeaders) + editText("response", x.ResponseHeaders)
	if x.Timeout != nil {
		out += " timeout " + x.Timeout.String()
	}
	if x.BackendTimeout != nil {
		out += " try " + x.BackendTimeout.String()
	}
	return out
}

func modText(full, prefix *string) string {
	switch {
	case full != nil:
		return " path " + *full
	case prefix != nil:
		return " prefix " + *prefix
	}
	return ""
}

func editText(what string, e ir.HeaderEdit) string {
	if len(e.Set)+len(e.Add)+len(e.Remove) == 0 {
		return ""
	}
	return fmt.Sprintf(" %s headers set%v add%v remove%v", what, e.Set, e.Add, e.Remove)
}

func podText(p *ir.Pod) string {
	out := ""
	if p.Strict {
		out += " strict"
	}
	if p.Shortcut {
		out += " shortcut"
	}
	if len(p.ProbePorts) > 0 {
		out += fmt.Sprintf(" probes %v", p.ProbePorts)
	}
	if len(p.ServerFirstPorts) > 0 {
		out += fmt.Sprintf(" server-first %v", p.ServerFirstPorts)
	}
	return out
}

func policyText(p ir.PortPolicy) string {
	out := [...]string{"", "permissive", "strict"}[p.Mode]
	if p.HTTP {
		out += " http"
	}
	if p.Closed {
		out += " closed"
	}
	rules := func(what string, l []ir.Rule) {
		for _, x := range l {
			out += " " + what + " " + x.Name + "("
			for _, peer := range x.Peers {
				out += strings.TrimPrefix(cmp.Or(peer.ID, peer.Prefix+"*"), "spiffe://cluster.local/ns/") + " "
			}
			for _, q := range x.Requests {
				out += fmt.Sprintf("%v", q.Methods)
				for _, m := range q.Paths {
					out += " path" + matchText(&m)
				}
				for _, h := range q.Headers {
					out += " header " + h.Name + matchText(&h.StringMatch)
				}
			}
			out = strings.TrimSpace(out) + ")"
		}
	}
	rules("deny", p.Deny)
	if p.Restricted {
		out += " only"
	}
	rules("allow", p.Allow)
	return out
}

// golden compares cases' results with testdata/<file>.txt, one section each.
func golden(t *testing.T, file string, cases []goldenCase) {
	t.Helper()
	name := filepath.Join("testdata", file+".txt")
	var all strings.Builder
	want := map[string]string{}
	content, err := os.ReadFile(name)
	if err != nil && !*update {
		t.Fatal(err)
	}
	for _, section := range strings.Split(string(content), "== ")[1:] {
		title, body, _ := strings.Cut(section, "\n")
		want[title] = strings.TrimSuffix(body, "\n")
	}
	for _, c := range cases {
		var got string
		t.Run(c.name, func(t *testing.T) {
			result := Resolve(nil, world(c.before...))
			if c.before == nil {
				result = nil
			}
			got = describe(Resolve(result, world(c.objects...)))
			if !*update && got != want[c.name] {
				t.Errorf("got, against %s:\n%s", name, gocmp.Diff(want[c.name], got))
			}
		})
		fmt.Fprintf(&all, "== %s\n%s\n", c.name, got)
		delete(want, c.name)
	}
	if *update {
		if err := os.WriteFile(name, []byte(all.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if f := flag.Lookup("test.run"); strings.Contains(f.Value.String(), "/") {
		return // only some cases ran
	}
	for title := range want {
		t.Errorf("no case makes section %q of %s: run go test -update to remove it", title, name)
	}
}

type goldenCase struct {
	name string
	// before, if any, are resolved first, and the objects after them.
	before, objects []any
}
