package redirect

import (
	"errors"
	"net/netip"

	"github.com/weftmesh/weft/api/names"
)

var (
	// ErrUnknownPod is returned for a pod uid that is neither gated nor enrolled in this instance.
	ErrUnknownPod = errors.New("pod is not enrolled on this node")
	// ErrStillAttached is in AttachProxy's error when that cgroup is attached since before, and stays so.
	ErrStillAttached = errors.New("it is attached since before")
	// ErrPodsFull is returned by Gate and Enrol when Limits.Pods is reached. The pod is untouched.
	ErrPodsFull = errors.New("no room for another pod: raise the limit of enrolled pods per node")
	// ErrFull is returned when another kernel map is full; the text names it. Its size follows Limits.Pods.
	ErrFull = errors.New("a kernel map is full: raise the limit of enrolled pods per node")
	// ErrNetnsGone is returned when the pod's network namespace does not exist or is not the one that was enrolled.
	ErrNetnsGone = errors.New("the pod's network namespace is gone")
	// ErrUnsupported is returned by Load on a kernel without a feature; the text names it and the kernel that has it.
	ErrUnsupported = errors.New("kernel lacks a feature")
)

// Class is the kind of a service's protocol and picks the steering port, by which Envoy picks its filter chain.
type Class uint16

// The classes are the steering ports themselves.
const (
	ClassHTTP Class = names.PortOutHTTP
	ClassTCP  Class = names.PortOutTCP
	// ClassAuto is for ports that declare no protocol.
	ClassAuto Class = names.PortOutAuto
)

// Service is one address of a service that enrolled pods' connections are captured for.
type Service struct {
	Addr  netip.AddrPort
	Class Class
}

// Refusal says why one service address is not captured.
type Refusal struct {
	Addr   netip.AddrPort
	Reason string
}

// Pod is a pod as the container runtime shows it.
type Pod struct {
	// UID is the pod's uid, at most 63 bytes.
	UID string
	// Sandbox is the runtime's id of the pod sandbox, at most 79 bytes. A new sandbox of the same uid is another pod.
	Sandbox string
	// NetnsPath is where the pod's network namespace can be opened, at most 255 bytes.
	NetnsPath string
	// Addresses are the pod's own, one or both families. The first of each family becomes the source address of
	// captured connections.
	Addresses []netip.Addr
	// Cookie is the netns cookie that NetnsPath must have; 0 takes what it has.
	Cookie uint64
}

// Role is what a listener of Envoy in a pod's netns is for.
type Role uint32

// The roles are the ones digits of the listeners' ports; names.ListenPort gives the port of a role and generation.
const (
	// RoleOut accepts what the pod's apps dial, all classes.
	RoleOut Role = names.PortOutHTTP - names.PortFirst
	// RoleIn accepts what others dial.
	RoleIn Role = names.PortIn - names.PortFirst
	// RoleInFirst accepts, under Permissive, peers that are not enrolled on ports whose server speaks first.
	RoleInFirst Role = names.PortInFirst - names.PortFirst
)

// Listener is a listening socket of Envoy that the kernel will hand connections to.
type Listener struct {
	Role       Role
	Generation uint32
	// Port is where it listens; apps cannot reach it by that port.
	Port uint16
	// Socket is the kernel's cookie of the socket.
	Socket uint64
}

// Mode is how inbound connections of a pod are judged before Envoy sees them.
type Mode struct {
	// Strict drops everything while Envoy has no listener. Permissive lets peers that are not enrolled through to the app.
	Strict bool
	// ServerFirst are the pod's ports whose server speaks first; they only matter under Permissive.
	ServerFirst []uint16
	// Probes are the ports of probes and lifecycle hooks that kubelet may dial directly on the pod's addresses.
	Probes []uint16
}

// State is what the kernel holds for one pod, read back through the pins.
type State struct {
	Pod             Pod
	Gated           bool
	Inbound         bool
	Outbound        bool
	Strict          bool
	Shortcut        bool
	Generation      uint32
	Listeners       []Listener
	Outgoing        uint64 // captured connections open now that the pod made
	Incoming        uint64 // captured connections open now that the pod accepted
	RefusedOutgoing uint64 // refused because of Limits.ConnectionsPerPod
	RefusedIncoming uint64
	// Drift lists what is not as it should be, a phrase each: a link detached or with another program, a sysctl, an
	// address or route missing. Empty: the pod is captured as the flags above say. Enrol with the same Pod repairs, and
	// AttachProxy what Envoy lacks.
	Drift []string
}

// Captured reports whether both directions are captured and nothing drifted: the truth behind the pod's condition.
func (s State) Captured() bool { return s.Inbound && s.Outbound && !s.Gated && len(s.Drift) == 0 }
