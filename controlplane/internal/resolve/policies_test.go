package resolve

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weftmesh/weft/api/v1alpha1"
)

func selects(app string) func(*v1alpha1.AuthenticationPolicy) {
	return func(p *v1alpha1.AuthenticationPolicy) {
		p.Spec.Selector = &v1alpha1.LabelSelector{MatchLabels: map[string]v1alpha1.LabelValue{"app": v1alpha1.LabelValue(app)}}
	}
}

func onPort(n int32, mode v1alpha1.MTLSMode) func(*v1alpha1.AuthenticationPolicy) {
	return func(p *v1alpha1.AuthenticationPolicy) {
		p.Spec.Ports = append(p.Spec.Ports, v1alpha1.PortMTLS{Port: n, Mode: mode})
	}
}

func bornAt(minute int) func(*v1alpha1.AuthenticationPolicy) {
	return func(p *v1alpha1.AuthenticationPolicy) { born(p, minute) }
}

func TestAuthenticationPolicies(t *testing.T) {
	web, p := service("web", "10.96.0.1", "http:80>8080"), pod("web-1", "10.0.0.1")
	strict, permissive := v1alpha1.Strict, v1alpha1.Permissive
	mesh := &v1alpha1.MeshConfig{ObjectMeta: metav1.ObjectMeta{Name: "default"}, Spec: v1alpha1.MeshConfigSpec{MTLS: v1alpha1.MTLS{Mode: strict}}}
	broken := authentication("a", permissive)
	broken.Spec.Selector = unreadable()
	golden(t, "authentication", []goldenCase{
		{name: "none: Permissive", objects: objects{p}},
		{name: "MeshConfig's mode", objects: objects{mesh, p}},
		{name: "namespace", objects: objects{p, authentication("a", strict), pod("other/x-1", "10.0.0.2", label("enabled"))}},
		{name: "selector over namespace", objects: objects{p, authentication("a", strict), authentication("b", permissive, selects("web"))}},
		{name: "Service over selector, on its target port alone", objects: objects{p, web, authentication("b", permissive, selects("web")), authentication("c", strict, target("web"))}},
		{name: "port over Service", objects: objects{p, web, authentication("a", "", onPort(8080, permissive)), authentication("c", strict, target("web"))}},
		{name: "one port of a selector", objects: objects{p, authentication("a", strict, selects("web"), onPort(9090, permissive))}},
		{name: "a Service's policy names only ports that it sends to", objects: objects{p, web, authentication("c", "", target("web"), onPort(9090, strict), onPort(8080, strict))}},
		{name: "equally specific: the older wins", objects: objects{p, authentication("a", permissive, bornAt(5)), authentication("b", strict, bornAt(1))}},
		{name: "equally specific and old: the name decides", objects: objects{p, authentication("b", permissive), authentication("a", strict)}},
		{name: "target that does not exist", objects: objects{p, authentication("a", strict, target("gone"))}},
		{name: "target that has no selector", objects: objects{p, service("bare", "10.96.0.9", "http:80", func(s *corev1.Service) { s.Spec.Selector = nil }), authentication("a", strict, target("bare"))}},
		{name: "broken from the start: Strict", objects: objects{p, broken}},
		{name: "more than 64 KiB from the start: Strict", objects: objects{p, authentication("a", permissive, func(a *v1alpha1.AuthenticationPolicy) {
			a.Spec.Ports = make([]v1alpha1.PortMTLS, 4000)
		})}},
		{name: "broken later: the last good form stays", before: objects{p, authentication("a", strict)}, objects: objects{p, broken}},
		{name: "a Service with a named target port", objects: objects{authentication("c", strict, target("web")),
			service("web", "10.96.0.1", "http:80", func(s *corev1.Service) { s.Spec.Ports[0].TargetPort = portNamed("main") }),
			pod("web-1", "10.0.0.1", func(p *corev1.Pod) {
				p.Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "main", ContainerPort: 7777}}}}
			})}},
		{name: "a pod that leaves keeps its policy until it is out", objects: objects{pod("other/web-1", "10.0.0.1"), in("other/web-1"), authentication("other/a", strict)}},
	})
}

func unreadable() *v1alpha1.LabelSelector {
	return &v1alpha1.LabelSelector{MatchExpressions: []v1alpha1.LabelRequirement{{Key: "app", Operator: "Like", Values: []v1alpha1.LabelValue{"x"}}}}
}

func TestAccessPolicies(t *testing.T) {
	web := service("web", "10.96.0.1", "http:80>8080 redis:6379")
	p := pod("web-1", "10.0.0.1")
	allow, deny := v1alpha1.Allow, v1alpha1.Deny
	get := v1alpha1.Operation{Methods: []string{"GET"}}
	on := func(ports ...int32) v1alpha1.Operation { return v1alpha1.Operation{Ports: ports} }
	paths := v1alpha1.Operation{Paths: []v1alpha1.ValueMatch{{Value: "/a"}, {Type: v1alpha1.MatchPrefix, Value: "/b/"}, {Type: v1alpha1.MatchRegex, Value: "/c.*"}},
		Headers: []v1alpha1.HeaderMatch{{Name: "x-a"}, {Name: "x-b", Value: &v1alpha1.ValueMatch{Value: "1"}}}}
	invalid := v1alpha1.Operation{Paths: []v1alpha1.ValueMatch{{Type: v1alpha1.MatchRegex, Value: "("}}}
	targeted := func(a *v1alpha1.AccessPolicy, service string) *v1alpha1.AccessPolicy {
		a.Spec.TargetRefs = []v1alpha1.TargetRef{{Kind: "Service", Name: service}}
		return a
	}
	selected := func(a *v1alpha1.AccessPolicy, s *v1alpha1.LabelSelector) *v1alpha1.AccessPolicy {
		a.Spec.Selector = s
		return a
	}
	sources := v1alpha1.AccessRule{From: []v1alpha1.Source{{ServiceAccounts: []v1alpha1.ServiceAccountRef{{Name: "b", Namespace: "other"}, {Name: "a"}}}, {Namespaces: []string{"other"}}, {SPIFFEIDs: []string{"spiffe://cluster.local/ns/shop/sa/a", "spiffe://example.org/x"}}}}
	golden(t, "access", []goldenCase{
		{name: "none: everything goes", objects: objects{p, web}},
		{name: "L4 Allow on every port", objects: objects{p, web, access("a", allow, from("api"))}},
		{name: "L4 Deny", objects: objects{p, web, access("a", deny, from("api"))}},
		{name: "L7 Allow never matches on a port that carries bytes", objects: objects{p, web, access("a", allow, from("api", get))}},
		{name: "L7 Deny denies its peers on a port that carries bytes", objects: objects{p, web, access("a", deny, from("api", get))}},
		{name: "paths and headers", objects: objects{p, web, access("a", allow, from("api", paths))}},
		{name: "one port: others stay open", objects: objects{p, web, access("a", allow, from("api", on(8080)))}},
		{name: "L4 and L7 of one rule: any request", objects: objects{p, web, access("a", allow, from("api", get, on(8080)))}},
		{name: "Deny and Allow together: both are there, Deny first", objects: objects{p, web, access("a", allow, from("api")), access("b", deny, from("bad", get))}},
		{name: "two Allows add up", objects: objects{p, web, access("a", allow, from("api")), access("b", allow, from("till"))}},
		{name: "Allow without rules allows nothing", objects: objects{p, web, access("a", allow)}},
		{name: "Deny without rules denies nothing", objects: objects{p, web, access("a", deny)}},
		{name: "sources: accounts, namespaces, SPIFFE IDs, each once", objects: objects{p, web, access("a", allow, sources)}},
		{name: "a rule for everybody", objects: objects{p, web, access("a", allow, v1alpha1.AccessRule{To: []v1alpha1.Operation{get}})}},
		{name: "attached to a Service: its target ports", objects: objects{p, web, targeted(access("a", allow, from("api")), "web"), pod("api-1", "10.0.0.2")}},
		{name: "attached to a Service, naming a port it does not send to", objects: objects{p, web, targeted(access("a", allow, from("api", on(9090))), "web")}},
		{name: "selected pods", objects: objects{p, pod("api-1", "10.0.0.2"), selected(access("a", allow, from("api")), &v1alpha1.LabelSelector{MatchLabels: map[string]v1alpha1.LabelValue{"app": "web"}})}},
		{name: "another namespace's policy", objects: objects{p, access("other/a", allow, from("api"))}},
		{name: "unknown target", objects: objects{p, web, targeted(access("a", allow, from("api")), "gone")}},
		{name: "an undeclared port is parsed when a rule needs it", objects: objects{p, access("a", allow, from("api", v1alpha1.Operation{Ports: []int32{9000}, Methods: []string{"GET"}}))}},
		{name: "ports whose server speaks first", objects: objects{pod("db-1", "10.0.0.1"), service("db", "None", "mysql:3306 nats:4222"), access("a", deny, from("api"))}},
		{name: "invalid regex from the start: targets refuse everything", objects: objects{p, web, targeted(access("a", allow, from("api", invalid)), "web")}},
		{name: "regex too large, or about what bytes cannot tell: targets refuse everything", objects: objects{p, web,
			targeted(access("a", allow, from("api", operationOn(`/.{1000}`))), "web"), targeted(access("b", allow, from("api", operationOn(`/\pL`))), "web")}},
		{name: "invalid regex later: the last good form stays", before: objects{p, web, access("a", allow, from("api"))}, objects: objects{p, web, access("a", allow, from("api", invalid))}},
		{name: "more than 64 KiB later: the last good form stays", before: objects{p, web, access("a", allow, from("api"))}, objects: objects{p, web, access("a", allow, large())}},
		{name: "a selector that cannot be read closes the namespace", objects: objects{p, pod("other/x-1", "10.0.0.2", label("enabled")), selected(access("a", allow, from("api")), unreadable())}},
		{name: "declared twice: the protocol that parses wins", objects: objects{p, service("web", "10.96.0.1", "redis:80>8080"), service("also", "10.96.0.2", "http:80>8080", func(s *corev1.Service) {
			s.Spec.Selector = map[string]string{"app": "web"}
		}), access("a", allow, from("api", get))}},
	})
}

// large is a rule that is within the bound of each list.
func large() (rule v1alpha1.AccessRule) {
	for i := range 32 {
		var s v1alpha1.Source
		for j := range 64 {
			s.ServiceAccounts = append(s.ServiceAccounts, v1alpha1.ServiceAccountRef{Namespace: "other", Name: fmt.Sprintf("account-%d-%d", i, j)})
		}
		rule.From = append(rule.From, s)
	}
	return rule
}

func operationOn(pattern string) v1alpha1.Operation {
	return v1alpha1.Operation{Paths: []v1alpha1.ValueMatch{{Type: v1alpha1.MatchRegex, Value: pattern}}}
}

// Mended, a policy counts again as written; broken a second time, the mended form stays.
func TestLastGoodFormFollows(t *testing.T) {
	p, broken := pod("web-1", "10.0.0.1"), access("a", v1alpha1.Allow, from("api"))
	broken.Spec.Selector = unreadable()
	var r *Result
	for _, step := range []struct {
		name   string
		policy *v1alpha1.AccessPolicy
		want   string
	}{
		{"broken", broken, "permissive closed"},
		{"mended", access("a", v1alpha1.Allow, from("api")), "permissive only allow shop/a[0](shop/sa/api)"},
		{"broken again", broken, "permissive only allow shop/a[0](shop/sa/api)"},
		{"changed", access("a", v1alpha1.Deny, from("till")), "permissive deny shop/a[0](shop/sa/till)"},
		{"broken a third time", broken, "permissive deny shop/a[0](shop/sa/till)"},
	} {
		r = Resolve(r, world(p, step.policy))
		if got := policyText(r.Snapshot.Policies[r.Snapshot.Pods["shop/web-1"].Policy].Default); got != step.want {
			t.Errorf("%s: %s, want %s", step.name, got, step.want)
		}
	}
	r = Resolve(r, world(p))
	r = Resolve(r, world(p, broken))
	if got := policyText(r.Snapshot.Policies[r.Snapshot.Pods["shop/web-1"].Policy].Default); got != "permissive closed" {
		t.Errorf("deleted and made again broken: %s, want closed", got)
	}
}
