package agent

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/weftmesh/weft/nodeproxy/internal/enrol"
	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
	"github.com/weftmesh/weft/redirect"
)

// namespaces is the kernel as enrolment uses it, and tells Envoy's broker which network namespaces it may enter: those of the pods
// that the kernel knows, by their cookies, which the kernel gives once.
type namespaces struct {
	enrol.Kernel
	runDir string
	// linger is how long Envoy may still have connections of a pod that was withdrawn.
	linger time.Duration

	mu sync.Mutex
	// cookies are those of pods in the mesh; left those of pods that have just left.
	cookies map[string]uint64
	left    map[uint64]bool
	closed  bool
}

// newNamespaces begins with the pods that an agent before this one enrolled.
func newNamespaces(kernel enrol.Kernel, runDir string, linger time.Duration) (*namespaces, error) {
	n := &namespaces{Kernel: kernel, runDir: runDir, linger: linger, cookies: map[string]uint64{}, left: map[uint64]bool{}}
	held, err := kernel.Pods()
	if err != nil {
		return nil, fmt.Errorf("read enrolled pods: %w", err)
	}
	for _, p := range held {
		n.cookies[p.UID] = p.Cookie
	}
	return n, n.Write()
}

// Enrol lets the broker in: Envoy's listeners come next.
func (n *namespaces) Enrol(p redirect.Pod) error {
	if err := n.Kernel.Enrol(p); err != nil {
		return err
	}
	now, err := n.Verify(p.UID)
	if err != nil {
		return fmt.Errorf("read the pod's network namespace back: %w", err)
	}
	n.mu.Lock()
	known := n.cookies[p.UID] == now.Pod.Cookie
	n.cookies[p.UID] = now.Pod.Cookie
	n.mu.Unlock()
	if known {
		return nil
	}
	return n.Write()
}

// Withdraw keeps the broker out, once Envoy has cut what it had.
func (n *namespaces) Withdraw(uid string) error {
	err := n.Kernel.Withdraw(uid)
	if err != nil && !errors.Is(err, redirect.ErrUnknownPod) {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	cookie, known := n.cookies[uid]
	if !known {
		return err
	}
	delete(n.cookies, uid)
	n.left[cookie] = true
	time.AfterFunc(n.linger, func() {
		n.mu.Lock()
		delete(n.left, cookie)
		n.mu.Unlock()
		_ = n.Write() // the next one writes it too
	})
	return err
}

// Write tells the broker, a new Envoy's among them: a supervisor that ends forgets.
func (n *namespaces) Write() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	all := maps.Clone(n.left)
	for _, cookie := range n.cookies {
		all[cookie] = true
	}
	return envoy.AllowNamespaces(n.runDir, slices.Collect(maps.Keys(all)))
}

// close ends writing: another agent may have the node.
func (n *namespaces) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
}
