package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/weftmesh/weft/nodeproxy/internal/enrol"
	"github.com/weftmesh/weft/redirect"
)

// enrolling is a kernel that knows some pods.
type enrolling struct {
	enrol.Kernel
	pods   []redirect.Pod
	cookie uint64
	err    error
}

func (k *enrolling) Pods() ([]redirect.Pod, error) { return k.pods, nil }
func (k *enrolling) Enrol(redirect.Pod) error      { return k.err }
func (k *enrolling) Withdraw(string) error         { return k.err }
func (k *enrolling) Verify(string) (redirect.State, error) {
	return redirect.State{Pod: redirect.Pod{Cookie: k.cookie}}, nil
}

// TestBrokerMayEnterPodsOfTheMesh, those of an agent before this one among them, until Envoy has cut what it had of them.
func TestBrokerMayEnterPodsOfTheMesh(t *testing.T) {
	dir := t.TempDir()
	folder := filepath.Join(dir, "generation-1") // of a supervisor
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	written := func() string {
		got, err := os.ReadFile(filepath.Join(folder, "namespaces"))
		if err != nil {
			t.Fatal(err)
		}
		return string(got)
	}
	expect := func(when string, want ...uint64) {
		t.Helper()
		text := ""
		for _, n := range want {
			text += fmt.Sprintln(n)
		}
		if got := written(); got != text {
			t.Errorf("%s: %q, want %q", when, got, text)
		}
	}
	k := &enrolling{pods: []redirect.Pod{{UID: "old", Cookie: 7}}, cookie: 3}
	n, err := newNamespaces(k, dir, 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	expect("at the start", 7)
	if err := n.Enrol(redirect.Pod{UID: "new"}); err != nil {
		t.Fatal(err)
	}
	expect("after an enrolment", 3, 7)
	k.err = errors.New("broken")
	if err := n.Withdraw("new"); !errors.Is(err, k.err) {
		t.Error(err)
	}
	if err := n.Enrol(redirect.Pod{UID: "another"}); !errors.Is(err, k.err) {
		t.Error(err)
	}
	expect("after what failed", 3, 7)
	k.err = redirect.ErrUnknownPod
	if err := n.Withdraw("new"); !errors.Is(err, k.err) {
		t.Error(err)
	}
	k.err = nil
	if err := n.Withdraw("old"); err != nil {
		t.Error(err)
	}
	expect("right after the withdrawals", 3, 7)
	for end := time.Now().Add(10 * time.Second); written() != "" && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
	}
	expect("in the end")
	k.cookie = 9
	n.close()
	if err := n.Enrol(redirect.Pod{UID: "late"}); err != nil {
		t.Error(err)
	}
	expect("after another agent has the node")
}
