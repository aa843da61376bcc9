package recall

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

func policy(name, pattern string) *v1alpha1.AccessPolicy {
	p := &v1alpha1.AccessPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Annotations: map[string]string{"note": "x"}}}
	p.Spec.Action = v1alpha1.Allow
	p.Spec.Rules = []v1alpha1.AccessRule{{To: []v1alpha1.Operation{{Paths: []v1alpha1.ValueMatch{{Type: v1alpha1.MatchRegex, Value: pattern}}}}}}
	return p
}

func input(objects ...any) resolve.Input {
	in := resolve.Input{Namespace: "weft-system", Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}},
		Pods: []*corev1.Pod{{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "web"}, Spec: corev1.PodSpec{NodeName: "n"}}}}
	for _, o := range objects {
		switch o := o.(type) {
		case *v1alpha1.AccessPolicy:
			in.AccessPolicies = append(in.AccessPolicies, o)
		case *v1alpha1.MeshConfig:
			in.MeshConfig = o
		}
	}
	return in
}

// leader is one life of a controller, as main wires it.
type leader struct {
	store  *Store
	known  Known
	result *resolve.Result
	// end ends it: there is one leader at a time.
	end func()
}

func lead(t *testing.T, client *fake.Clientset) *leader {
	t.Helper()
	store, known, err := Open(t.Context(), Config{Client: client, Namespace: "weft-system", Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); store.Run(ctx) }()
	end := func() { cancel(); <-done }
	t.Cleanup(end)
	return &leader{store: store, known: known, end: end}
}

func (l *leader) turn(in resolve.Input) {
	in.Good = l.known.Policies
	if in.MeshConfig == nil {
		in.MeshConfig = l.known.MeshConfig
	}
	l.result = resolve.Resolve(l.result, in)
	l.store.Take(in, l.result.Good)
}

func kept(t *testing.T, client *fake.Clientset, want func(map[string]string) bool) {
	t.Helper()
	var content map[string]string
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		m, err := client.CoreV1().ConfigMaps("weft-system").Get(t.Context(), names.LastKnownConfigMap, metav1.GetOptions{})
		if err == nil {
			if content = m.Data; want(content) {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("ConfigMap is %v", content)
		}
	}
}

func TestTheNextLeaderKnows(t *testing.T) {
	client := fake.NewClientset()
	failures := 1
	client.PrependReactor("create", "configmaps", func(clienttesting.Action) (bool, runtime.Object, error) {
		failures--
		return failures >= 0, nil, errors.New("the API server is away")
	})
	mesh := &v1alpha1.MeshConfig{ObjectMeta: metav1.ObjectMeta{Name: "default"}, Spec: v1alpha1.MeshConfigSpec{Enrolment: v1alpha1.Enrolment{Mode: v1alpha1.EnrolAll}}}
	first := lead(t, client)
	first.turn(input(mesh, policy("a", "/ok.*")))
	kept(t, client, func(m map[string]string) bool {
		return len(m) == 2 && strings.Contains(m["MeshConfig"], `"All"`) && strings.Contains(m["policy.AccessPolicy.uid-a"], "/ok.*")
	})

	// MeshConfig is deleted and the policy broken while nobody leads.
	first.end()
	second := lead(t, client)
	second.turn(input(policy("a", "(")))
	if pod := second.result.Snapshot.Pods["web"]; pod.Goal == 0 {
		t.Error("the pod is out: MeshConfig's mode All is forgotten")
	}
	if p := second.result.Snapshot.Policies[second.result.Snapshot.Pods["web"].Policy].Default; p.Closed || len(p.Allow) != 1 {
		t.Errorf("the good form is forgotten: %+v", p)
	}

	second.end()
	third := lead(t, client)
	third.turn(input(policy("a", "("), policy("b", "(")))
	if g := third.result.Good; len(g) != 1 || !g["AccessPolicy.uid-a"].InForce {
		t.Errorf("good forms: %v", g)
	}
	order := input()
	order.UninstallOrder = &corev1.ConfigMap{Data: map[string]string{names.UninstallKey: "true"}}
	third.turn(order)
	kept(t, client, func(m map[string]string) bool { return len(m) == 0 })
}

func TestBound(t *testing.T) {
	k := Known{MeshConfig: &v1alpha1.MeshConfig{}, Policies: map[string]resolve.Good{}}
	for i := range 10 {
		k.Policies[fmt.Sprintf("AccessPolicy.%d", i)] = resolve.Good{Access: policy(fmt.Sprint(i), "/"), InForce: i == 7}
	}
	all, skipped := encode(k, sizeLimit)
	if len(all) != 11 || len(skipped) != 0 || strings.Contains(fmt.Sprint(all), "note") {
		t.Errorf("%d kept, %v skipped: %v", len(all), skipped, all)
	}
	size := 0
	for _, key := range []string{"MeshConfig", "policy.AccessPolicy.0", "policy.AccessPolicy.7"} {
		size += len(key) + len(all[key])
	}
	some, skipped := encode(k, size)
	if got := slices.Sorted(maps.Keys(some)); !slices.Equal(got, []string{"MeshConfig", "policy.AccessPolicy.0", "policy.AccessPolicy.7"}) || len(skipped) != 8 {
		t.Errorf("%v kept, %v skipped", got, skipped)
	}
}

func TestWhatCannotBeReadIsLeftOut(t *testing.T) {
	good, _ := encode(Known{Policies: map[string]resolve.Good{"AccessPolicy.a": {Access: policy("a", "/")}}}, sizeLimit)
	good["policy.AccessPolicy.b"], good["MeshConfig"], good["other"], good["policy.AccessPolicy.c"] = "{", "[]", "", "{}"
	k, bad := decode(good)
	if len(k.Policies) != 1 || k.Policies["AccessPolicy.a"].Access.Name != "a" || k.MeshConfig != nil {
		t.Errorf("read %+v", k)
	}
	if got := slices.Sorted(maps.Keys(bad)); !slices.Equal(got, []string{"MeshConfig", "other", "policy.AccessPolicy.b", "policy.AccessPolicy.c"}) {
		t.Errorf("bad: %v", bad)
	}
}
