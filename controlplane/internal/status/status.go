// Package status writes what became of objects into their conditions: pods, weft's policies, routes, Services. It writes
// only what changed, pods at once, other objects at most once a second each and 20 times a second in all. What is likely to
// be over in a moment is not written at all.
package status

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/flowcontrol"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/weftmesh/weft/controlplane/internal/engine"
)

// Config of a Writer.
type Config struct {
	Client client.Client
	Log    *slog.Logger
}

// Limits of writing.
const (
	perSecond = 20
	perObject = time.Second
	// retry is how long after a write the watch may take to show it, and how long after a failure the next try comes.
	retry = 2 * time.Second
)

// patience is how long a condition must be wanted before it is written: most changes are acknowledged sooner than somebody
// could read that they are pending, and agents come back together with their reports.
var patience = map[string]time.Duration{pending: 300 * time.Millisecond, notReported: 5 * time.Second}

// Writer writes conditions.
type Writer struct {
	config  Config
	limiter flowcontrol.RateLimiter
	wake    chan struct{}

	mu      sync.Mutex
	picture *engine.Picture

	// written holds what was last written to an object, until the watch shows it; at is when; since is from when on an object
	// has wanted something that patience holds back.
	written   map[string][]metav1.Condition
	at, since map[string]time.Time
}

// New makes a Writer; Run starts it.
func New(c Config) *Writer {
	return &Writer{config: c, limiter: flowcontrol.NewTokenBucketRateLimiter(perSecond, perSecond), wake: make(chan struct{}, 1),
		written: map[string][]metav1.Condition{}, at: map[string]time.Time{}, since: map[string]time.Time{}}
}

// Take gives the newest picture; it does not block.
func (w *Writer) Take(p engine.Picture) {
	w.mu.Lock()
	w.picture = &p
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Run writes until ctx ends.
func (w *Writer) Run(ctx context.Context) {
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		case <-again.C:
		}
		w.mu.Lock()
		p := w.picture
		w.mu.Unlock()
		if p == nil {
			continue
		}
		if next := w.write(ctx, p); !next.IsZero() {
			again.Reset(time.Until(next))
		}
	}
}

// write brings all objects up to date and returns when to look at what is left; zero: nothing is.
func (w *Writer) write(ctx context.Context, p *engine.Picture) time.Time {
	var next time.Time
	later := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	v := newView(p)
	for _, pod := range p.Input.Pods {
		if want := v.podConditions(pod); len(want) > 0 {
			later(w.pod(ctx, pod, want))
		}
	}
	for _, t := range v.targets() {
		later(w.object(ctx, t))
	}
	return next
}

// changed tells which of the wanted conditions differ from those there are, and keeps the time of those that do not
// change their status.
func changed(have, want []metav1.Condition, now time.Time) []metav1.Condition {
	var out []metav1.Condition
	for _, c := range want {
		c.LastTransitionTime = metav1.NewTime(now.Truncate(time.Second))
		same := false
		for _, h := range have {
			if h.Type != c.Type {
				continue
			}
			same = h.Status == c.Status && h.Reason == c.Reason && h.Message == c.Message && h.ObservedGeneration == c.ObservedGeneration
			if h.Status == c.Status {
				c.LastTransitionTime = h.LastTransitionTime
			}
		}
		if !same {
			out = append(out, c)
		}
	}
	return out
}

// hold tells until when conditions are held back; zero: they are not.
func (w *Writer) hold(id string, fresh []metav1.Condition) time.Time {
	wait := time.Duration(0)
	for _, c := range fresh {
		if c.Status != metav1.ConditionTrue {
			wait = max(wait, patience[c.Reason])
		}
	}
	if wait == 0 {
		delete(w.since, id)
		return time.Time{}
	}
	if w.since[id].IsZero() {
		w.since[id] = time.Now()
	}
	if until := w.since[id].Add(wait); time.Now().Before(until) {
		return until
	}
	return time.Time{}
}

// pod patches a pod's conditions and returns when to look again. What was just written counts until the watch has caught up.
func (w *Writer) pod(ctx context.Context, pod *corev1.Pod, want []metav1.Condition) time.Time {
	var have []metav1.Condition
	for _, c := range pod.Status.Conditions {
		have = append(have, metav1.Condition{Type: string(c.Type), Status: metav1.ConditionStatus(c.Status), Reason: c.Reason, Message: c.Message, LastTransitionTime: c.LastTransitionTime})
	}
	id := "Pod/" + string(pod.UID)
	fresh := changed(have, want, time.Now())
	if len(fresh) == 0 {
		delete(w.since, id)
		return time.Time{}
	}
	if equal(w.written[id], want) && time.Since(w.at[id]) < retry {
		return w.at[id].Add(retry)
	}
	if fresh[0].Reason == notReported { // a pod's other steps are written at once
		if until := w.hold(id, fresh); !until.IsZero() {
			return until
		}
	}
	type condition struct {
		Type               string      `json:"type"`
		Status             string      `json:"status"`
		Reason             string      `json:"reason"`
		Message            string      `json:"message"`
		LastTransitionTime metav1.Time `json:"lastTransitionTime"`
	}
	var list []condition
	for _, c := range fresh {
		list = append(list, condition{c.Type, string(c.Status), c.Reason, c.Message, c.LastTransitionTime})
	}
	return w.patch(ctx, id, want, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}}, types.StrategicMergePatchType,
		map[string]any{"metadata": map[string]any{"uid": pod.UID}, "status": map[string]any{"conditions": list}})
}

// target is one object that is no pod, with its status as it should be.
type target struct {
	object client.Object
	how    types.PatchType
	status any
	// done: the object has it.
	done       bool
	conditions []metav1.Condition
	// fresh are those of the conditions that it does not have.
	fresh []metav1.Condition
}

// merged is a target whose whole status is ours to write.
func merged(o client.Object, have, want any, conditions, before []metav1.Condition) target {
	return target{o, types.MergePatchType, want, reflect.DeepEqual(have, want), conditions, changed(before, conditions, time.Now())}
}

// known is what a patch needs of an object's metadata.
func known(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion}
}

// read names the object as it was read: not another of the same name, nor, where the status has others' parts too, one that
// somebody else has written since.
func (t target) read() map[string]any {
	read := map[string]any{"uid": t.object.GetUID()}
	if t.how == types.MergePatchType {
		read["resourceVersion"] = t.object.GetResourceVersion()
	}
	return read
}

// object patches an object and returns when to look again.
func (w *Writer) object(ctx context.Context, t target) time.Time {
	id := fmt.Sprintf("%T/%s/%s", t.object, t.object.GetNamespace(), t.object.GetName())
	if t.done {
		delete(w.since, id)
		return time.Time{}
	}
	if equal(w.written[id], t.conditions) && time.Since(w.at[id]) < retry {
		return w.at[id].Add(retry)
	}
	if until := w.hold(id, t.fresh); !until.IsZero() {
		return until
	}
	if time.Since(w.at[id]) < perObject {
		return w.at[id].Add(perObject)
	}
	if !w.limiter.TryAccept() {
		return time.Now().Add(time.Second / perSecond)
	}
	return w.patch(ctx, id, t.conditions, t.object, t.how, map[string]any{"metadata": t.read(), "status": t.status})
}

// patch writes and returns when to try again; zero: it is done.
func (w *Writer) patch(ctx context.Context, id string, want []metav1.Condition, o client.Object, how types.PatchType, body any) time.Time {
	content, err := json.Marshal(body)
	if err != nil {
		w.config.Log.Error("marshal status", "object", id, "error", err)
		return time.Time{}
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err = w.config.Client.Status().Patch(ctx, o, client.RawPatch(how, content))
	switch {
	case apierrors.IsNotFound(err), apierrors.IsConflict(err): // it is gone, or another of the same name
		return time.Time{}
	case err != nil:
		w.config.Log.Warn("write status", "object", id, "error", err)
		return time.Now().Add(retry)
	}
	w.written[id], w.at[id] = want, time.Now()
	delete(w.since, id)
	w.forget()
	return time.Time{}
}

// forget bounds the memory of what was written.
func (w *Writer) forget() {
	if len(w.at) < 50_000 {
		return
	}
	old := slices.Collect(maps.Keys(w.at))
	for _, id := range old {
		if time.Since(w.at[id]) > time.Minute {
			delete(w.at, id)
			delete(w.written, id)
			delete(w.since, id)
		}
	}
}

func equal(a, b []metav1.Condition) bool {
	return slices.EqualFunc(a, b, func(x, y metav1.Condition) bool {
		return x.Type == y.Type && x.Status == y.Status && x.Reason == y.Reason && x.Message == y.Message && x.ObservedGeneration == y.ObservedGeneration
	})
}
