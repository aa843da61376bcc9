package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
	"github.com/weftmesh/weft/test/contract/ads"
	"github.com/weftmesh/weft/test/contract/proxy"
)

// Namespace of every pod and service of a lab.
const Namespace = "shop"

// Spec says which pods and services there are.
type Spec struct {
	Pods     []PodSpec
	Services []ServiceSpec
	// Routes of the services, as users write them.
	HTTPRoutes []*gwv1.HTTPRoute
	GRPCRoutes []*gwv1.GRPCRoute
	// Module is the root of the clone, where the tools that build resources are compiled.
	Module string
	// AsOnNodes runs each Envoy under nodeproxy's supervisor, without an access log, and has each node's hooks see only what
	// runs in that node's own cgroup (Lab.Cgroup). What Pod.Dial and Pod.Listen open is then not captured.
	AsOnNodes bool
	// Concurrency is the number of worker threads of each Envoy; 0: 2.
	Concurrency int
}

// PodSpec is one pod. An Account of "" leaves it out of the mesh.
type PodSpec struct {
	Name, Account string
	// Node is 0 or 1.
	Node int
	// Last is the last part of its addresses: 10.88.<node>.<last> and fd88:<node>::<last>.
	Last byte
	// ServerFirst are ports whose server speaks first.
	ServerFirst []uint16
}

// ServiceSpec is one service: 10.96.88.<last> and fd96:88::<last>.
type ServiceSpec struct {
	Name string
	// Namespace, if not that of the pods.
	Namespace string
	Last      byte
	Ports     []PortSpec
	// Pods behind it.
	Pods []string
	// IPv4 alone, not both families.
	IPv4 bool
}

// PortSpec maps a service port to a pod port.
type PortSpec struct {
	Port, Target uint16
	Class        meshv1.Class
	Protocol     meshv1.Protocol
	// Affinity keeps a client at one endpoint.
	Affinity time.Duration
}

// Lab is the running data path.
type Lab struct {
	spec      Spec
	scratch   string
	authority *ads.Authority
	nodes     []*node
	pods      map[string]*Pod
	// generation of the endpoints behind all services.
	generation int
	rendered   map[string]rendering
}

type node struct {
	name     string
	space    *space
	own      *space // Envoy's own netns, with nothing in it
	redirect *redirect.Redirect
	ads      *ads.Server
	envoy    *proxy.Envoy
	cgroup   string
}

// Pod is a pod of the lab.
type Pod struct {
	PodSpec
	*space
	UID       string
	Addresses []netip.Addr
	lab       *Lab
	// Policy and Stage are what Apply puts into force.
	Policy *meshv1.InboundPolicy
	Stage  meshv1.Stage
	// Previous policy, whose chains are kept, and the Revision of each one's chains, by port (see lds.Form).
	Previous                   *meshv1.InboundPolicy
	Revision, PreviousRevision map[uint16]uint32
}

// ID is the pod's identity.
func (p *Pod) ID() string { return names.SPIFFEID(names.DefaultTrustDomain, Namespace, p.Account) }

// Dial connects from inside the pod, as its app would.
func (p *Pod) Dial(ctx context.Context, to string) (net.Conn, error) { return p.dial(ctx, to) }

// Listen listens inside the pod, as its app would.
func (p *Pod) Listen(port uint16) (net.Listener, error) { return p.listen(port) }

// New builds nodes, pods and cables, loads the hooks and starts the Envoys. Nothing is captured yet. Close it also
// after an error.
func New(ctx context.Context, spec Spec) (*Lab, error) {
	l := &Lab{spec: spec, scratch: os.Getenv(scratchVariable), pods: map[string]*Pod{}, rendered: map[string]rendering{}}
	for _, step := range []func(context.Context) error{l.build, l.wire, l.start} {
		if err := step(ctx); err != nil {
			return l, err
		}
	}
	return l, nil
}

// Pod finds a pod by name.
func (l *Lab) Pod(name string) *Pod { return l.pods[name] }

// Address is a service's address with a port: IPv4 or IPv6.
func (l *Lab) Address(service string, port uint16, ipv6 bool) string {
	for _, s := range l.spec.Services {
		if s.Name == service {
			return netip.AddrPortFrom(s.addresses()[map[bool]int{false: 0, true: 1}[ipv6]], port).String()
		}
	}
	panic("no service " + service)
}

func (s ServiceSpec) addresses() []netip.Addr {
	return []netip.Addr{
		netip.AddrFrom4([4]byte{10, 96, 88, s.Last}), netip.MustParseAddr(fmt.Sprintf("fd96:88::%x", s.Last))}
}

// build compiles the tools that make resources.
func (l *Lab) build(ctx context.Context) error {
	tools := map[string]string{"lds": "./nodeproxy/internal/lds/render", "xds": "./controlplane/internal/xds/render"}
	if l.spec.AsOnNodes {
		tools["nodeproxy"] = "./nodeproxy"
	}
	for tool, path := range tools {
		cmd := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(l.scratch, "bin", tool), path)
		cmd.Dir = l.spec.Module
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", path, err, out)
		}
	}
	return nil
}

func (l *Lab) wire(context.Context) error {
	for i := range 2 {
		n := &node{name: fmt.Sprintf("node%d", i)}
		l.nodes = append(l.nodes, n)
		for _, s := range []struct {
			at   **space
			name string
		}{{&n.space, n.name}, {&n.own, n.name + "-envoy"}} {
			made, err := newSpace(filepath.Join(l.scratch, "netns"), s.name)
			*s.at = made
			if err != nil {
				return err
			}
		}
		for name, value := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"} {
			if err := n.space.sysctl(name, value); err != nil {
				return err
			}
		}
	}
	var ends [2]end
	for i := range ends {
		o := 1 - i
		ends[i] = end{l.nodes[i].space, fmt.Sprintf("wire%d", i), []string{fmt.Sprintf("10.89.0.%d/24", i+1), fmt.Sprintf("fd89::%d/64", i+1)}, [][2]string{
			{fmt.Sprintf("10.88.%d.0/24", o), fmt.Sprintf("10.89.0.%d", o+1)}, {fmt.Sprintf("fd88:%d::/64", o), fmt.Sprintf("fd89::%d", o+1)}}}
	}
	if err := wire(ends[0], ends[1]); err != nil {
		return err
	}
	for _, spec := range l.spec.Pods {
		made, err := newSpace(filepath.Join(l.scratch, "netns"), "pod-"+spec.Name)
		if err != nil {
			return err
		}
		v4, v6 := fmt.Sprintf("10.88.%d.%d", spec.Node, spec.Last), fmt.Sprintf("fd88:%d::%x", spec.Node, spec.Last)
		l.pods[spec.Name] = &Pod{PodSpec: spec, space: made, UID: "uid-" + spec.Name, lab: l, Stage: meshv1.Stage_STAGE_ENFORCED,
			Addresses: []netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}}
		err = wire(
			end{l.nodes[spec.Node].space, "v" + spec.Name, []string{"169.254.1.1/32", "fe80::1/64"}, [][2]string{{v4 + "/32", ""}, {v6 + "/128", ""}}},
			end{made, "eth0", []string{v4 + "/32", v6 + "/128"}, [][2]string{{"169.254.1.1/32", ""}, {"0.0.0.0/0", "169.254.1.1"}, {"::/0", "fe80::1"}}})
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) start(ctx context.Context) (err error) {
	if l.authority, err = ads.NewAuthority(); err != nil {
		return err
	}
	base := os.Getenv(cgroupVariable)
	for i, n := range l.nodes {
		n.cgroup = filepath.Join(base, n.name)
		if err := os.Mkdir(n.cgroup, 0o755); err != nil {
			return fmt.Errorf("make Envoy's cgroup: %w", err)
		}
		root, proxies := base, n.cgroup
		if l.spec.AsOnNodes {
			root, proxies = n.cgroup, filepath.Join(n.cgroup, "envoy")
			if err := os.Mkdir(proxies, 0o755); err != nil {
				return fmt.Errorf("make Envoy's cgroup: %w", err)
			}
		}
		if n.redirect, err = redirect.Load(redirect.Config{CgroupRoot: root, PinDir: filepath.Join(l.scratch, "bpf", n.name)}); err != nil {
			return err
		}
		if err := n.redirect.AttachProxy(0, proxies); err != nil {
			return err
		}
		config := proxy.Config{Node: n.name, Dir: filepath.Join(l.scratch, "envoy"), XDS: filepath.Join(l.scratch, "envoy", n.name+".xds"), Netns: n.own.path, Concurrency: l.spec.Concurrency}
		if l.spec.AsOnNodes {
			if err := l.supervise(&config); err != nil {
				return err
			}
		}
		if n.ads, err = ads.Serve(config.XDS, func(typeURL, name string) proto.Message { return l.answer(i, typeURL, name) }); err != nil {
			return err
		}
		if l.spec.AsOnNodes {
			if err := os.Chown(config.XDS, 0, proxy.User); err != nil {
				return fmt.Errorf("give Envoy the agent's socket: %w", err)
			}
			if err := os.Chmod(config.XDS, 0o660); err != nil {
				return fmt.Errorf("give Envoy the agent's socket: %w", err)
			}
		}
		cgroup, err := os.Open(n.cgroup)
		if err != nil {
			return err
		}
		config.Cgroup = cgroup
		n.envoy, err = proxy.Start(ctx, config)
		cgroup.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// answer is what an agent makes itself: SVIDs of the node's own pods, the bundle, and refusal for what is not known.
func (l *Lab) answer(node int, typeURL, name string) proto.Message {
	switch typeURL {
	case ads.Secrets:
		if name == names.SecretBundle {
			return l.authority.Bundle(name)
		}
		for _, pod := range l.pods {
			if pod.Node == node && pod.Account != "" && pod.ID() == name {
				svid, err := l.authority.SVID(name)
				if err != nil {
					panic(err)
				}
				return svid
			}
		}
	case ads.Clusters:
		return &cluster.Cluster{Name: name, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
			LoadAssignment: &endpoint.ClusterLoadAssignment{ClusterName: name}}
	}
	return nil
}

// Close ends everything in the reverse order.
func (l *Lab) Close() error {
	var errs []error
	for _, n := range l.nodes {
		if n.envoy != nil {
			n.envoy.Stop()
		}
		if n.ads != nil {
			n.ads.Stop()
		}
		if n.redirect != nil {
			errs = append(errs, n.redirect.Release(true))
		}
		for _, s := range []*space{n.space, n.own} {
			if s != nil {
				s.close()
			}
		}
		if n.cgroup != "" {
			_ = os.Remove(filepath.Join(n.cgroup, "envoy"))
			errs = append(errs, os.Remove(n.cgroup))
		}
	}
	for _, pod := range l.pods {
		pod.space.close()
	}
	return errors.Join(errs...)
}

// Enrol captures all pods that have an account, in the order of docs/LIFECYCLE.md: listeners, inbound, outbound, mode.
func (l *Lab) Enrol(ctx context.Context) error {
	var addresses []netip.Addr
	var services []redirect.Service
	for _, pod := range l.pods {
		if pod.Account == "" {
			continue
		}
		addresses = append(addresses, pod.Addresses...)
		if err := l.nodes[pod.Node].redirect.Enrol(redirect.Pod{UID: pod.UID, Sandbox: "sandbox", NetnsPath: pod.path, Addresses: pod.Addresses}); err != nil {
			return err
		}
	}
	for _, s := range l.spec.Services {
		for _, port := range s.Ports {
			class := map[meshv1.Class]redirect.Class{meshv1.Class_CLASS_HTTP: redirect.ClassHTTP, meshv1.Class_CLASS_TCP: redirect.ClassTCP, meshv1.Class_CLASS_AUTO: redirect.ClassAuto}[port.Class]
			for _, a := range s.addresses() {
				services = append(services, redirect.Service{Addr: netip.AddrPortFrom(a, port.Port), Class: class})
			}
		}
	}
	if l.spec.AsOnNodes {
		if err := l.allow(); err != nil {
			return err
		}
	}
	if err := l.Apply(ctx); err != nil {
		return err
	}
	for _, n := range l.nodes {
		if refused, err := n.redirect.SetServices(services); err != nil || len(refused) > 0 {
			return fmt.Errorf("set services: %v, %w", refused, err)
		}
		if refused, err := n.redirect.SetAddresses(addresses); err != nil || len(refused) > 0 {
			return fmt.Errorf("set addresses: %v, %w", refused, err)
		}
	}
	for _, pod := range l.pods {
		if pod.Account == "" {
			continue
		}
		r := l.nodes[pod.Node].redirect
		err := proxy.Until(ctx, func() error {
			listeners, err := r.Listening(pod.UID)
			if err == nil && len(listeners) < 2 {
				err = fmt.Errorf("pod %s has %d listeners of Envoy", pod.Name, len(listeners))
			}
			return err
		})
		if err != nil {
			return err
		}
		if err := r.Capture(pod.UID, true, true); err != nil {
			return err
		}
	}
	return nil
}

// Shortcut switches the short circuit of every pod that has an account.
func (l *Lab) Shortcut(on bool) error {
	for _, pod := range l.pods {
		if pod.Account == "" {
			continue
		}
		if err := l.nodes[pod.Node].redirect.SetShortcut(pod.UID, on); err != nil {
			return err
		}
	}
	return nil
}

// Log is what one node's Envoy wrote, its access log included.
func (l *Lab) Log(node int) string { return l.nodes[node].envoy.Log() }

// Stat reads one of a node's Envoy's counters.
func (l *Lab) Stat(node int, name string) (uint64, error) { return l.nodes[node].envoy.Stat(name) }

// Stats reads those that a pattern names.
func (l *Lab) Stats(node int, pattern string) (string, error) {
	return l.nodes[node].envoy.Admin("GET", "/stats?usedonly&filter="+pattern)
}

// ClientAddress says whether apps see their own pod's address as their client's, on all nodes.
func (l *Lab) ClientAddress(own bool) error {
	var errs []error
	for _, n := range l.nodes {
		errs = append(errs, n.redirect.SetClientAddress(own))
	}
	return errors.Join(errs...)
}

// Memory is what a node's Envoy holds, in bytes.
func (l *Lab) Memory(node int) (uint64, error) { return l.nodes[node].envoy.Resident() }

// CPU is the processor time that a node's Envoy has taken.
func (l *Lab) CPU(node int) (time.Duration, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", l.nodes[node].envoy.PID()))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	var user, system int64
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		return 0, fmt.Errorf("read Envoy's processor time: %w", err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond, nil
}

// Claim gives a pod every address of a prefix of its node's range, to dial from.
func (p *Pod) Claim(prefix string) error {
	node := p.lab.nodes[p.Node].space
	if err := node.run(func() error {
		link, err := netlink.LinkByName("v" + p.Name)
		if err != nil {
			return err
		}
		return route(link, prefix, p.Addresses[1].String())
	}); err != nil {
		return err
	}
	return p.run(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Dst: ipNet(prefix)})
	})
}

// DialFrom connects from one of the claimed addresses.
func (p *Pod) DialFrom(ctx context.Context, from netip.Addr, to string) (conn net.Conn, err error) {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}, Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1) })
		return errors.Join(err, failed)
	}}
	err = p.run(func() error {
		conn, err = dialer.DialContext(ctx, "tcp", to)
		return err
	})
	return conn, err
}

// Command makes a process of an app inside the pod.
func (p *Pod) Command(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + p.path, name}, args...)...)
}

// Kernel reads a node's counters of the hooks.
func (l *Lab) Kernel(node int) (map[string]uint64, error) { return l.nodes[node].redirect.Counters() }

// Records parses the access log of a node: one map per line.
func (l *Lab) Records(node int) []map[string]any {
	var out []map[string]any
	for line := range strings.Lines(l.Log(node)) {
		var record map[string]any
		if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &record) == nil {
			out = append(out, record)
		}
	}
	return out
}
