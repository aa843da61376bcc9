package resolve

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// config is MeshConfig in usable form.
type config struct {
	enrolment             v1alpha1.EnrolmentMode
	namespaces, pods      labels.Selector
	forbidOptOut          bool
	mode                  ir.Mode
	externalAddressRanges []netip.Prefix
}

func (r *resolver) readConfig() {
	c := config{enrolment: v1alpha1.EnrolLabelled, namespaces: labels.Everything(), pods: labels.Everything(), mode: ir.Permissive}
	mesh := ir.Mesh{TrustDomain: r.in.TrustDomain, SVIDLife: r.in.SVIDLife, DefaultMode: ir.Permissive, ConnectionsPerPod: 4000, Uninstall: r.in.UninstallOrder != nil && r.in.UninstallOrder.Data[names.UninstallKey] == "true"}
	if mesh.TrustDomain == "" {
		mesh.TrustDomain = names.DefaultTrustDomain
	}
	if m := r.in.MeshConfig; m != nil {
		ref := Ref{"MeshConfig", "", m.Name, m.Generation}
		bad := func(field string, err error, instead string) {
			r.problem(Problem{ref, -1, accepted, "False", "Invalid", fmt.Sprintf("%s: %v; %s", field, err, instead)})
		}
		// The certificate authority signs for the controller's trust domain; identities of another would never verify.
		if d := m.Spec.TrustDomain; d != "" && d != mesh.TrustDomain {
			bad("trustDomain", fmt.Errorf("the controller runs with trust domain %s: install it with this one, or leave the field out", mesh.TrustDomain), "the field is ignored")
		}
		c.mode = modeOf(m.Spec.MTLS.Mode)
		if m.Spec.Enrolment.Mode != "" {
			c.enrolment = m.Spec.Enrolment.Mode
		}
		c.forbidOptOut = m.Spec.Enrolment.PodOptOut == v1alpha1.OptOutForbidden
		if m.Spec.ConnectionsPerPod > 0 {
			mesh.ConnectionsPerPod = uint32(m.Spec.ConnectionsPerPod)
		}
		mesh.OwnClientAddress = m.Spec.ClientAddress == v1alpha1.ClientAddressOwn
		for _, s := range []struct {
			field string
			from  *v1alpha1.LabelSelector
			to    *labels.Selector
		}{{"enrolment.namespaceSelector", m.Spec.Enrolment.NamespaceSelector, &c.namespaces}, {"enrolment.podSelector", m.Spec.Enrolment.PodSelector, &c.pods}} {
			if s.from == nil {
				continue
			}
			selector, err := compileSelector(s.from)
			if err != nil {
				bad(s.field, err, "it selects nothing")
				selector = labels.Nothing()
			}
			*s.to = selector
		}
		for i, text := range m.Spec.ServiceAddressRanges {
			prefix, err := netip.ParsePrefix(text)
			if err != nil {
				bad(fmt.Sprintf("serviceAddressRanges[%d]", i), err, "the range is ignored")
				continue
			}
			c.externalAddressRanges = append(c.externalAddressRanges, prefix)
		}
	}
	mesh.DefaultMode, mesh.ForbidOptOut = c.mode, c.forbidOptOut
	r.config, r.snap.Mesh = c, mesh
}

func modeOf(m v1alpha1.MTLSMode) ir.Mode {
	if m == v1alpha1.Strict {
		return ir.Strict
	}
	return ir.Permissive
}

// closed namespaces have no pod in the mesh, whatever labels say.
func (r *resolver) closed(namespace string) bool {
	return names.Excluded(namespace) || namespace == r.in.Namespace || r.config.enrolment == v1alpha1.EnrolOff || r.snap.Mesh.Uninstall
}

// namespaceIn tells whether pods of a namespace that say nothing join.
func (r *resolver) namespaceIn(namespace string) bool {
	n := r.namespaces[namespace]
	if n == nil || r.closed(namespace) {
		return false
	}
	switch n.Labels[names.LabelMesh] {
	case names.MeshEnabled:
		return true
	case names.MeshDisabled:
		return false
	}
	return r.config.enrolment == v1alpha1.EnrolAll && r.config.namespaces.Matches(labels.Set(n.Labels))
}

// goal is where labels and MeshConfig want a pod.
func (r *resolver) goal(p *corev1.Pod) ir.Stage {
	if r.closed(p.Namespace) {
		return ir.Out
	}
	in := r.namespaceIn(p.Namespace)
	switch p.Labels[names.LabelMesh] {
	case names.MeshEnabled:
		in = true
	case names.MeshDisabled:
		if in && r.config.forbidOptOut {
			r.problem(Problem{Ref{"Pod", p.Namespace, p.Name, p.Generation}, -1, names.ConditionEnrolled, "True", "OptOutForbidden",
				"the label " + names.LabelMesh + "=" + names.MeshDisabled + " is ignored: MeshConfig forbids pods to opt out"})
		} else {
			in = false
		}
	default:
		if in && r.namespaces[p.Namespace].Labels[names.LabelMesh] != names.MeshEnabled {
			in = r.config.pods.Matches(labels.Set(p.Labels))
		}
	}
	if in {
		return ir.Enforced
	}
	return ir.Out
}

// shortcut tells whether labels ask for a pod's short circuit.
func (r *resolver) shortcut(p *corev1.Pod) bool {
	asked := p.Labels[names.LabelSockmap]
	if n := r.namespaces[p.Namespace]; asked == "" && n != nil {
		asked = n.Labels[names.LabelSockmap]
	}
	return asked == names.MeshEnabled
}

func (r *resolver) resolveNamespaces() {
	r.snap.Namespaces = make(map[string]*ir.Namespace, len(r.in.Namespaces))
	for name, n := range r.namespaces {
		out := &ir.Namespace{Name: name, Enrol: r.namespaceIn(name), Closed: r.closed(name), Mode: r.config.mode}
		if n.Labels[names.LabelMesh] != names.MeshEnabled {
			out.PodSelector = r.config.pods.String()
			_, selects := r.config.pods.Requirements() // that of nothing looks like that of everything
			out.Enrol = out.Enrol && selects
		}
		r.snap.Namespaces[name] = out
	}
}
