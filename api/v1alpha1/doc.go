// Package v1alpha1 holds weft's own resources. Gateway API resources come first: weft defines its own only where
// Gateway API has none.
//
// +kubebuilder:object:generate=true
// +groupName=weft.dev
package v1alpha1
