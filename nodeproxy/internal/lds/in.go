package lds

import (
	"fmt"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"

	"github.com/weftmesh/weft/api/names"
)

// closed is the chain of a listener that lets nobody in.
const closed = "closed"

// in takes what others dial. Each port has its own chains for mesh TLS, so that one port's change drains no other; the
// chains for callers without mesh TLS are shared where no rule tells ports apart.
func (p Pod) in() *listener.Listener {
	l := p.listener("in", names.PortIn)
	l.ListenerFilters = []*listener.ListenerFilter{p.localLegState(), originalSource(), tlsInspector(), httpInspector()}
	var whole *onMatch
	listed := map[string]*onMatch{}
	chains := chainSet{seen: map[string]bool{}}
	for _, q := range p.ports() {
		matched := p.choose(q, &chains)
		if q.number == 0 {
			whole = matched
		} else {
			listed[fmt.Sprint(q.number)] = matched
		}
	}
	for _, old := range p.previous() {
		for _, q := range old.ports() {
			q.plain = false
			old.choose(q, &chains)
		}
	}
	if len(chains.list) == 0 {
		// Envoy wants a chain even where nothing leads to it.
		chains.list = []*listener.FilterChain{{Name: closed, Filters: []*listener.Filter{tcpProxy(bytes(closed, names.ClusterNone))}}}
	}
	l.FilterChains = chains.list
	if len(listed) == 0 {
		// Envoy wants a tree even where one branch is all there is.
		listed[fmt.Sprint(names.PortIn)] = chain(refuse)
	}
	return setMatcher(l, byPort(listed, whole))
}

// inFirst takes callers without mesh TLS on ports whose server speaks first; nil when every such port refuses them.
func (p Pod) inFirst() *listener.Listener {
	open := map[string]*onMatch{}
	for _, q := range p.ports() {
		if q.serverFirst && q.plain {
			open[fmt.Sprint(q.number)] = chain(p.shared().chain("plain"))
		}
	}
	if len(open) == 0 {
		return nil
	}
	l := p.listener("in-first", names.PortInFirst)
	l.ListenerFilters = []*listener.ListenerFilter{p.localLegState(), originalSource()}
	l.FilterChains = []*listener.FilterChain{p.plainBytes()}
	return setMatcher(l, byPort(open, chain(refuse)))
}

// localLegState says where the last hop goes and in which netns: to the address that the caller dialled, in the pod. Pools
// are by address already, so that the netns alone has to separate them.
func (p Pod) localLegState() *listener.ListenerFilter {
	return stateFilter(
		state(names.StateNetns, names.StateHashable, literal(p.NetnsPath), true),
		state(names.StateOriginalDst, names.StateOriginalDst, "%DOWNSTREAM_LOCAL_ADDRESS%", false),
	)
}

type chainSet struct {
	list []*listener.FilterChain
	seen map[string]bool
}

// add keeps a chain, once by name, and returns the match that leads to it.
func (s *chainSet) add(c *listener.FilterChain) *onMatch {
	if !s.seen[c.Name] {
		s.seen[c.Name] = true
		s.list = append(s.list, c)
	}
	return chain(c.Name)
}

// choose builds the port's chains and the decision between them: mesh TLS by the offered list, and where the port lets
// others in, an app's own TLS and plaintext.
func (p Pod) choose(q port, chains *chainSet) *onMatch {
	if q.refuse {
		return chain(refuse)
	}
	secure := map[string]*onMatch{}
	if q.http {
		h1, h2 := chains.add(p.meshHTTP(q, names.ALPNH1)), chains.add(p.meshHTTP(q, names.ALPNH2))
		secure[offersHTTP1], secure[offersHTTP2] = h1, h2
		// Who forwards bytes does not know the codec; what the port declares decides.
		secure[offersTCP] = h1
		if q.http2 {
			secure[offersTCP] = h2
		}
	} else {
		l4 := chains.add(p.meshBytes(q))
		secure[offersHTTP1], secure[offersHTTP2], secure[offersTCP] = l4, l4, l4
	}
	if !q.plain {
		return next(byTransport(map[string]*onMatch{"tls": next(byALPN(secure, chain(refuse)))}, chain(refuse)))
	}
	foreign, bytes := chain(refuse), chain(refuse)
	var plain *onMatch
	switch {
	case q.http:
		// Rules about requests bind every caller: what cannot be parsed is refused.
		plain = chains.add(p.plainHTTP(q))
	case q.parsePlain:
		plain = chains.add(p.plainHTTP(p.shared()))
		fallthrough
	default:
		bytes = chains.add(p.plainBytes())
		foreign = bytes
	}
	open := bytes
	if plain != nil {
		parsed := map[string]*onMatch{}
		for _, protocol := range plainHTTP {
			parsed[protocol] = plain
		}
		open = next(byALPN(parsed, bytes))
	}
	return next(byTransport(map[string]*onMatch{"tls": next(byALPN(secure, foreign))}, open))
}

// meshBytes lets in whom the port's validation secret allows, and dials the app only after the handshake. The caller's
// first bytes wait for the app's socket.
func (p Pod) meshBytes(q port) *listener.FilterChain {
	proxy := bytes("in-mesh", names.ClusterLocalH1)
	proxy.UpstreamConnectMode = tcpproxy.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE
	proxy.MaxEarlyDataBytes = number(0)
	if p.MaxConnection > 0 {
		proxy.MaxDownstreamConnectionDuration = seconds(p.MaxConnection)
		proxy.MaxDownstreamConnectionDurationJitterPercentage = percent(maxAgeJitter)
	}
	return &listener.FilterChain{
		Name:            q.chain(names.ALPNL4),
		TransportSocket: meshTLS(p.SPIFFEID, q.secret(p.UID), names.ALPNL4),
		Filters:         []*listener.Filter{tcpProxy(proxy)},

		TransportSocketConnectTimeout: seconds(handshakeTimeout),
	}
}

// meshHTTP parses requests and judges each. TLS lets in whomever the trust bundle vouches for, so that a denied caller
// gets an answer: 403.
func (p Pod) meshHTTP(q port, alpn string) *listener.FilterChain {
	codec := hcm.HttpConnectionManager_HTTP1
	if alpn == names.ALPNH2 {
		codec = hcm.HttpConnectionManager_HTTP2
	}
	manager := p.judged(q, codec)
	manager.maxAge = p.MaxConnection
	return &listener.FilterChain{
		Name:            q.chain(alpn),
		TransportSocket: meshTLS(p.SPIFFEID, names.SecretBundle, alpn),
		Filters:         []*listener.Filter{manager.manager()},

		TransportSocketConnectTimeout: seconds(handshakeTimeout),
	}
}

func (p Pod) plainHTTP(q port) *listener.FilterChain {
	return &listener.FilterChain{Name: q.chain("plain-http"), Filters: []*listener.Filter{p.judged(q, hcm.HttpConnectionManager_AUTO).manager()}}
}

// shared is what ports without rules of their own have in common.
func (p Pod) shared() port { return port{revision: p.Revision[0]} }

func (p Pod) plainBytes() *listener.FilterChain {
	return &listener.FilterChain{Name: p.shared().chain("plain"), Filters: []*listener.Filter{tcpProxy(bytes("in-plain", names.ClusterLocalH1))}}
}

// judged counts what it denies in http.in-<uid>-<port>.rbac.denied, both transports together.
func (p Pod) judged(q port, codec hcm.HttpConnectionManager_CodecType) http {
	stat := "in-plain"
	if q.http {
		stat = "in-" + p.UID + "-" + q.name()
	}
	return http{stat: stat, codec: codec, filters: q.judge(), routes: toApp(), strictPaths: q.comparesPaths(), log: p.AccessLog}
}
