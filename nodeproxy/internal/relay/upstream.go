package relay

import (
	"context"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/api/names"
)

// Type URLs of weft's own resources.
const (
	mesh = "type.googleapis.com/weft.mesh.v1."

	TypeMesh          = mesh + "Mesh"
	TypeNamespace     = mesh + "Namespace"
	TypeService       = mesh + "Service"
	TypeWorkload      = mesh + "Workload"
	TypeLocalPod      = mesh + "LocalPod"
	TypeInboundPolicy = mesh + "InboundPolicy"
	// TypeSeen is of no resource: under it is kept what the controller calls the state that it gave last.
	TypeSeen = mesh + "Seen"
)

var eager = []string{TypeMesh, TypeNamespace, TypeService, TypeWorkload, TypeLocalPod}

// UpstreamConfig of an Upstream.
type UpstreamConfig struct {
	// Connect returns a connection to the controller with the agent's SVID; it may wait for the SVID.
	Connect func(ctx context.Context) (grpc.ClientConnInterface, error)
	Node    string
	Cache   *Cache
	// Overlay lays the node's own view over endpoints; nil: none.
	Overlay func(k Key, body *anypb.Any) *anypb.Any
	// Apply is called after each change of the index, with the type that changed, in order for each type. What it returns is
	// the answer to the controller: it waits until the change is in force. Refusals are about single resources.
	Apply func(ctx context.Context, typeURL string) error
	// Instead makes what Envoy gets under a name that the controller, being away, does not answer; nil, or nil of a name: it
	// waits. The controller's word replaces it.
	Instead func(k Key) *anypb.Any
	// Changed is told, without blocking, that a type of what the controller made is not as it was; nil: nobody is.
	Changed func(typeURL string)
	// Settle is how long Envoy's answer is waited for before the log says so. The controller is told nothing meanwhile: a node
	// that is late is behind, and does not refuse. 0: 10 seconds.
	Settle time.Duration
	Log    *slog.Logger
}

// steady is how long a stream must have lasted for its end to be none of the controller's absence.
const steady = 10 * time.Second

// Refusals are resources of the controller's that are not in force, and why, by name.
type Refusals map[string]string

func (r Refusals) Error() string {
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(r)) {
		lines = append(lines, names.RefusedText(name, r[name]))
	}
	return strings.Join(lines, "\n")
}

// of are the refusals that are about a response.
func (r Refusals) of(response *discovery.DeltaDiscoveryResponse) Refusals {
	out := Refusals{}
	for _, resource := range response.Resources {
		if text, refused := r[resource.Name]; refused {
			out[resource.Name] = text
		}
	}
	return out
}

// answerLimit is how long Envoy waits for an answer under a name that is new to it while the controller is away.
const answerLimit = 2 * time.Second

// instead is the version of what stands in for the controller's answer.
const instead = "instead"

// Upstream is the stream to the controller and the index that it gives.
type Upstream struct {
	config UpstreamConfig

	mu       sync.Mutex
	versions map[Key]string
	wanted   map[Key]bool
	changes  chan struct{} // subscriptions changed
	queue    []subscription
	bodies   map[Key]proto.Message
	// workloads are those of the index, by uid: there may be more of them than of all else together.
	workloads map[uid]workload
	// synced is closed when every eager type has been given once.
	synced  chan struct{}
	missing map[string]bool
	// known: the index was restored, so that there is something to go on with while the controller is away.
	known bool
	// live: a stream to the controller is open.
	live bool
	// seen names the controller's state that was given last, in the controller's words.
	seen string
}

// metadataSeen is the key under which the controller's replica is told what another one gave, so that it gives nothing older.
const metadataSeen = "weft-seen"

// seenKey stands for seen among the resources that are kept.
var seenKey = Key{TypeURL: TypeSeen, Name: "seen"}

type subscription struct {
	key    Key
	wanted bool
}

// NewUpstream makes an Upstream; Run connects it. Cache's Config.Want must be its Want.
func NewUpstream(c UpstreamConfig) *Upstream {
	u := &Upstream{config: c, versions: map[Key]string{}, wanted: map[Key]bool{}, changes: make(chan struct{}, 1),
		bodies: map[Key]proto.Message{}, workloads: map[uid]workload{}, synced: make(chan struct{}), missing: map[string]bool{}}
	for _, t := range eager {
		u.missing[t] = true
	}
	if u.config.Settle == 0 {
		u.config.Settle = 10 * time.Second
	}
	if u.config.Instead == nil {
		u.config.Instead = func(Key) *anypb.Any { return nil }
	}
	if u.config.Changed == nil {
		u.config.Changed = func(string) {}
	}
	return u
}

// Restore puts back what the controller made before this process. Call it before Run.
func (u *Upstream) Restore(resources []Resource) {
	for _, r := range resources {
		if r.Key == seenKey {
			u.mu.Lock()
			u.seen = r.Version
			u.mu.Unlock()
			continue
		}
		if relayed[r.Key.TypeURL] {
			u.config.Cache.Restore(r)
			u.mu.Lock()
			u.versions[r.Key] = r.Version
			u.mu.Unlock()
			continue
		}
		if err := u.store(r.Key, r.Version, r.Body); err != nil {
			u.config.Log.Warn("a resource of the last known state cannot be read", "type", r.Key.TypeURL, "name", r.Key.Name, "error", err)
			continue
		}
		u.mu.Lock()
		u.known = true
		if r.Key.TypeURL == TypeInboundPolicy {
			u.wanted[r.Key] = true
		}
		u.mu.Unlock()
	}
}

// Live tells whether a stream to the controller is open.
func (u *Upstream) Live() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.live
}

// Restored tells whether Restore brought an index.
func (u *Upstream) Restored() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.known
}

// Index lists what the controller made for the agent itself, by type and name.
func (u *Upstream) Index() ([]Resource, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []Resource
	for k, m := range u.bodies {
		body, _, err := Pack(m)
		if err != nil {
			return nil, err
		}
		out = append(out, Resource{k, u.versions[k], body})
	}
	for id, w := range u.workloads {
		body, _, err := Pack(w.message())
		if err != nil {
			return nil, err
		}
		version, _ := w.parts()
		out = append(out, Resource{Key{TypeWorkload, id.name()}, version, body})
	}
	if u.seen != "" {
		out = append(out, Resource{seenKey, u.seen, &anypb.Any{TypeUrl: TypeSeen}})
	}
	sortResources(out)
	return out, nil
}

// Want subscribes to a named resource, or gives it up. It does not block.
func (u *Upstream) Want(k Key, wanted bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.wanted[k] == wanted {
		return
	}
	if wanted {
		u.wanted[k] = true
		if relayed[k.TypeURL] {
			time.AfterFunc(answerLimit, func() { u.standIn(k) })
		}
	} else {
		delete(u.wanted, k)
		delete(u.versions, k)
		delete(u.bodies, k)
	}
	u.queue = append(u.queue, subscription{k, wanted})
	select {
	case u.changes <- struct{}{}:
	default:
	}
}

// standIn answers Envoy where the controller is away and has not answered; while it is there, it is waited for.
func (u *Upstream) standIn(k Key) {
	u.mu.Lock()
	_, answered := u.versions[k]
	waits, live := u.wanted[k] && !answered, u.live
	u.mu.Unlock()
	switch body := u.config.Instead(k); {
	case !waits || body == nil:
	case live:
		time.AfterFunc(answerLimit, func() { u.standIn(k) })
	default:
		u.config.Cache.Relay(k, instead, body)
	}
}

// setLive says whether the controller answers.
func (u *Upstream) setLive(live bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.live = live
}

// Synced is closed once the whole index has been given.
func (u *Upstream) Synced() <-chan struct{} { return u.synced }

// Run keeps the stream up until ctx ends.
func (u *Upstream) Run(ctx context.Context) {
	wait := 100 * time.Millisecond
	for ctx.Err() == nil {
		started := time.Now()
		err := u.stream(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > steady {
			wait = 100 * time.Millisecond
			u.config.Log.Info("stream to the controller ended, opening another", "error", err)
		} else {
			u.config.Log.Warn("controller is away, trying again", "error", err, "wait", wait)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait)):
		}
		wait = min(2*wait, 5*time.Second)
	}
}
