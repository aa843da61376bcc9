// Package report tells the controller what this node's kernel holds.
package report

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// Config of a Reporter.
type Config struct {
	Conn                  func(ctx context.Context) (grpc.ClientConnInterface, error)
	Node, BootID, Version string
	Log                   *slog.Logger
}

// Reporter keeps the newest report of each pod and sends what changed.
type Reporter struct {
	config Config

	mu    sync.Mutex
	pods  map[string]*meshv1.PodReport
	dirty map[string]bool
	ready bool // every pod of the node has a report
	// health of the node; unsaid: the stream has yet to say it.
	health *meshv1.NodeHealth
	unsaid bool
	wake   chan struct{}
}

// New makes a Reporter; Run connects it.
func New(c Config) *Reporter {
	return &Reporter{config: c, pods: map[string]*meshv1.PodReport{}, dirty: map[string]bool{}, wake: make(chan struct{}, 1)}
}

// Pod sets a pod's report; one in state GONE is sent once and forgotten.
func (r *Reporter) Pod(p *meshv1.PodReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.pods[p.Uid]; old != nil && proto.Equal(old, p) {
		return
	}
	r.pods[p.Uid] = p
	r.dirty[p.Uid] = true
	r.rouse()
}

// Preexisting sums the connections that the node's pods had when they were captured first.
func (r *Reporter) Preexisting() (sum uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.pods {
		sum += uint64(p.PreexistingConnections)
	}
	return sum
}

// Unheld counts the node's pods in the mesh whose containers nothing held back until they were.
func (r *Reporter) Unheld() (count int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.pods {
		if p.StartedUnheld && (p.State == meshv1.PodState_POD_STATE_CAPTURED || p.State == meshv1.PodState_POD_STATE_ENFORCED) {
			count++
		}
	}
	return count
}

// Health changes what the node says of itself.
func (r *Reporter) Health(change func(*meshv1.NodeHealth)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := &meshv1.NodeHealth{}
	if r.health != nil {
		now = proto.Clone(r.health).(*meshv1.NodeHealth)
	}
	change(now)
	if r.health != nil && proto.Equal(r.health, now) {
		return
	}
	r.health, r.unsaid = now, true
	r.rouse()
}

// Ready says that every pod of the node has a report: a controller may conclude from silence from now on.
func (r *Reporter) Ready() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ready = true
	r.rouse()
}

func (r *Reporter) rouse() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// steady is how long a stream must have lasted for its end to be nothing unusual.
const steady = 10 * time.Second

// Run keeps the stream up until ctx ends; each new stream begins with everything.
func (r *Reporter) Run(ctx context.Context) {
	wait := 100 * time.Millisecond
	for ctx.Err() == nil {
		started := time.Now()
		err := r.stream(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > steady {
			wait = 100 * time.Millisecond
			r.config.Log.Info("stream of reports ended, opening another", "error", err)
		} else {
			r.config.Log.Warn("reports interrupted, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, 5*time.Second)
	}
}

func (r *Reporter) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := r.config.Conn(ctx)
	if err != nil {
		return err
	}
	s, err := meshv1.NewReportsClient(conn).Report(ctx)
	if err != nil {
		return fmt.Errorf("open report stream: %w", err)
	}
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := s.Recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	opened, err := sinceBoot()
	if err != nil {
		return err
	}
	hello := &meshv1.Hello{Node: r.config.Node, BootId: r.config.BootID, Version: r.config.Version, Opened: opened}
	if err := s.Send(&meshv1.NodeReport{Kind: &meshv1.NodeReport_Hello{Hello: hello}}); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	r.mu.Lock()
	for uid := range r.pods {
		r.dirty[uid] = true
	}
	r.unsaid = r.health != nil // the controller forgets it at Hello
	synced := false
	r.rouse()
	r.mu.Unlock()
	for {
		select {
		case err := <-ended:
			return fmt.Errorf("report: %w", err)
		case <-r.wake:
		}
		pods, health := r.take()
		for _, p := range pods {
			if err := s.Send(&meshv1.NodeReport{Kind: &meshv1.NodeReport_Pod{Pod: p}}); err != nil {
				return fmt.Errorf("report: %w", err)
			}
		}
		if health != nil {
			if err := s.Send(&meshv1.NodeReport{Kind: &meshv1.NodeReport_Health{Health: health}}); err != nil {
				return fmt.Errorf("report: %w", err)
			}
		}
		r.mu.Lock()
		say := r.ready && !synced && len(r.dirty) == 0
		synced = synced || say
		r.mu.Unlock()
		if say {
			if err := s.Send(&meshv1.NodeReport{Kind: &meshv1.NodeReport_Synced{Synced: &meshv1.Synced{}}}); err != nil {
				return fmt.Errorf("report: %w", err)
			}
		}
	}
}

// sinceBoot is the kernel's time in nanoseconds: the next agent on this node goes on from it.
func sinceBoot() (uint64, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0, fmt.Errorf("read the kernel's clock: %w", err)
	}
	return uint64(t.Nano()), nil
}

// take returns what is to be said; health is nil if it has been.
func (r *Reporter) take() (out []*meshv1.PodReport, health *meshv1.NodeHealth) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unsaid {
		health, r.unsaid = r.health, false
	}
	for uid := range r.dirty {
		p := r.pods[uid]
		out = append(out, p)
		if p.State == meshv1.PodState_POD_STATE_GONE {
			delete(r.pods, uid)
		}
	}
	r.dirty = map[string]bool{}
	return out, health
}
