// Package resolve turns Kubernetes objects into an ir.Snapshot: who is in the mesh, which service answers at which
// address, where requests go, and what each callee enforces. It is a pure function: no client, no clock. Everything that
// an object asks for and cannot get becomes a Problem, which package status writes into the object's conditions.
package resolve

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
)

// Input is all that a snapshot is made of. The objects are not changed.
type Input struct {
	// Namespace is weft's own.
	Namespace string
	// TrustDomain is used where MeshConfig names none.
	TrustDomain string
	// SVIDLife is how long SVIDs live; 0: unknown.
	SVIDLife time.Duration

	// UninstallOrder is the ConfigMap that orders every pod out of the mesh, or nil.
	UninstallOrder *corev1.ConfigMap

	// MeshConfig is the one named "default", or nil.
	MeshConfig             *v1alpha1.MeshConfig
	Namespaces             []*corev1.Namespace
	Pods                   []*corev1.Pod
	Services               []*corev1.Service
	EndpointSlices         []*discoveryv1.EndpointSlice
	HTTPRoutes             []*gwv1.HTTPRoute
	GRPCRoutes             []*gwv1.GRPCRoute
	ReferenceGrants        []*gwv1.ReferenceGrant
	AuthenticationPolicies []*v1alpha1.AuthenticationPolicy
	AccessPolicies         []*v1alpha1.AccessPolicy

	// Good holds policies' last good forms as an earlier leader knew them, by name (see Result.Good).
	Good map[string]Good
	// Lost are policies, by the same names, that were deleted with their CRD: they hold.
	Lost map[string]bool

	// Made are the newest of these objects, Seen is how far each kind was followed, deletions included.
	Made, Seen epoch.Kinds

	// Decisions are package barrier's, by pod uid. A pod without one is out.
	Decisions map[string]Decision
}

// Decision is how far one pod has come, as package barrier has it.
type Decision struct {
	Stage ir.Stage
	// MTLS: peers speak mTLS to it.
	MTLS bool
	// Lost: it was in the mesh and its node no longer asserts it; nobody speaks plaintext to it if it is Strict.
	Lost bool
	// Policy is the hash of the inbound policy that its node reports in force; it is the generation of the pod's endpoints.
	Policy string
	// Moved is Policy once every node has acknowledged that generation: callers have moved to new connections.
	Moved string
	// Proxy is the generation of its node's Envoy that serves the pod's new connections.
	Proxy uint32
}

// Result is what Resolve makes.
type Result struct {
	Snapshot *ir.Snapshot
	// Problems in a stable order.
	Problems []Problem
	// Good holds each policy's last form that could be compiled, by "<kind>.<uid>".
	Good map[string]Good
}

// Good is a form of a policy that can be compiled: one of both kinds.
type Good struct {
	Authentication *v1alpha1.AuthenticationPolicy `json:"authentication,omitempty"`
	Access         *v1alpha1.AccessPolicy         `json:"access,omitempty"`
	// Lost: the policy was deleted with its CRD.
	Lost bool `json:"lost,omitempty"`
	// InForce: the policy's current form cannot be compiled, and this one applies instead.
	InForce bool `json:"-"`
}

// Ref names an object.
type Ref struct {
	Kind, Namespace, Name string
	Generation            int64
}

// Problem is one condition of one object. An object without problems is accepted.
type Problem struct {
	Object Ref
	// Parent is the parentRef's index in a route; -1: the object as a whole.
	Parent int
	// Type, Status, Reason and Message are the condition's.
	Type, Status, Reason, Message string
}

// GoodAuthentication and GoodAccess name a policy in Result.Good.
func GoodAuthentication(p *v1alpha1.AuthenticationPolicy) string {
	return "AuthenticationPolicy." + string(p.UID)
}

func GoodAccess(p *v1alpha1.AccessPolicy) string { return "AccessPolicy." + string(p.UID) }
