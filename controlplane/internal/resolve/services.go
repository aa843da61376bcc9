package resolve

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// spoken maps appProtocol and the first part of a port's name to what the server speaks.
var spoken = map[string]ir.Protocol{
	"http": ir.HTTP1, "http1": ir.HTTP1, "http/1.1": ir.HTTP1, "kubernetes.io/ws": ir.HTTP1,
	"http2": ir.HTTP2, "h2c": ir.HTTP2, "kubernetes.io/h2c": ir.HTTP2, "grpc": ir.HTTP2,
	"https": ir.TCP, "tls": ir.TCP, "grpcs": ir.TCP, "kubernetes.io/wss": ir.TCP, "tcp": ir.TCP,
	"redis": ir.TCP, "mongo": ir.TCP, "postgresql": ir.TCP, "postgres": ir.TCP, "amqp": ir.TCP, "kafka": ir.TCP, "nats": ir.TCPServerFirst,
	// Servers that send the first bytes; docs/LIMITS.md lists them.
	"mysql": ir.TCPServerFirst, "mariadb": ir.TCPServerFirst, "smtp": ir.TCPServerFirst, "ftp": ir.TCPServerFirst,
	"ssh": ir.TCPServerFirst, "imap": ir.TCPServerFirst, "pop3": ir.TCPServerFirst, "irc": ir.TCPServerFirst, "vnc": ir.TCPServerFirst,
}

// protocolOf reads what a service port declares; false: nothing.
func protocolOf(p corev1.ServicePort) (ir.Protocol, bool) {
	if p.AppProtocol != nil {
		protocol, ok := spoken[strings.ToLower(*p.AppProtocol)]
		if !ok {
			return ir.TCP, true // declared as something that weft does not parse
		}
		return protocol, true
	}
	name, _, _ := strings.Cut(strings.ToLower(p.Name), "-")
	protocol, ok := spoken[name]
	return protocol, ok
}

func classOf(p ir.Protocol) ir.Class {
	if p == ir.HTTP1 || p == ir.HTTP2 {
		return ir.ClassHTTP
	}
	return ir.ClassTCP
}

// resolveServices makes services without endpoints and decides who owns which address.
func (r *resolver) resolveServices() {
	r.snap.Services = make(map[ir.Key]*ir.Service, len(r.in.Services))
	r.snap.Owners = make(map[netip.AddrPort]ir.PortKey, len(r.in.Services))
	ordered := slices.Clone(r.in.Services)
	slices.SortFunc(ordered, func(a, b *corev1.Service) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	for _, s := range ordered {
		if s.Spec.Type != corev1.ServiceTypeExternalName {
			r.addService(s)
		}
	}
	// Allocated addresses first: nobody takes a ClusterIP by naming it elsewhere.
	allocated := map[netip.Addr]*corev1.Service{}
	for _, s := range ordered {
		for _, a := range clusterIPs(s) {
			allocated[a] = s
		}
		r.claim(s, clusterIPs(s))
	}
	for _, s := range ordered {
		r.claim(s, slices.DeleteFunc(r.externalAddresses(s), func(a netip.Addr) bool {
			owner := ""
			if other := allocated[a]; other != nil && other != s {
				owner = "Service " + other.Namespace + "/" + other.Name
			}
			if uid, ok := r.snap.PodsByAddress[a]; ok {
				owner = "pod " + r.snap.Pods[uid].Key.String()
			}
			if owner != "" {
				r.addressConflict(s, fmt.Sprintf("%s is the own address of %s: the Service does not get it", a, owner))
			}
			return owner != ""
		}))
	}
}

func (r *resolver) addService(s *corev1.Service) {
	key := ir.Key{Namespace: s.Namespace, Name: s.Name}
	service := &ir.Service{Key: key}
	for _, p := range s.Spec.Ports {
		if p.Protocol != "" && p.Protocol != corev1.ProtocolTCP {
			continue
		}
		port := &ir.ServicePort{Key: ir.PortKey{Service: key, Port: uint16(p.Port)}, Name: p.Name}
		if protocol, declared := protocolOf(p); declared {
			port.Protocol, port.Class = protocol, classOf(protocol)
		} else {
			port.Protocol, port.Class = ir.HTTP1, ir.ClassAuto
		}
		if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
			port.Affinity = 3 * time.Hour
			if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
				port.Affinity = time.Duration(*c.ClientIP.TimeoutSeconds) * time.Second
			}
		}
		port.LocalOnly = s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
		service.Ports = append(service.Ports, port)
	}
	r.snap.Services[key] = service
}

func clusterIPs(s *corev1.Service) []netip.Addr {
	var l []netip.Addr
	for _, text := range s.Spec.ClusterIPs {
		if a, err := netip.ParseAddr(text); err == nil { // "None" is no address
			l = append(l, a.Unmap())
		}
	}
	return l
}

// externalAddresses are externalIPs and load-balancer addresses within the ranges that the administrator allows.
func (r *resolver) externalAddresses(s *corev1.Service) []netip.Addr {
	texts := slices.Clone(s.Spec.ExternalIPs)
	for _, i := range s.Status.LoadBalancer.Ingress {
		if i.IP != "" {
			texts = append(texts, i.IP)
		}
	}
	var l []netip.Addr
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		a = a.Unmap()
		if slices.ContainsFunc(r.config.externalAddressRanges, func(p netip.Prefix) bool { return p.Contains(a) }) {
			l = append(l, a)
		}
	}
	return l
}

func (r *resolver) addressConflict(s *corev1.Service, message string) {
	r.problem(Problem{Ref{"Service", s.Namespace, s.Name, s.Generation}, -1, "weft.dev/Captured", "False", "AddressConflict", message})
}

// claim gives a Service those of the addresses on which all of its ports are free: a scope with two owners would be
// refused by every Envoy.
func (r *resolver) claim(s *corev1.Service, addresses []netip.Addr) {
	service := r.snap.Services[ir.Key{Namespace: s.Namespace, Name: s.Name}]
	if service == nil {
		return
	}
	for _, a := range addresses {
		free := true
		for _, p := range service.Ports {
			at := netip.AddrPortFrom(a, p.Key.Port)
			owner, taken := r.snap.Owners[at]
			if !taken || owner == p.Key {
				continue
			}
			free = false
			r.addressConflict(s, fmt.Sprintf("%s belongs to Service %s (port %d): traffic to it follows that Service", at, owner.Service, owner.Port))
		}
		if !free {
			continue
		}
		for _, p := range service.Ports {
			r.snap.Owners[netip.AddrPortFrom(a, p.Key.Port)] = p.Key
		}
		if !slices.Contains(service.Addresses, a) {
			service.Addresses = append(service.Addresses, a)
		}
	}
}
