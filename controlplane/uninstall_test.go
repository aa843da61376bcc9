package main

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/weftmesh/weft/api/names"
)

// member is a pod whose condition says whether it is enrolled; empty: it says nothing.
func member(name, node string, enrolled corev1.ConditionStatus) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}}
	p.Spec.NodeName = node
	if enrolled != "" {
		p.Status.Conditions = []corev1.PodCondition{{Type: names.ConditionEnrolled, Status: enrolled}}
	}
	return p
}

// fakeMesh has pods in all states, and the ConfigMap of the order.
func fakeMesh() *fake.Clientset {
	finished := member("finished", "n1", corev1.ConditionTrue)
	finished.Status.Phase = corev1.PodSucceeded
	return fake.NewClientset(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: names.UninstallConfigMap}},
		member("a", "n1", corev1.ConditionTrue), member("b", "n1", corev1.ConditionTrue), member("c", "n2", corev1.ConditionUnknown),
		member("left", "n3", corev1.ConditionFalse), member("stranger", "n3", ""), finished)
}

// leave lets a pod's node take it out of the mesh.
func leave(t *testing.T, clients *fake.Clientset, name string) {
	t.Helper()
	p, err := clients.CoreV1().Pods("shop").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.Status.Conditions[0].Status = corev1.ConditionFalse
	if _, err := clients.CoreV1().Pods("shop").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestUninstallWaitsUntilEveryPodHasLeft(t *testing.T) {
	clients := fakeMesh()
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		done := make(chan error, 1)
		go func() { done <- uninstall(t.Context(), clients, "weft-system", time.Minute, &out) }()
		pass := func() { time.Sleep(2 * time.Second); synctest.Wait() }
		pass()
		order, err := clients.CoreV1().ConfigMaps("weft-system").Get(t.Context(), names.UninstallConfigMap, metav1.GetOptions{})
		if err != nil || order.Data[names.UninstallKey] != "true" {
			t.Fatalf("the order: %v, %v", order, err)
		}
		for _, name := range []string{"a", "b", "c"} {
			pass()
			leave(t, clients, name)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		want := "still in the mesh: n1 (2 pods, such as shop/a), n2 (shop/c)\n" +
			"still in the mesh: n1 (shop/b), n2 (shop/c)\n" +
			"still in the mesh: n2 (shop/c)\n" +
			"every pod has left the mesh\n"
		if out.String() != want {
			t.Errorf("it says\n%s, want\n%s", &out, want)
		}
	})
}

func TestUninstallNamesTheNodesThatDoNotAnswer(t *testing.T) {
	clients := fakeMesh()
	leave(t, clients, "a")
	leave(t, clients, "b")
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		start := time.Now()
		err := uninstall(t.Context(), clients, "weft-system", time.Minute, &out)
		if err == nil || !strings.Contains(err.Error(), "n2 (shop/c)") || strings.Contains(err.Error(), "n1") || !strings.Contains(err.Error(), "nodeproxy release") {
			t.Errorf("after the time is up: %v", err)
		}
		if took := time.Since(start); took != time.Minute {
			t.Errorf("it waited %s", took)
		}
	})
}

func TestUninstallNeedsTheOrder(t *testing.T) {
	clients := fake.NewClientset()
	if err := uninstall(context.Background(), clients, "weft-system", time.Minute, &strings.Builder{}); err == nil || !strings.Contains(err.Error(), "order the pods out") {
		t.Errorf("without the ConfigMap: %v", err)
	}
}
