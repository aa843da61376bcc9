package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// MeshConfig configures the mesh. Only the one named "default" counts; without it every field has its default.
// Deleting it keeps the last values and withdraws nothing.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,categories=weft
// +kubebuilder:validation:XValidation:rule="self.metadata.name == 'default'",message="only the MeshConfig named default counts"
// +kubebuilder:printcolumn:name="Trust domain",type=string,JSONPath=`.spec.trustDomain`
// +kubebuilder:printcolumn:name="Enrolment",type=string,JSONPath=`.spec.enrolment.mode`
type MeshConfig struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What the mesh is to be. Required.
	Spec MeshConfigSpec `json:"spec"`
	// What became of it. The controller writes it. Default: none.
	// +optional
	Status Status `json:"status,omitempty"`
}

// MeshConfigSpec is the mesh's configuration.
//
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.trustDomain) || (has(self.trustDomain) && self.trustDomain == oldSelf.trustDomain)",message="trustDomain cannot change: every identity would"
type MeshConfigSpec struct {
	// SPIFFE trust domain of all identities: lower-case letters, digits, dots, dashes and underscores. Immutable.
	// Default: the controller's, "cluster.local" unless the chart says otherwise.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9._-]+$`
	TrustDomain string `json:"trustDomain,omitempty"`
	// mTLS mode where no AuthenticationPolicy says otherwise. Default: Permissive.
	// +optional
	// +kubebuilder:default={mode: Permissive}
	MTLS MTLS `json:"mtls,omitempty"`
	// Which pods join the mesh. Default: those that a label says (mode Labelled, podOptOut Allowed).
	// +optional
	// +kubebuilder:default={mode: Labelled, podOptOut: Allowed}
	Enrolment Enrolment `json:"enrolment,omitempty"`
	// Ranges (CIDR) within which externalIPs and load-balancer addresses of Services are captured. Addresses outside
	// are never captured: a Service could otherwise claim any address. Default: none.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=43
	// +kubebuilder:validation:items:XValidation:rule="isCIDR(self)",message="not a CIDR"
	ServiceAddressRanges []string `json:"serviceAddressRanges,omitempty"`
	// Most connections that one pod may hold through the proxy, in each direction. Default: 4000.
	// +optional
	// +kubebuilder:default=4000
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=20000
	ConnectionsPerPod int32 `json:"connectionsPerPod,omitempty"`
	// What an app sees as its client's address. Preserve: the client's, as without weft. Own: its own pod's, for every
	// client. A change counts for new connections. Default: Preserve.
	// +optional
	// +kubebuilder:default=Preserve
	// +kubebuilder:validation:Enum=Preserve;Own
	ClientAddress ClientAddress `json:"clientAddress,omitempty"`
}

// ClientAddress is Preserve or Own.
type ClientAddress string

// What an app sees as its client's address.
const (
	ClientAddressPreserve ClientAddress = "Preserve"
	ClientAddressOwn      ClientAddress = "Own"
)

// MTLS says which callers a port takes.
type MTLS struct {
	// Permissive takes mesh mTLS, an app's own TLS as bytes, and plaintext. Strict takes mesh mTLS with a verified
	// identity and nothing else. Default: Permissive.
	// +optional
	// +kubebuilder:default=Permissive
	Mode MTLSMode `json:"mode,omitempty"`
}

// MTLSMode is Permissive or Strict.
// +kubebuilder:validation:Enum=Permissive;Strict
type MTLSMode string

// Modes of mTLS.
const (
	Permissive MTLSMode = "Permissive"
	Strict     MTLSMode = "Strict"
)

// Enrolment says which pods join the mesh. kube-system, kube-public, kube-node-lease, weft's own namespace, hostNetwork
// pods and finished pods never do.
type Enrolment struct {
	// Labelled: pods and namespaces with the label weft.dev/mesh=enabled. All: every pod that the selectors match and
	// that does not say weft.dev/mesh=disabled. Off: no new pod joins; pods in the mesh leave. Default: Labelled.
	// +optional
	// +kubebuilder:default=Labelled
	// +kubebuilder:validation:Enum=Labelled;All;Off
	Mode EnrolmentMode `json:"mode,omitempty"`
	// Namespaces that mode All reaches. Default: all.
	// +optional
	NamespaceSelector *LabelSelector `json:"namespaceSelector,omitempty"`
	// Pods that mode All reaches. Default: all.
	// +optional
	PodSelector *LabelSelector `json:"podSelector,omitempty"`
	// Whether a pod's own label weft.dev/mesh=disabled keeps it out where its namespace is in. Default: Allowed.
	// +optional
	// +kubebuilder:default=Allowed
	// +kubebuilder:validation:Enum=Allowed;Forbidden
	PodOptOut PodOptOut `json:"podOptOut,omitempty"`
}

// EnrolmentMode is Labelled, All or Off.
type EnrolmentMode string

// Modes of enrolment.
const (
	EnrolLabelled EnrolmentMode = "Labelled"
	EnrolAll      EnrolmentMode = "All"
	EnrolOff      EnrolmentMode = "Off"
)

// PodOptOut is Allowed or Forbidden.
type PodOptOut string

// Whether pods may opt out.
const (
	OptOutAllowed   PodOptOut = "Allowed"
	OptOutForbidden PodOptOut = "Forbidden"
)

// Status is what became of one of weft's objects.
type Status struct {
	// Accepted: the object is valid and used. Programmed: every concerned node has acknowledged it.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// MeshConfigList is a list of MeshConfig.
// +kubebuilder:object:root=true
type MeshConfigList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []MeshConfig `json:"items"`
}
