// Package pods knows the pods of this node as the container runtime has them: learnt by NRI, all running ones when it
// connects and each new one before its first container exists.
package pods

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"golang.org/x/sys/unix"
)

// Pod is a pod sandbox with a network namespace of its own.
type Pod struct {
	UID, Namespace, Name string
	Sandbox              string
	// NetnsPath is the runtime's own, as it stands in this process's file system.
	NetnsPath string
	Addresses []netip.Addr
	Labels    map[string]string
	// Containers are the names of those that run or ran in it.
	Containers []string
	// Runtime is the RuntimeClass's handler; empty: the default.
	Runtime string
	// Static: the API server knows it under another uid, if at all; kubelet or another client made it by itself.
	Static bool
	// Unheld: it ran before the agent learnt of it.
	Unheld bool
	// Since is when the agent learnt of it.
	Since time.Time
}

// Container is one that is to be made.
type Container struct {
	// UID and Sandbox are its pod's.
	UID, Sandbox string
	Name         string
}

// Config of a Table.
type Config struct {
	// Socket is NRI's.
	Socket string
	// NetnsDir is where this process sees the runtime's netns files: the runtime's /run/netns.
	NetnsDir string
	// Hold is asked about each pod in which no container has been made yet; true: Admit lets each of its containers be made.
	Hold func(Pod) bool
	// Admit waits until a container may be made; its error becomes the runtime's, and kubelet tries again.
	Admit func(context.Context, Container) error
	// Ended is told of each sandbox that is gone, before Changed.
	Ended func(uid, sandbox string)
	// Changed is called, without blocking, with the uid of a pod that came, changed or went.
	Changed func(uid string)
	Log     *slog.Logger
}

// Table is the node's pods.
type Table struct {
	config Config

	mu     sync.Mutex
	pods   map[string]Pod // by uid
	synced chan struct{}
	once   sync.Once
}

// New makes a Table; Run fills it.
func New(c Config) *Table {
	return &Table{config: c, pods: map[string]Pod{}, synced: make(chan struct{})}
}

// Synced is closed when the runtime has told of all running pods once.
func (t *Table) Synced() <-chan struct{} { return t.synced }

// Get returns one pod.
func (t *Table) Get(uid string) (Pod, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.pods[uid]
	return p, ok
}

// All returns all pods, by uid.
func (t *Table) All() []Pod {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Pod, 0, len(t.pods))
	for _, p := range t.pods {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Pod) int { return strings.Compare(a.UID, b.UID) })
	return out
}

// Run keeps the connection to the runtime up until ctx ends: the stub does not reconnect by itself.
func (t *Table) Run(ctx context.Context) {
	wait := 200 * time.Millisecond
	for ctx.Err() == nil {
		started := time.Now()
		err := t.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > 10*time.Second {
			wait = 200 * time.Millisecond
		}
		t.config.Log.Warn("container runtime is away, trying again", "socket", t.config.Socket, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, 5*time.Second)
	}
}

func (t *Table) connect(ctx context.Context) error {
	p := &plugin{table: t}
	s, err := stub.New(p, stub.WithPluginName("weft"), stub.WithPluginIdx("00"), stub.WithSocketPath(t.config.Socket))
	if err != nil {
		return fmt.Errorf("make NRI plugin: %w", err)
	}
	p.requests = s.RequestTimeout
	defer context.AfterFunc(ctx, s.Stop)()
	if err := s.Run(ctx); err != nil {
		return fmt.Errorf("run NRI plugin on %s: %w", t.config.Socket, err)
	}
	return nil
}

// plugin has the methods that the stub looks for.
type plugin struct {
	table *Table
	// requests is the runtime's limit for one of them: after it this plugin counts as dead.
	requests func() time.Duration
}

// answerMargin is how long before the runtime's limit an answer has to be given.
const answerMargin = time.Second / 2

// Synchronize tells of all running pods.
func (p *plugin) Synchronize(_ context.Context, sandboxes []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	t := p.table
	now := map[string]Pod{}
	for _, s := range sandboxes {
		if pod, ok := t.read(s); ok {
			pod.Unheld = true
			for _, c := range containers {
				if c.PodSandboxId == s.Id {
					pod.Containers = append(pod.Containers, c.Name)
				}
			}
			if other, twice := now[pod.UID]; !twice || t.prefer(pod, other) {
				now[pod.UID] = pod
			}
		}
	}
	for uid, pod := range now {
		if old, ok := t.Get(uid); (!ok || old.Sandbox != pod.Sandbox) && len(pod.Containers) == 0 {
			pod.Unheld = !t.config.Hold(pod)
			now[uid] = pod
		}
	}
	var ended []Pod
	t.mu.Lock()
	changed := map[string]bool{}
	for uid, pod := range now {
		if old, ok := t.pods[uid]; ok && old.Sandbox == pod.Sandbox {
			pod.Unheld, pod.Since = old.Unheld, old.Since
			now[uid] = pod
		}
		changed[uid] = true
	}
	for uid, old := range t.pods {
		changed[uid] = true
		if now[uid].Sandbox != old.Sandbox {
			ended = append(ended, old)
		}
	}
	t.pods = now
	t.mu.Unlock()
	for _, p := range ended {
		t.config.Ended(p.UID, p.Sandbox)
	}
	t.once.Do(func() { close(t.synced) })
	for uid := range changed {
		t.config.Changed(uid)
	}
	return nil, nil
}

// prefer chooses of two sandboxes of one pod: runtimes list a dead one until kubelet removes it. The network namespace of
// what lives is there; else the one that is known stays.
func (t *Table) prefer(pod, other Pod) bool {
	if lives, otherLives := isNetns(pod.NetnsPath), isNetns(other.NetnsPath); lives != otherLives {
		return lives
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	known, ok := t.pods[pod.UID]
	return ok && known.Sandbox == pod.Sandbox
}

func isNetns(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) == nil && s.Type == unix.NSFS_MAGIC
}

// RunPodSandbox tells of a new pod whose network is ready and in which no container exists yet.
func (p *plugin) RunPodSandbox(_ context.Context, s *api.PodSandbox) error {
	pod, ok := p.table.read(s)
	if !ok {
		return nil
	}
	pod.Unheld = !p.table.config.Hold(pod)
	p.table.set(pod)
	return nil
}

// ValidateContainerAdjustment is asked before a container is made.
func (p *plugin) ValidateContainerAdjustment(ctx context.Context, r *api.ValidateContainerAdjustmentRequest) error {
	limit := time.Now().Add(p.requests())
	if call, ok := ctx.Deadline(); ok && call.Before(limit) {
		limit = call
	}
	ctx, cancel := context.WithDeadline(ctx, limit.Add(-answerMargin))
	defer cancel()
	c := Container{UID: r.GetPod().GetUid(), Sandbox: r.GetPod().GetId(), Name: r.GetContainer().GetName()}
	if err := p.table.config.Admit(ctx, c); err != nil {
		p.table.config.Log.Warn("container is not let in", "pod", c.UID, "container", c.Name, "error", err)
		return fmt.Errorf("weft: %w", err)
	}
	return nil
}

// CreateContainer adds a container's name.
func (p *plugin) CreateContainer(_ context.Context, s *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	t := p.table
	t.mu.Lock()
	if pod, ok := t.pods[s.Uid]; ok && pod.Sandbox == s.Id && !slices.Contains(pod.Containers, c.Name) {
		pod.Containers = append(slices.Clone(pod.Containers), c.Name)
		t.pods[s.Uid] = pod
	}
	t.mu.Unlock()
	return nil, nil, nil
}

// StopPodSandbox tells that a pod is ending; its network is still there.
func (p *plugin) StopPodSandbox(_ context.Context, s *api.PodSandbox) error {
	p.table.remove(s)
	return nil
}

// RemovePodSandbox comes for sandboxes that were never stopped.
func (p *plugin) RemovePodSandbox(_ context.Context, s *api.PodSandbox) error {
	p.table.remove(s)
	return nil
}

func (t *Table) set(p Pod) {
	t.mu.Lock()
	t.pods[p.UID] = p
	t.mu.Unlock()
	t.config.Changed(p.UID)
}

func (t *Table) remove(s *api.PodSandbox) {
	t.mu.Lock()
	pod, ok := t.pods[s.Uid]
	if ok && pod.Sandbox == s.Id {
		delete(t.pods, s.Uid)
	}
	t.mu.Unlock()
	t.config.Ended(s.Uid, s.Id)
	if ok {
		t.config.Changed(s.Uid)
	}
}

// read makes a Pod of a sandbox; false: it has no network namespace of its own.
func (t *Table) read(s *api.PodSandbox) (Pod, bool) {
	path := ""
	for _, n := range s.GetLinux().GetNamespaces() {
		if n.GetType() == "network" {
			path = n.GetPath()
		}
	}
	if path == "" || s.Uid == "" {
		return Pod{}, false
	}
	pod := Pod{
		UID: s.Uid, Namespace: s.Namespace, Name: s.Name, Sandbox: s.Id, NetnsPath: filepath.Join(t.config.NetnsDir, filepath.Base(path)),
		Labels: s.Labels, Runtime: s.RuntimeHandler, Since: time.Now(), Static: s.Annotations["kubernetes.io/config.source"] != "api",
	}
	for _, ip := range s.Ips {
		if a, err := netip.ParseAddr(ip); err == nil {
			pod.Addresses = append(pod.Addresses, a.Unmap())
		}
	}
	return pod, true
}
