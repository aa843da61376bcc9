package watch

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// kind is one kind of object with its way into an Input.
type kind struct {
	name   string
	object client.Object
	// optional kinds may be missing from the API server; they are followed as soon as they are there.
	optional bool
	list     func(ctx context.Context, c cache.Cache, in *resolve.Input) error
}

// list lists the objects of a kind. They are the cache's own: nobody changes them.
func list[T any](ctx context.Context, c cache.Cache, l client.ObjectList, items *[]T) ([]*T, error) {
	if err := c.List(ctx, l, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	all := make([]*T, len(*items))
	for i := range *items {
		all[i] = &(*items)[i]
	}
	return all, nil
}

func kinds() []kind {
	return []kind{
		{name: "namespaces", object: &corev1.Namespace{}, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l corev1.NamespaceList
			in.Namespaces, err = list(ctx, c, &l, &l.Items)
			return err
		}},
		{name: "pods", object: &corev1.Pod{}, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l corev1.PodList
			in.Pods, err = list(ctx, c, &l, &l.Items)
			return err
		}},
		{name: "services", object: &corev1.Service{}, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l corev1.ServiceList
			in.Services, err = list(ctx, c, &l, &l.Items)
			return err
		}},
		{name: "endpointslices", object: &discoveryv1.EndpointSlice{}, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l discoveryv1.EndpointSliceList
			in.EndpointSlices, err = list(ctx, c, &l, &l.Items)
			return err
		}},
		{name: "configmaps", object: &corev1.ConfigMap{}, list: listOrder},
		{name: "httproutes", object: &gwv1.HTTPRoute{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l gwv1.HTTPRouteList
			in.HTTPRoutes, err = list(ctx, c, &l, &l.Items)
			return err
		}},
		{name: "grpcroutes", object: &gwv1.GRPCRoute{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l gwv1.GRPCRouteList
			in.GRPCRoutes, err = list(ctx, c, &l, &l.Items)
			return err
		}},
		{name: "referencegrants", object: &gwv1.ReferenceGrant{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l gwv1.ReferenceGrantList
			in.ReferenceGrants, err = list(ctx, c, &l, &l.Items)
			return err
		}},
		{name: "meshconfigs", object: &v1alpha1.MeshConfig{}, optional: true, list: listMesh},
		{name: "authenticationpolicies", object: &v1alpha1.AuthenticationPolicy{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l v1alpha1.AuthenticationPolicyList
			in.AuthenticationPolicies, err = list(ctx, c, &l, &l.Items)
			return err
		}},
		{name: "accesspolicies", object: &v1alpha1.AccessPolicy{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (err error) {
			var l v1alpha1.AccessPolicyList
			in.AccessPolicies, err = list(ctx, c, &l, &l.Items)
			return err
		}},
	}
}

// listOrder finds the uninstall order.
func listOrder(ctx context.Context, c cache.Cache, in *resolve.Input) error {
	var l corev1.ConfigMapList
	all, err := list(ctx, c, &l, &l.Items)
	for _, m := range all {
		if m.Name == names.UninstallConfigMap {
			in.UninstallOrder = m
		}
	}
	return err
}

// listMesh finds the one MeshConfig that counts.
func listMesh(ctx context.Context, c cache.Cache, in *resolve.Input) error {
	var l v1alpha1.MeshConfigList
	all, err := list(ctx, c, &l, &l.Items)
	for _, m := range all {
		if m.Name == "default" {
			in.MeshConfig = m
		}
	}
	return err
}
