package xds_test

import (
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	upstream "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/xds"
	"github.com/weftmesh/weft/test/contract/golden"
)

const td = "spiffe://cluster.local/ns/shop/sa/"

func key(name string, port uint16) ir.PortKey {
	return ir.PortKey{Service: ir.Key{Namespace: "shop", Name: name}, Port: port}
}

func endpoint(address string, transport ir.Transport, account string) *ir.Endpoint {
	e := &ir.Endpoint{Address: netip.MustParseAddrPort(address), Transport: transport, Node: "node-1", Generation: "g1", Ready: true, Serving: true}
	if account != "" {
		e.Identity = td + account
	}
	return e
}

func to(name string, weight uint32) ir.Backend {
	return ir.Backend{Weight: weight, Port: key(name, 80)}
}

func match(kind ir.MatchKind, value string) *ir.StringMatch {
	return &ir.StringMatch{Kind: kind, Value: value}
}

func text(s string) *string { return &s }

// routes are the cases of a service port's routes, by name of the service.
func routes() map[string][]*ir.Route {
	second, none := time.Second, time.Duration(0)
	return map[string][]*ir.Route{
		"plain": nil,
		"split": {{Source: "HTTPRoute shop/split rule 0 match 0", Backends: []ir.Backend{to("plain", 90), to("canary", 10)}}},
		"matches": {
			{Source: "r0", Match: ir.RouteMatch{Path: match(ir.Exact, "/exact")}, Backends: []ir.Backend{to("plain", 1)}},
			{Source: "r1", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/items/"), Method: "GET"}, Backends: []ir.Backend{to("plain", 1)}},
			{Source: "r2", Match: ir.RouteMatch{Path: match(ir.Regex, "/v[0-9]+/.*"), Headers: []ir.NamedMatch{
				{Name: "x-user", StringMatch: ir.StringMatch{Kind: ir.Regex, Value: "a.*"}}, {Name: "x-any", StringMatch: ir.StringMatch{Kind: ir.Present}}}}, Backends: []ir.Backend{to("plain", 1)}},
			{Source: "r3", Match: ir.RouteMatch{Query: []ir.NamedMatch{{Name: "debug", StringMatch: ir.StringMatch{Kind: ir.Exact, Value: "1"}}, {Name: "any", StringMatch: ir.StringMatch{Kind: ir.Present}}}}, Backends: []ir.Backend{to("canary", 1)}},
			{Source: "r4", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/")}, Backends: []ir.Backend{to("plain", 1)}},
		},
		"filters": {
			{Source: "r0", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/old")}, Rewrite: &ir.Rewrite{PrefixPath: text("/new"), Hostname: "new.example.com"},
				RequestHeaders:  ir.HeaderEdit{Set: []ir.Header{{Name: "x-set", Value: "100%"}}, Add: []ir.Header{{Name: "x-add", Value: ""}}, Remove: []string{"x-gone"}},
				ResponseHeaders: ir.HeaderEdit{Add: []ir.Header{{Name: "x-back", Value: "1"}}, Remove: []string{"server"}},
				Timeout:         &second, BackendTimeout: &second, Backends: []ir.Backend{to("plain", 1)}},
			{Source: "r1", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/strip")}, Rewrite: &ir.Rewrite{PrefixPath: text("/")}, Timeout: &none, Backends: []ir.Backend{to("plain", 1)}},
			{Source: "r2", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/full")}, Rewrite: &ir.Rewrite{Path: text(`/one\two`)}, Backends: []ir.Backend{
				{Weight: 1, Port: key("plain", 80), RequestHeaders: ir.HeaderEdit{Set: []ir.Header{{Name: "x-backend", Value: "plain"}}}}}},
			{Source: "r3", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/")}, Rewrite: &ir.Rewrite{PrefixPath: text("/root")}, Backends: []ir.Backend{to("plain", 1)}},
		},
		"redirects": {
			{Source: "r0", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/a")}, Redirect: &ir.Redirect{Scheme: "https", Hostname: "example.com", Port: 8443, Status: 301}},
			{Source: "r1", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/b")}, Redirect: &ir.Redirect{PrefixPath: text("/c"), Status: 308}},
			{Source: "r2", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/d")}, Redirect: &ir.Redirect{PrefixPath: text("/"), Status: 307}},
			{Source: "r3", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/e")}, Redirect: &ir.Redirect{Path: text("/f"), Status: 303}},
			{Source: "r4", Redirect: &ir.Redirect{Hostname: "x.example.com"}},
			{Source: "https, no port", Redirect: &ir.Redirect{Scheme: "https"}},
			{Source: "http, no port", Redirect: &ir.Redirect{Scheme: "http"}},
			{Source: "https of another host, no port", Redirect: &ir.Redirect{Scheme: "https", Hostname: "x.example.com"}},
			{Source: "https of another host, its own port", Redirect: &ir.Redirect{Scheme: "https", Hostname: "x.example.com", Port: 443}},
			{Source: "another host, port of http", Redirect: &ir.Redirect{Hostname: "x.example.com", Port: 443}},
			{Source: "port alone", Redirect: &ir.Redirect{Port: 8443}},
		},
		"broken": {
			{Source: "r0", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/part")}, Backends: []ir.Backend{to("plain", 3), {Weight: 1, Status: 500}}},
			{Source: "r1", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/all")}, Backends: []ir.Backend{{Weight: 1, Status: 500}}},
			{Source: "r2", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/zero")}, Backends: []ir.Backend{to("plain", 0)}},
		},
		"consumer": {
			{Source: "c0", Match: ir.RouteMatch{SourceNamespace: "team", Path: match(ir.PathPrefix, "/")}, Backends: []ir.Backend{to("canary", 1)}},
		},
		"consumer-and-producer": {
			{Source: "c0", Match: ir.RouteMatch{SourceNamespace: "team", Path: match(ir.PathPrefix, "/x")}, Backends: []ir.Backend{to("canary", 1)}},
			{Source: "p0", Match: ir.RouteMatch{Path: match(ir.PathPrefix, "/y")}, Backends: []ir.Backend{to("plain", 1)}},
		},
		"grpc": {
			{Source: "g0", Match: ir.RouteMatch{GRPC: true, Path: match(ir.Exact, "/shop.Stock/Get")}, Backends: []ir.Backend{to("grpc", 1)}},
			{Source: "g1", Match: ir.RouteMatch{GRPC: true, Path: match(ir.Regex, "/shop.Stock/.+")}, Backends: []ir.Backend{to("grpc", 3), to("canary", 1)}},
		},
		"sticky": nil,
	}
}

func snapshot() *ir.Snapshot {
	s := &ir.Snapshot{
		Mesh:          ir.Mesh{TrustDomain: "cluster.local", DefaultMode: ir.Permissive, ConnectionsPerPod: 4000},
		Namespaces:    map[string]*ir.Namespace{"shop": {Name: "shop", Enrol: true, Mode: ir.Strict}, "batch": {Name: "batch"}},
		Services:      map[ir.Key]*ir.Service{},
		Pods:          map[string]*ir.Pod{},
		Policies:      map[string]*ir.InboundPolicy{},
		Owners:        map[netip.AddrPort]ir.PortKey{},
		PodsByAddress: map[netip.Addr]string{},
	}
	byName := routes()
	byName["canary"], byName["tcp"], byName["mixed"], byName["draining"], byName["empty"], byName["local"] = nil, nil, nil, nil, nil, nil
	host := byte(0)
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		host++
		address := netip.AddrFrom4([4]byte{10, 96, 0, host})
		port := &ir.ServicePort{Key: key(name, 80), Protocol: ir.HTTP1, Class: ir.ClassHTTP, Routes: byName[name],
			Endpoints: []*ir.Endpoint{endpoint("10.1.0.2:8080", ir.MTLS, "catalogue"), endpoint("[fd00::2]:8080", ir.MTLS, "catalogue")}}
		switch name {
		case "grpc":
			port.Protocol = ir.HTTP2
		case "tcp":
			port.Protocol, port.Class = ir.TCP, ir.ClassTCP
		case "sticky":
			port.Affinity = 3 * time.Hour
		case "local":
			port.Class, port.LocalOnly = ir.ClassAuto, true
		case "empty":
			port.Endpoints = nil
		case "mixed":
			port.Endpoints = []*ir.Endpoint{endpoint("10.1.0.9:8080", ir.Plain, ""), endpoint("10.1.0.4:8080", ir.MTLS, "other"),
				endpoint("10.1.0.3:8080", ir.MTLS, "catalogue"), endpoint("10.1.0.5:8080", ir.Refuse, ""), endpoint("10.1.0.6:8080", ir.MTLS, "")}
		case "draining":
			for _, e := range port.Endpoints {
				e.Ready = false
			}
		}
		service := &ir.Service{Key: port.Key.Service, Addresses: []netip.Addr{address}, Ports: []*ir.ServicePort{port}}
		s.Services[service.Key] = service
		s.Owners[netip.AddrPortFrom(address, 80)] = port.Key
	}
	for uid, pod := range map[string]*ir.Pod{
		"uid-mtls":   {Addresses: addresses("10.1.0.2", "fd00::2"), Goal: ir.Enforced, Stage: ir.Enforced, MTLS: true, Strict: true, Policy: "hash", Moved: "hash", ProbePorts: []uint16{8081, 8080}, ServerFirstPorts: []uint16{3306}, Shortcut: true},
		"uid-plain":  {Addresses: addresses("10.1.0.3"), Goal: ir.Enforced, Stage: ir.Captured},
		"uid-strict": {Addresses: addresses("10.1.0.4"), Goal: ir.Enforced, Stage: ir.Captured, Strict: true},
		"uid-out":    {Addresses: addresses("10.1.0.5")},
	} {
		pod.UID, pod.Key, pod.Node, pod.ServiceAccount, pod.SPIFFEID = uid, ir.Key{Namespace: "shop", Name: "pod-" + uid}, "node-1", "catalogue", td+"catalogue"
		s.Pods[uid] = pod
		for _, address := range pod.Addresses {
			s.PodsByAddress[address] = uid
		}
	}
	s.Policies["hash"] = &ir.InboundPolicy{Hash: "hash", Default: ir.PortPolicy{Mode: ir.Strict}, Ports: []ir.PortPolicy{
		{Port: 9090, Mode: ir.Strict, Closed: true},
		{Port: 8080, Mode: ir.Permissive, Protocol: ir.HTTP1, HTTP: true, Identity: true, Restricted: true, Sources: []string{"AccessPolicy shop/reads"},
			Deny: []ir.Rule{{Name: "shop/deny[0]", Peers: []ir.Peer{{Prefix: "spiffe://cluster.local/ns/batch/"}}}},
			Allow: []ir.Rule{{Name: "shop/reads[0]", Peers: []ir.Peer{{ID: td + "front"}}, Requests: []ir.Request{{
				Methods: []string{"GET"}, Paths: []ir.StringMatch{{Kind: ir.PathPrefix, Value: "/items"}, {Kind: ir.Regex, Value: "/x.*"}},
				Headers: []ir.NamedMatch{{Name: "x-a", StringMatch: ir.StringMatch{Kind: ir.Present}}, {Name: "x-b", StringMatch: ir.StringMatch{Kind: ir.Exact, Value: "b"}}}}}}}},
	}}
	return s
}

func addresses(in ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range in {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func build[M proto.Message](t *testing.T, s *ir.Snapshot, typeURL string, resources ...string) []proto.Message {
	t.Helper()
	var out []proto.Message
	for _, name := range resources {
		m, ok := xds.Build(s, typeURL, name)
		if !ok {
			t.Fatalf("no %s %q", typeURL, name)
		}
		if _, right := m.(M); !right {
			t.Fatalf("%s %q is a %T", typeURL, name, m)
		}
		out = append(out, m)
	}
	return out
}

func TestResources(t *testing.T) {
	dir := golden.Open(t, "testdata")
	s := snapshot()
	for name := range routes() {
		t.Run("route-"+name, func(t *testing.T) {
			dir.Check(t, "route-"+name, golden.File{Routes: build[proto.Message](t, s, xds.TypeRoute, names.Route("shop", name, 80))})
		})
	}
	for name, clusters := range map[string][]string{
		"http":     {names.ServiceCluster("shop", "plain", 80)},
		"grpc":     {names.ServiceCluster("shop", "grpc", 80)},
		"mixed":    {names.ServiceCluster("shop", "mixed", 80)},
		"draining": {names.ServiceCluster("shop", "draining", 80)},
		"empty":    {names.ServiceCluster("shop", "empty", 80)},
		"sticky":   {names.ServiceCluster("shop", "sticky", 80)},
		"local":    {names.ServiceCluster("shop", "local", 80)},
		"tcp":      {tcpName(s, "tcp")},
		"pod":      {"pod/10.1.0.2", "pod/fd00::2", "pod/10.1.0.3", "tcp/10.1.0.2:9999"},
		"refusing": {"svc/shop/none/80", "svc/shop/plain/81", "svc/shop/plain/x", "tcp/10.96.0.99:80", "tcp/x", "pod/10.1.0.4", "pod/10.9.9.9", "pod/x", "else"},
	} {
		t.Run("cluster-"+name, func(t *testing.T) {
			file := golden.File{Clusters: build[*cluster.Cluster](t, s, xds.TypeCluster, clusters...)}
			for _, m := range file.Clusters {
				if c := m.(*cluster.Cluster); c.GetType() == cluster.Cluster_EDS {
					file.Endpoints = append(file.Endpoints, build[proto.Message](t, s, xds.TypeEndpoints, c.GetName())...)
				}
			}
			dir.Check(t, "cluster-"+name, file)
		})
	}
	t.Run("mesh", func(t *testing.T) {
		var file golden.File
		for _, kind := range []string{xds.TypeMesh, xds.TypeNamespace, xds.TypeWorkload, xds.TypeLocalPod} {
			file.Mesh = append(file.Mesh, build[proto.Message](t, s, kind, xds.Names(s, kind, "node-1")...)...)
		}
		file.Mesh = append(file.Mesh, build[proto.Message](t, s, xds.TypeService, "shop/plain", "shop/tcp", "shop/local")...)
		file.Mesh = append(file.Mesh, build[proto.Message](t, s, xds.TypeInboundPolicy, "hash")...)
		dir.Check(t, "mesh", file)
	})
	t.Run("route-edges", func(t *testing.T) { dir.Check(t, "route-edges", golden.File{Routes: oddRoute(t)}) })
	t.Run("route-unknown", func(t *testing.T) {
		dir.Check(t, "route-unknown", golden.File{Routes: build[proto.Message](t, s, xds.TypeRoute, "route/shop/none/80", "else")})
	})
}

func tcpName(s *ir.Snapshot, service string) string {
	for address, owner := range s.Owners {
		if owner.Service.Name == service {
			return names.TCPCluster(address)
		}
	}
	return ""
}

// TestSameInputSameBytes: resource versions are hashes of the bytes, and must be equal on every replica.
func TestSameInputSameBytes(t *testing.T) {
	for range 5 {
		for _, r := range [][2]string{
			{xds.TypeCluster, "svc/shop/mixed/80"}, {xds.TypeEndpoints, "svc/shop/mixed/80"}, {xds.TypeRoute, "route/shop/matches/80"},
			{xds.TypeInboundPolicy, "hash"}, {xds.TypeLocalPod, "node-1/uid-mtls"},
		} {
			a, _ := xds.Build(snapshot(), r[0], r[1])
			b, _ := xds.Build(snapshot(), r[0], r[1])
			x, _ := proto.MarshalOptions{Deterministic: true}.Marshal(a)
			y, _ := proto.MarshalOptions{Deterministic: true}.Marshal(b)
			if string(x) != string(y) {
				t.Errorf("%s %s: other bytes", r[0], r[1])
			}
		}
	}
}

// TestPoolAge: callers replace HTTP connections before callees cut them, at 40 % of SVIDs' life.
func TestPoolAge(t *testing.T) {
	for life, want := range map[time.Duration]time.Duration{0: 5 * time.Minute, time.Hour: 5 * time.Minute, 6 * time.Minute: 2 * time.Minute, time.Minute: 20 * time.Second} {
		s := snapshot()
		s.Mesh.SVIDLife = life
		var options upstream.HttpProtocolOptions
		for _, packed := range xds.Cluster(s, "svc/shop/mixed/80").TypedExtensionProtocolOptions {
			if err := packed.UnmarshalTo(&options); err != nil {
				t.Fatal(err)
			}
		}
		if got := options.GetCommonHttpProtocolOptions().GetMaxConnectionDuration().AsDuration(); got != want {
			t.Errorf("SVIDs live for %s: connections for %s, want %s", life, got, want)
		}
	}
}

func TestUnknownMeshResources(t *testing.T) {
	s := snapshot()
	for _, r := range [][2]string{
		{xds.TypeMesh, "other"}, {xds.TypeNamespace, "none"}, {xds.TypeService, "shop"}, {xds.TypeService, "shop/none"}, {xds.TypeWorkload, "uid-out"},
		{xds.TypeWorkload, "none"}, {xds.TypeLocalPod, "node-2/uid-mtls"}, {xds.TypeLocalPod, "uid-mtls"}, {xds.TypeInboundPolicy, "none"}, {"other", "mesh"},
	} {
		if m, ok := xds.Build(s, r[0], r[1]); ok {
			t.Errorf("%s %q: got %v", r[0], r[1], m)
		}
	}
	if got := xds.Names(s, xds.TypeLocalPod, "node-2"); len(got) != 0 {
		t.Errorf("node-2 got node-1's pods %v", got)
	}
}
