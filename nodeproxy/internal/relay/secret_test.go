package relay_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	common "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	networkstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	mapper "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_mappers/filter_state_override/v3"
	selector "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_selectors/on_demand_secret/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

const caller = "spiffe://cluster.local/ns/shop/sa/front"

// svid is a certificate and key of its own CA, PEM.
func newSVID(t *testing.T, id string) (chain, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{uri}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// askingBackend takes nobody without a certificate, and answers with the caller's identity.
func askingBackend(t *testing.T) backend {
	t.Helper()
	b := meshBackend(t, "", till)
	chain, key := newSVID(t, till)
	certificate, err := tls.X509KeyPair(chain, key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.TLS.PeerCertificates[0].URIs[0]) }))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert}
	s.StartTLS()
	t.Cleanup(s.Close)
	b.port, b.root = uint32(s.Listener.Addr().(*net.TCPAddr).Port), chain
	return b
}

// identified is a service whose callers show the SVID that their connection names.
func identified(t *testing.T, b backend) *cluster.Cluster {
	t.Helper()
	c := service(t, b)
	m := c.TransportSocketMatches[0].TransportSocket
	var context tlsv3.UpstreamTlsContext
	if err := m.GetTypedConfig().UnmarshalTo(&context); err != nil {
		t.Fatal(err)
	}
	stream := &core.ConfigSource{ResourceApiVersion: core.ApiVersion_V3, InitialFetchTimeout: durationpb.New(5 * time.Second),
		ConfigSourceSpecifier: &core.ConfigSource_ApiConfigSource{ApiConfigSource: &core.ApiConfigSource{
			ApiType: core.ApiConfigSource_DELTA_GRPC, TransportApiVersion: core.ApiVersion_V3,
			GrpcServices: []*core.GrpcService{{TargetSpecifier: &core.GrpcService_EnvoyGrpc_{EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: names.ClusterAgent}}}},
		}}}
	context.CommonTlsContext.CustomTlsCertificateSelector = &core.TypedExtensionConfig{Name: "envoy.tls.certificate_selectors.on_demand_secret",
		TypedConfig: wrap(t, &selector.Config{ConfigSource: stream, CertificateMapper: &core.TypedExtensionConfig{
			Name: "envoy.tls.upstream_certificate_mappers.filter_state_override", TypedConfig: wrap(t, &mapper.Config{DefaultValue: "none"})}})}
	m.ConfigType = &core.TransportSocket_TypedConfig{TypedConfig: wrap(t, &context)}
	return c
}

// as makes a listener's connections those of an identity.
func as(t *testing.T, l *listener.Listener, id string) *listener.Listener {
	t.Helper()
	state := &networkstate.Config{OnNewConnection: []*common.FilterStateValue{{
		Key: &common.FilterStateValue_ObjectKey{ObjectKey: names.StateSVID}, FactoryKey: names.StateHashable, SharedWithUpstream: common.FilterStateValue_TRANSITIVE,
		Value: &common.FilterStateValue_FormatString{FormatString: &core.SubstitutionFormatString{Format: &core.SubstitutionFormatString_TextFormatSource{
			TextFormatSource: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: id}}}}},
	}}}
	chain := l.FilterChains[0]
	chain.Filters = append([]*listener.Filter{{Name: "state", ConfigType: &listener.Filter_TypedConfig{TypedConfig: wrap(t, state)}}}, chain.Filters...)
	return l
}

func (n *node) giveSVID(t *testing.T, id string) {
	t.Helper()
	chain, key := newSVID(t, id)
	n.give(t, lds.TLSCertificateSecret(id, chain, key))
}

// TestSVIDsComeAndGo: the identity that a connection names is the one that its peer sees; one that is not of this node is
// refused at once, not waited for; and an account whose last pod leaves and comes back is served as before.
func TestSVIDsComeAndGo(t *testing.T) {
	n := newNode(t)
	b := askingBackend(t)
	l := as(t, n.entry(t), caller)
	n.port = freePort(t)
	l.Name, l.Address = "identified", address("127.0.0.1", n.port)
	k, version := n.give(t, l)
	n.wait(t, k, version)
	until(t, "the listener is there", func() bool { return listens(n.port) }, nil)
	go n.get()
	n.asked(t, relay.TypeRoute, routeName)
	n.controller.Send(t, relay.TypeRoute, map[string]proto.Message{routeName: routes()})
	n.asked(t, relay.TypeCluster, serviceName)
	n.controller.Send(t, relay.TypeCluster, map[string]proto.Message{serviceName: identified(t, b)})
	n.asked(t, relay.TypeEndpoints, serviceName)
	n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)})
	until(t, "an unknown identity is refused at once", func() bool {
		started := time.Now()
		status, _, err := n.get()
		return err == nil && status == 503 && time.Since(started) < 2*time.Second
	}, nil)
	n.giveSVID(t, caller)
	n.answered(t, caller)

	plain := plainBackend(t, "plain")
	meshed, unmeshed := identified(t, b), service(t, plain)
	for i := range 10 {
		// Out: the peers go back to plaintext, then the last pod of the account leaves.
		n.controller.Send(t, relay.TypeCluster, map[string]proto.Message{serviceName: unmeshed})
		n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(plain)})
		n.answered(t, "plain")
		n.cache.Delete(k)
		n.cache.Delete(relay.Key{TypeURL: relay.TypeSecret, Name: caller})
		n.wait(t, k, "")
		// In again.
		n.giveSVID(t, caller)
		l.Name = fmt.Sprint("identified-", i)
		k, version = n.give(t, l)
		n.wait(t, k, version)
		n.controller.Send(t, relay.TypeCluster, map[string]proto.Message{serviceName: meshed})
		n.controller.Send(t, relay.TypeEndpoints, map[string]proto.Message{serviceName: endpoints(b)})
		n.answered(t, caller)
	}
}
