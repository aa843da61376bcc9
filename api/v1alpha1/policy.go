package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// TargetRef names what a policy is attached to, in the policy's own namespace.
//
// +kubebuilder:validation:XValidation:rule="self.group.size() == 0 && self.kind == 'Service'",message="policies attach to Services (group \"\", kind Service)"
type TargetRef struct {
	// API group of the target: "" for a Service. Default: "".
	// +optional
	// +kubebuilder:default=""
	// +kubebuilder:validation:MaxLength=253
	Group string `json:"group"`
	// Kind of the target: Service. Default: Service.
	// +optional
	// +kubebuilder:default=Service
	// +kubebuilder:validation:MaxLength=63
	Kind string `json:"kind"`
	// Name of the target. Required.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// Target says which pods of the policy's namespace a policy is about. Neither field: all of them.
type Target struct {
	// Services, up to 16: the policy is about the pods behind them, on the ports that they send to. Default: none, all pods of
	// the namespace.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	TargetRefs []TargetRef `json:"targetRefs,omitempty"`
	// Pods, by label: the policy is about all of their ports. Default: all pods of the namespace.
	// +optional
	Selector *LabelSelector `json:"selector,omitempty"`
}

// AuthenticationPolicy says which callers the pods of a namespace take: mesh mTLS alone, or plaintext too. Of several
// for one port the more specific wins (port over Service over selector over namespace), then the older, then the name.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:categories=weft,shortName=authnp
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.mtls.mode`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].status`
type AuthenticationPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What the policy demands. Required.
	Spec AuthenticationPolicySpec `json:"spec"`
	// What became of it. The controller writes it. Default: none.
	// +optional
	Status Status `json:"status,omitempty"`
}

// AuthenticationPolicySpec is what the policy demands.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.targetRefs) && has(self.selector))",message="set targetRefs or selector, not both"
type AuthenticationPolicySpec struct {
	Target `json:",inline"`
	// Mode of all ports that ports does not name. Default: that of a less specific policy, else of MeshConfig.
	// +optional
	MTLS *MTLS `json:"mtls,omitempty"`
	// Mode of single ports, up to 32. Default: none.
	// +optional
	// +listType=map
	// +listMapKey=port
	// +kubebuilder:validation:MaxItems=32
	Ports []PortMTLS `json:"ports,omitempty"`
}

// PortMTLS is the mode of one port.
type PortMTLS struct {
	// Port of the pod (not of a Service), 1 to 65535. Required.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port"`
	// Mode of this port. Default: Permissive.
	// +kubebuilder:default=Permissive
	Mode MTLSMode `json:"mode"`
}

// AuthenticationPolicyList is a list of AuthenticationPolicy.
// +kubebuilder:object:root=true
type AuthenticationPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []AuthenticationPolicy `json:"items"`
}

// AccessPolicy allows or denies requests to pods by the caller's identity and by what is asked for. Any Deny that
// matches denies; else, if any Allow is about the port, one must match; else the request is allowed. A port with a rule
// that names an identity takes no caller without one, under Permissive neither.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:categories=weft,shortName=accessp
// +kubebuilder:printcolumn:name="Action",type=string,JSONPath=`.spec.action`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].status`
type AccessPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// What the policy allows or denies. Required.
	Spec AccessPolicySpec `json:"spec"`
	// What became of it. The controller writes it. Default: none.
	// +optional
	Status Status `json:"status,omitempty"`
}

// AccessAction is Allow or Deny.
// +kubebuilder:validation:Enum=Allow;Deny
type AccessAction string

// Actions of an AccessPolicy.
const (
	Allow AccessAction = "Allow"
	Deny  AccessAction = "Deny"
)

// AccessPolicySpec is what the policy allows or denies.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.targetRefs) && has(self.selector))",message="set targetRefs or selector, not both"
type AccessPolicySpec struct {
	Target `json:",inline"`
	// What happens to a request that a rule matches. Default: Allow.
	// +optional
	// +kubebuilder:default=Allow
	Action AccessAction `json:"action,omitempty"`
	// A request matches the policy when it matches one of its rules, up to 32. Default: none; an Allow without rules allows
	// nothing, a Deny without rules denies nothing.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Rules []AccessRule `json:"rules,omitempty"`
}

// AccessRule matches a request when one of From and one of To match. An empty list matches everything.
type AccessRule struct {
	// Who calls, up to 32 entries. Default: everybody, callers without an identity included.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	From []Source `json:"from,omitempty"`
	// What is asked for, up to 32 entries. Default: everything.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	To []Operation `json:"to,omitempty"`
}

// Source matches a caller that is in any of its lists.
//
// +kubebuilder:validation:XValidation:rule="has(self.serviceAccounts) || has(self.namespaces) || has(self.spiffeIDs)",message="name serviceAccounts, namespaces or spiffeIDs; a rule for everybody has no from"
type Source struct {
	// Service accounts, 1 to 64. Default: none.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	ServiceAccounts []ServiceAccountRef `json:"serviceAccounts,omitempty"`
	// All service accounts of these namespaces, 1 to 64. Default: none.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	Namespaces []string `json:"namespaces,omitempty"`
	// SPIFFE IDs, whole ("spiffe://cluster.local/ns/shop/sa/front"), 1 to 64 of up to 512 characters. Default: none.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:Pattern=`^spiffe://[a-z0-9._-]+/.+$`
	SPIFFEIDs []string `json:"spiffeIDs,omitempty"`
}

// ServiceAccountRef names a service account.
type ServiceAccountRef struct {
	// Namespace of the account. Default: the policy's own.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Namespace string `json:"namespace,omitempty"`
	// Name of the account. Required.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// Operation matches a request that matches every list it has. Methods, paths and headers make the callee's Envoy parse
// HTTP on the port; what is not HTTP there is refused.
type Operation struct {
	// Ports of the pod (not of a Service), 1 to 65535, up to 32. Default: all that the policy is about.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=65535
	Ports []int32 `json:"ports,omitempty"`
	// HTTP methods, upper case, up to 16; one must match. Default: any.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=32
	// +kubebuilder:validation:items:Pattern=`^[A-Z][A-Z-]*$`
	Methods []string `json:"methods,omitempty"`
	// Paths without the query, up to 32; one must match. Default: any.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=32
	Paths []ValueMatch `json:"paths,omitempty"`
	// Headers, up to 16; all must match. Default: none.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	Headers []HeaderMatch `json:"headers,omitempty"`
}

// MatchType is how a value is compared.
// +kubebuilder:validation:Enum=Exact;Prefix;RegularExpression
type MatchType string

// Ways to compare a value. A regular expression is RE2 and must match the whole value.
const (
	MatchExact  MatchType = "Exact"
	MatchPrefix MatchType = "Prefix"
	MatchRegex  MatchType = "RegularExpression"
)

// ValueMatch compares one value.
type ValueMatch struct {
	// How the value is compared. Default: Exact.
	// +optional
	// +kubebuilder:default=Exact
	Type MatchType `json:"type,omitempty"`
	// The value, the prefix or the regular expression (RE2, ASCII alone, at most 256 characters). Required.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	Value string `json:"value"`
}

// HeaderMatch compares one header.
type HeaderMatch struct {
	// Name of the header, 1 to 128 characters; case does not matter. Required.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=128
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9!#$%&'*+.^_|~-]+$`
	Name string `json:"name"`
	// What the value must be. Several headers of one name are one value, joined by commas (RFC 9110): a prefix or an
	// expression of an Allow should not leave room for more behind it. A Deny looks at each of them as well. An Allow never
	// matches an empty value or one beyond 8 KiB. Default: anything, the header must be there.
	// +optional
	Value *ValueMatch `json:"value,omitempty"`
}

// AccessPolicyList is a list of AccessPolicy.
// +kubebuilder:object:root=true
type AccessPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []AccessPolicy `json:"items"`
}
