package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/weftmesh/weft/api/names"
)

// GroupVersion is weft.dev/v1alpha1.
var GroupVersion = schema.GroupVersion{Group: names.Group, Version: "v1alpha1"}

// AddToScheme registers the types of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&MeshConfig{}, &MeshConfigList{},
		&AuthenticationPolicy{}, &AuthenticationPolicyList{},
		&AccessPolicy{}, &AccessPolicyList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
