package lds

import (
	"fmt"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/weftmesh/weft/api/names"
)

// out takes what the pod's apps dial. The pod's netns separates its connection pools from other pods', and its identity with
// them: a netns has one. The listener filters set the constants of the pod, remember the class while the
// local port still is the steering port, look at the first bytes of undeclared services alone (a server there may
// speak first), and put the original destination in place. For undeclared services it is in place before: when the
// inspector gives up, Envoy runs no filter after it.
func (p Pod) out() *listener.Listener {
	l := p.listener("out", names.PortOutHTTP)
	declared := anyOf(toPorts(names.PortOutHTTP, names.PortOutTCP), toPorts(names.PortOutPod, names.PortOutPod))
	undeclaredFirst, inspector, declaredThen := originalDst(), httpInspector(), originalDst()
	undeclaredFirst.FilterDisabled = not(toPorts(names.PortOutAuto, names.PortOutAuto))
	inspector.FilterDisabled = declared
	declaredThen.FilterDisabled = not(declared)
	l.ListenerFilters = []*listener.ListenerFilter{
		stateFilter(
			state(names.StateNetns, names.StateHashable, literal(p.NetnsPath), true),
			state(names.StateSVID, names.StateString, literal(p.SPIFFEID), true),
			state(names.StateClass, names.StateString, "%DOWNSTREAM_LOCAL_PORT%", false),
		),
		undeclaredFirst,
		inspector,
		declaredThen,
	}
	l.FilterChains = []*listener.FilterChain{
		{Name: "http", Filters: []*listener.Filter{http{
			stat:     "out",
			codec:    hcm.HttpConnectionManager_AUTO,
			filters:  []*hcm.HttpFilter{onDemandFilter()},
			set:      [][2]string{{names.HeaderDestination, "%DOWNSTREAM_LOCAL_ADDRESS%"}, {names.HeaderSourceNamespace, literal(p.Namespace)}},
			log:      p.AccessLog,
			outbound: true,
		}.manager()}},
		{Name: "tcp", Filters: outBytes("tcp", "tcp/%DOWNSTREAM_LOCAL_ADDRESS%")},
		{Name: "pod", Filters: outBytes("pod", "pod/%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%")},
	}
	auto := map[string]*onMatch{}
	for _, protocol := range plainHTTP {
		auto[protocol] = chain("http")
	}
	return setMatcher(l, knownDestination(byState(names.StateClass, map[string]*onMatch{
		fmt.Sprint(names.PortOutHTTP): chain("http"),
		fmt.Sprint(names.PortOutTCP):  chain("tcp"),
		fmt.Sprint(names.PortOutAuto): next(byALPN(auto, chain("tcp"))),
		fmt.Sprint(names.PortOutPod):  chain("pod"),
	}, chain(refuse))))
}

// outBytes forwards bytes to the cluster that format names, which Envoy asks the agent for at first use.
func outBytes(stat, format string) []*listener.Filter {
	proxy := bytes("out-"+stat, names.ClusterNone)
	proxy.OnDemand = &tcpproxy.TcpProxy_OnDemand{OdcdsConfig: ads(), Timeout: seconds(onDemandTimeout)}
	proxy.HashPolicy = []*envoytype.HashPolicy{{PolicySpecifier: &envoytype.HashPolicy_SourceIp_{SourceIp: &envoytype.HashPolicy_SourceIp{}}}}
	return []*listener.Filter{
		networkState(state(names.StateTCPCluster, names.StateTCPCluster, format, false)),
		tcpProxy(proxy),
	}
}

type predicate = listener.ListenerFilterChainMatchPredicate

// toPorts matches connections whose destination port is from first to last.
func toPorts(first, last uint16) *predicate {
	return &predicate{Rule: &listener.ListenerFilterChainMatchPredicate_DestinationPortRange{
		DestinationPortRange: &envoytype.Int32Range{Start: int32(first), End: int32(last) + 1}}}
}

func anyOf(of ...*predicate) *predicate {
	return &predicate{Rule: &listener.ListenerFilterChainMatchPredicate_OrMatch{
		OrMatch: &listener.ListenerFilterChainMatchPredicate_MatchSet{Rules: of}}}
}

func not(p *predicate) *predicate {
	return &predicate{Rule: &listener.ListenerFilterChainMatchPredicate_NotMatch{NotMatch: p}}
}
