package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/test/contract/ads"
)

const system = "weft-system"

// controller is one in as far as an agent without pods needs it: it attests everybody, and gives the whole index, each type in
// one response as the real one does.
type controller struct {
	meshv1.UnimplementedIdentityServer
	meshv1.UnimplementedReportsServer
	discovery.UnimplementedAggregatedDiscoveryServiceServer

	address, token, bundle string
	authority              *ads.Authority
	server                 *grpc.Server
	index                  map[string][]*discovery.Resource

	mu      sync.Mutex
	refused []string
	acked   map[string]bool
}

const indexPrefix = "type.googleapis.com/weft.mesh.v1."

// indexTypes in the order in which the controller sends them.
var indexTypes = []string{"Mesh", "Namespace", "Service", "Workload", "LocalPod"}

func newController(dir string, e extent) (*controller, error) {
	c := &controller{token: filepath.Join(dir, "token"), bundle: filepath.Join(dir, "ca.crt"), acked: map[string]bool{}}
	var err error
	if c.authority, err = ads.NewAuthority(); err != nil {
		return nil, err
	}
	if c.index, err = index(e); err != nil {
		return nil, err
	}
	for path, content := range map[string][]byte{c.token: []byte("token"), c.bundle: c.authority.Roots()} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return nil, err
		}
	}
	own, err := c.authority.KeyPair(names.SPIFFEID(names.DefaultTrustDomain, system, names.ControlPlaneServiceAccount))
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	c.address = l.Addr().String()
	c.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{own}, MinVersion: tls.VersionTLS13, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: c.authority.Pool()})))
	meshv1.RegisterIdentityServer(c.server, c)
	meshv1.RegisterReportsServer(c.server, c)
	discovery.RegisterAggregatedDiscoveryServiceServer(c.server, c)
	go c.server.Serve(l) // ends with stop
	return c, nil
}

func (c *controller) stop() { c.server.Stop() }

// inForce is nil once the agent has acknowledged every type of the index.
func (c *controller) inForce() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.refused) > 0 {
		return fmt.Errorf("the agent refused: %s", c.refused[0])
	}
	for _, kind := range indexTypes {
		if !c.acked[indexPrefix+kind] {
			return fmt.Errorf("%s is not acknowledged", kind)
		}
	}
	return nil
}

// Bootstrap attests the agent.
func (c *controller) Bootstrap(_ context.Context, r *meshv1.BootstrapRequest) (*meshv1.Credentials, error) {
	request, err := x509.ParseCertificateRequest(r.Csr)
	if err != nil {
		return nil, err
	}
	id := names.SPIFFEID(names.DefaultTrustDomain, system, "weft-nodeproxy")
	chain, err := c.authority.Sign(id, request.PublicKey)
	if err != nil {
		return nil, err
	}
	return &meshv1.Credentials{SpiffeId: id, Chain: [][]byte{chain}}, nil
}

// Bundle gives the trust bundle once.
func (c *controller) Bundle(_ *meshv1.BundleRequest, s grpc.ServerStreamingServer[meshv1.TrustBundle]) error {
	block, _ := pem.Decode(c.authority.Roots())
	if err := s.Send(&meshv1.TrustBundle{Roots: [][]byte{block.Bytes}, Hash: "1"}); err != nil {
		return err
	}
	<-s.Context().Done()
	return nil
}

// Report takes what comes.
func (c *controller) Report(s grpc.BidiStreamingServer[meshv1.NodeReport, meshv1.ReportAck]) error {
	for {
		if _, err := s.Recv(); err != nil {
			return err
		}
	}
}

// DeltaAggregatedResources gives the index.
func (c *controller) DeltaAggregatedResources(s discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	given := map[string]bool{}
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		c.mu.Lock()
		switch {
		case r.ErrorDetail != nil:
			c.refused = append(c.refused, r.TypeUrl+": "+r.ErrorDetail.Message)
		case r.ResponseNonce != "":
			c.acked[r.TypeUrl] = true
		}
		c.mu.Unlock()
		known := slices.ContainsFunc(indexTypes, func(kind string) bool { return indexPrefix+kind == r.TypeUrl })
		if r.ResponseNonce != "" || given[r.TypeUrl] || !known {
			continue
		}
		given[r.TypeUrl] = true
		if err := s.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: r.TypeUrl, Nonce: "1", Resources: c.index[r.TypeUrl]}); err != nil {
			return err
		}
	}
}

// index makes a mesh: 50 pods and 12 services in each namespace, names as Kubernetes makes them.
func index(e extent) (map[string][]*discovery.Resource, error) {
	out := map[string][]*discovery.Resource{}
	add := func(name string, m proto.Message) error {
		body, err := anypb.New(m)
		if err != nil {
			return err
		}
		out[body.TypeUrl] = append(out[body.TypeUrl], &discovery.Resource{Name: name, Version: fmt.Sprintf("%016x", len(out[body.TypeUrl])), Resource: body})
		return nil
	}
	if err := add("mesh", &meshv1.Mesh{TrustDomain: names.DefaultTrustDomain}); err != nil {
		return nil, err
	}
	for i := range 400 {
		if err := add(fmt.Sprintf("team-%03d", i), &meshv1.Namespace{Name: fmt.Sprintf("team-%03d", i)}); err != nil {
			return nil, err
		}
	}
	for i := range e.services {
		s := &meshv1.Service{Namespace: fmt.Sprintf("team-%03d", i%400), Name: fmt.Sprintf("checkout-%05d", i), Addresses: addresses(96, i, e.families),
			Ports: []*meshv1.ServicePort{{Port: 80, Class: meshv1.Class_CLASS_HTTP}}}
		if err := add(s.Namespace+"/"+s.Name, s); err != nil {
			return nil, err
		}
	}
	for i := range e.pods {
		namespace := fmt.Sprintf("team-%03d", i%400)
		w := &meshv1.Workload{Uid: fmt.Sprintf("%08x-3f1e-4a55-9f43-%012x", i*7919, i), Namespace: namespace, Name: fmt.Sprintf("checkout-%05d-7d9f8b6c5d-%05x", i/4, i),
			Node: fmt.Sprintf("node-%04d", 1+i/100), Addresses: addresses(40, i, e.families), SpiffeId: names.SPIFFEID(names.DefaultTrustDomain, namespace, fmt.Sprintf("checkout-%05d", i/4)), Mtls: true}
		if err := add(w.Uid, w); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// addresses are those of the i-th object: IPv4, and IPv6 where it has two.
func addresses(second byte, i, families int) (out [][]byte) {
	v4 := [4]byte{10, second + byte(i>>16), byte(i >> 8), byte(i)}
	v6 := netip.MustParseAddr("fd00::").As16()
	copy(v6[12:], v4[:])
	return [][]byte{v4[:], v6[:]}[:families]
}
