// Package enrol brings the pods of this node into the mesh and out again, step by step (docs/LIFECYCLE.md). It is
// level-based: each turn compares what the controller wants, what the runtime runs and what the kernel holds, and does
// what is missing. The kernel's own state decides what is reported.
package enrol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"k8s.io/client-go/util/workqueue"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/pods"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/svid"
	"github.com/weftmesh/weft/redirect"
)

// Kernel is what redirect does for a pod.
type Kernel interface {
	Gate(redirect.Pod) error
	Enrol(redirect.Pod) error
	Listening(uid string) ([]redirect.Listener, error)
	Capture(uid string, inbound, outbound bool) error
	SetMode(uid string, mode redirect.Mode) error
	Flip(uid string, generation uint32) error
	SetShortcut(uid string, on bool) error
	Withdraw(uid string) error
	Verify(uid string) (redirect.State, error)
	Pods() ([]redirect.Pod, error)
}

// Envoy is what Envoy is given and has acknowledged.
type Envoy interface {
	Set(name string, m proto.Message) (version string, err error)
	Delete(k relay.Key)
	Wait(ctx context.Context, k relay.Key, version string) error
	Names(typeURL, prefix string) []string
	// Complete says that the listeners that were Set are all that the pod has: Envoy loses others of it.
	Complete(podUID string)
}

// Identities gives SVIDs.
type Identities interface {
	Use(ctx context.Context, a svid.Account, podUID string) (*svid.SVID, error)
	Leave(a svid.Account, podUID string)
}

// Wishes is what the controller wants.
type Wishes interface {
	LocalPod(uid string) *meshv1.LocalPod
	Policy(hash string) *meshv1.InboundPolicy
}

// Memory keeps what Envoy holds of each pod for the next agent (memory.go).
type Memory interface {
	Save(podUID string, record []byte) error
	// Load returns nil where nothing is kept.
	Load(podUID string) ([]byte, error)
	Drop(podUID string) error
}

// Config of an Enroller.
type Config struct {
	Kernel     Kernel
	Envoy      Envoy
	Identities Identities
	Wishes     Wishes
	Memory     Memory
	// Runtime finds a pod in the container runtime.
	Runtime func(uid string) (pods.Pod, bool)
	// Roots is the trust bundle, PEM.
	Roots func() ([]byte, error)
	// Generation of the Envoy that new connections are to go to; false: it does not serve.
	Generation func() (uint32, bool)
	// Beside are other generations, whose Envoys serve the connections that they have: they get the same listeners, on ports of
	// their own. Nil: there are none.
	Beside func() []uint32
	Report func(*meshv1.PodReport)
	// Settle is how long after the end of capture a pod's listeners stay at least, for connections that are still on their
	// way, and how long Envoys' workers take at most to have what Envoys acknowledged; Linger how long the listeners stay at
	// most while connections use them.
	Settle, Linger time.Duration
	// Drain is how long after the end of a filter chain Envoy has cut every connection that it had.
	Drain     time.Duration
	AccessLog bool
	Log       *slog.Logger
}

// Limits of waiting for one step, and the time between two looks at the kernel.
const (
	stepLimit  = 15 * time.Second
	adoptLimit = time.Second
	hearLimit  = time.Second
	// accompanyLimit is for Envoys of other generations.
	accompanyLimit = 2 * time.Second
	listenPoll     = 2 * time.Millisecond
	verifyEvery    = 5 * time.Second
	lookAgain      = time.Second
	workers        = 32 // most of them wait for SVIDs or Envoy, if at all
)

// Enroller turns pods.
type Enroller struct {
	config Config
	// inspect refuses a pod for what its network namespace holds.
	inspect func(netnsPath string) error
	// count tells how many connections a pod has.
	count func(netnsPath string) (uint32, error)
	now   func() time.Time
	queue workqueue.TypedRateLimitingInterface[string]

	mu   sync.Mutex
	pods map[string]*state
	// went are the generations that captured pods' new connections go to, by uid.
	went map[string]uint32
	// holds are the pods whose containers wait, by uid; waits is what they have cost the node lately.
	holds map[string]*hold
	waits budget

	// trust guards rules: the authorisation secrets that Envoy has, by name. Each has the trust bundle inside.
	trust sync.Mutex
	rules map[string]lds.RuleSecret
}

// state is what has been done about one pod. Only the worker that holds its key touches it.
type state struct {
	pod     pods.Pod
	account svid.Account
	stage   meshv1.Stage
	// inbound is what Envoy has acknowledged; mode what the kernel was told; generation the Envoy that both are for.
	inbound inbound
	// svid is the one that the pod began with; nil: none has come since this process started.
	svid       *svid.SVID
	mode       redirect.Mode
	generation uint32
	// prepared: the kernel knows the pod; complete: its connections went to that Envoy, and capture has not ended since.
	prepared, complete bool
	// gated: nothing goes in or out of it yet, so that it can go to its policy at once: nobody speaks plaintext to it.
	gated bool
	// strict: it let nobody in by plaintext before this process.
	strict bool
	// moved is when the controller first asked to enforce: every Envoy had acknowledged that callers use mTLS here. Their
	// workers have it Settle later, and only then is plaintext refused.
	moved time.Time
	// leaving is when outbound capture ended, left when inbound capture did. Between them Settle passes: Envoys acknowledge
	// "plaintext" before their workers have it, and what an app without TLS makes of a handshake may be nothing at all. The
	// listeners stay until their connections have ended.
	leaving, left time.Time
	// older counts the connections from before the pod was captured first: they stay as they are.
	older uint32
	// drifted is what was last found otherwise than it should be, and mended when it was repaired.
	drifted []string
	mended  time.Time
	took    time.Duration
	// noShortcut is why the kernel cannot have the pod's short circuit.
	noShortcut string
	failure    string
	reason     string
}

// New makes an Enroller; Run turns it.
func New(c Config) *Enroller {
	return &Enroller{
		config: c, inspect: inspectNetns, count: countEstablished, now: time.Now, pods: map[string]*state{}, went: map[string]uint32{}, holds: map[string]*hold{}, rules: map[string]lds.RuleSecret{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](200*time.Millisecond, 10*time.Second)),
	}
}

// Changed asks for a pod to be looked at.
func (e *Enroller) Changed(uid string) { e.queue.Add(uid) }

// Adopt takes over what the kernel holds since before this process: those pods stay captured while their listeners are made
// again. Call it before Run, with the runtime's pods known.
func (e *Enroller) Adopt() error {
	held, err := e.config.Kernel.Pods()
	if err != nil {
		return fmt.Errorf("read enrolled pods: %w", err)
	}
	for _, p := range held {
		running, ok := e.config.Runtime(p.UID)
		if !ok || running.Sandbox != p.Sandbox {
			e.config.Log.Info("pod ended while the agent was away", "pod", p.UID)
			if err := e.config.Kernel.Withdraw(p.UID); err != nil {
				return fmt.Errorf("withdraw %s: %w", p.UID, err)
			}
			e.forget(p.UID)
			continue
		}
		if now, err := e.config.Kernel.Verify(p.UID); err == nil && now.Inbound && !now.Gated {
			e.goes(p.UID, now.Generation)
		}
		e.Changed(p.UID)
	}
	return nil
}

// goes notes the Envoy that a pod's new connections go to.
func (e *Enroller) goes(uid string, generation uint32) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.went[uid] = generation
}

// gone forgets it.
func (e *Enroller) gone(uid string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.went, uid)
}

// Elsewhere counts the captured pods whose new connections go to another generation of Envoy.
func (e *Enroller) Elsewhere(generation uint32) (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, g := range e.went {
		if g != generation {
			n++
		}
	}
	return n
}

// Run turns pods until ctx ends. Nothing is withdrawn then.
func (e *Enroller) Run(ctx context.Context) {
	context.AfterFunc(ctx, e.queue.ShutDown)
	var wait sync.WaitGroup
	for range workers {
		wait.Go(func() {
			for e.turn(ctx) {
			}
		})
	}
	tick := time.NewTicker(verifyEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			wait.Wait()
			return
		case <-tick.C:
			e.mu.Lock()
			for uid := range e.pods {
				e.queue.Add(uid)
			}
			e.mu.Unlock()
		}
	}
}

func (e *Enroller) turn(ctx context.Context) bool {
	uid, end := e.queue.Get()
	if end {
		return false
	}
	defer e.queue.Done(uid)
	limited, cancel := context.WithTimeout(ctx, 2*stepLimit)
	defer cancel()
	again, err := e.reconcile(limited, uid)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		e.config.Log.Warn("pod is not as wanted, trying again", "pod", uid, "error", err)
		e.queue.AddRateLimited(uid)
	default:
		e.queue.Forget(uid)
		if again > 0 {
			e.queue.AddAfter(uid, again)
		}
	}
	return true
}

func (e *Enroller) state(uid string) *state {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.pods[uid]
}

func (e *Enroller) keep(uid string, s *state) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if s == nil {
		delete(e.pods, uid)
	} else {
		e.pods[uid] = s
	}
}

// reconcile brings one pod a step or more further; again: look at it anew after that time.
func (e *Enroller) reconcile(ctx context.Context, uid string) (again time.Duration, err error) {
	running, runs := e.config.Runtime(uid)
	wish := e.config.Wishes.LocalPod(uid)
	s := e.state(uid)
	if s != nil && (!runs || running.Sandbox != s.pod.Sandbox) {
		if err := e.end(s); err != nil {
			return 0, err
		}
		e.keep(uid, nil)
		s = nil
		if !runs {
			e.config.Report(&meshv1.PodReport{Uid: uid, State: meshv1.PodState_POD_STATE_GONE})
			return 0, nil
		}
	}
	if !runs { // nor was anything done about it here; an agent before may have
		e.forget(uid)
		e.gone(uid)
		e.config.Envoy.Complete(uid)
		return 0, ignoreUnknown(e.config.Kernel.Withdraw(uid))
	}
	look := e.looks(running)
	if s == nil && look > 0 {
		e.gate(running) // the end of an earlier sandbox, or of an attempt, opened it
	}
	if wish == nil { // the controller has not spoken of it: leave it as it is
		e.wait(running, look, errors.New("the controller has not told of it: see that weft-controlplane runs and that the node's agent reaches it"))
		return 0, nil
	}
	if s == nil {
		if wish.Stage == meshv1.Stage_STAGE_OUT && wish.Goal == meshv1.Stage_STAGE_OUT {
			if _, known, err := e.look(uid); !known {
				if err == nil {
					e.letGo(uid, running.Sandbox)
				}
				return 0, err
			}
		}
		s = &state{pod: running, account: svid.Account{Namespace: wish.Namespace, Name: wish.ServiceAccount}}
		e.keep(uid, s)
	}
	s.pod.Containers = running.Containers
	started := time.Now()
	before := s.stage
	adopted := false
	if before == meshv1.Stage_STAGE_OUT {
		now, _, err := e.look(uid)
		if err != nil {
			return 0, err
		}
		// What this process has not captured an agent before it has: the pod stays so, and must not become Permissive on the way.
		adopted, s.gated = now.Inbound && !now.Gated, now.Gated
		s.strict = adopted && now.Strict
		if !adopted { // a pod that has left the mesh comes back as one that runs
			s.pod.Unheld = !s.gated && look == 0
		}
	}
	err = e.step(ctx, s, wish)
	// What keeps plaintext out of a pod, an agent before this one's hooks or the gate, outlives whatever fails here.
	fresh := s.stage == meshv1.Stage_STAGE_OUT && !adopted && !s.gated
	if s.stage != before {
		s.took = time.Since(started)
	}
	var refused *Refusal
	if errors.As(err, &refused) {
		s.reason, s.failure = refused.Reason, refused.Error()
		if fresh || s.gated {
			e.undo(s)
		}
	} else if err != nil {
		s.reason, s.failure = "StepFailed", err.Error()
		if s.inbound.refused != nil {
			s.reason = "Refused"
		}
		if fresh && s.target(wish) != meshv1.Stage_STAGE_OUT && ctx.Err() == nil {
			e.undo(s)
		}
	} else {
		s.reason, s.failure = "", ""
	}
	again = e.settle(s)
	left := e.report(s, wish)
	e.judgeHold(s, wish, look, left && err == nil, err)
	if left && err == nil {
		e.keep(uid, nil)
		return 0, nil
	}
	switch {
	case !s.leaving.IsZero() && time.Since(s.leaving) < 2*e.config.Settle+time.Second:
		again = 100 * time.Millisecond
	case !s.leaving.IsZero(): // what lingers may do so for minutes
		again = time.Second
	case err == nil && e.unsure(s) > 0:
		again = e.unsure(s)
	case err == nil && e.early(s) > 0:
		again = e.early(s)
	}
	return again, err
}

// look reads what the kernel holds of a pod; known: it holds something. A kernel that cannot be read is no "no": a Strict pod
// would be opened.
func (e *Enroller) look(uid string) (now redirect.State, known bool, err error) {
	now, err = e.config.Kernel.Verify(uid)
	return now, err == nil, ignoreUnknown(err)
}

func ignoreUnknown(err error) error {
	if errors.Is(err, redirect.ErrUnknownPod) {
		return nil
	}
	return err
}
