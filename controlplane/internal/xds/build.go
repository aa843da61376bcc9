package xds

import (
	"net/netip"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// Type URLs of the resources that Build makes.
const (
	prefix = "type.googleapis.com/"

	TypeCluster       = prefix + "envoy.config.cluster.v3.Cluster"
	TypeEndpoints     = prefix + "envoy.config.endpoint.v3.ClusterLoadAssignment"
	TypeRoute         = prefix + "envoy.config.route.v3.RouteConfiguration"
	TypeMesh          = prefix + "weft.mesh.v1.Mesh"
	TypeNamespace     = prefix + "weft.mesh.v1.Namespace"
	TypeService       = prefix + "weft.mesh.v1.Service"
	TypeWorkload      = prefix + "weft.mesh.v1.Workload"
	TypeLocalPod      = prefix + "weft.mesh.v1.LocalPod"
	TypeInboundPolicy = prefix + "weft.mesh.v1.InboundPolicy"
)

// Build makes one resource. False: there is no such resource. Clusters, load assignments and routes always are.
func Build(s *ir.Snapshot, typeURL, name string) (proto.Message, bool) {
	switch typeURL {
	case TypeCluster:
		return Cluster(s, name), true
	case TypeEndpoints:
		return Endpoints(s, name), true
	case TypeRoute:
		return Route(s, name), true
	default:
		return buildMesh(s, typeURL, name)
	}
}

// parsePort splits "<kind>/<namespace>/<service>/<port>", the form of names.ServiceCluster and names.Route.
func parsePort(kind, name string) (ir.PortKey, bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 || parts[0] != kind {
		return ir.PortKey{}, false
	}
	number, err := strconv.ParseUint(parts[3], 10, 16)
	return ir.PortKey{Service: ir.Key{Namespace: parts[1], Name: parts[2]}, Port: uint16(number)}, err == nil
}

func findPort(s *ir.Snapshot, key ir.PortKey) *ir.ServicePort {
	service := s.Services[key.Service]
	if service == nil {
		return nil
	}
	for _, port := range service.Ports {
		if port.Key.Port == key.Port {
			return port
		}
	}
	return nil
}

// podByName finds the pod of a names.PodCluster, and of a names.TCPCluster that names a pod's own address, as hooks of an earlier
// version have Envoy ask.
func podByName(s *ir.Snapshot, name string) *ir.Pod {
	if raw, ok := strings.CutPrefix(name, "pod/"); ok {
		address, err := netip.ParseAddr(raw)
		if err != nil {
			return nil
		}
		return s.Pods[s.PodsByAddress[address.Unmap()]]
	}
	if raw, ok := strings.CutPrefix(name, "tcp/"); ok {
		address, err := netip.ParseAddrPort(raw)
		if err != nil {
			return nil
		}
		return s.Pods[s.PodsByAddress[address.Addr().Unmap()]]
	}
	return nil
}

// portByAddress finds the service port of a names.TCPCluster.
func portByAddress(s *ir.Snapshot, name string) *ir.ServicePort {
	raw, ok := strings.CutPrefix(name, "tcp/")
	if !ok {
		return nil
	}
	address, err := netip.ParseAddrPort(raw)
	if err != nil {
		return nil
	}
	key, ok := s.Owners[netip.AddrPortFrom(address.Addr().Unmap(), address.Port())]
	if !ok {
		return nil
	}
	return findPort(s, key)
}
