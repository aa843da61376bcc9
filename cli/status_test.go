package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic/fake"
)

func object(kind, apiVersion, name string, conditions ...any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": apiVersion, "kind": kind, "metadata": map[string]any{"name": name, "namespace": "shop"},
		"spec": map[string]any{"nodeName": "n1"}, "status": map[string]any{"conditions": conditions},
	}}
}

func condition(kind, status, reason string) any {
	return map[string]any{"type": kind, "status": status, "reason": reason, "message": "said so"}
}

func route(name, controller string, conditions ...any) *unstructured.Unstructured {
	o := object("HTTPRoute", "gateway.networking.k8s.io/v1", name)
	o.Object["status"] = map[string]any{"parents": []any{map[string]any{"controllerName": controller, "conditions": conditions}}}
	return o
}

func TestStatus(t *testing.T) {
	lists := map[schema.GroupVersionResource]string{}
	for _, k := range kinds {
		lists[k.resource] = k.name + "List"
	}
	mesh := object("MeshConfig", "weft.dev/v1alpha1", "default", condition("Accepted", "True", "Accepted"), condition("Programmed", "False", "Pending"))
	mesh.SetNamespace("")
	client := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), lists,
		object("Pod", "v1", "in", condition("weft.dev/Enrolled", "True", "Captured"), condition("weft.dev/Enforced", "True", "Enforced")),
		object("Pod", "v1", "stuck", condition("weft.dev/Enrolled", "False", "PortTaken")),
		object("Pod", "v1", "on TCP", condition("weft.dev/Enrolled", "True", "Captured"), condition("weft.dev/Shortcut", "False", "Unsupported")),
		object("Pod", "v1", "on TCP again", condition("weft.dev/Enrolled", "True", "Captured"), condition("weft.dev/Shortcut", "False", "Off")),
		object("Pod", "v1", "left", condition("weft.dev/Enrolled", "False", "Withdrawn")),
		object("Pod", "v1", "stranger", condition("Ready", "True", "")),
		object("AccessPolicy", "weft.dev/v1alpha1", "fine", condition("Accepted", "True", "Accepted"), condition("Programmed", "True", "Programmed")),
		object("AccessPolicy", "weft.dev/v1alpha1", "unseen"),
		object("Service", "v1", "contested", condition("weft.dev/Captured", "False", "AddressConflict")),
		object("Service", "v1", "ordinary", condition("example.com/Announced", "False", "No")),
		mesh,
		route("ours", "weft.dev/controlplane", condition("Accepted", "True", "Accepted"), condition("Programmed", "False", "Refused")),
		route("theirs", "example.com/gateway", condition("Accepted", "False", "NotAllowed")),
	)
	s, err := read(t.Context(), client, "shop")
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	s.print(&out)
	var got []string
	for l := range strings.Lines(out.String()) {
		got = append(got, strings.Join(strings.Fields(l), " "))
	}
	want := []string{
		"KIND NAMESPACE NAME NODE IN FORCE WHY NOT",
		"Pod shop in n1 yes",
		"Pod shop on TCP n1 no weft.dev/Shortcut: Unsupported, said so",
		"Pod shop on TCP again n1 yes",
		"Pod shop stuck n1 no weft.dev/Enrolled: PortTaken, said so",
		"Service shop contested n1 no weft.dev/Captured: AddressConflict, said so",
		"MeshConfig default n1 no Programmed: Pending, said so",
		"AccessPolicy shop fine n1 yes",
		"AccessPolicy shop unseen n1 no the controller has not spoken of it: see that weft-controlplane runs",
		"HTTPRoute shop ours n1 no Programmed: Refused, said so",
	}
	if !slices.Equal(got, want) {
		t.Errorf("it says\n%s\nwant\n%s", &out, strings.Join(want, "\n"))
	}
	if s.wrong != 6 {
		t.Errorf("%d objects are wrong, want 6", s.wrong)
	}
}

func TestLeader(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		name, holder string
		renewed      time.Duration
		want         string
	}{
		{"a replica", "weft-controlplane-5d7-x2_10.0.0.1_AB12CD", time.Second, "weft-controlplane-5d7-x2 leads"},
		{"nobody", "", time.Second, "no replica of the controller leads"},
		{"one that is gone", "weft-controlplane-5d7-x2_10.0.0.1_AB12CD", time.Minute, "no replica of the controller leads"},
	} {
		lease := &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": map[string]any{"name": "weft-controlplane", "namespace": "weft-system"},
			"spec": map[string]any{"holderIdentity": c.holder, "leaseDurationSeconds": int64(6), "renewTime": now.Add(-c.renewed).Format("2006-01-02T15:04:05.000000Z07:00")},
		}}
		client := fake.NewSimpleDynamicClient(runtime.NewScheme(), lease)
		var out strings.Builder
		(&status{leader: leads(t.Context(), client, "weft-system", now)}).print(&out)
		if !strings.Contains(out.String(), c.want) {
			t.Errorf("%s: %q, want %q", c.name, out.String(), c.want)
		}
	}
	if got := leads(t.Context(), fake.NewSimpleDynamicClient(runtime.NewScheme()), "weft-system", now); got != "" {
		t.Errorf("without a Lease: %q", got)
	}
}
