package lab

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	envoytls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
	"github.com/weftmesh/weft/test/contract/ads"
	"github.com/weftmesh/weft/test/contract/golden"
)

// Bump gives every endpoint a new generation at the next Apply: callers' pools move to new connections.
func (l *Lab) Bump() { l.generation++ }

// Apply builds all resources anew, gives them to the Envoys and waits for their acknowledgement. The kernel's mode
// follows the pods' policies.
func (l *Lab) Apply(ctx context.Context) error {
	controller, err := l.render("xds", l.controllerInput())
	if err != nil {
		return err
	}
	for i, n := range l.nodes {
		agent, err := l.render("lds", l.agentInput(i, controller))
		if err != nil {
			return err
		}
		if err := n.push(ctx, controller, agent); err != nil {
			return err
		}
	}
	for _, pod := range l.pods {
		if pod.Account == "" {
			continue
		}
		mode := redirect.Mode{Strict: pod.Policy.GetDefaultPort().GetMode() == meshv1.Mode_MODE_STRICT, ServerFirst: pod.ServerFirst}
		if err := l.nodes[pod.Node].redirect.SetMode(pod.UID, mode); err != nil {
			return err
		}
	}
	return nil
}

func (n *node) push(ctx context.Context, controller, agent golden.File) error {
	for _, m := range agent.Secrets {
		n.ads.Offer(ads.Secrets, m.(*envoytls.Secret).GetName(), m)
	}
	for _, m := range controller.Endpoints {
		n.ads.Offer(ads.Endpoints, m.(*endpoint.ClusterLoadAssignment).GetClusterName(), m)
	}
	for _, m := range controller.Clusters {
		n.ads.Offer(ads.Clusters, m.(*cluster.Cluster).GetName(), m)
	}
	for _, m := range controller.Routes {
		n.ads.Offer(ads.Routes, m.(*routev3.RouteConfiguration).GetName(), m)
	}
	for _, m := range agent.Clusters {
		n.ads.Set(ads.Clusters, m.(*cluster.Cluster).GetName(), m)
	}
	for _, m := range agent.Scopes {
		n.ads.Set(ads.Scopes, m.(*routev3.ScopedRouteConfiguration).GetName(), m)
	}
	for _, m := range agent.Listeners {
		name := m.(*listener.Listener).GetName()
		n.ads.Set(ads.Listeners, name, m)
		if err := n.ads.Acked(ctx, ads.Listeners, name); err != nil {
			return err
		}
	}
	// What is asked for by name must be there in its newest version too.
	for _, kind := range []string{ads.Secrets, ads.Clusters, ads.Endpoints, ads.Routes} {
		for _, name := range n.ads.Asked(kind) {
			if n.ads.Has(kind, name) {
				if err := n.ads.Acked(ctx, kind, name); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (l *Lab) render(tool string, in any) (golden.File, error) {
	var file golden.File
	raw, err := json.Marshal(in)
	if err != nil {
		return file, err
	}
	if last := l.rendered[tool]; bytes.Equal(last.in, raw) {
		return last.out, nil
	}
	cmd := exec.Command(filepath.Join(l.scratch, "bin", tool))
	var complaint bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(raw), &complaint
	out, err := cmd.Output()
	if err != nil {
		return file, fmt.Errorf("build resources: %w: %s", err, complaint.String())
	}
	err = golden.Decode(out, &file)
	if err == nil {
		l.rendered[tool] = rendering{in: raw, out: file}
	}
	return file, err
}

// rendering is what a builder made of its input; reading its megabyte takes longer than all else that Apply does.
type rendering struct {
	in  []byte
	out golden.File
}

type object = map[string]any

// controllerInput is the mesh as the controller would have resolved it.
func (l *Lab) controllerInput() object {
	var services, pods []any
	var direct []string
	for _, s := range l.spec.Services {
		var ports []any
		key := object{"Namespace": cmp.Or(s.Namespace, Namespace), "Name": s.Name}
		for _, port := range s.Ports {
			var endpoints []any
			for _, name := range s.Pods {
				pod := l.pods[name]
				for _, a := range pod.Addresses {
					if s.IPv4 && !a.Is4() {
						continue
					}
					direct = append(direct, names.PodCluster(a))
					endpoints = append(endpoints, object{"Address": netip.AddrPortFrom(a, port.Target), "Transport": 2, "Identity": pod.ID(),
						"Pod": pod.UID, "Generation": fmt.Sprint(l.generation), "Ready": true, "Serving": true})
				}
			}
			ports = append(ports, object{"Key": object{"Service": key, "Port": port.Port}, "Protocol": port.Protocol, "Class": port.Class, "Endpoints": endpoints, "Affinity": port.Affinity})
		}
		services = append(services, object{"Key": key, "Addresses": s.addresses(), "Ports": ports})
	}
	for _, s := range l.spec.Pods {
		if pod := l.pods[s.Name]; pod.Account != "" {
			pods = append(pods, object{"UID": pod.UID, "SPIFFEID": pod.ID(), "Addresses": pod.Addresses, "Stage": 2, "MTLS": true})
		}
	}
	slices.Sort(direct)
	return object{"Services": services, "Pods": pods, "Clusters": slices.Compact(direct), "HTTPRoutes": l.spec.HTTPRoutes, "GRPCRoutes": l.spec.GRPCRoutes}
}

// agentInput is what the node's agent knows.
func (l *Lab) agentInput(node int, controller golden.File) object {
	var pods, services []any
	for _, pod := range l.pods {
		if pod.Node != node || pod.Account == "" {
			continue
		}
		policy, err := protojson.Marshal(pod.Policy)
		if err != nil {
			panic(err)
		}
		var previous json.RawMessage
		if pod.Previous != nil {
			if previous, err = protojson.Marshal(pod.Previous); err != nil {
				panic(err)
			}
		}
		pods = append(pods, object{"Previous": previous, "UID": pod.UID, "Namespace": Namespace, "SPIFFEID": pod.ID(), "Sandbox": "sandbox", "NetnsPath": pod.path,
			"Stage": pod.Stage, "ServerFirst": pod.ServerFirst, "AccessLog": !l.spec.AsOnNodes, "Revision": pod.Revision, "PreviousRevision": pod.PreviousRevision, "Policy": json.RawMessage(policy)})
	}
	for _, m := range controller.Mesh {
		if service, ok := m.(*meshv1.Service); ok {
			raw, err := protojson.Marshal(service)
			if err != nil {
				panic(err)
			}
			services = append(services, json.RawMessage(raw))
		}
	}
	return object{"Roots": string(l.authority.Roots()), "Pods": pods, "Services": services}
}
