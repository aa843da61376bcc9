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
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// Kinds whose objects may be lost with their CRD.
const authenticationPolicies, accessPolicies = "authenticationpolicies", "accesspolicies"

// kind is one kind of object with its way into an Input.
type kind struct {
	name   string
	object client.Object
	// optional kinds may be missing from the API server; they are followed as soon as they are there.
	optional bool
	list     func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error)
}

// list lists the objects of a kind, and tells the highest of their resource versions. They are the cache's own: nobody changes them.
func list[T any, P interface {
	*T
	client.Object
}](ctx context.Context, c cache.Cache, l client.ObjectList, items *[]T) (all []*T, newest uint64, err error) {
	if err := c.List(ctx, l, client.UnsafeDisableDeepCopy); err != nil {
		return nil, 0, err
	}
	all = make([]*T, len(*items))
	for i := range *items {
		all[i] = &(*items)[i]
		newest = max(newest, epoch.Version(P(all[i]).GetResourceVersion()))
	}
	return all, newest, nil
}

func kinds() []kind {
	return []kind{
		{name: "namespaces", object: &corev1.Namespace{}, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l corev1.NamespaceList
			in.Namespaces, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
		{name: "pods", object: &corev1.Pod{}, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l corev1.PodList
			in.Pods, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
		{name: "services", object: &corev1.Service{}, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l corev1.ServiceList
			in.Services, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
		{name: "endpointslices", object: &discoveryv1.EndpointSlice{}, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l discoveryv1.EndpointSliceList
			in.EndpointSlices, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
		{name: "configmaps", object: &corev1.ConfigMap{}, list: listOrder},
		{name: "httproutes", object: &gwv1.HTTPRoute{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l gwv1.HTTPRouteList
			in.HTTPRoutes, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
		{name: "grpcroutes", object: &gwv1.GRPCRoute{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l gwv1.GRPCRouteList
			in.GRPCRoutes, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
		{name: "referencegrants", object: &gwv1.ReferenceGrant{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l gwv1.ReferenceGrantList
			in.ReferenceGrants, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
		{name: "meshconfigs", object: &v1alpha1.MeshConfig{}, optional: true, list: listMesh},
		{name: authenticationPolicies, object: &v1alpha1.AuthenticationPolicy{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l v1alpha1.AuthenticationPolicyList
			in.AuthenticationPolicies, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
		{name: accessPolicies, object: &v1alpha1.AccessPolicy{}, optional: true, list: func(ctx context.Context, c cache.Cache, in *resolve.Input) (newest uint64, err error) {
			var l v1alpha1.AccessPolicyList
			in.AccessPolicies, newest, err = list(ctx, c, &l, &l.Items)
			return newest, err
		}},
	}
}

// listOrder finds the uninstall order.
func listOrder(ctx context.Context, c cache.Cache, in *resolve.Input) (uint64, error) {
	var l corev1.ConfigMapList
	all, newest, err := list(ctx, c, &l, &l.Items)
	for _, m := range all {
		if m.Name == names.UninstallConfigMap {
			in.UninstallOrder = m
		}
	}
	return newest, err
}

// listMesh finds the one MeshConfig that counts.
func listMesh(ctx context.Context, c cache.Cache, in *resolve.Input) (uint64, error) {
	var l v1alpha1.MeshConfigList
	all, newest, err := list(ctx, c, &l, &l.Items)
	for _, m := range all {
		if m.Name == "default" {
			in.MeshConfig = m
		}
	}
	return newest, err
}
