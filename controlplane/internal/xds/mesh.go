package xds

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// meshName is the name of the one Mesh resource.
const meshName = "mesh"

// Names lists, sorted, what a node's agent gets for a wildcard subscription. LocalPods are those of the node.
func Names(s *ir.Snapshot, typeURL, node string) []string {
	var out []string
	switch typeURL {
	case TypeMesh:
		out = []string{meshName}
	case TypeNamespace:
		for name := range s.Namespaces {
			out = append(out, name)
		}
	case TypeService:
		for key := range s.Services {
			out = append(out, key.String())
		}
	case TypeWorkload:
		for uid, pod := range s.Pods {
			if inMesh(pod) {
				out = append(out, uid)
			}
		}
	case TypeLocalPod:
		for uid, pod := range s.Pods {
			if pod.Node == node {
				out = append(out, localName(node, uid))
			}
		}
	}
	slices.Sort(out)
	return out
}

func localName(node, uid string) string { return node + "/" + uid }

// inMesh: peers are to know the pod, because it is captured or about to be.
func inMesh(pod *ir.Pod) bool { return pod.Stage != ir.Out || pod.MTLS }

func buildMesh(s *ir.Snapshot, typeURL, name string) (proto.Message, bool) {
	switch typeURL {
	case TypeMesh:
		return mesh(s), name == meshName
	case TypeNamespace:
		if n := s.Namespaces[name]; n != nil {
			return &meshv1.Namespace{Name: n.Name, Enrol: n.Enrol, Mode: mode(n.Mode), PodSelector: n.PodSelector, Closed: n.Closed}, true
		}
	case TypeService:
		namespace, service, _ := strings.Cut(name, "/")
		if found := s.Services[ir.Key{Namespace: namespace, Name: service}]; found != nil {
			return serviceIndex(found), true
		}
	case TypeWorkload:
		if pod := s.Pods[name]; pod != nil && inMesh(pod) {
			return workload(pod), true
		}
	case TypeLocalPod:
		node, uid, _ := strings.Cut(name, "/")
		if pod := s.Pods[uid]; pod != nil && pod.Node == node {
			return localPod(pod), true
		}
	case TypeInboundPolicy:
		if policy := s.Policies[name]; policy != nil {
			return inboundPolicy(policy), true
		}
	}
	return nil, false
}

func mesh(s *ir.Snapshot) *meshv1.Mesh {
	return &meshv1.Mesh{
		TrustDomain: s.Mesh.TrustDomain, DefaultMode: mode(s.Mesh.DefaultMode), ForbidOptOut: s.Mesh.ForbidOptOut,
		Uninstall: s.Mesh.Uninstall, ConnectionsPerPod: s.Mesh.ConnectionsPerPod,
		OwnClientAddress: s.Mesh.OwnClientAddress,
	}
}

func serviceIndex(service *ir.Service) *meshv1.Service {
	out := &meshv1.Service{Namespace: service.Key.Namespace, Name: service.Key.Name, Addresses: rawAddresses(service.Addresses)}
	for _, port := range service.Ports {
		class := meshv1.Class_CLASS_UNSPECIFIED
		switch port.Class {
		case ir.ClassTCP:
			class = meshv1.Class_CLASS_TCP
		case ir.ClassHTTP:
			class = meshv1.Class_CLASS_HTTP
		case ir.ClassAuto:
			class = meshv1.Class_CLASS_AUTO
		}
		out.Ports = append(out.Ports, &meshv1.ServicePort{Port: uint32(port.Key.Port), Class: class, Pass: port.Pass})
	}
	slices.SortFunc(out.Ports, func(a, b *meshv1.ServicePort) int { return cmp.Compare(a.Port, b.Port) })
	return out
}

func workload(pod *ir.Pod) *meshv1.Workload {
	return &meshv1.Workload{
		Uid: pod.UID, Namespace: pod.Key.Namespace, Name: pod.Key.Name, Node: pod.Node,
		Addresses: rawAddresses(pod.Addresses), SpiffeId: pod.SPIFFEID, Mtls: pod.MTLS,
	}
}

func localPod(pod *ir.Pod) *meshv1.LocalPod {
	return &meshv1.LocalPod{
		Uid: pod.UID, Namespace: pod.Key.Namespace, Name: pod.Key.Name, ServiceAccount: pod.ServiceAccount,
		SpiffeId: pod.SPIFFEID, Stage: stage(pod.Stage), Goal: stage(pod.Goal), InboundPolicy: pod.Policy,
		ProbePorts: sortedPorts(pod.ProbePorts), ServerFirstPorts: sortedPorts(pod.ServerFirstPorts), Strict: pod.Strict,
		Addresses: rawAddresses(pod.Addresses), MovedPolicy: pod.Moved, Shortcut: pod.Shortcut,
	}
}

func inboundPolicy(policy *ir.InboundPolicy) *meshv1.InboundPolicy {
	out := &meshv1.InboundPolicy{DefaultPort: portPolicy(policy.Default)}
	for _, port := range policy.Ports {
		out.Ports = append(out.Ports, portPolicy(port))
	}
	slices.SortStableFunc(out.Ports, func(a, b *meshv1.PortPolicy) int { return cmp.Compare(a.Port, b.Port) })
	return out
}

func portPolicy(p ir.PortPolicy) *meshv1.PortPolicy {
	return &meshv1.PortPolicy{
		Port: uint32(p.Port), Mode: mode(p.Mode), Protocol: protocol(p.Protocol), Http: p.HTTP, Identity: p.Identity,
		Deny: rules(p.Deny), Restricted: p.Restricted, Allow: rules(p.Allow), Closed: p.Closed, Sources: p.Sources,
	}
}

func rules(in []ir.Rule) []*meshv1.Rule {
	var out []*meshv1.Rule
	for _, rule := range in {
		r := &meshv1.Rule{Name: rule.Name}
		for _, peer := range rule.Peers {
			if peer.Prefix != "" {
				r.Peers = append(r.Peers, &meshv1.Peer{Match: &meshv1.Peer_SpiffePrefix{SpiffePrefix: peer.Prefix}})
			} else {
				r.Peers = append(r.Peers, &meshv1.Peer{Match: &meshv1.Peer_SpiffeId{SpiffeId: peer.ID}})
			}
		}
		for _, request := range rule.Requests {
			q := &meshv1.Request{Methods: request.Methods}
			for _, path := range request.Paths {
				q.Paths = append(q.Paths, stringMatch(path))
			}
			for _, header := range request.Headers {
				h := &meshv1.HeaderMatch{Name: header.Name, Match: &meshv1.HeaderMatch_Present{Present: true}}
				if header.Kind != ir.Present {
					h.Match = &meshv1.HeaderMatch_Value{Value: stringMatch(header.StringMatch)}
				}
				q.Headers = append(q.Headers, h)
			}
			r.Requests = append(r.Requests, q)
		}
		out = append(out, r)
	}
	return out
}

func stringMatch(m ir.StringMatch) *meshv1.StringMatch {
	switch m.Kind {
	case ir.Prefix, ir.PathPrefix:
		return &meshv1.StringMatch{Match: &meshv1.StringMatch_Prefix{Prefix: m.Value}}
	case ir.Regex:
		return &meshv1.StringMatch{Match: &meshv1.StringMatch_Regex{Regex: m.Value}}
	default:
		return &meshv1.StringMatch{Match: &meshv1.StringMatch_Exact{Exact: m.Value}}
	}
}

func rawAddresses(in []netip.Addr) [][]byte {
	var out [][]byte
	for _, address := range in {
		out = append(out, address.Unmap().AsSlice())
	}
	return out
}

func sortedPorts(in []uint16) []uint32 {
	var out []uint32
	for _, port := range in {
		out = append(out, uint32(port))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func mode(m ir.Mode) meshv1.Mode {
	switch m {
	case ir.Permissive:
		return meshv1.Mode_MODE_PERMISSIVE
	case ir.Strict:
		return meshv1.Mode_MODE_STRICT
	}
	return meshv1.Mode_MODE_UNSPECIFIED
}

func protocol(p ir.Protocol) meshv1.Protocol {
	switch p {
	case ir.HTTP1:
		return meshv1.Protocol_PROTOCOL_HTTP1
	case ir.HTTP2:
		return meshv1.Protocol_PROTOCOL_HTTP2
	case ir.TCP:
		return meshv1.Protocol_PROTOCOL_TCP
	case ir.TCPServerFirst:
		return meshv1.Protocol_PROTOCOL_TCP_SERVER_FIRST
	}
	return meshv1.Protocol_PROTOCOL_UNSPECIFIED
}

func stage(s ir.Stage) meshv1.Stage {
	switch s {
	case ir.Captured:
		return meshv1.Stage_STAGE_CAPTURED
	case ir.Enforced:
		return meshv1.Stage_STAGE_ENFORCED
	}
	return meshv1.Stage_STAGE_OUT
}
