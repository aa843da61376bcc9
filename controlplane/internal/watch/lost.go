package watch

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/weftmesh/weft/api/names"
)

// A CRD that is deleted takes its objects along, and one event looks like the other. For a policy that would mean that Strict pods
// open and that rules lapse: so what goes with its CRD stays in force, until an object of that name is made again.

// asker tells the uid of a kind's CRD; empty: it is not there, or about to go.
type asker func(ctx context.Context, kind string) (types.UID, error)

func askCRDs(c metadata.Interface) asker {
	crds := c.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	return func(ctx context.Context, kind string) (types.UID, error) {
		crd, err := crds.Get(ctx, kind+"."+names.Group, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return "", nil
		case err != nil:
			return "", fmt.Errorf("ask for the CRD of %s: %w", kind, err)
		case crd.DeletionTimestamp != nil:
			return "", nil
		}
		return crd.UID, nil
	}
}

// keptPolicies are those of a kind that hold though they may be gone.
type keptPolicies[P client.Object] struct {
	kind string
	crd  types.UID
	// last were there when it was looked last; lost went with their CRD; known are what an earlier controller knew, until it is looked first.
	last, lost, known map[types.NamespacedName]P
}

func (k *keptPolicies[P]) know(p P, lost bool) {
	if lost {
		k.lost = with(k.lost, p)
	} else {
		k.known = with(k.known, p)
	}
}

func with[P client.Object](all map[types.NamespacedName]P, p P) map[types.NamespacedName]P {
	if all == nil {
		all = map[types.NamespacedName]P{}
	}
	all[client.ObjectKeyFromObject(p)] = p
	return all
}

// complete adds to the policies that are there those that hold though they are gone. served: the API server has the kind. An error says
// that it is not known yet why some are gone: they hold, and it is to be looked again.
func (k *keptPolicies[P]) complete(ctx context.Context, there []P, served bool, ask asker) (all []P, lost []P, err error) {
	now := map[types.NamespacedName]P{}
	for _, p := range there {
		now[client.ObjectKeyFromObject(p)] = p
	}
	if !served {
		for _, p := range k.known {
			k.lost = with(k.lost, p)
		}
		k.known = nil
		return append(there, values(k.lost)...), values(k.lost), nil
	}
	k.known = nil
	gone := map[types.NamespacedName]P{}
	for key, p := range k.last {
		if _, is := now[key]; !is {
			gone[key] = p
		}
	}
	if len(gone) > 0 || k.crd == "" {
		crd, failed := ask(ctx, k.kind)
		switch {
		case failed != nil:
			err = failed
		case crd == "" || k.crd != "" && crd != k.crd:
			for _, p := range gone {
				k.lost = with(k.lost, p)
			}
			gone, k.crd = nil, crd
		default: // whoever deleted them meant them
			gone, k.crd = nil, crd
		}
	}
	for key := range now {
		delete(k.lost, key)
	}
	k.last = now
	for key, p := range gone {
		k.last[key] = p
	}
	lost = append(values(k.lost), values(gone)...)
	return append(there, lost...), lost, err
}

func values[P client.Object](all map[types.NamespacedName]P) (out []P) {
	for _, p := range all {
		out = append(out, p)
	}
	return out
}
