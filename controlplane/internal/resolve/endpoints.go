package resolve

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

const endpointSliceController = "endpointslice-controller.k8s.io"

// resolveEndpoints fills the service ports' endpoints from the slices.
func (r *resolver) resolveEndpoints() {
	for _, slice := range r.in.EndpointSlices {
		name := slice.Labels[discoveryv1.LabelServiceName]
		service := r.snap.Services[ir.Key{Namespace: slice.Namespace, Name: name}]
		if service == nil || slice.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		for _, port := range service.Ports {
			for _, p := range slice.Ports {
				if p.Port == nil || *p.Port <= 0 || p.Name == nil && port.Name != "" || p.Name != nil && *p.Name != port.Name {
					continue
				}
				if p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP {
					continue
				}
				for _, e := range slice.Endpoints {
					r.addEndpoints(port, slice, uint16(*p.Port), e)
				}
			}
		}
	}
	for _, s := range r.snap.Services {
		for _, p := range s.Ports {
			// An address that two slices name (while one is replaced by the other) counts once, in its better form.
			slices.SortFunc(p.Endpoints, func(a, b *ir.Endpoint) int {
				return cmp.Or(a.Address.Compare(b.Address), boolean(b.Ready, a.Ready), boolean(b.Serving, a.Serving), cmp.Compare(a.Node, b.Node))
			})
			p.Endpoints = slices.CompactFunc(p.Endpoints, func(a, b *ir.Endpoint) bool { return a.Address == b.Address })
		}
	}
}

func (r *resolver) addEndpoints(port *ir.ServicePort, slice *discoveryv1.EndpointSlice, number uint16, e discoveryv1.Endpoint) {
	for _, text := range e.Addresses {
		address, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		address = address.Unmap()
		endpoint := &ir.Endpoint{Address: netip.AddrPortFrom(address, number), Transport: ir.Plain, Ready: truth(e.Conditions.Ready, true)}
		endpoint.Serving = truth(e.Conditions.Serving, endpoint.Ready)
		if e.NodeName != nil {
			endpoint.Node = *e.NodeName
		}
		if uid, ok := r.snap.PodsByAddress[address]; ok {
			pod := r.snap.Pods[uid]
			if pod.Key.Namespace != slice.Namespace {
				r.foreign(port, slice, address, pod)
				endpoint.Transport = ir.Refuse // not left out here: an enrolled caller's connection is captured, and goes nowhere
			} else {
				r.reach(endpoint, pod)
			}
		} else if slices.ContainsFunc(r.contested[address], func(uid string) bool { return r.snap.Pods[uid].MTLS || r.in.Decisions[uid].Lost }) {
			endpoint.Transport = ir.Refuse // one of its owners must not be spoken to in plaintext
		}
		port.Endpoints = append(port.Endpoints, endpoint)
	}
}

// foreign tells of an endpoint that is another namespace's pod. The endpoint controller's own slice names one only while it
// lags behind an address that was given to another pod, which is nobody's mistake. Its label can be written by anybody, so
// it excuses from the condition and from nothing else.
func (r *resolver) foreign(port *ir.ServicePort, slice *discoveryv1.EndpointSlice, address netip.Addr, pod *ir.Pod) {
	if slice.Labels[discoveryv1.LabelManagedBy] == endpointSliceController {
		return
	}
	r.problem(Problem{Ref{"Service", port.Key.Service.Namespace, port.Key.Service.Name, 0}, -1, "weft.dev/Captured", "False", "ForeignEndpoint",
		fmt.Sprintf("EndpointSlice %s names %s, the address of a pod in namespace %s: the endpoint is left out", slice.Name, address, pod.Key.Namespace)})
}

// reach says how a pod is spoken to.
func (r *resolver) reach(e *ir.Endpoint, pod *ir.Pod) {
	d := r.in.Decisions[pod.UID]
	e.Pod, e.Node = pod.UID, pod.Node
	e.Identity = pod.SPIFFEID
	switch {
	case pod.MTLS:
		e.Transport, e.Generation = ir.MTLS, "mtls/"+d.Policy
		if d.Proxy > 0 {
			e.Generation += "/" + strconv.FormatUint(uint64(d.Proxy), 10)
		}
	case d.Lost && pod.Strict:
		e.Transport = ir.Refuse
	}
}

func truth(b *bool, unset bool) bool {
	if b == nil {
		return unset
	}
	return *b
}

// targetPort returns the port of a pod that a service port sends to; false: a name that the pod does not have.
func targetPort(p *corev1.Pod, s corev1.ServicePort) (uint16, bool) {
	if s.TargetPort.StrVal != "" {
		for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			for _, named := range c.Ports {
				if named.Name == s.TargetPort.StrVal && cmp.Or(named.Protocol, corev1.ProtocolTCP) == corev1.ProtocolTCP {
					return uint16(named.ContainerPort), true
				}
			}
		}
		return 0, false
	}
	if s.TargetPort.IntVal > 0 {
		return uint16(s.TargetPort.IntVal), true
	}
	return uint16(s.Port), s.Port > 0
}
