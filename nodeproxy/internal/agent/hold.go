package agent

import (
	"k8s.io/apimachinery/pkg/labels"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
)

// hold closes a new pod that is to be in the mesh; true: its containers wait for that.
func (a *agent) hold(p pods.Pod) bool {
	if !a.belongs(p) {
		return false
	}
	if now, err := a.kernel.Verify(p.UID); err == nil && now.Inbound && !now.Gated && now.Pod.Sandbox == p.Sandbox {
		return false // it is in the mesh, and its containers have all ended
	}
	a.enroller.Hold(p)
	return true
}

// belongs tells whether a new pod is to be in the mesh. The controller may not have told of the pod itself yet, or be away; then
// the namespace and the pod's labels decide, and the controller's word ends what is held wrongly. A namespace that is as new as
// the pod is waited for while there is a controller to tell of it.
func (a *agent) belongs(p pods.Pod) bool {
	if p.Static || names.Excluded(p.Namespace) || p.Namespace == a.config.Namespace {
		return false
	}
	if wish := a.LocalPod(p.UID); wish != nil {
		return wish.Goal != meshv1.Stage_STAGE_OUT
	}
	n := a.upstream.Namespace(p.Namespace)
	switch label := p.Labels[names.LabelMesh]; {
	case n == nil && label != names.MeshDisabled:
		return label == names.MeshEnabled || a.upstream.Live()
	case n.GetClosed():
		return false
	case label == names.MeshEnabled:
		return true
	case label == names.MeshDisabled:
		return n.GetEnrol() && a.upstream.Mesh().GetForbidOptOut()
	case !n.GetEnrol():
		return false
	}
	selector, err := labels.Parse(n.GetPodSelector())
	return err != nil || selector.Matches(labels.Set(p.Labels))
}
