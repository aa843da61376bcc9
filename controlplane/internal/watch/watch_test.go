package watch

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

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
