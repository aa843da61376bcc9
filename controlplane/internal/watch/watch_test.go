package watch

import (
	"context"
	"errors"
	"maps"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// What is deleted by mistake, by its CRD or by helm says as little as silence.
func TestDeletedObjectsKeepTheirLastForm(t *testing.T) {
	var last lasting
	mesh, order := &v1alpha1.MeshConfig{}, &corev1.ConfigMap{Data: map[string]string{"uninstall": "true"}}
	for _, turn := range []struct {
		name      string
		in        resolve.Input
		mesh      *v1alpha1.MeshConfig
		uninstall *corev1.ConfigMap
	}{
		{"neither was ever there", resolve.Input{}, nil, nil},
		{"both are there", resolve.Input{MeshConfig: mesh, UninstallOrder: order}, mesh, order},
		{"both are deleted", resolve.Input{}, mesh, order},
		{"the order is there again, and says no", resolve.Input{UninstallOrder: &corev1.ConfigMap{}}, mesh, &corev1.ConfigMap{}},
	} {
		in := turn.in
		last.complete(&in)
		if in.MeshConfig != turn.mesh || (in.UninstallOrder == nil) != (turn.uninstall == nil) || in.UninstallOrder != nil && in.UninstallOrder.Data["uninstall"] != turn.uninstall.Data["uninstall"] {
			t.Errorf("%s: MeshConfig %v, order %v", turn.name, in.MeshConfig, in.UninstallOrder)
		}
	}
}

// TestPoliciesOutliveTheirCRD: a policy that goes with its CRD holds until it is made again; one that is deleted by itself is gone.
func TestPoliciesOutliveTheirCRD(t *testing.T) {
	policy := func(name string) *v1alpha1.AccessPolicy {
		p := &v1alpha1.AccessPolicy{}
		p.Name = name
		return p
	}
	var k keptPolicies[*v1alpha1.AccessPolicy]
	k.know(policy("deleted meanwhile"), false)
	k.know(policy("lost before"), true)
	for _, turn := range []struct {
		name   string
		there  []string
		crd    types.UID
		failed error
		served bool
		want   map[string]bool
	}{
		{"it is looked first", []string{"a", "b"}, "one", nil, true, map[string]bool{"a": true, "b": true, "lost before": true}},
		{"a is deleted", []string{"b"}, "one", nil, true, map[string]bool{"b": true, "lost before": true}},
		{"b is gone, and nobody knows why", nil, "one", errors.New("away"), true, map[string]bool{"b": true, "lost before": true}},
		{"its CRD is gone", nil, "", nil, true, map[string]bool{"b": true, "lost before": true}},
		{"the CRD is back", nil, "two", nil, true, map[string]bool{"b": true, "lost before": true}},
		{"b is back, and c", []string{"b", "c"}, "two", nil, true, map[string]bool{"b": true, "c": true, "lost before": true}},
		{"b is deleted", []string{"c"}, "two", nil, true, map[string]bool{"c": true, "lost before": true}},
		{"the CRD was replaced while nobody looked", nil, "three", nil, true, map[string]bool{"c": true, "lost before": true}},
		{"the other is made", []string{"lost before"}, "three", nil, true, map[string]bool{"c": true, "lost before": true}},
		{"and deleted", nil, "three", nil, true, map[string]bool{"c": true}},
	} {
		var there []*v1alpha1.AccessPolicy
		for _, name := range turn.there {
			there = append(there, policy(name))
		}
		all, _, err := k.complete(t.Context(), there, turn.served, func(context.Context, string) (types.UID, error) { return turn.crd, turn.failed })
		got := map[string]bool{}
		for _, p := range all {
			got[p.Name] = true
		}
		if len(all) != len(turn.want) || !maps.Equal(got, turn.want) || !errors.Is(err, turn.failed) {
			t.Errorf("%s: %v, %v, want %v", turn.name, got, err, turn.want)
		}
	}
}

// TestPoliciesOfAMissingKind: a controller that starts while a kind's CRD is not there goes on with what the one before knew.
func TestPoliciesOfAMissingKind(t *testing.T) {
	var k keptPolicies[*v1alpha1.AuthenticationPolicy]
	p := &v1alpha1.AuthenticationPolicy{}
	p.Name = "strict"
	k.know(p, false)
	for range 2 {
		if all, lost, err := k.complete(t.Context(), nil, false, nil); len(all) != 1 || len(lost) != 1 || err != nil {
			t.Errorf("%d policies, %d lost, %v", len(all), len(lost), err)
		}
	}
	crd := func(context.Context, string) (types.UID, error) { return "new", nil }
	if all, lost, err := k.complete(t.Context(), nil, true, crd); len(all) != 1 || len(lost) != 1 || err != nil {
		t.Errorf("with a CRD again: %d policies, %d lost, %v", len(all), len(lost), err)
	}
}
