package resolve

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

func finished(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func (r *resolver) resolvePods() {
	r.snap.Pods = make(map[string]*ir.Pod, len(r.in.Pods))
	r.snap.PodsByAddress = make(map[netip.Addr]string, len(r.in.Pods))
	for _, p := range r.in.Pods {
		if p.Spec.HostNetwork {
			if p.Labels[names.LabelMesh] == names.MeshEnabled {
				r.problem(Problem{Ref{"Pod", p.Namespace, p.Name, p.Generation}, -1, names.ConditionEnrolled, "False", "HostNetwork",
					"a pod in the node's own network namespace cannot be enrolled: remove hostNetwork or the label " + names.LabelMesh})
			}
			for _, a := range podAddresses(p) {
				if _, known := r.contested[a]; !known {
					r.contested[a] = nil
				}
			}
			continue
		}
		if finished(p) || p.Spec.NodeName == "" {
			continue
		}
		uid := string(p.UID)
		account := p.Spec.ServiceAccountName
		if account == "" {
			account = "default"
		}
		d := r.in.Decisions[uid]
		pod := &ir.Pod{
			UID: uid, Key: ir.Key{Namespace: p.Namespace, Name: p.Name}, Node: p.Spec.NodeName, ServiceAccount: account,
			SPIFFEID: names.SPIFFEID(r.snap.Mesh.TrustDomain, p.Namespace, account), Addresses: podAddresses(p),
			Goal: r.goal(p), Stage: d.Stage, MTLS: d.MTLS, Moved: d.Moved, ProbePorts: probePorts(p), Shortcut: r.shortcut(p),
		}
		if p.DeletionTimestamp != nil { // the grace period is in it
			pod.Ends = p.DeletionTimestamp.Time
		}
		r.snap.Pods[uid] = pod
		r.byNamespace[p.Namespace] = append(r.byNamespace[p.Namespace], p)
		for _, a := range pod.Addresses {
			if other, taken := r.snap.PodsByAddress[a]; taken {
				r.contested[a] = append(r.contested[a], other)
			}
			r.snap.PodsByAddress[a] = uid
		}
	}
	for a, others := range r.contested {
		if uid, ok := r.snap.PodsByAddress[a]; ok {
			r.contested[a] = append(others, uid)
			delete(r.snap.PodsByAddress, a)
		}
	}
}

func podAddresses(p *corev1.Pod) []netip.Addr {
	var l []netip.Addr
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			l = append(l, a.Unmap())
		}
	}
	return l
}

// probePorts are the ports on which kubelet itself dials the pod: probes and lifecycle hooks.
func probePorts(p *corev1.Pod) []uint16 {
	var ports []uint16
	add := func(c corev1.Container, port intstr.IntOrString, host string) {
		if host != "" {
			return // dialled at another address than the pod's
		}
		number := port.IntVal
		if port.Type == intstr.String {
			for _, named := range c.Ports {
				if named.Name == port.StrVal {
					number = named.ContainerPort
				}
			}
		}
		if number > 0 && number < 1<<16 {
			ports = append(ports, uint16(number))
		}
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		for _, probe := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
			switch {
			case probe == nil:
			case probe.HTTPGet != nil:
				add(c, probe.HTTPGet.Port, probe.HTTPGet.Host)
			case probe.TCPSocket != nil:
				add(c, probe.TCPSocket.Port, probe.TCPSocket.Host)
			case probe.GRPC != nil:
				add(c, intstr.FromInt32(probe.GRPC.Port), "")
			}
		}
		if c.Lifecycle == nil {
			continue
		}
		for _, hook := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
			switch {
			case hook == nil:
			case hook.HTTPGet != nil:
				add(c, hook.HTTPGet.Port, hook.HTTPGet.Host)
			case hook.TCPSocket != nil:
				add(c, hook.TCPSocket.Port, hook.TCPSocket.Host)
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}
