//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

const routeOf = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: bad, namespace: mesh}\nspec:\n  parentRefs: [{group: \"\", kind: Service, name: %s, port: %d}]\n  rules: [{%s}]\n"

// TestBadInput: each line of docs/ERRORS.md that only an API server and real traffic can show.
func TestBadInput(t *testing.T) {
	alone(t, "mesh")
	long := strings.Repeat("x", 300)
	for _, c := range []struct {
		name, manifest string
		// refused: the API server's words; else the condition of kind/name.
		refused, object, condition string
		// status of a request to the Service server meanwhile; 0: none is made.
		status int
	}{
		{"unknown service", fmt.Sprintf(routeOf, "ghost", 80, "backendRefs: [{name: server, port: 80}]"), "", "httproute/bad", `Accepted=False NoMatchingParent: Service mesh/ghost does not exist`, 200},
		{"missing backend", fmt.Sprintf(routeOf, "server", 80, "backendRefs: [{name: ghost, port: 80}]"), "", "httproute/bad", `ResolvedRefs=False BackendNotFound: .*Service mesh/ghost does not exist.*500`, 500},
		{"backend's port missing", fmt.Sprintf(routeOf, "server", 80, "backendRefs: [{name: server, port: 81}]"), "", "httproute/bad", `ResolvedRefs=False BackendNotFound: .*no TCP port 81`, 500},
		{"backend in another namespace", fmt.Sprintf(routeOf, "server", 80, "backendRefs: [{name: kubernetes, namespace: default, port: 443}]"), "", "httproute/bad", `ResolvedRefs=False RefNotPermitted: .*no ReferenceGrant`, 500},
		{"port 0 of a route", fmt.Sprintf(routeOf, "server", 80, "backendRefs: [{name: server, port: 0}]"), `port.*should be greater than or equal to 1`, "", "", 0},
		{"port 0 of a policy", "apiVersion: weft.dev/v1alpha1\nkind: AuthenticationPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {ports: [{port: 0, mode: Strict}]}\n", `port.*should be greater than or equal to 1`, "", "", 0},
		{"unknown field", "apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {actoin: Deny}\n", `unknown field "spec.actoin"`, "", "", 0},
		{"unknown action", "apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {action: Maybe}\n", `Unsupported value: "Maybe"`, "", "", 0},
		{"both ways to target", "apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {targetRefs: [{name: server}], selector: {matchLabels: {app: server}}}\n", `set targetRefs or selector, not both`, "", "", 0},
		{"oversized value", "apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {rules: [{to: [{paths: [{value: /" + long + "}]}]}]}\n", `Too long: may not be more than 256`, "", "", 0},
		{"oversized list", "apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {rules: [{to: [{ports: [" + numbers(1, 33) + "]}]}]}\n", `Too many: 33: must have at most 32 items`, "", "", 0},
		{"invalid regex", "apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {selector: {matchLabels: {app: server}}, rules: [{to: [{paths: [{type: RegularExpression, value: \"(\"}]}]}]}\n", "", "accesspolicy/bad", `Accepted=False Invalid: .*no good form yet`, 503},
		{"invalid regex, for other pods", "apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {selector: {matchLabels: {app: prices}}, rules: [{to: [{paths: [{type: RegularExpression, value: \"(\"}]}]}]}\n", "", "accesspolicy/bad", `Accepted=False Invalid: .*no good form yet`, 200},
		{"unknown target", "apiVersion: weft.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: bad, namespace: mesh}\nspec: {targetRefs: [{name: ghost}], rules: []}\n", "", "accesspolicy/bad", `Accepted=False TargetNotFound: Service mesh/ghost does not exist`, 200},
		{"another MeshConfig", "apiVersion: weft.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: second}\nspec: {}\n", `default`, "", "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := k8s.Apply(t.Context(), c.manifest)
			t.Cleanup(func() { _ = k8s.Delete(context.Background(), c.manifest) })
			if c.refused != "" {
				if err == nil || !regexp.MustCompile(c.refused).MatchString(err.Error()) {
					t.Fatalf("the API server says %v, want %q", err, c.refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			kind, name, _ := strings.Cut(c.object, "/")
			condition(t, "mesh", kind, name, c.condition)
			until(t, 30*time.Second, fmt.Sprintf("status %d", c.status), func() (bool, string) {
				o, err := batch(t.Context(), pod(t, "mesh", "client", "n2"), []call{{URL: "http://server.mesh/pod"}})
				if err != nil {
					return false, err.Error()
				}
				return o[0].Status == c.status, fmt.Sprintf("%+v", o)
			})
		})
	}
	t.Run("the traffic is as before", func(t *testing.T) {
		until(t, 30*time.Second, "status 200", func() (bool, string) {
			o, err := batch(t.Context(), pod(t, "mesh", "client", "n2"), []call{{URL: "http://server.mesh/pod"}})
			return err == nil && o[0].Status == 200, fmt.Sprintf("%+v, %v", o, err)
		})
	})
}

// numbers lists numbers from one to another, for YAML.
func numbers(from, to int) string {
	var all []string
	for n := from; n <= to; n++ {
		all = append(all, fmt.Sprint(n))
	}
	return strings.Join(all, ",")
}

// condition waits until an object carries a condition: "Type=Status Reason: message", a regular expression.
func condition(t *testing.T, namespace, kind, name, pattern string) {
	t.Helper()
	want := regexp.MustCompile(pattern)
	path := ".status.conditions[*]"
	if kind == "httproute" {
		path = ".status.parents[*].conditions[*]"
	}
	until(t, 30*time.Second, kind+" "+name+" to say "+pattern, func() (bool, string) {
		out, err := k8s.Kubectl(t.Context(), "get", kind, name, "-n", namespace, "-o", `jsonpath={range `+path+`}{.type}={.status} {.reason}: {.message}{"\n"}{end}`)
		return err == nil && want.MatchString(out), out
	})
}

// TestLastGoodForm: an update that cannot be compiled leaves the policy in force as it was.
func TestLastGoodForm(t *testing.T) {
	alone(t, "mesh")
	const policy = `action: Deny, rules: [{to: [{ports: [8080], paths: [{type: RegularExpression, value: %q}]}]}]`
	apply(t, manifest([]string{fmt.Sprintf(policy, "/status/.*")}))
	programmed(t, "accesspolicy", "case-0")
	calls := []call{{URL: "http://server.mesh/status/200"}, {URL: "http://server.mesh/pod"}}
	good := func() (bool, string) {
		o := client.ask(t, "n2", calls...)
		return o[0].Status == 403 && o[1].Status == 200, fmt.Sprintf("%+v", o)
	}
	until(t, 30*time.Second, "the policy to judge", good)
	if err := k8s.Apply(t.Context(), manifest([]string{fmt.Sprintf(policy, "(")})); err != nil {
		t.Fatal(err)
	}
	condition(t, "mesh", "accesspolicy", "case-0", `Accepted=False Invalid: .*last good form stays in force`)
	for range 10 {
		if ok, detail := good(); !ok {
			t.Fatalf("the last good form does not judge: %s", detail)
		}
	}
}

// TestRouteConflict: of two routes about the same requests the older decides; both are accepted.
func TestRouteConflict(t *testing.T) {
	alone(t, "mesh")
	const route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: %s, namespace: mesh}\nspec:\n  parentRefs: [{group: \"\", kind: Service, name: server, port: 80}]\n  rules:\n    - matches: [{path: {type: Exact, value: /conflict}}]\n      filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: /%[1]s}, statusCode: 302}}]\n"
	// The name of the older comes later in the alphabet.
	apply(t, fmt.Sprintf(route, "older"))
	created := func(name string) string {
		out, err := k8s.Kubectl(t.Context(), "get", "httproute", name, "-n", "mesh", "-o", "jsonpath={.metadata.creationTimestamp}")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	first := created("older")
	until(t, 30*time.Second, "the second to be over", func() (bool, string) { return time.Now().UTC().Format(time.RFC3339) > first, first })
	apply(t, fmt.Sprintf(route, "newer"))
	for _, name := range []string{"older", "newer"} {
		accepted(t, name)
	}
	for _, at := range placements {
		until(t, 30*time.Second, "the older route, "+at.name, func() (bool, string) {
			o := client.ask(t, at.node, call{URL: "http://server.mesh/conflict"})[0]
			return o.Status == 302 && strings.HasSuffix(o.Location, "/older"), fmt.Sprintf("%+v", o)
		})
	}
}

// TestAddressHijack: §5.9, another namespace's externalIP that is the server's ClusterIP stays the server's.
func TestAddressHijack(t *testing.T) {
	address := clusterIPs(t, "mesh", "server")[0]
	meshConfig(t, "clientAddress: Own, serviceAddressRanges: ["+address+"/32]")
	apply(t, "apiVersion: v1\nkind: Service\nmetadata: {name: thief, namespace: outside}\nspec: {externalIPs: ["+address+"], selector: {app: stranger}, ports: [{name: http, port: 80, targetPort: 8080}]}\n")
	condition(t, "outside", "service", "thief", `weft.dev/Captured=False AddressConflict: .*mesh/server`)
	for _, at := range placements {
		for i, o := range client.ask(t, at.node, repeat(call{URL: "http://server.mesh/pod"}, 20)...) {
			if o.Status != 200 || o.Body != "server" {
				t.Errorf("%s, call %d: %+v, want the server's answer", at.name, i, o)
			}
		}
	}
}

// TestExamples: the API server takes every example, and every one is accepted.
func TestExamples(t *testing.T) {
	if err := k8s.ApplyFile(t.Context(), filepath.Join(root, "examples/shop/shop.yaml")); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(root, "examples/policies/*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		apply(t, string(raw))
	}
	for _, kind := range []string{"authenticationpolicy", "accesspolicy", "httproute", "grpcroute"} {
		until(t, time.Minute, "every "+kind+" to be accepted", func() (bool, string) {
			out, err := k8s.Kubectl(t.Context(), "get", kind, "-n", "shop", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Accepted")].status}{.status.parents[*].conditions[?(@.type=="Accepted")].status}{"\n"}{end}`)
			good := err == nil && strings.TrimSpace(out) != ""
			for l := range strings.Lines(out) {
				good = good && strings.HasSuffix(strings.TrimSpace(l), " True")
			}
			return good, out
		})
	}
	if _, err := k8s.Kubectl(t.Context(), "delete", "namespace", "shop"); err != nil {
		t.Fatal(err)
	}
}

// TestConnectionLimit: §5.8, a pod that holds its connections gets no more, in either direction, and others are served
// as before.
func TestConnectionLimit(t *testing.T) {
	const limit = 20
	meshConfig(t, fmt.Sprintf("clientAddress: Own, connectionsPerPod: %d", limit))
	apply(t, podOn("greedy", "n2", "mesh", "", `args: [serve]`))
	if err := k8s.UntilCondition(t.Context(), time.Minute, "mesh", "app=greedy", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	if err := k8s.UntilReady(t.Context(), time.Minute, "mesh", "app=greedy", nil); err != nil {
		t.Fatal(err)
	}
	greedy := pod(t, "mesh", "greedy", "n2")
	for _, c := range []struct {
		name, counter string
		from          caller
		url           string
	}{
		{"outbound", "out_refused_limit", caller{"mesh", "greedy"}, "http://server.mesh/delay/2s"},
		{"inbound", "in_refused_limit", stranger, "http://" + greedy.IPs[0] + ":8080/delay/2s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			counted, let := hookEvents(t, "n2", c.counter), 0
			for _, o := range c.from.ask(t, "n2", repeat(call{URL: c.url}, 3*limit)...) {
				if o.allowed() {
					let++
				}
			}
			// The kernel counts a connection when it is established: handshakes side by side may pass together.
			if let == 0 || let > limit+limit/4 {
				t.Errorf("%d of %d connections at a time were let through, want some %d", let, 3*limit, limit)
			}
			if n := hookEvents(t, "n2", c.counter) - counted; n < 3*limit-let {
				t.Errorf("the counter %s rose by %d, %d connections were refused", c.counter, n, 3*limit-let)
			}
			for _, o := range client.ask(t, "n2", repeat(call{URL: "http://server.mesh/delay/500ms"}, 3*limit)...) {
				if !o.allowed() {
					t.Errorf("another pod on the node: %+v", o)
				}
			}
		})
	}
}

// meshConfig sets MeshConfig for one test, and then what it was before.
func meshConfig(t *testing.T, spec string) {
	t.Helper()
	set := func(ctx context.Context, spec string) error {
		if err := k8s.Apply(ctx, "apiVersion: weft.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {"+spec+"}\n"); err != nil {
			return err
		}
		return kube.Until(ctx, time.Minute, "MeshConfig", nil, func(ctx context.Context) (bool, string) {
			out, err := k8s.Kubectl(ctx, "get", "meshconfig", "default", "-o", `jsonpath={.metadata.generation} {range .status.conditions[?(@.type=="Programmed")]}{.observedGeneration} {.status}{end}`)
			f := strings.Fields(out)
			return err == nil && len(f) == 3 && f[0] == f[1] && f[2] == "True", out
		})
	}
	if err := set(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := set(ctx, "clientAddress: Own, connectionsPerPod: 4000, enrolment: {mode: Labelled, podOptOut: Allowed}, mtls: {mode: Permissive}"); err != nil {
			t.Error(err)
		}
	})
}

// TestPodOptOut: §5.10, a pod leaves by its own label only where the administrator lets it.
func TestPodOptOut(t *testing.T) {
	apply(t, podOn("leaver", "n2", "mesh", "weft.dev/mesh: disabled", `args: [serve]`))
	if err := k8s.UntilReady(t.Context(), time.Minute, "mesh", "app=leaver", nil); err != nil {
		t.Fatal(err)
	}
	// The node takes in a pod that started later: it has seen the leaver.
	apply(t, podOn("later", "n2", "mesh", "", `args: [serve]`))
	if err := k8s.UntilCondition(t.Context(), time.Minute, "mesh", "app=later", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	if k := pod(t, "mesh", "leaver", "n2").Conditions[enrolled]; k.Status == "True" {
		t.Fatalf("a pod that may opt out is enrolled: %+v", k)
	}
	meshConfig(t, "clientAddress: Own, enrolment: {podOptOut: Forbidden}")
	if err := k8s.UntilCondition(t.Context(), time.Minute, "mesh", "app=leaver", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	condition(t, "mesh", "pod", "leaver", `weft.dev/Enrolled=True OptOutForbidden: .*weft.dev/mesh`)
}
