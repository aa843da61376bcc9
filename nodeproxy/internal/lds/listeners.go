package lds

import (
	"time"

	matcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	common "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	httpinspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	originaldst "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	originalsrc "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	setstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/set_filter_state/v3"
	tlsinspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkstate "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
)

const (
	// inspectTimeout is how long an outbound listener waits for the client's first bytes to tell the protocol; then the
	// connection goes on as plain bytes. It delays servers that speak first on ports that do not say so.
	inspectTimeout = 100 * time.Millisecond
	// helloTimeout is the same for inbound listeners. A caller's Envoy connects first and sends its ClientHello when it has the
	// caller's SVID, which it may have to ask for, and a processor to run on. One that comes late is taken for plain bytes:
	// the app gets TLS, and redis for one says nothing to it, ever.
	helloTimeout = time.Second
	// handshakeTimeout is how long a peer may take for mesh TLS. Whoever has no SVID would otherwise hold a place in the
	// pod's count of connections for as long as it keeps silent after its ClientHello.
	handshakeTimeout = 10 * time.Second
	// maxAgeJitter is how many percent longer than MaxConnection a connection may live, so that those that were made
	// together do not end together.
	maxAgeJitter = 10
	// bufferLimit bounds what Envoy buffers for one connection in each direction, in bytes.
	bufferLimit = 256 << 10
)

// Listeners builds the pod's listeners in Envoy: out, in, and in-first when a Permissive port's server speaks first.
// A pod at STAGE_OUT has none.
func Listeners(p Pod) ([]*listener.Listener, error) {
	if p.Stage == meshv1.Stage_STAGE_OUT {
		return nil, nil
	}
	if err := p.validate(); err != nil {
		return nil, err
	}
	listeners := []*listener.Listener{p.out(), p.in()}
	if first := p.inFirst(); first != nil {
		listeners = append(listeners, first)
	}
	return listeners, nil
}

// Holder is a listener that nobody reaches: it has no socket. It keeps the subscription to the scopes open. Without it
// Envoy 1.40 ends the subscription with the last pod's listeners, asks for nothing when the next one comes, and waits
// for initial_fetch_timeout, 15 s, before that one listens. It also begins the subscription to clusters on demand:
// what Envoy's listeners share then belongs to one that never goes. So it must be the first that Envoy gets.
//
// It has every address that pods' listeners have, without a netns. Envoy's workers keep listeners by an address's text,
// which does not name the netns, and by the IPv4 one beside it, 0.0.0.0:<port>. The second is taken by the first pod's
// listener; when that goes while the first belongs to another pod by then, the second stays behind
// (ConnectionHandlerImpl::removeListeners), and the same pod's next listener replaces it: Envoy 1.40 then uses freed
// memory and dies. The holder takes the second for good.
func Holder() *listener.Listener {
	h := http{stat: "holder", outbound: true, filters: []*hcm.HttpFilter{onDemandFilter()}}
	var others []*listener.AdditionalAddress
	for generation := range uint32(2) {
		for _, role := range []uint16{names.PortOutHTTP, names.PortIn, names.PortInFirst} {
			if role != names.PortOutHTTP || generation > 0 {
				others = append(others, &listener.AdditionalAddress{Address: anyAddress(role, generation)})
			}
		}
	}
	return &listener.Listener{
		Name:                "holder",
		Address:             anyAddress(names.PortOutHTTP, 0),
		AdditionalAddresses: others,
		BindToPort:          truth(false),
		FilterChains:        []*listener.FilterChain{{Filters: []*listener.Filter{h.manager()}}},
	}
}

// anyAddress is the address of every pod's listener of a role, but for the pod's netns.
func anyAddress(role uint16, generation uint32) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: "::", Ipv4Compat: true, PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(names.ListenPort(role, generation))},
	}}}
}

// listener is what all of a pod's listeners share: one socket for both families in the pod's netns. Never a loopback
// address, for Envoy would take the listener's address as the destination.
func (p Pod) listener(direction string, role uint16) *listener.Listener {
	l := &listener.Listener{
		Name:                             names.Listener(direction, p.UID, p.Sandbox, p.Generation),
		Address:                          anyAddress(role, p.Generation),
		StatPrefix:                       direction + "-" + p.UID,
		PerConnectionBufferLimitBytes:    number(bufferLimit),
		ListenerFiltersTimeout:           seconds(helloTimeout),
		ContinueOnListenerFiltersTimeout: true,
		TcpKeepalive:                     keepalive(),
		TrafficDirection:                 core.TrafficDirection_INBOUND,
	}
	l.Address.GetSocketAddress().NetworkNamespaceFilepath = p.NetnsPath
	if direction == "out" {
		l.TrafficDirection = core.TrafficDirection_OUTBOUND
		l.StatPrefix = direction
		l.ListenerFiltersTimeout = seconds(inspectTimeout)
	}
	if p.AccessLog {
		l.AccessLog = connectionLog(direction == "out")
	}
	return l
}

func listenerFilter(name string, m proto.Message) *listener.ListenerFilter {
	return &listener.ListenerFilter{Name: name, ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: pack(m)}}
}

func stateFilter(values ...*common.FilterStateValue) *listener.ListenerFilter {
	return listenerFilter("envoy.filters.listener.set_filter_state", &setstate.Config{OnAccept: values})
}

func httpInspector() *listener.ListenerFilter {
	return listenerFilter("envoy.filters.listener.http_inspector", &httpinspector.HttpInspector{})
}

func tlsInspector() *listener.ListenerFilter {
	return listenerFilter("envoy.filters.listener.tls_inspector", &tlsinspector.TlsInspector{})
}

// originalSource has Envoy bind what it opens for a connection to the client's address: the hooks take that as whose
// connection it is, whether the app is to see that or not (docs/adr/0006-client-address.md). It keeps pools apart by client.
// It goes by the connection: the HTTP filter of that name would believe x-forwarded-for.
func originalSource() *listener.ListenerFilter {
	return listenerFilter("envoy.filters.listener.original_src", &originalsrc.OriginalSrc{})
}

func originalDst() *listener.ListenerFilter {
	return listenerFilter("envoy.filters.listener.original_dst", &originaldst.OriginalDst{})
}

func networkState(values ...*common.FilterStateValue) *listener.Filter {
	return network("envoy.filters.network.set_filter_state", &networkstate.Config{OnNewConnection: values})
}

// bytes is the tcp_proxy of every chain that does not parse HTTP. Nothing ends a silent connection but keepalive.
func bytes(stat, cluster string) *tcpproxy.TcpProxy {
	return &tcpproxy.TcpProxy{
		StatPrefix:         stat,
		ClusterSpecifier:   &tcpproxy.TcpProxy_Cluster{Cluster: cluster},
		IdleTimeout:        seconds(0),
		MaxConnectAttempts: number(2),
	}
}

func tcpProxy(t *tcpproxy.TcpProxy) *listener.Filter {
	return network("envoy.filters.network.tcp_proxy", t)
}

func setMatcher(l *listener.Listener, m *matcher.Matcher) *listener.Listener {
	l.FilterChainMatcher = m
	return l
}
