// Command render prints what the controller would serve for a mesh given as JSON on standard input, as a golden file.
// Tests outside this module's internal tree use it, and whoever wants to see what a route becomes.
package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/xds"
	"github.com/weftmesh/weft/test/contract/golden"
)

type input struct {
	Services []*ir.Service
	Pods     []*ir.Pod
	Policies []*ir.InboundPolicy
	// Clusters are further names to build.
	Clusters []string
	// Routes of the services, as users write them.
	HTTPRoutes []*gwv1.HTTPRoute
	GRPCRoutes []*gwv1.GRPCRoute
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

func run() error {
	var in input
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		return fmt.Errorf("read mesh: %w", err)
	}
	s := &ir.Snapshot{
		Services: map[ir.Key]*ir.Service{}, Pods: map[string]*ir.Pod{}, Policies: map[string]*ir.InboundPolicy{},
		Owners: map[netip.AddrPort]ir.PortKey{}, PodsByAddress: map[netip.Addr]string{},
	}
	for _, service := range in.Services {
		s.Services[service.Key] = service
		for _, port := range service.Ports {
			for _, address := range service.Addresses {
				s.Owners[netip.AddrPortFrom(address, port.Key.Port)] = port.Key
			}
		}
	}
	if err := resolveRoutes(in); err != nil {
		return err
	}
	for _, pod := range in.Pods {
		s.Pods[pod.UID] = pod
		for _, address := range pod.Addresses {
			s.PodsByAddress[address] = pod.UID
		}
	}
	out, err := all(s, in).Marshal()
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(out)
	return err
}

// resolveRoutes gives the services' ports the routes that resolve makes.
func resolveRoutes(in input) error {
	objects := resolve.Input{HTTPRoutes: in.HTTPRoutes, GRPCRoutes: in.GRPCRoutes}
	for _, service := range in.Services {
		one := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: service.Key.Namespace, Name: service.Key.Name}}
		for _, address := range service.Addresses {
			one.Spec.ClusterIPs = append(one.Spec.ClusterIPs, address.String())
		}
		for _, port := range service.Ports {
			protocol := map[ir.Protocol]string{ir.HTTP1: "http", ir.HTTP2: "kubernetes.io/h2c", ir.TCP: "tcp", ir.TCPServerFirst: "mysql"}[port.Protocol]
			out := corev1.ServicePort{Name: fmt.Sprint("port-", port.Key.Port), Port: int32(port.Key.Port)}
			if port.Class != ir.ClassAuto {
				out.AppProtocol = &protocol
			}
			one.Spec.Ports = append(one.Spec.Ports, out)
		}
		objects.Services = append(objects.Services, one)
	}
	result := resolve.Resolve(nil, objects)
	for _, p := range result.Problems {
		if p.Type == "Accepted" {
			return fmt.Errorf("%s %s/%s: %s: %s", p.Object.Kind, p.Object.Namespace, p.Object.Name, p.Reason, p.Message)
		}
	}
	for _, service := range in.Services {
		for i, port := range result.Snapshot.Services[service.Key].Ports {
			service.Ports[i].Routes = port.Routes
		}
	}
	return nil
}

func all(s *ir.Snapshot, in input) golden.File {
	var file golden.File
	add := func(section *[]proto.Message, typeURL, name string) {
		if m, ok := xds.Build(s, typeURL, name); ok {
			*section = append(*section, m)
		}
	}
	for _, service := range in.Services {
		add(&file.Mesh, xds.TypeService, service.Key.String())
		for _, port := range service.Ports {
			name := names.ServiceCluster(service.Key.Namespace, service.Key.Name, port.Key.Port)
			add(&file.Clusters, xds.TypeCluster, name)
			add(&file.Endpoints, xds.TypeEndpoints, name)
			add(&file.Routes, xds.TypeRoute, names.Route(service.Key.Namespace, service.Key.Name, port.Key.Port))
			for _, address := range service.Addresses {
				tcp := names.TCPCluster(netip.AddrPortFrom(address, port.Key.Port))
				add(&file.Clusters, xds.TypeCluster, tcp)
				add(&file.Endpoints, xds.TypeEndpoints, tcp)
			}
		}
	}
	for _, pod := range in.Pods {
		for _, address := range pod.Addresses {
			add(&file.Clusters, xds.TypeCluster, names.PodCluster(address))
		}
	}
	for _, name := range in.Clusters {
		add(&file.Clusters, xds.TypeCluster, name)
	}
	for _, policy := range in.Policies {
		s.Policies[policy.Hash] = policy
		add(&file.Mesh, xds.TypeInboundPolicy, policy.Hash)
	}
	return file
}
