package xds

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	preserve "github.com/envoyproxy/go-control-plane/envoy/extensions/http/header_formatters/preserve_case/v3"
	selector "github.com/envoyproxy/go-control-plane/envoy/extensions/local_address_selectors/filter_state_override/v3"
	upstream "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

const (
	connectTimeout = 5 * time.Second
	// poolAge bounds HTTP connections between Envoys, well below the time that a draining Envoy waits, for where the
	// far side forwards bytes it cannot tell them to go; and below the 40 % of SVIDs' life after which callees cut them.
	poolAge = 5 * time.Minute
	// bufferLimit bounds what Envoy buffers for one connection in each direction, in bytes.
	bufferLimit = 256 << 10
)

// Cluster answers names.ServiceCluster, names.TCPCluster and names.PodCluster. Any other name, and any destination that
// is not there, gets a cluster without endpoints: it refuses.
func Cluster(s *ir.Snapshot, name string) *cluster.Cluster {
	if key, ok := parsePort("svc", name); ok {
		if port := findPort(s, key); port != nil {
			return serviceCluster(s, name, port, true)
		}
	} else if port := portByAddress(s, name); port != nil {
		return serviceCluster(s, name, port, false)
	} else if pod := podByName(s, name); pod != nil {
		return podCluster(name, pod)
	}
	return refusing(name)
}

func refusing(name string) *cluster.Cluster {
	return &cluster.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
		LoadAssignment:       &endpoint.ClusterLoadAssignment{ClusterName: name},
	}
}

// outbound is what every cluster shares whose connections leave for another pod: they open in the source pod's netns,
// tagged, for both families.
func outbound(name string) *cluster.Cluster {
	options := []*core.SocketOption{{
		Description: "weft's tag of Envoy's own sockets",
		Level:       names.SocketOptionLevel,
		Name:        names.SocketOptionName,
		Value:       &core.SocketOption_IntValue{IntValue: names.TagOutboundLeg << 16},
		State:       core.SocketOption_STATE_PREBIND,
	}}
	unbound := func(address string) *core.SocketAddress {
		return &core.SocketAddress{Address: address, PortSpecifier: &core.SocketAddress_PortValue{PortValue: 0}}
	}
	// What one pod may hold is bounded where it is captured; Envoy's default of 1024 for a whole node is not.
	const most = 1 << 30
	return &cluster.Cluster{
		Name:                          name,
		ConnectTimeout:                durationpb.New(connectTimeout),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		UpstreamBindConfig: &core.BindConfig{
			SourceAddress: unbound("0.0.0.0"),
			SocketOptions: options,
			ExtraSourceAddresses: []*core.ExtraSourceAddress{{
				Address: unbound("::"), SocketOptions: &core.SocketOptionsOverride{SocketOptions: options}}},
			LocalAddressSelector: extension("envoy.upstream.local_address_selector.filter_state_override", &selector.Config{}),
		},
		CircuitBreakers: &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{{
			MaxConnections: wrapperspb.UInt32(most), MaxPendingRequests: wrapperspb.UInt32(most),
			MaxRequests: wrapperspb.UInt32(most), MaxRetries: wrapperspb.UInt32(most),
		}}},
		UpstreamConnectionOptions: &cluster.UpstreamConnectionOptions{TcpKeepalive: &core.TcpKeepalive{
			KeepaliveTime: wrapperspb.UInt32(300), KeepaliveInterval: wrapperspb.UInt32(30), KeepaliveProbes: wrapperspb.UInt32(4)}},
		// Nobody is in the trust bundle under this name. It is for an endpoint whose own match is not here (yet).
		TransportSocket: peerTLS(nobody, names.ALPNOfferTCP),
	}
}

// serviceCluster balances over a service port's endpoints. The load assignment has the cluster's own name: Envoy does
// not ask again for one that another cluster has already, and the second cluster would wait for ever, all others
// behind it.
func serviceCluster(s *ir.Snapshot, name string, port *ir.ServicePort, http bool) *cluster.Cluster {
	c := outbound(name)
	c.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_EDS}
	c.EdsClusterConfig = &cluster.Cluster_EdsClusterConfig{EdsConfig: ads()}
	c.LbPolicy = cluster.Cluster_LEAST_REQUEST
	if port.Affinity > 0 {
		// Ring hash over the client's address: the same endpoint for as long as it stays, on every node.
		c.LbPolicy = cluster.Cluster_RING_HASH
	}
	c.IgnoreHealthOnHostRemoval = true
	c.CommonLbConfig = &cluster.Cluster_CommonLbConfig{HealthyPanicThreshold: percent(0)}
	offer := names.ALPNOfferTCP
	if http {
		offer = names.ALPNOfferH1
		if port.Protocol == ir.HTTP2 {
			offer = names.ALPNOfferH2
		}
		c.TypedExtensionProtocolOptions = protocolOptions(s.Mesh, port.Protocol == ir.HTTP2)
	}
	c.TransportSocketMatches = matches(port.Endpoints, offer)
	return c
}

// matches has one transport socket per peer identity, with that one SPIFFE ID, and one for peers outside the mesh. They do
// not change while pods enter and leave: a cluster that is replaced forgets handshakes that wait for their SVID (Envoy's
// on_demand_secret selector), and those connections hang until connectTimeout.
func matches(endpoints []*ir.Endpoint, offer []string) []*cluster.Cluster_TransportSocketMatch {
	peers := map[string]*core.TransportSocket{names.TransportSocketPlain: plainSocket()}
	for _, e := range endpoints {
		if e.Identity != "" {
			peers[e.Identity] = peerTLS(e.Identity, offer)
		}
	}
	var out []*cluster.Cluster_TransportSocketMatch
	for peer, socket := range peers {
		out = append(out, &cluster.Cluster_TransportSocketMatch{Name: peer, Match: fields(names.MetadataPeer, peer), TransportSocket: socket})
	}
	slices.SortFunc(out, func(a, b *cluster.Cluster_TransportSocketMatch) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return out
}

// podCluster dials whatever port of one pod the caller dialled.
func podCluster(name string, pod *ir.Pod) *cluster.Cluster {
	if !pod.MTLS && pod.Strict {
		return refusing(name)
	}
	c := outbound(name)
	c.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_ORIGINAL_DST}
	c.LbPolicy = cluster.Cluster_CLUSTER_PROVIDED
	c.CleanupInterval = durationpb.New(time.Minute)
	c.TransportSocket = plainSocket()
	if pod.MTLS {
		c.TransportSocket = peerTLS(pod.SPIFFEID, names.ALPNOfferTCP)
	}
	return c
}

func protocolOptions(mesh ir.Mesh, http2 bool) map[string]*anypb.Any {
	age := poolAge
	if third := mesh.SVIDLife / 3; third > 0 {
		age = min(age, third)
	}
	options := &upstream.HttpProtocolOptions{
		CommonHttpProtocolOptions: &core.HttpProtocolOptions{MaxConnectionDuration: durationpb.New(age)},
	}
	explicit := &upstream.HttpProtocolOptions_ExplicitHttpConfig{}
	if http2 {
		explicit.ProtocolConfig = &upstream.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
			Http2ProtocolOptions: &core.Http2ProtocolOptions{
				InitialStreamWindowSize: wrapperspb.UInt32(bufferLimit), InitialConnectionWindowSize: wrapperspb.UInt32(4 * bufferLimit)}}
	} else {
		explicit.ProtocolConfig = &upstream.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{
			HttpProtocolOptions: &core.Http1ProtocolOptions{EnableTrailers: true, HeaderKeyFormat: &core.Http1ProtocolOptions_HeaderKeyFormat{
				HeaderFormat: &core.Http1ProtocolOptions_HeaderKeyFormat_StatefulFormatter{
					StatefulFormatter: extension("envoy.http.stateful_header_formatters.preserve_case",
						&preserve.PreserveCaseFormatterConfig{ForwardReasonPhrase: true})}}}}
	}
	options.UpstreamProtocolOptions = &upstream.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: explicit}
	return map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(options)}
}

// pack wraps a message, same content giving the same bytes.
func pack(m proto.Message) *anypb.Any {
	packed := &anypb.Any{}
	if err := anypb.MarshalFrom(packed, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic(fmt.Sprintf("marshal %s: %v", m.ProtoReflect().Descriptor().FullName(), err)) // only invalid UTF-8 does this
	}
	return packed
}

func extension(name string, m proto.Message) *core.TypedExtensionConfig {
	return &core.TypedExtensionConfig{Name: name, TypedConfig: pack(m)}
}

func ads() *core.ConfigSource {
	return &core.ConfigSource{
		ResourceApiVersion:    core.ApiVersion_V3,
		ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
	}
}

// fields makes a Struct of pairs of name and value; empty values are left out.
func fields(pairs ...string) *structpb.Struct {
	out := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			out.Fields[pairs[i]] = structpb.NewStringValue(pairs[i+1])
		}
	}
	return out
}
