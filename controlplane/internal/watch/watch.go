// Package watch follows the Kubernetes objects that a mesh is made of and gives them to package resolve as plain lists,
// whenever something changed. It is level-based: each Input is complete.
package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"
	gwv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

// Config of a Watcher.
type Config struct {
	REST *rest.Config
	// Namespace is weft's own, TrustDomain the default one, SVIDLife how long SVIDs live; all are passed on.
	Namespace, TrustDomain string
	SVIDLife               time.Duration
	Log                    *slog.Logger
	// MeshConfig and Good are what an earlier leader knew last (package recall).
	MeshConfig *v1alpha1.MeshConfig
	Good       map[string]resolve.Good
}

// Coalescing of changes: an Input is given this long after the last change, and at most maxDelay after the first.
const (
	idleDelay = 5 * time.Millisecond
	maxDelay  = 50 * time.Millisecond
	// retryMissing is the time between two looks for a kind that the API server does not serve yet.
	retryMissing = 2 * time.Second
)

// Watcher follows objects.
type Watcher struct {
	config Config
	cache  cache.Cache
	dirty  chan struct{}

	mu      sync.Mutex
	present map[string]bool // kinds that are followed
	// seen is how far each kind has been followed: no change up to it is missing.
	seen    epoch.Kinds
	lasting lasting

	ask            asker
	authentication keptPolicies[*v1alpha1.AuthenticationPolicy]
	access         keptPolicies[*v1alpha1.AccessPolicy]
}

// lasting are the objects whose last form holds when they are gone. Deleting MeshConfig, or its CRD, never means "withdraw";
// deleting the uninstall order does not take it back: helm deletes it with the rest, while agents still have to follow it.
type lasting struct {
	mesh  *v1alpha1.MeshConfig
	order *corev1.ConfigMap
}

// complete puts the last form of what is missing into an Input.
func (l *lasting) complete(in *resolve.Input) {
	if in.MeshConfig == nil {
		in.MeshConfig = l.mesh
	}
	if in.UninstallOrder == nil {
		in.UninstallOrder = l.order
	}
	l.mesh, l.order = in.MeshConfig, in.UninstallOrder
}

// Scheme knows every type that the controller reads or writes.
func Scheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, gwv1.Install, v1alpha1.AddToScheme} {
		if err := add(s); err != nil {
			return nil, fmt.Errorf("register types: %w", err)
		}
	}
	return s, nil
}

// New makes a Watcher; Run starts it.
func New(c Config) (*Watcher, error) {
	s, err := Scheme()
	if err != nil {
		return nil, err
	}
	httpClient, err := rest.HTTPClientFor(c.REST)
	if err != nil {
		return nil, fmt.Errorf("watch objects: %w", err)
	}
	mapper, err := apiutil.NewDynamicRESTMapper(c.REST, httpClient)
	if err != nil {
		return nil, fmt.Errorf("watch objects: %w", err)
	}
	objects, err := cache.New(c.REST, cache.Options{
		HTTPClient: httpClient, Scheme: s, Mapper: mapper,
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}: {Transform: trimPod},
			// One object alone: the controller has no right to any other.
			&corev1.ConfigMap{}: {Namespaces: map[string]cache.Config{c.Namespace: {}}, Field: fields.OneTermEqualSelector("metadata.name", names.UninstallConfigMap)},
		},
	})
	if err != nil {
		return nil, fmt.Errorf("watch objects: %w", err)
	}
	about, err := metadata.NewForConfigAndClient(c.REST, httpClient)
	if err != nil {
		return nil, fmt.Errorf("watch objects: %w", err)
	}
	w := &Watcher{config: c, cache: objects, dirty: make(chan struct{}, 1), present: map[string]bool{}, seen: epoch.Kinds{}, lasting: lasting{mesh: c.MeshConfig}, ask: askCRDs(about)}
	w.authentication.kind, w.access.kind = authenticationPolicies, accessPolicies
	for _, g := range c.Good {
		switch {
		case g.Authentication != nil:
			w.authentication.know(g.Authentication, g.Lost)
		case g.Access != nil:
			w.access.know(g.Access, g.Lost)
		}
	}
	return w, nil
}

// trimPod keeps what resolve reads: pods are by far the most numerous objects.
func trimPod(o any) (any, error) {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return o, nil
	}
	slim := &corev1.Pod{TypeMeta: p.TypeMeta}
	slim.Name, slim.Namespace, slim.UID, slim.ResourceVersion, slim.Generation = p.Name, p.Namespace, p.UID, p.ResourceVersion, p.Generation
	slim.Labels, slim.CreationTimestamp, slim.DeletionTimestamp = p.Labels, p.CreationTimestamp, p.DeletionTimestamp
	slim.Spec.NodeName, slim.Spec.HostNetwork, slim.Spec.ServiceAccountName = p.Spec.NodeName, p.Spec.HostNetwork, p.Spec.ServiceAccountName
	slim.Status.Phase, slim.Status.PodIPs, slim.Status.Conditions = p.Status.Phase, p.Status.PodIPs, p.Status.Conditions
	containers := func(from []corev1.Container) []corev1.Container {
		var to []corev1.Container
		for _, c := range from {
			to = append(to, corev1.Container{Name: c.Name, Ports: c.Ports, LivenessProbe: c.LivenessProbe, ReadinessProbe: c.ReadinessProbe, StartupProbe: c.StartupProbe, Lifecycle: c.Lifecycle})
		}
		return to
	}
	slim.Spec.Containers, slim.Spec.InitContainers = containers(p.Spec.Containers), containers(p.Spec.InitContainers)
	return slim, nil
}

// Run follows the objects until ctx ends and calls give with a complete Input at first and after each change. give is
// never called twice at a time.
func (w *Watcher) Run(ctx context.Context, give func(resolve.Input)) error {
	all := kinds()
	failed := make(chan error, len(all)+1)
	go func() {
		if err := w.cache.Start(ctx); err != nil {
			failed <- fmt.Errorf("watch objects: %w", err)
		}
	}()
	var looked sync.WaitGroup // each kind is followed, or known to be missing
	for _, k := range all {
		looked.Add(1)
		go w.follow(ctx, k, sync.OnceFunc(looked.Done), failed)
	}
	ready := make(chan struct{})
	go func() { looked.Wait(); close(ready) }()
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	case <-ready:
	}
	w.mark()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-w.dirty:
		}
		w.settle(ctx)
		in, err := w.read(ctx, all)
		if err != nil {
			return err
		}
		give(in)
	}
}

// settle waits for the end of a burst of changes.
func (w *Watcher) settle(ctx context.Context) {
	limit := time.After(maxDelay)
	for {
		select {
		case <-ctx.Done():
			return
		case <-limit:
			return
		case <-w.dirty:
		case <-time.After(idleDelay):
			return
		}
	}
}

// follow starts the informer of one kind, as soon as the API server serves it.
func (w *Watcher) follow(ctx context.Context, k kind, looked func(), failed chan<- error) {
	for told := false; ; {
		informer, err := w.cache.GetInformer(ctx, k.object)
		switch {
		case err == nil:
			_, err = informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
				AddFunc: func(any) { w.mark() }, UpdateFunc: func(any, any) { w.mark() },
				DeleteFunc: func(o any) { w.deleted(k.name, o); w.mark() },
			})
			if err != nil {
				failed <- fmt.Errorf("watch %s: %w", k.name, err)
				return
			}
			w.mu.Lock()
			w.present[k.name] = true
			if l, ok := informer.(interface{ LastSyncResourceVersion() string }); ok { // what was deleted before leaves no other trace
				if v := epoch.Version(l.LastSyncResourceVersion()); v != math.MaxUint64 {
					w.seen.Raise(epoch.Kinds{k.name: v})
				}
			}
			w.mu.Unlock()
			looked()
			w.mark()
			return
		case ctx.Err() != nil:
			return
		case !k.optional || !meta.IsNoMatchError(err):
			if !k.optional {
				failed <- fmt.Errorf("watch %s: %w", k.name, err)
				return
			}
			// Not looked yet: without its policies the mesh would stand open.
			w.config.Log.Warn("watch failed, trying again", "kind", k.name, "error", err)
		default:
			if !told {
				told = true
				w.config.Log.Info("kind is not installed; it is followed as soon as it is", "kind", k.name)
			}
			looked()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryMissing):
		}
	}
}

// deleted notes that a deletion was seen: the object carries the resource version of its end.
func (w *Watcher) deleted(kind string, o any) {
	if object, ok := o.(client.Object); ok {
		if v := epoch.Version(object.GetResourceVersion()); v != math.MaxUint64 {
			w.mu.Lock()
			w.seen.Raise(epoch.Kinds{kind: v})
			w.mu.Unlock()
		}
	}
}

func (w *Watcher) mark() {
	select {
	case w.dirty <- struct{}{}:
	default:
	}
}

// read lists everything that is followed.
func (w *Watcher) read(ctx context.Context, all []kind) (resolve.Input, error) {
	in := resolve.Input{Namespace: w.config.Namespace, TrustDomain: w.config.TrustDomain, SVIDLife: w.config.SVIDLife, Good: w.config.Good, Made: epoch.Kinds{}}
	for _, k := range all {
		w.mu.Lock()
		present := w.present[k.name]
		w.mu.Unlock()
		if !present {
			continue
		}
		newest, err := k.list(ctx, w.cache, &in)
		if err != nil {
			return in, fmt.Errorf("list %s: %w", k.name, err)
		}
		if newest > 0 {
			in.Made[k.name] = newest
		}
	}
	w.mu.Lock()
	w.seen.Raise(in.Made)
	in.Seen = maps.Clone(w.seen)
	w.mu.Unlock()
	w.lasting.complete(&in)
	w.keep(ctx, &in)
	return in, nil
}

// keep puts the policies into an Input that were lost with their CRD.
func (w *Watcher) keep(ctx context.Context, in *resolve.Input) {
	w.mu.Lock()
	authentication, access := w.present[authenticationPolicies], w.present[accessPolicies]
	w.mu.Unlock()
	in.Lost = map[string]bool{}
	var lostAuthentication []*v1alpha1.AuthenticationPolicy
	var lostAccess []*v1alpha1.AccessPolicy
	var err, err2 error
	in.AuthenticationPolicies, lostAuthentication, err = w.authentication.complete(ctx, in.AuthenticationPolicies, authentication, w.ask)
	in.AccessPolicies, lostAccess, err2 = w.access.complete(ctx, in.AccessPolicies, access, w.ask)
	for _, p := range lostAuthentication {
		in.Lost[resolve.GoodAuthentication(p)] = true
	}
	for _, p := range lostAccess {
		in.Lost[resolve.GoodAccess(p)] = true
	}
	if err := errors.Join(err, err2); err != nil {
		w.config.Log.Warn("policies are gone, and it is not known why: they hold until it is", "error", err)
		time.AfterFunc(retryMissing, w.mark)
	}
}
