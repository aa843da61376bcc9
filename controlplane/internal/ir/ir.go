// Package ir is what resolve makes of Kubernetes objects and what xds makes resources of: plain data, no Kubernetes
// type and no protobuf. Everything in a Snapshot is immutable once built; resolve reuses what did not change, so that
// equal pointers mean equal content and later stages do work proportional to a change.
package ir

import (
	"net/netip"
	"time"
)

// Mode says which callers a port takes.
type Mode uint8

const (
	// Permissive takes mesh mTLS, an app's own TLS as bytes, and plaintext.
	Permissive Mode = iota + 1
	// Strict takes mesh mTLS with a verified identity, nothing else.
	Strict
)

// Class is how outbound connections to a service port are handled.
type Class uint8

const (
	ClassHTTP Class = iota + 1
	ClassTCP
	// ClassAuto looks at the first bytes.
	ClassAuto
)

// Protocol is what a port's server speaks.
type Protocol uint8

const (
	HTTP1 Protocol = iota + 1
	HTTP2
	TCP
	// TCPServerFirst is TCP whose server sends the first bytes.
	TCPServerFirst
)

// Key names a namespaced object.
type Key struct{ Namespace, Name string }

func (k Key) String() string { return k.Namespace + "/" + k.Name }

// PortKey names one port of a Service.
type PortKey struct {
	Service Key
	Port    uint16
}

// Snapshot is the whole mesh at one time.
type Snapshot struct {
	Mesh       Mesh
	Namespaces map[string]*Namespace
	// Services holds every Service of the Kubernetes cluster that has an address or a selectorless slice.
	Services map[Key]*Service
	// Pods holds every pod that is not hostNetwork and not terminal, by uid.
	Pods map[string]*Pod
	// Policies holds the inbound policies that pods name, by hash.
	Policies map[string]*InboundPolicy
	// Owners tells which service port answers at an address; a contested address has the older ClusterIP's owner.
	Owners map[netip.AddrPort]PortKey
	// PodsByAddress holds the uid of the one pod that owns an address; a contested address is absent.
	PodsByAddress map[netip.Addr]string
}

// Mesh is MeshConfig with its defaults filled in.
type Mesh struct {
	TrustDomain       string
	SVIDLife          time.Duration // 0: unknown
	DefaultMode       Mode
	ForbidOptOut      bool
	Uninstall         bool
	ConnectionsPerPod uint32
	// OwnClientAddress: apps see their own pod's address as their client's.
	OwnClientAddress bool
}

// Namespace is the decision for one namespace.
type Namespace struct {
	Name string
	// Enrol: pods that say nothing join, if PodSelector (Kubernetes' text form; empty: all) selects them.
	Enrol       bool
	PodSelector string
	// Closed: no pod joins, whatever its own label says.
	Closed bool
	Mode   Mode
}

// Service is one Kubernetes Service.
type Service struct {
	Key Key
	// Addresses are allocated ClusterIPs first, then external and load-balancer addresses within the allowed ranges.
	Addresses []netip.Addr
	Ports     []*ServicePort
}

// ServicePort is one port of a Service with its routes and endpoints.
type ServicePort struct {
	Key      PortKey
	Name     string
	Protocol Protocol
	Class    Class
	// Pass: no mesh feature needs the port, so new connections are not captured. Those that were keep their routes.
	Pass bool
	// Routes in order of precedence; the first match wins. Empty: everything goes to this port's own endpoints.
	// Consumer routes stand first and match on SourceNamespace.
	Routes []*Route
	// Endpoints sorted by address.
	Endpoints []*Endpoint
	// Affinity is ClientIP session affinity's timeout; 0: none.
	Affinity time.Duration
	// LocalOnly: internalTrafficPolicy Local, only endpoints of the caller's own node.
	LocalOnly bool
}

// Transport is how an endpoint is spoken to.
type Transport uint8

const (
	// Plain: the endpoint is not in the mesh and nothing demands that it be.
	Plain Transport = iota + 1
	// MTLS: mesh mTLS with Identity verified.
	MTLS
	// Refuse: the destination is Strict and not (yet) in the mesh: no connection at all.
	Refuse
)

// Endpoint is one address behind a service port.
type Endpoint struct {
	Address   netip.AddrPort
	Transport Transport
	// Identity is the SPIFFE ID of the pod behind the address, verified under MTLS. A pod outside the mesh has one too, so
	// that the clusters that lead to it stay as they are when it enters and when it leaves.
	Identity string
	// Pod is the uid of the pod that owns the address; empty for foreign addresses.
	Pod  string
	Node string
	// Generation changes when callers' pools must move to new connections (docs/LIFECYCLE.md, policy change).
	Generation string
	// Serving endpoints take traffic when no Ready one is left (serving but terminating).
	Ready, Serving bool
}

// Route is one rule of an HTTPRoute or GRPCRoute.
type Route struct {
	// Source is "HTTPRoute namespace/name rule 0 match 1", for names and status.
	Source string
	Match  RouteMatch
	// Exactly one of Backends and Redirect.
	Backends                        []Backend
	Redirect                        *Redirect
	Rewrite                         *Rewrite
	RequestHeaders, ResponseHeaders HeaderEdit
	// Timeout of the whole request; nil: none. 0 disables.
	Timeout *time.Duration
	// BackendTimeout of one try; nil: none.
	BackendTimeout *time.Duration
}

// RouteMatch matches when every field that is set matches.
type RouteMatch struct {
	// SourceNamespace restricts a consumer route to callers of one namespace.
	SourceNamespace string
	Path            *StringMatch
	Method          string
	Headers         []NamedMatch
	Query           []NamedMatch
	// GRPC: only requests with a gRPC content type. Service and ServiceMethod are how many characters of each the match
	// names, which decides its precedence.
	GRPC                   bool
	Service, ServiceMethod int
}

// MatchKind is how a value is compared.
type MatchKind uint8

const (
	Exact MatchKind = iota + 1
	Prefix
	// PathPrefix compares whole path elements, as Gateway API defines it.
	PathPrefix
	// Regex is RE2 over the whole value.
	Regex
	// Present matches any value.
	Present
)

// StringMatch compares one value.
type StringMatch struct {
	Kind  MatchKind
	Value string
}

// NamedMatch compares one header or query parameter.
type NamedMatch struct {
	Name string
	StringMatch
}

// Backend is one weighted destination of a route.
type Backend struct {
	Weight uint32
	Port   PortKey
	// Status answers this share of requests without a backend (500: invalid reference); 0: use Port.
	Status                          uint32
	RequestHeaders, ResponseHeaders HeaderEdit
}

// HeaderEdit changes headers: Set overwrites, Add appends, Remove deletes.
type HeaderEdit struct {
	Set, Add []Header
	Remove   []string
}

// Header is one name and value.
type Header struct{ Name, Value string }

// Redirect answers with a Location.
type Redirect struct {
	Scheme, Hostname string
	Port             uint32
	// Path replaces the whole path, PrefixPath the matched prefix; at most one.
	Path, PrefixPath *string
	Status           uint32
}

// Rewrite changes the request before it is sent.
type Rewrite struct {
	Hostname         string
	Path, PrefixPath *string
}

// Stage is how far a pod is to be brought into the mesh.
type Stage uint8

const (
	Out Stage = iota
	Captured
	Enforced
)

// Pod is one pod that could be enrolled.
type Pod struct {
	UID            string
	Key            Key
	Node           string
	ServiceAccount string
	SPIFFEID       string
	Addresses      []netip.Addr
	// Goal is where labels and MeshConfig want the pod: Out or Enforced.
	Goal Stage
	// Stage is what the pod's agent is to do now; MTLS whether peers speak mTLS to it (package barrier decides).
	Stage Stage
	MTLS  bool
	// Policy is the hash of its InboundPolicy, Moved that of the one to which all callers have moved.
	Policy, Moved    string
	Strict           bool
	ProbePorts       []uint16
	ServerFirstPorts []uint16
	// Shortcut: labels ask for the short circuit.
	Shortcut bool
	// Ends is when a deleted pod's grace period is over; zero: it is not deleted.
	Ends time.Time
}

// Ended tells whether the pod was deleted and has had its grace period: nothing is done in its name any more.
func (p *Pod) Ended(now time.Time) bool { return !p.Ends.IsZero() && !now.Before(p.Ends) }

// InboundPolicy is everything that a callee enforces, named by its content.
type InboundPolicy struct {
	Hash    string
	Default PortPolicy
	Ports   []PortPolicy
}

// PortPolicy is what one callee port enforces.
type PortPolicy struct {
	Port     uint16
	Mode     Mode
	Protocol Protocol
	// HTTP: rules need methods, paths or headers.
	HTTP bool
	// Identity: some rule names an identity.
	Identity bool
	Deny     []Rule
	// Restricted: denied unless one of Allow matches.
	Restricted bool
	Allow      []Rule
	// Closed: a policy could not be compiled and has no last good form.
	Closed  bool
	Sources []string
}

// Rule matches when its peer and its request both match.
type Rule struct {
	Name     string
	Peers    []Peer
	Requests []Request
}

// Peer matches a SPIFFE ID: the whole, or a prefix that ends in "/".
type Peer struct{ ID, Prefix string }

// Request matches an HTTP request.
type Request struct {
	Methods []string
	Paths   []StringMatch
	Headers []NamedMatch
}
