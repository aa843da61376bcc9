package resolve

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

type objects = []any

func ranges(cidrs ...string) *v1alpha1.MeshConfig {
	return &v1alpha1.MeshConfig{ObjectMeta: metav1.ObjectMeta{Name: "default"}, Spec: v1alpha1.MeshConfigSpec{ServiceAddressRanges: cidrs}}
}

func younger(s *corev1.Service) { born(s, 9) }

func TestServices(t *testing.T) {
	web := service("web", "10.96.0.1", "http:80>8080")
	golden(t, "services", []goldenCase{
		{name: "ClusterIP with a pod in the mesh", objects: objects{web, slice("web", "http:8080", "10.0.0.1"), pod("web-1", "10.0.0.1"), in("web-1")}},
		{name: "nobody needs the port, so it passes", objects: objects{web, slice("web", "http:8080", "10.0.0.1"), pod("web-1", "10.0.0.1")}},
		{name: "headless", objects: objects{service("db", "None", "mysql:3306"), slice("db", "mysql:3306", "10.0.0.1"), pod("db-1", "10.0.0.1"), in("db-1")}},
		{name: "dual stack", objects: objects{service("web", "10.96.0.1 fd00::1", "http:80"), slice("web", "http:80", "10.0.0.1"),
			slice("web", "http:80", "fd01::1", func(e *discoveryv1.EndpointSlice) { e.AddressType = discoveryv1.AddressTypeIPv6 }), pod("web-1", "10.0.0.1 fd01::1"), in("web-1")}},
		{name: "ExternalName has no address and no endpoint", objects: objects{service("ext", "", "http:80", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName })}},
		{name: "selectorless with a hand-made slice", objects: objects{service("legacy", "10.96.0.1", "http:80", func(s *corev1.Service) { s.Spec.Selector = nil }),
			slice("legacy", "http:8080", "192.0.2.10", byHand)}},
		{name: "FQDN slices are no endpoints", objects: objects{web, slice("web", "http:80", "example.com", func(e *discoveryv1.EndpointSlice) { e.AddressType = discoveryv1.AddressTypeFQDN })}},
		{name: "protocols by appProtocol, by name, or none", objects: objects{service("all", "10.96.0.1", "http-a:1 grpc-b:2 redis:3 x:4 y:5 smtp:6 z:7", func(s *corev1.Service) {
			s.Spec.Ports[4].AppProtocol, s.Spec.Ports[6].AppProtocol = ptr("kubernetes.io/h2c"), ptr("example.com/own")
		})}},
		{name: "UDP ports are left alone", objects: objects{service("dns", "10.96.0.10", "dns:53 dns-tcp:53", func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolUDP })}},
		{name: "affinity and internalTrafficPolicy", objects: objects{service("web", "10.96.0.1", "http:80", func(s *corev1.Service) {
			s.Spec.SessionAffinity, s.Spec.InternalTrafficPolicy = corev1.ServiceAffinityClientIP, ptr(corev1.ServiceInternalTrafficPolicyLocal)
			s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr(int32(90))}}
		})}},
		{name: "externalIPs and load balancer addresses inside the ranges only", objects: objects{ranges("192.0.2.0/24"), service("web", "10.96.0.1", "http:80", func(s *corev1.Service) {
			s.Spec.ExternalIPs = []string{"192.0.2.1", "198.51.100.1"}
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.2"}, {IP: "8.8.8.8"}, {Hostname: "lb.example.com"}}
		})}},
		{name: "no ranges, no external address", objects: objects{service("web", "10.96.0.1", "http:80", func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"192.0.2.1"} })}},
		{name: "an externalIP that is a ClusterIP, on any port, stays its owner's", objects: objects{ranges("0.0.0.0/0"), web,
			service("thief", "10.96.0.2", "http:80 other:81", func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"10.96.0.1"} }),
			service("thief2", "10.96.0.3", "http:8443", func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"10.96.0.1"} })}},
		{name: "an externalIP that is a pod's address stays the pod's", objects: objects{ranges("0.0.0.0/0"), pod("web-1", "10.0.0.1"),
			service("thief", "10.96.0.2", "http:80", func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"10.0.0.1"} })}},
		{name: "of two externalIPs the older Service's counts", objects: objects{ranges("192.0.2.0/24"),
			service("a", "10.96.0.2", "http:80", younger, func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"192.0.2.1"} }),
			service("b", "10.96.0.3", "http:80", func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"192.0.2.1"} })}},
		{name: "of two of one age the name decides", objects: objects{ranges("192.0.2.0/24"),
			service("b", "10.96.0.3", "http:80", func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"192.0.2.1"} }),
			service("a", "10.96.0.2", "http:80", func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"192.0.2.1"} })}},
		{name: "a hand-made slice cannot name another namespace's pod", objects: objects{pod("web-1", "10.0.0.1"), in("web-1"),
			service("other/bait", "10.96.0.9", "http:80 more:81"), slice("other/bait", "http:8080 more:8080", "10.0.0.1 192.0.2.1", byHand)}},
		{name: "nor can one that says it is the endpoint controller's", objects: objects{pod("web-1", "10.0.0.1"), in("web-1"),
			service("other/bait", "10.96.0.9", "http:80"), slice("other/bait", "http:8080", "10.0.0.1")}},
		{name: "a hand-made slice may name a pod of its own namespace", objects: objects{pod("web-1", "10.0.0.1"), in("web-1"), web, slice("web", "http:8080", "10.0.0.1", byHand)}},
		{name: "terminating endpoints and one that two slices name", objects: objects{web, slice("web", "http:8080", "10.0.0.1! 10.0.0.2~ 10.0.0.3"), slice("web", "http:8080", "10.0.0.1 10.0.0.3!")}},
		{name: "a Strict pod that its node lost is refused, a Permissive one is not", objects: objects{
			web, slice("web", "http:8080", "10.0.0.1"), pod("web-1", "10.0.0.1"), lost("web-1"), authentication("strict", v1alpha1.Strict, target("web")),
			service("api", "10.96.0.2", "http:80"), slice("api", "http:80", "10.0.0.2"), pod("api-1", "10.0.0.2"), lost("api-1")}},
	})
}

func target(service string) func(*v1alpha1.AuthenticationPolicy) {
	return func(p *v1alpha1.AuthenticationPolicy) {
		p.Spec.TargetRefs = []v1alpha1.TargetRef{{Kind: "Service", Name: service}}
	}
}

func label(value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Labels[names.LabelMesh] = value }
}

func sockmap(value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Labels[names.LabelSockmap] = value }
}

func enrolment(e v1alpha1.Enrolment) *v1alpha1.MeshConfig {
	return &v1alpha1.MeshConfig{ObjectMeta: metav1.ObjectMeta{Name: "default"}, Spec: v1alpha1.MeshConfigSpec{Enrolment: e}}
}

func TestPods(t *testing.T) {
	apps := func(app string) *v1alpha1.LabelSelector {
		return &v1alpha1.LabelSelector{MatchLabels: map[string]v1alpha1.LabelValue{"app": v1alpha1.LabelValue(app)}}
	}
	golden(t, "pods", []goldenCase{
		{name: "the namespace's label, the pod's label", objects: objects{pod("web-1", "10.0.0.1"), pod("off-1", "10.0.0.2", label("disabled")), pod("other/on-1", "10.0.0.3", label("enabled")), pod("other/x-1", "10.0.0.4")}},
		{name: "the short circuit: the namespace's label, the pod's label", objects: objects{
			&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{names.LabelMesh: "enabled", names.LabelSockmap: "enabled"}}},
			pod("web-1", "10.0.0.1"), pod("off-1", "10.0.0.2", sockmap("disabled")), pod("other/on-1", "10.0.0.3", label("enabled"), sockmap("enabled")), pod("other/x-1", "10.0.0.4", label("enabled"))}},
		{name: "opting out forbidden", objects: objects{enrolment(v1alpha1.Enrolment{PodOptOut: v1alpha1.OptOutForbidden}), pod("off-1", "10.0.0.1", label("disabled")), pod("other/off-1", "10.0.0.2", label("disabled"))}},
		{name: "mode All", objects: objects{enrolment(v1alpha1.Enrolment{Mode: v1alpha1.EnrolAll}), pod("web-1", "10.0.0.1"), pod("other/x-1", "10.0.0.2"), pod("other/off-1", "10.0.0.3", label("disabled"))}},
		{name: "mode All with selectors, labels win", objects: objects{enrolment(v1alpha1.Enrolment{Mode: v1alpha1.EnrolAll, PodSelector: apps("x"), NamespaceSelector: &v1alpha1.LabelSelector{}}),
			pod("web-1", "10.0.0.1"), pod("other/x-1", "10.0.0.2"), pod("other/y-1", "10.0.0.3"), pod("other/z-1", "10.0.0.4", label("enabled"))}},
		{name: "mode All and a namespace that is not known yet", objects: objects{enrolment(v1alpha1.Enrolment{Mode: v1alpha1.EnrolAll}), pod("new/x-1", "10.0.0.1")}},
		{name: "a selector that cannot be read selects nobody", objects: objects{enrolment(v1alpha1.Enrolment{Mode: v1alpha1.EnrolAll, PodSelector: &v1alpha1.LabelSelector{MatchExpressions: []v1alpha1.LabelRequirement{{Key: "a", Operator: "Like"}}}}), pod("other/x-1", "10.0.0.1")}},
		{name: "mode Off", objects: objects{enrolment(v1alpha1.Enrolment{Mode: v1alpha1.EnrolOff}), pod("web-1", "10.0.0.1", label("enabled"))}},
		{name: "kube-system and weft's own namespace never join", objects: objects{enrolment(v1alpha1.Enrolment{Mode: v1alpha1.EnrolAll}), pod("kube-system/dns-1", "10.0.0.1", label("enabled")), pod("weft-system/x-1", "10.0.0.2", label("enabled"))}},
		{name: "hostNetwork pods own nothing", objects: objects{pod("host-1", "172.18.0.2", label("enabled"), func(p *corev1.Pod) { p.Spec.HostNetwork = true }), pod("quiet-1", "172.18.0.2", func(p *corev1.Pod) { p.Spec.HostNetwork = true })}},
		{name: "finished and unscheduled pods own nothing", objects: objects{
			pod("done-1", "10.0.0.1", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }), pod("failed-1", "10.0.0.2", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }),
			pod("new-1", "", func(p *corev1.Pod) { p.Spec.NodeName = "" })}},
		{name: "an address goes from a finished pod to the next", objects: objects{pod("done-1", "10.0.0.1", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }), pod("next-1", "10.0.0.1")}},
		{name: "a contested address has no owner and is not spoken to in plaintext", objects: objects{pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.1"), pod("web-3", "10.0.0.3"), in("web-1", "web-3"),
			service("web", "10.96.0.1", "http:80"), slice("web", "http:80", "10.0.0.1 10.0.0.3")}},
		{name: "an address that a hostNetwork pod has too", objects: objects{pod("web-1", "10.0.0.1"), in("web-1"), pod("node-1", "10.0.0.1", func(p *corev1.Pod) { p.Spec.HostNetwork = true })}},
		{name: "a pod without address", objects: objects{pod("web-1", "")}},
		{name: "ports that kubelet dials", objects: objects{pod("web-1", "10.0.0.1", func(p *corev1.Pod) {
			p.Spec.InitContainers = []corev1.Container{{StartupProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 9000}}}}}
			p.Spec.Containers = []corev1.Container{{
				Ports:          []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}},
				LivenessProbe:  &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: portNamed("web")}}},
				ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: port(7000)}}},
				StartupProbe:   &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: port(1), Host: "192.0.2.1"}}},
				Lifecycle:      &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: port(8081)}}},
			}}
		})}},
		{name: "another trust domain than the controller's is refused", objects: objects{&v1alpha1.MeshConfig{ObjectMeta: metav1.ObjectMeta{Name: "default"}, Spec: v1alpha1.MeshConfigSpec{TrustDomain: "example.org"}}, pod("web-1", "10.0.0.1")}},
	})
}

func TestClientAddress(t *testing.T) {
	for setting, own := range map[v1alpha1.ClientAddress]bool{"": false, v1alpha1.ClientAddressPreserve: false, v1alpha1.ClientAddressOwn: true} {
		w := world(&v1alpha1.MeshConfig{ObjectMeta: metav1.ObjectMeta{Name: "default"}, Spec: v1alpha1.MeshConfigSpec{ClientAddress: setting}})
		if got := Resolve(nil, w).Snapshot.Mesh.OwnClientAddress; got != own {
			t.Errorf("clientAddress %q: apps see their own address: %v", setting, got)
		}
	}
}

func TestUninstallOrdersEveryPodOut(t *testing.T) {
	w := world(pod("web-1", "10.0.0.1"), in("web-1"))
	w.UninstallOrder = &corev1.ConfigMap{Data: map[string]string{names.UninstallKey: "true"}}
	s := Resolve(nil, w).Snapshot
	if !s.Mesh.Uninstall || s.Pods["shop/web-1"].Goal != ir.Out {
		t.Errorf("uninstall: mesh %+v, pod %+v", s.Mesh, s.Pods["shop/web-1"])
	}
}

// Equal objects in another order make equal text, and what did not change is the same pointer.
func TestOrderDoesNotMatter(t *testing.T) {
	w := world(shop()...)
	first := Resolve(nil, w)
	for range 20 {
		rand.Shuffle(len(w.Pods), func(i, j int) { w.Pods[i], w.Pods[j] = w.Pods[j], w.Pods[i] })
		rand.Shuffle(len(w.Services), func(i, j int) { w.Services[i], w.Services[j] = w.Services[j], w.Services[i] })
		rand.Shuffle(len(w.EndpointSlices), func(i, j int) { w.EndpointSlices[i], w.EndpointSlices[j] = w.EndpointSlices[j], w.EndpointSlices[i] })
		rand.Shuffle(len(w.HTTPRoutes), func(i, j int) { w.HTTPRoutes[i], w.HTTPRoutes[j] = w.HTTPRoutes[j], w.HTTPRoutes[i] })
		rand.Shuffle(len(w.AccessPolicies), func(i, j int) { w.AccessPolicies[i], w.AccessPolicies[j] = w.AccessPolicies[j], w.AccessPolicies[i] })
		next := Resolve(first, w)
		if a, b := describe(first), describe(next); a != b {
			t.Fatalf("another order gives\n%s\nnot\n%s", b, a)
		}
		for key, s := range next.Snapshot.Services {
			if first.Snapshot.Services[key] != s {
				t.Errorf("service %s was made anew", key)
			}
		}
		for uid, p := range next.Snapshot.Pods {
			if first.Snapshot.Pods[uid] != p {
				t.Errorf("pod %s was made anew", uid)
			}
		}
	}
}

func shop() []any {
	exact := []gwv1.HTTPRouteMatch{path(gwv1.PathMatchExact, "/a")}
	twice := slice("web", "http:8080", "10.0.0.1 10.0.0.2!")
	return []any{
		service("web", "10.96.0.1", "http:80>8080"), service("web2", "10.96.0.2", "http:80>8080"),
		slice("web", "http:8080", "10.0.0.1! 10.0.0.2"), twice, pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.2"), pod("api-1", "10.0.0.3"), in("web-1"),
		httpRoute("a", "web", rule(exact, "web:80")), httpRoute("b", "web", rule(exact, "web2:80")),
		access("one", v1alpha1.Allow, from("api")), access("two", v1alpha1.Deny, from("web")),
	}
}

func TestOneChangeLeavesTheRest(t *testing.T) {
	first := Resolve(nil, world(shop()...))
	next := Resolve(first, world(append(shop(), pod("web-3", "10.0.0.9"), slice("web2", "http:8080", "10.0.0.9"))...))
	if first.Snapshot.Services[ir.Key{Namespace: "shop", Name: "web"}] != next.Snapshot.Services[ir.Key{Namespace: "shop", Name: "web"}] {
		t.Error("service web was made anew although only web2 changed")
	}
	if first.Snapshot.Services[ir.Key{Namespace: "shop", Name: "web2"}] == next.Snapshot.Services[ir.Key{Namespace: "shop", Name: "web2"}] {
		t.Error("service web2 did not change")
	}
}

func TestSPIFFEIDUsesTheDefaultAccount(t *testing.T) {
	p := pod("web-1", "10.0.0.1", func(p *corev1.Pod) { p.Spec.ServiceAccountName = "" })
	if got := Resolve(nil, world(p)).Snapshot.Pods["shop/web-1"].SPIFFEID; got != "spiffe://cluster.local/ns/shop/sa/default" {
		t.Errorf("SPIFFE ID %s", got)
	}
}

func TestDeletedPodEndsAfterItsGrace(t *testing.T) {
	ends := time.Date(2026, 1, 1, 0, 0, 30, 0, time.UTC)
	pods := Resolve(nil, world(pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.2", func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: ends} }))).Snapshot.Pods
	for _, c := range []struct {
		uid   string
		now   time.Time
		ended bool
	}{
		{"shop/web-1", ends.Add(time.Hour), false}, {"shop/web-2", ends.Add(-time.Second), false}, {"shop/web-2", ends, true},
	} {
		if pods[c.uid].Ended(c.now) != c.ended {
			t.Errorf("pod %s has ended at %s: %t, want %t", c.uid, c.now.Format(time.TimeOnly), !c.ended, c.ended)
		}
	}
}

func longRegex() string { return strings.Repeat("a", regexLimit+1) }

var second = gwv1.Duration("1s500ms")

func TestDurations(t *testing.T) {
	if d := duration(&second); d == nil || *d != 1500*time.Millisecond {
		t.Errorf("1s500ms is read as %v", d)
	}
	if d := duration(nil); d != nil {
		t.Errorf("no timeout is read as %v", *d)
	}
}

func external(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }
