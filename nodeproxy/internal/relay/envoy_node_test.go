package relay_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	raw "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/relay/relaytest"
	"github.com/weftmesh/weft/test/contract/proxy"
)

const (
	// patience is at least ten times what anything here may take.
	patience = 20 * time.Second

	destination = "10.96.0.10:80"
	serviceName = "svc/shop/till/80"
	routeName   = "route/shop/till/80"
	till        = "spiffe://cluster.local/ns/shop/sa/till"
)

// node is one Envoy with the relay before it and a controller behind that.
type node struct {
	controller *relaytest.Controller
	cache      *relay.Cache
	upstream   *relay.Upstream
	envoy      *proxy.Envoy
	dir        string
	port       uint32
	server     *grpc.Server
	stopUp     context.CancelFunc
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "weft-relay-") // short, for Unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n := &node{controller: relaytest.NewController(t), dir: dir, port: freePort(t)}
	n.agent(t)
	n.cache.Prime()
	n.start(t)
	// Envoy is ready, and acknowledges listeners, before its workers accept.
	until(t, "Envoy listens", func() bool { return listens(n.port) }, nil)
	return n
}

// agent makes a new cache and upstream, as a starting agent has them.
func (n *node) agent(t *testing.T) {
	t.Helper()
	var upstream *relay.Upstream
	n.cache = relay.NewCache(relay.Config{Want: func(k relay.Key, wanted bool) { upstream.Want(k, wanted) }, Log: slog.New(slog.DiscardHandler)})
	upstream = relay.NewUpstream(relay.UpstreamConfig{
		Connect: n.controller.Connect, Node: "node", Cache: n.cache, Log: slog.New(slog.DiscardHandler),
		Apply: func(context.Context, string) error { return nil },
		Instead: func(k relay.Key) *anypb.Any {
			if k.TypeURL != relay.TypeRoute {
				return nil
			}
			return wrap(t, lds.Away(k.Name))
		},
	})
	n.upstream = upstream
	n.give(t, n.entry(t))
	n.give(t, n.scope())
	ctx, cancel := context.WithCancel(context.Background())
	n.stopUp = cancel
	t.Cleanup(cancel)
	go upstream.Run(ctx)
	n.serve(t)
}

// scope leads the destination to its routes.
func (n *node) scope() *route.ScopedRouteConfiguration {
	return &route.ScopedRouteConfiguration{
		Name: destination, OnDemand: true, RouteConfigurationName: routeName,
		Key: &route.ScopedRouteConfiguration_Key{Fragments: []*route.ScopedRouteConfiguration_Key_Fragment{{
			Type: &route.ScopedRouteConfiguration_Key_Fragment_StringKey{StringKey: destination}}}},
	}
}

func (n *node) serve(t *testing.T) {
	t.Helper()
	socket := filepath.Join(n.dir, "xds")
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	n.server = grpc.NewServer()
	(&relay.Service{Cache: n.cache}).Register(n.server)
	go n.server.Serve(l) // ends with Stop
	t.Cleanup(n.server.Stop)
}

func (n *node) start(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	e, err := proxy.Start(ctx, proxy.Config{Node: "relaytest", Dir: n.dir, XDS: filepath.Join(n.dir, "xds"), Concurrency: 2})
	if err != nil {
		t.Fatal(err)
	}
	n.envoy = e
	t.Cleanup(func() {
		e.Stop()
		if t.Failed() {
			t.Logf("Envoy's log:\n%s", e.Log())
		}
	})
}

type named interface {
	proto.Message
	GetName() string
}

// give sets a resource of the agent's own and returns its key and version.
func (n *node) give(t *testing.T, m named) (relay.Key, string) {
	t.Helper()
	version, err := n.cache.Set(m.GetName(), m)
	if err != nil {
		t.Fatal(err)
	}
	return relay.Key{TypeURL: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Name: m.GetName()}, version
}

func (n *node) wait(t *testing.T, k relay.Key, version string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := n.cache.Wait(ctx, k, version); err != nil {
		t.Fatal(err)
	}
}

// entry is an outbound listener on loopback, as pods have it but that the destination is a header of the client's.
func (n *node) entry(t *testing.T) *listener.Listener {
	t.Helper()
	l := lds.Holder()
	var m hcm.HttpConnectionManager
	if err := l.FilterChains[0].Filters[0].GetTypedConfig().UnmarshalTo(&m); err != nil {
		t.Fatal(err)
	}
	m.EarlyHeaderMutationExtensions = nil
	l.FilterChains[0].Filters[0].ConfigType = &listener.Filter_TypedConfig{TypedConfig: wrap(t, &m)}
	l.Name, l.BindToPort, l.AdditionalAddresses = "entry", nil, nil
	l.Address = address("127.0.0.1", n.port)
	return l
}

// get asks through Envoy on a connection of its own.
func (n *node) get() (status int, answer string, err error) {
	response, err := n.ask(destination)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	var body [64]byte
	size, _ := response.Body.Read(body[:])
	return response.StatusCode, string(body[:size]), nil
}

// getFrom asks a destination, and returns the headers of the answer.
func (n *node) getFrom(destination string) (http.Header, error) {
	response, err := n.ask(destination)
	if err != nil {
		return nil, err
	}
	return response.Header, response.Body.Close()
}

func (n *node) ask(destination string) (*http.Response, error) {
	request, err := http.NewRequest("GET", fmt.Sprintf("http://127.0.0.1:%d/", n.port), nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set(names.HeaderDestination, destination)
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	return client.Do(request)
}

// answered waits for an answer of a backend.
func (n *node) answered(t *testing.T, want string) {
	t.Helper()
	last := ""
	until(t, "a request is answered by "+want, func() bool {
		status, answer, err := n.get()
		last = fmt.Sprint(status, " ", answer, " ", err)
		return status == 200 && answer == want
	}, func() string { return last })
}

// serveFrom makes a first request, and the controller answer what it needs with a backend.
func (n *node) serveFrom(t *testing.T, b backend) {
	t.Helper()
	until(t, "the listener is there", func() bool { return listens(n.port) }, nil)
	go n.get()
	n.asked(t, relay.TypeRoute, routeName)
	n.controller.Send(t, relay.TypeRoute, map[string]proto.Message{routeName: routes()})
	n.asked(t, relay.TypeCluster, serviceName)
	n.controller.Send(t, relay.TypeCluster, map[string]proto.Message{serviceName: service(t, b)})
	n.asked(t, relay.TypeEndpoints, serviceName)
	n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)})
}

func (n *node) asked(t *testing.T, typeURL, name string) {
	t.Helper()
	until(t, "the agent asks for "+name, func() bool { return n.controller.Asked(typeURL, name) }, nil)
}

// backend is a server that answers with its name.
type backend struct {
	name string
	peer string // names.TransportSocketPlain or a SPIFFE ID
	port uint32
	root []byte // PEM
}

func plainBackend(t *testing.T, name string) backend {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) }))
	t.Cleanup(s.Close)
	return backend{name: name, peer: names.TransportSocketPlain, port: uint32(s.Listener.Addr().(*net.TCPAddr).Port)}
}

func meshBackend(t *testing.T, name, id string) backend {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{uri}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) }))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}
	s.StartTLS()
	t.Cleanup(s.Close)
	return backend{name: name, peer: id, port: uint32(s.Listener.Addr().(*net.TCPAddr).Port), root: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// service is the controller's cluster for these backends: one match for each, and nobody's for any other.
func service(t *testing.T, backends ...backend) *cluster.Cluster {
	t.Helper()
	c := &cluster.Cluster{
		Name: serviceName, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS}, ConnectTimeout: durationpb.New(patience),
		EdsClusterConfig: &cluster.Cluster_EdsClusterConfig{EdsConfig: adsSource()},
		TransportSocket:  socket(t, backend{peer: "weft:nobody", root: meshBackend(t, "", "weft:nobody").root}),
	}
	for _, b := range backends {
		c.TransportSocketMatches = append(c.TransportSocketMatches, &cluster.Cluster_TransportSocketMatch{Name: b.peer, Match: peer(b), TransportSocket: socket(t, b)})
	}
	return c
}

func socket(t *testing.T, b backend) *core.TransportSocket {
	t.Helper()
	var config proto.Message = &raw.RawBuffer{}
	if b.peer != names.TransportSocketPlain {
		config = &tlsv3.UpstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
			TlsParams: &tlsv3.TlsParameters{TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3},
			ValidationContextType: &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
				TrustedCa: &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: b.root}},
				MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{SanType: tlsv3.SubjectAltNameMatcher_URI,
					Matcher: &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: b.peer}}}},
			}},
		}}
	}
	name := map[bool]string{true: "envoy.transport_sockets.raw_buffer", false: "envoy.transport_sockets.tls"}[b.peer == names.TransportSocketPlain]
	return &core.TransportSocket{Name: name, ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: wrap(t, config)}}
}

func peer(b backend) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{names.MetadataPeer: structpb.NewStringValue(b.peer)}}
}

func endpoints(backends ...backend) *endpoint.ClusterLoadAssignment {
	group := &endpoint.LocalityLbEndpoints{}
	for _, b := range backends {
		group.LbEndpoints = append(group.LbEndpoints, &endpoint.LbEndpoint{
			Metadata:       &core.Metadata{FilterMetadata: map[string]*structpb.Struct{names.MetadataNamespace: peer(b)}},
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: address("127.0.0.1", b.port)}},
		})
	}
	return &endpoint.ClusterLoadAssignment{ClusterName: serviceName, Endpoints: []*endpoint.LocalityLbEndpoints{group}}
}

func routes() *route.RouteConfiguration {
	return &route.RouteConfiguration{Name: routeName, VirtualHosts: []*route.VirtualHost{{Name: "all", Domains: []string{"*"}, Routes: []*route.Route{{
		Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
		Action: &route.Route_Route{Route: &route.RouteAction{
			ClusterSpecifier: &route.RouteAction_Cluster{Cluster: serviceName}, Timeout: durationpb.New(0)}},
	}}}}}
}

func address(host string, port uint32) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: host, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port}}}}
}

func adsSource() *core.ConfigSource {
	return &core.ConfigSource{ResourceApiVersion: core.ApiVersion_V3, ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}}
}

func wrap(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	packed, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

func freePort(t *testing.T) uint32 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

// until waits for a condition; why, if not nil, says what stands in its way.
func until(t *testing.T, what string, so func() bool, why func() string) {
	t.Helper()
	for end := time.Now().Add(patience); !so(); {
		if time.Now().After(end) {
			if why != nil {
				what += ": " + why()
			}
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func listens(port uint32) bool {
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}
