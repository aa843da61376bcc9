package pods

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
)

// runtime is the container runtime's side of a Table.
type runtime struct {
	*plugin
	changed []string
	// holds are the pods that are held, and refused why their containers are not made.
	holds   map[string]bool
	refused error
	ended   []string
}

func newRuntime() *runtime {
	r := &runtime{}
	table := New(Config{
		NetnsDir: "/host/netns", Changed: func(uid string) { r.changed = append(r.changed, uid) }, Log: slog.New(slog.DiscardHandler),
		Ended: func(uid, sandbox string) { r.ended = append(r.ended, uid+"/"+sandbox) },
		Hold:  func(p Pod) bool { return r.holds[p.UID] },
		Admit: func(ctx context.Context, c Container) error {
			if r.holds[c.UID] && r.refused == nil {
				<-ctx.Done()
				return ctx.Err()
			}
			return r.refused
		},
	})
	r.plugin = &plugin{table, func() time.Duration { return answerMargin + 20*time.Millisecond }}
	return r
}

// took returns whom Changed was called for since the last time.
func (r *runtime) took() []string {
	out := r.changed
	r.changed = nil
	slices.Sort(out)
	return out
}

func sandbox(uid, id string) *api.PodSandbox {
	return &api.PodSandbox{
		Id: id, Uid: uid, Namespace: "shop", Name: "till", Labels: map[string]string{"app": "till"}, RuntimeHandler: "runc", Ips: []string{"10.1.0.7", "::ffff:10.1.0.8", "fd00::7", "nonsense"},
		Annotations: map[string]string{"kubernetes.io/config.source": "api"},
		Linux:       &api.LinuxPodSandbox{Namespaces: []*api.LinuxNamespace{{Type: "pid", Path: "/proc/1/ns/pid"}, {Type: "network", Path: "/var/run/netns/cni-" + id}}},
	}
}

func hostNetwork(uid, id string) *api.PodSandbox {
	s := sandbox(uid, id)
	s.Linux.Namespaces[1].Path = ""
	return s
}

func call(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestNewPod(t *testing.T) {
	r := newRuntime()
	call(t, r.RunPodSandbox(t.Context(), sandbox("a", "1")))
	p, ok := r.table.Get("a")
	want := []netip.Addr{netip.MustParseAddr("10.1.0.7"), netip.MustParseAddr("10.1.0.8"), netip.MustParseAddr("fd00::7")}
	if !ok || p.Namespace != "shop" || p.Name != "till" || p.Sandbox != "1" || p.NetnsPath != "/host/netns/cni-1" || p.Runtime != "runc" ||
		p.Labels["app"] != "till" || !slices.Equal(p.Addresses, want) || !p.Unheld || p.Since.IsZero() {
		t.Errorf("the pod is %+v", p)
	}
	if got := r.took(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("told of %v", got)
	}
	for range 2 {
		_, _, err := r.CreateContainer(t.Context(), sandbox("a", "1"), &api.Container{Name: "app"})
		call(t, err)
	}
	_, _, err := r.CreateContainer(t.Context(), sandbox("unknown", "9"), &api.Container{Name: "app"})
	call(t, err)
	if p, _ := r.table.Get("a"); !slices.Equal(p.Containers, []string{"app"}) {
		t.Errorf("containers are %v", p.Containers)
	}
	select {
	case <-r.table.Synced():
		t.Error("synced before the runtime told of all pods")
	default:
	}
}

func TestHostNetworkIsNoPod(t *testing.T) {
	r := newRuntime()
	call(t, r.RunPodSandbox(t.Context(), hostNetwork("a", "1")))
	_, err := r.Synchronize(t.Context(), []*api.PodSandbox{hostNetwork("b", "2")}, nil)
	call(t, err)
	if all := r.table.All(); len(all) != 0 || len(r.took()) != 0 {
		t.Errorf("pods are %v", all)
	}
}

func TestSynchronizeTellsOfAllPods(t *testing.T) {
	r := newRuntime()
	containers := []*api.Container{{Name: "app", PodSandboxId: "1"}, {Name: "istio-proxy", PodSandboxId: "1"}, {Name: "other", PodSandboxId: "2"}}
	_, err := r.Synchronize(t.Context(), []*api.PodSandbox{sandbox("b", "2"), sandbox("a", "1")}, containers)
	call(t, err)
	<-r.table.Synced()
	all := r.table.All()
	if len(all) != 2 || all[0].UID != "a" || all[1].UID != "b" || !slices.Equal(all[0].Containers, []string{"app", "istio-proxy"}) || !all[0].Unheld {
		t.Errorf("pods are %+v", all)
	}
	if got := r.took(); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("told of %v", got)
	}
}

// TestNewPodIsHeld: before its first container, and one that got none while the agent was away.
func TestNewPodIsHeld(t *testing.T) {
	r := newRuntime()
	r.holds = map[string]bool{"a": true, "waits": true, "runs": true}
	call(t, r.RunPodSandbox(t.Context(), sandbox("a", "1")))
	call(t, r.RunPodSandbox(t.Context(), sandbox("b", "2")))
	all := []*api.PodSandbox{sandbox("a", "1"), sandbox("b", "2"), sandbox("waits", "3"), sandbox("runs", "4")}
	for range 2 { // the runtime came back
		_, err := r.Synchronize(t.Context(), all, []*api.Container{{Name: "app", PodSandboxId: "4"}})
		call(t, err)
		for uid, unheld := range map[string]bool{"a": false, "b": true, "waits": false, "runs": true} {
			if p, _ := r.table.Get(uid); p.Unheld != unheld {
				t.Errorf("%s started unheld: %t", uid, p.Unheld)
			}
		}
	}
	create := func(uid string) error {
		return r.ValidateContainerAdjustment(t.Context(), &api.ValidateContainerAdjustmentRequest{Pod: &api.PodSandbox{Uid: uid}, Container: &api.Container{Name: "app"}})
	}
	call(t, create("b"))
	if err := create("a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a held pod's container: %v", err)
	}
	r.refused = errors.New("no SVID")
	if err := create("a"); !errors.Is(err, r.refused) || !strings.HasPrefix(err.Error(), "weft: ") {
		t.Errorf("a refused pod's container: %v", err)
	}
}

// TestRuntimeComesBack: after a restart of containerd old pods sent no StopPodSandbox.
func TestRuntimeComesBack(t *testing.T) {
	r := newRuntime()
	for uid, id := range map[string]string{"stays": "1", "gone": "2", "anew": "3"} {
		call(t, r.RunPodSandbox(t.Context(), sandbox(uid, id)))
	}
	before, _ := r.table.Get("stays")
	r.took()
	_, err := r.Synchronize(t.Context(), []*api.PodSandbox{sandbox("stays", "1"), sandbox("anew", "4"), sandbox("new", "5")}, nil)
	call(t, err)
	if got := r.took(); !slices.Equal(got, []string{"anew", "gone", "new", "stays"}) {
		t.Errorf("told of %v", got)
	}
	if _, ok := r.table.Get("gone"); ok {
		t.Error("a pod that is gone is still there")
	}
	if p, _ := r.table.Get("anew"); p.Sandbox != "4" {
		t.Errorf("the replaced sandbox is %s", p.Sandbox)
	}
	if p, _ := r.table.Get("stays"); !p.Since.Equal(before.Since) {
		t.Error("a pod that stayed counts as new")
	}
}

func TestPodEnds(t *testing.T) {
	r := newRuntime()
	call(t, r.RunPodSandbox(t.Context(), sandbox("a", "1")))
	call(t, r.RunPodSandbox(t.Context(), sandbox("a", "2")))
	r.took()
	// The end of the old sandbox comes after the new one's start.
	call(t, r.StopPodSandbox(t.Context(), sandbox("a", "1")))
	call(t, r.RemovePodSandbox(t.Context(), sandbox("a", "1")))
	if p, ok := r.table.Get("a"); !ok || p.Sandbox != "2" {
		t.Errorf("the new sandbox went with the old one: %+v", p)
	}
	call(t, r.RemovePodSandbox(t.Context(), sandbox("a", "2")))
	if _, ok := r.table.Get("a"); ok {
		t.Error("the pod is still there")
	}
	if got := r.took(); len(got) == 0 {
		t.Error("nobody was told")
	}
	call(t, r.StopPodSandbox(t.Context(), sandbox("a", "2")))
	if got := r.took(); len(got) != 0 {
		t.Errorf("told of %v, which is long gone", got)
	}
}

// TestDeadSandboxIsPassedOver: after a reboot a pod has two sandboxes, and the runtime lists them in any order.
func TestDeadSandboxIsPassedOver(t *testing.T) {
	for name, order := range map[string][]string{"dead first": {"1", "2"}, "dead last": {"2", "1"}} {
		t.Run(name, func(t *testing.T) {
			r := newRuntime()
			r.table.config.NetnsDir = t.TempDir()
			call(t, os.Symlink("/proc/self/ns/net", filepath.Join(r.table.config.NetnsDir, "cni-2")))
			var all []*api.PodSandbox
			for _, id := range order {
				all = append(all, sandbox("a", id))
			}
			for range 2 {
				_, err := r.Synchronize(t.Context(), all, nil)
				call(t, err)
				if p, _ := r.table.Get("a"); p.Sandbox != "2" {
					t.Errorf("the pod's sandbox is %s", p.Sandbox)
				}
			}
			// Where neither can be told to be dead, the known one stays.
			call(t, os.Remove(filepath.Join(r.table.config.NetnsDir, "cni-2")))
			_, err := r.Synchronize(t.Context(), all, nil)
			call(t, err)
			if p, _ := r.table.Get("a"); p.Sandbox != "2" {
				t.Errorf("the known sandbox gave way to %s", p.Sandbox)
			}
		})
	}
}
