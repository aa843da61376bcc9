// Package names holds every name that two of weft's processes must agree on: ports, labels, SPIFFE IDs and the names
// of xDS and SDS resources. It imports the standard library alone, so that any package may import it.
package names

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Group is the API group of weft's own resources and the prefix of its labels and annotations.
const Group = "weft.dev"

// Labels, annotations and conditions on Kubernetes objects.
const (
	// LabelMesh on a Namespace or Pod says whether pods join the mesh: MeshEnabled or MeshDisabled. The pod's wins.
	LabelMesh = Group + "/mesh"
	// MeshEnabled is LabelMesh's value for "enrol".
	MeshEnabled = "enabled"
	// MeshDisabled is LabelMesh's value for "leave alone".
	MeshDisabled = "disabled"

	// LabelSockmap on a Namespace or Pod says whether pods of the mesh have the short circuit, by the same values. The pod's wins.
	LabelSockmap = Group + "/sockmap"

	// ConditionEnrolled on a pod is True while the node's agent reads the pod's capture back from the kernel.
	ConditionEnrolled = Group + "/Enrolled"
	// ConditionEnforced on a pod is True once its configured mTLS mode and identity rules apply.
	ConditionEnforced = Group + "/Enforced"
	// ConditionShortcut on a pod that asks for the short circuit is True while the kernel has it.
	ConditionShortcut = Group + "/Shortcut"
	// ReasonOff is ConditionShortcut's while the pod does not ask for it any more.
	ReasonOff = "Off"
	// ReasonDrift is an agent's reason in a report: the kernel held something else than it should a moment ago.
	ReasonDrift = "Drift"

	// UninstallConfigMap in weft's own namespace orders every pod out of the mesh when its UninstallKey says "true".
	UninstallConfigMap = "weft-uninstall"
	UninstallKey       = "uninstall"

	// LastKnownConfigMap in weft's own namespace is where the leader keeps what the next one must not forget.
	LastKnownConfigMap = "weft-last-known"
)

// Ports of Envoy's listeners inside an enrolled pod's network namespace. PortFirst to PortLast is weft's whole range
// there: nobody but Envoy binds or dials it. A generation of Envoy uses one row of ports (see ListenPort).
const (
	PortFirst = 15000
	PortLast  = 15019

	// PortOutHTTP is the class port of connections to services that speak HTTP.
	PortOutHTTP = 15001
	// PortOutTCP is the class port of connections to services that speak plain TCP.
	PortOutTCP = 15002
	// PortOutAuto is the class port of connections to services with no declared protocol.
	PortOutAuto = 15003
	// PortOutPod is the class port of connections to an enrolled pod's own address, whatever the port.
	PortOutPod = 15004
	// PortIn is the inbound listener.
	PortIn = 15006
	// PortInFirst is the inbound listener without inspectors, for ports whose server speaks first.
	PortInFirst = 15007
)

// GenerationRow is the distance between the ports of two generations of Envoy that listen in one netns.
const GenerationRow = 10

// Generations of Envoy that a node may have at a time, numbered from 0: the one that serves, and during an upgrade the one
// that replaces it.
const Generations = 2

// MetadataGeneration is the key of an Envoy's generation, a number, in the metadata of its xDS node.
const MetadataGeneration = "generation"

// ListenPort is where a generation of Envoy listens for a role, given by PortOutHTTP (every outbound class), PortIn or
// PortInFirst: even generations on that port, odd ones GenerationRow above. The class ports an outbound connection
// is steered to do not move.
func ListenPort(role uint16, generation uint32) uint16 {
	return role + GenerationRow*uint16(generation%2)
}

// Steering ranges: the connect hook sends a captured connection to an address of these ranges that stands for the
// service address; local routes in the pod's netns make them deliverable.
var (
	SteerIPv4 = netip.MustParsePrefix("127.64.0.0/10")
	SteerIPv6 = netip.MustParsePrefix("fd77:5eed::/64")
)

// The parts of the steering ranges from which Envoy's connections to apps come, one address per client.
var (
	LegIPv4 = netip.MustParsePrefix("127.112.0.0/12")
	LegIPv6 = netip.MustParsePrefix("fd77:5eed::1:0:0/96")
)

// SocketOptionLevel is the private setsockopt level by which Envoy tags its own sockets; the hook on Envoy's cgroup
// swallows it. From any other process the kernel answers ENOPROTOOPT.
const SocketOptionLevel = 0x5746

// Tags carried by option SocketOptionName at SocketOptionLevel, shifted left by 16 bits in the option's value.
const (
	SocketOptionName = 1
	// TagLocalLeg marks Envoy's last hop to the app inside the pod's own netns.
	TagLocalLeg = 1
	// TagOutboundLeg marks Envoy's connection to another pod, opened in the source pod's netns.
	TagOutboundLeg = 3
)

// ALPN protocols of mesh mTLS: the kind of chain at the callee and, for HTTP, the codec. A caller offers every kind
// that it can speak (ALPNOffer…); the callee's listener alone decides, so no caller can choose a weaker one and a
// change of policy needs no caller to know (docs/adr/0001).
const (
	ALPNL4 = "weft-l4"
	ALPNH1 = "weft-h1"
	ALPNH2 = "weft-h2"
)

// What callers offer, in Envoy's order.
var (
	// ALPNOfferH1 is offered by a caller that has parsed the request and speaks HTTP/1.1.
	ALPNOfferH1 = []string{ALPNL4, ALPNH1}
	// ALPNOfferH2 is offered by a caller that has parsed the request and speaks HTTP/2.
	ALPNOfferH2 = []string{ALPNL4, ALPNH2}
	// ALPNOfferTCP is offered by a caller that forwards the app's bytes.
	ALPNOfferTCP = []string{ALPNL4, ALPNH1, ALPNH2}
)

// Endpoint metadata that a transport socket match reads.
const (
	// MetadataNamespace is Envoy's own namespace for transport socket matches.
	MetadataNamespace = "envoy.transport_socket_match"
	// MetadataPeer is the key that names the peer's SPIFFE ID, or TransportSocketPlain.
	MetadataPeer = "peer"
)

// HTTP headers that weft writes before routing and removes before forwarding. Client-sent ones are overwritten.
const (
	// HeaderDestination carries the original destination, "ip:port"; the scope key of scoped routes.
	HeaderDestination = "x-weft-dst"
	// HeaderSourceNamespace carries the caller's namespace, for consumer routes.
	HeaderSourceNamespace = "x-weft-src-ns"
)

// HeaderClientCert is how proxies pass a client's certificate on; apps may believe it.
const HeaderClientCert = "x-forwarded-client-cert"

// ReservedHeader tells whether a header, in lower case, is one that Envoy or the mesh acts on or that speaks for an
// identity: clients cannot send it and routes cannot write it.
func ReservedHeader(name string) bool {
	return strings.HasPrefix(name, "x-envoy-") || strings.HasPrefix(name, "x-weft-") || name == HeaderClientCert
}

// Filter state keys.
const (
	// StateNetns overrides the netns in which Envoy opens the upstream socket.
	StateNetns = "envoy.network.upstream_bind_override.network_namespace"
	// StateSVID names the SDS secret that the on-demand certificate selector presents.
	StateSVID = "envoy.tls.certificate_mappers.on_demand_secret"
	// StateOriginalDst is the address an ORIGINAL_DST cluster dials.
	StateOriginalDst = "envoy.network.transport_socket.original_dst_address"
	// StateTCPCluster names the cluster that tcp_proxy uses.
	StateTCPCluster = "envoy.tcp_proxy.cluster"
	// StateClass holds the class port of an outbound connection.
	StateClass = "weft.class"
	// StateHashable is the factory of string state that separates connection pools, once it is shared with upstream. One such
	// state at most may be on a connection: Envoy hashes them in the order of a hash table, another for each connection, and
	// two would make two pools of what is one.
	StateHashable = "envoy.hashable_string"
	// StateString is the factory of string state that separates nothing.
	StateString = "envoy.string"
)

// SDS secrets that are not SVIDs.
const (
	// SecretBundle is the trust bundle: CA certificates, no SAN rule.
	SecretBundle = "bundle"
)

// Clusters that the agent adds to every Envoy.
const (
	// ClusterLocalH1 dials the app inside the pod's netns, HTTP/1.1 or plain TCP.
	ClusterLocalH1 = "local"
	// ClusterLocalH2 dials the app inside the pod's netns by HTTP/2 with prior knowledge.
	ClusterLocalH2 = "local-h2"
	// ClusterNone has no endpoint; what reaches it is refused.
	ClusterNone = "none"
	// ClusterAgent is the agent's xDS socket.
	ClusterAgent = "agent"
)

// ScopedRoutes is the name of the scoped route set that every outbound listener shares.
const ScopedRoutes = "weft"

// DefaultTrustDomain is the SPIFFE trust domain when MeshConfig names none.
const DefaultTrustDomain = "cluster.local"

// TokenAudience is the audience of the agent's projected service account token. The Kubernetes API refuses it.
const TokenAudience = "weft-ca"

// BundleConfigMap is the ConfigMap in weft's namespace that carries the trust bundle to the agents, key BundleKey.
const (
	BundleConfigMap = "weft-ca"
	BundleKey       = "ca.crt"
)

// Service accounts of weft's own workloads.
const (
	AgentServiceAccount        = "weft-nodeproxy"
	ControlPlaneServiceAccount = "weft-controlplane"
)

// SPIFFEID returns the identity of a service account: spiffe://<trust domain>/ns/<namespace>/sa/<name>.
func SPIFFEID(trustDomain, namespace, serviceAccount string) string {
	return "spiffe://" + trustDomain + "/ns/" + namespace + "/sa/" + serviceAccount
}

// ParseSPIFFEID splits an identity made by SPIFFEID.
func ParseSPIFFEID(id string) (trustDomain, namespace, serviceAccount string, err error) {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" || parts[0] == "" || parts[2] == "" || parts[4] == "" {
		return "", "", "", fmt.Errorf("parse SPIFFE ID %q: want spiffe://<trust domain>/ns/<namespace>/sa/<service account>", id)
	}
	return parts[0], parts[2], parts[4], nil
}

// Scope is the name of the scoped route configuration of one service address, and its scope key: "10.96.0.10:80" or
// "[fd00::1]:80", the form of Envoy's %DOWNSTREAM_LOCAL_ADDRESS%.
func Scope(address netip.AddrPort) string { return address.String() }

// Route is the name of the RouteConfiguration of one service port.
func Route(namespace, service string, port uint16) string {
	return fmt.Sprintf("route/%s/%s/%d", namespace, service, port)
}

// ServiceCluster is the name of the cluster of one service port for HTTP callers.
func ServiceCluster(namespace, service string, port uint16) string {
	return fmt.Sprintf("svc/%s/%s/%d", namespace, service, port)
}

// TCPCluster is the cluster name that an outbound TCP chain asks for: "tcp/" and the original destination. The
// controller answers with the service port's cluster or a refusing one.
func TCPCluster(destination netip.AddrPort) string { return "tcp/" + destination.String() }

// PodCluster is the cluster name that a connection to an enrolled pod's own address asks for: one per pod, whatever
// the port, so that a port scan costs one cluster.
func PodCluster(pod netip.Addr) string { return "pod/" + pod.String() }

// TransportSocketPlain is the transport socket match of an endpoint that is spoken to in plaintext. The match of any
// other endpoint is named by the peer's SPIFFE ID.
const TransportSocketPlain = "plain"

// RulePrefix begins the name of every secret made by RuleSecret.
const RulePrefix = "rule/"

// RuleSecret is the SDS secret of one pod port's authorisation: trust bundle and the peers allowed by it.
func RuleSecret(podUID string, port uint16) string {
	return fmt.Sprintf("%s%s/%d", RulePrefix, podUID, port)
}

// Listener names, by pod uid, sandbox id and generation of Envoy.
func Listener(direction, podUID, sandbox string, generation uint32) string {
	if len(sandbox) > 12 {
		sandbox = sandbox[:12]
	}
	return fmt.Sprintf("%s/%s/%s/%d", direction, podUID, sandbox, generation)
}

// ListenerGeneration is the generation in a name that Listener made; false: it did not make it.
func ListenerGeneration(name string) (uint32, bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 {
		return 0, false
	}
	n, err := strconv.ParseUint(parts[3], 10, 32)
	return uint32(n), err == nil
}

// PodName splits "namespace/name".
func PodName(key string) (namespace, name string, err error) {
	namespace, name, ok := strings.Cut(key, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return "", "", fmt.Errorf("parse pod %q: want <namespace>/<name>", key)
	}
	return namespace, name, nil
}

// refusedMark stands between a resource's name and why it was refused; no name of ours holds a space.
const refusedMark = ": "

// RefusedText is one line of the ErrorDetail.message by which an agent refuses a response: the resource that is refused,
// and why. Resources of the response that no line names are in force.
func RefusedText(name, text string) string {
	return name + refusedMark + strings.Join(strings.Fields(text), " ")
}

// ParseRefused reads a message made of RefusedText lines: why, by resource name. Nil: it is not one, so it is about the
// whole response.
func ParseRefused(message string) map[string]string {
	refused := map[string]string{}
	for line := range strings.Lines(message) {
		name, text, ok := strings.Cut(strings.TrimSuffix(line, "\n"), refusedMark)
		if !ok || name == "" || strings.ContainsAny(name, " \t") {
			return nil
		}
		refused[name] = text
	}
	if len(refused) == 0 {
		return nil
	}
	return refused
}

// Excluded tells of the namespaces that are never in the mesh besides its own: those that Kubernetes needs to repair itself.
func Excluded(namespace string) bool {
	return namespace == "kube-system" || namespace == "kube-public" || namespace == "kube-node-lease"
}
