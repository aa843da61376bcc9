// Package relay stands between the controller and the node's Envoy. Downwards it serves delta ADS and SDS on a Unix
// socket: what the agent makes itself (listeners, secrets, scopes) and what the controller made (routes, clusters,
// endpoints), the latter only by the names that Envoy asked for. Upwards it subscribes to just those.
package relay

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Type URLs that Envoy is served.
const (
	prefix = "type.googleapis.com/envoy."

	TypeListener  = prefix + "config.listener.v3.Listener"
	TypeCluster   = prefix + "config.cluster.v3.Cluster"
	TypeEndpoints = prefix + "config.endpoint.v3.ClusterLoadAssignment"
	TypeRoute     = prefix + "config.route.v3.RouteConfiguration"
	TypeScope     = prefix + "config.route.v3.ScopedRouteConfiguration"
	TypeSecret    = prefix + "extensions.transport_sockets.tls.v3.Secret"
)

// order in which types are sent.
var order = []string{TypeSecret, TypeCluster, TypeEndpoints, TypeListener, TypeScope, TypeRoute}

// wild types are given whole. Envoy omits "*" after a reconnect, so a type stays wild once it was asked for.
var wild = map[string]bool{TypeListener: true, TypeCluster: true, TypeScope: true}

// relayed types come from the controller, by name.
var relayed = map[string]bool{TypeCluster: true, TypeEndpoints: true, TypeRoute: true}

// Key names a resource.
type Key struct{ TypeURL, Name string }

type entry struct {
	version string
	// body as Envoy gets it; origin as the controller made it.
	body, origin *anypb.Any
	// eager: part of the wildcard subscription.
	eager bool
	// place in the order in which resources came first.
	place uint64
	// Of a cluster with endpoints: the name under which Envoy asks for them, and the peers that it can speak to.
	assignment string
	peers      map[string]bool
}

// Config of a Cache.
type Config struct {
	// Want is told which relayed resources Envoy needs, and no longer needs.
	Want func(k Key, wanted bool)
	// Coming tells whether a secret that is not here is on its way; any other is answered as one that does not exist.
	// Nil: none is.
	Coming func(name string) bool
	// Keep is how long relayed resources stay, and up to date, after Envoy's stream ended or they were restored: Envoy may
	// come back while the controller is away. 0: 5 minutes.
	Keep time.Duration
	Log  *slog.Logger
}

// Cache holds what Envoy is to have and knows what it has acknowledged.
type Cache struct {
	config Config

	mu      sync.Mutex
	entries map[Key]entry
	streams map[*stream]bool
	wanted  map[Key]int // by streams
	kept    map[Key]time.Time
	primed  bool
	// paused are generations of Envoy that are not answered.
	paused map[uint32]bool
	// ended: no Envoy runs that could have anything of before.
	ended  bool
	places uint64
	// expected are pods whose listeners Envoy may have of an agent before this one, which has not given them yet.
	expected map[string]bool
	// answered is closed and replaced when Envoy answers something or a stream comes or goes.
	answered chan struct{}
}

// NewCache makes an empty Cache.
func NewCache(c Config) *Cache {
	if c.Keep == 0 {
		c.Keep = 5 * time.Minute
	}
	if c.Coming == nil {
		c.Coming = func(string) bool { return false }
	}
	return &Cache{config: c, entries: map[Key]entry{}, streams: map[*stream]bool{}, wanted: map[Key]int{}, kept: map[Key]time.Time{}, expected: map[string]bool{}, paused: map[uint32]bool{}, answered: make(chan struct{})}
}

// Prime starts answering. Until then Envoy waits: after a restart of the agent it would otherwise be told that what the
// agent does not know yet is gone.
func (c *Cache) Prime() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.primed = true
	for s := range c.streams {
		s.rouse()
	}
}

// Expect keeps from Envoy that listeners of these pods are gone, until Complete is called for them. An agent that has
// restarted may need long to make them all again, and Envoy may come back to it at any time.
func (c *Cache) Expect(podUIDs []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, uid := range podUIDs {
		c.expected[uid] = true
	}
}

// Complete says that what is here of a pod's listeners is all that Envoy is to have.
func (c *Cache) Complete(podUID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.expected[podUID] {
		return
	}
	delete(c.expected, podUID)
	for s := range c.streams {
		for k := range s.sent {
			if k.TypeURL == TypeListener && podOf(k.Name) == podUID {
				s.pending[k] = true
			}
		}
		s.rouse()
	}
}

// podOf is the uid in a listener's name, "<direction>/<uid>/<sandbox>".
func podOf(listener string) string {
	_, rest, _ := strings.Cut(listener, "/")
	uid, _, _ := strings.Cut(rest, "/")
	return uid
}

// Ended tells whether an Envoy runs; until it is told, one may.
func (c *Cache) Ended(ended bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = ended
	c.notify()
}

// Pause stops answering a generation of Envoy, or starts again: while the kernel does not know its cgroup, it must not listen in
// pods.
func (c *Cache) Pause(generation uint32, paused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused[generation] = paused
	for s := range c.streams {
		s.rouse()
	}
}

// Pack marshals a message so that equal content has equal bytes, and returns the hash as its version.
func Pack(m proto.Message) (*anypb.Any, string, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, "", fmt.Errorf("marshal %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	sum := sha256.Sum256(b)
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: b}, hex.EncodeToString(sum[:8]), nil
}

// Set gives Envoy a resource of the agent's own and returns its version, for Wait.
func (c *Cache) Set(name string, m proto.Message) (string, error) {
	body, version, err := Pack(m)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(Key{body.TypeUrl, name}, entry{version: version, body: body, eager: true})
	return version, nil
}

// Relay gives Envoy a resource as the controller made it. One that nobody wants any more is not kept: it would grow old.
func (c *Cache) Relay(k Key, version string, body *anypb.Any) {
	e := entry{version: version, body: body, origin: body}
	if k.TypeURL == TypeCluster {
		e = tie(k.Name, e)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, answered := c.entries[k]; version == instead && answered {
		return // the controller's own answer has come meanwhile
	}
	if _, kept := c.kept[k]; kept || c.wanted[k] > 0 {
		c.put(k, e)
	}
}

// Resource is a relayed one as the controller made it.
type Resource struct {
	Key     Key
	Version string
	Body    *anypb.Any
}

// Relayed lists what the controller made, by type and name.
func (c *Cache) Relayed() []Resource {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Resource
	for k, e := range c.entries {
		if !e.eager && e.version != instead {
			out = append(out, Resource{k, e.version, e.origin})
		}
	}
	sortResources(out)
	return out
}

func sortResources(r []Resource) {
	slices.SortFunc(r, func(a, b Resource) int {
		return cmp.Or(cmp.Compare(a.Key.TypeURL, b.Key.TypeURL), cmp.Compare(a.Key.Name, b.Key.Name))
	})
}

// Restore is Relay for what was relayed before this process; it is wanted for a while.
func (c *Cache) Restore(r Resource) {
	c.mu.Lock()
	if _, kept := c.kept[r.Key]; !kept && c.wanted[r.Key] == 0 {
		c.config.Want(r.Key, true)
		c.keep([]Key{r.Key})
	}
	c.mu.Unlock()
	c.Relay(r.Key, r.Version, r.Body)
}

// put is called with the lock held.
func (c *Cache) put(k Key, e entry) {
	old, ok := c.entries[k]
	if e.place = old.place; !ok {
		c.places++
		e.place = c.places
	}
	if ok && old.version == e.version && old.eager == e.eager {
		for s := range c.streams {
			if _, refused := s.refused[k]; refused { // tried again: what was missing may be there now
				delete(s.refused, k)
				delete(s.sent, k)
				s.pending[k] = true
				s.rouse()
			}
		}
		return
	}
	c.entries[k] = e
	for s := range c.streams {
		switch {
		case k.TypeURL == TypeEndpoints:
			for at := range s.named {
				if at.TypeURL == TypeEndpoints && origin(at.Name) == k.Name {
					s.pending[at] = true
				}
			}
		case s.wants(k, e):
			s.pending[k] = true
			// Envoy may know the endpoints by this name already, and would wait for them without asking again.
			if at := (Key{TypeEndpoints, e.assignment}); e.assignment != "" && s.named[at] {
				delete(s.sent, at)
				s.pending[at] = true
			}
		default:
			continue
		}
		s.rouse()
	}
}

// Delete takes a resource away.
func (c *Cache) Delete(k Key) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.entries[k]; !ok {
		return
	}
	delete(c.entries, k)
	for s := range c.streams {
		if _, sent := s.sent[k]; sent || s.pending[k] {
			s.pending[k] = true
			s.rouse()
		}
	}
}

// Names lists the agent's own resources of a type whose name begins with a prefix.
func (c *Cache) Names(typeURL, namePrefix string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for k, e := range c.entries {
		if k.TypeURL == typeURL && e.eager && strings.HasPrefix(k.Name, namePrefix) {
			out = append(out, k.Name)
		}
	}
	return out
}

// Refused is Envoy's NACK of a resource.
type Refused struct{ Name, Text string }

func (r *Refused) Error() string { return "Envoy refused " + r.Name + ": " + r.Text }

// await waits until something is so; a change of what Envoy has answered is looked at.
func (c *Cache) await(ctx context.Context, what string, so func() (bool, error)) error {
	for {
		c.mu.Lock()
		done, err := so()
		again := c.answered
		c.mu.Unlock()
		if done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for Envoy to acknowledge %s: %w", what, ctx.Err())
		case <-again:
		}
	}
}

// Wait waits until Envoy has acknowledged a version of a resource ("": its removal). A *Refused says that it has not and
// will not.
func (c *Cache) Wait(ctx context.Context, k Key, version string) error {
	return c.await(ctx, k.Name, func() (bool, error) { return c.state(k, version) })
}

// Settled is Wait for relayed resources: one that nobody wants any more, or that a newer version has replaced, is settled.
// One that is kept for an Envoy that has yet to say what it has is not: it may have an older version.
func (c *Cache) Settled(ctx context.Context, k Key, version string) error {
	return c.await(ctx, k.Name, func() (bool, error) {
		if e, ok := c.entries[k]; !ok || e.version != version {
			return true, nil
		}
		if c.wanted[k] == 0 {
			_, kept := c.kept[k]
			return !kept || c.ended || c.listening(), nil
		}
		return c.state(k, version)
	})
}

// CaughtUp waits until an Envoy is there and has, of every chosen resource of a type, no older form than the one that is here
// now. What it did not ask for it does not have; what it asked for and is not here it may have of an earlier agent. A *Refused
// says that it has not and will not.
func (c *Cache) CaughtUp(ctx context.Context, typeURL string, chosen func(name string) bool) error {
	left := map[Key]bool{}
	c.mu.Lock()
	for k, e := range c.entries {
		if k.TypeURL == typeURL && e.eager && chosen(k.Name) {
			left[k] = true
		}
	}
	c.mu.Unlock()
	return c.await(ctx, "the newest of "+typeURL, func() (bool, error) {
		if !c.listening() || c.lacks(typeURL, chosen) {
			return false, nil
		}
		for k := range left {
			held, err := c.held(k)
			if err != nil {
				return false, err
			}
			if held {
				delete(left, k)
			}
		}
		return len(left) == 0, nil
	})
}

// listening tells whether Envoy has said on each of its ADS streams what it asks for: it says all that it has at the
// beginning, before it answers anything.
func (c *Cache) listening() bool {
	there := false
	for s := range c.streams {
		if s.ads && !s.heard {
			return false
		}
		there = there || s.ads
	}
	return there
}

// lacks tells whether Envoy asked for a chosen resource that is not here.
func (c *Cache) lacks(typeURL string, chosen func(name string) bool) bool {
	for s := range c.streams {
		for k := range s.named {
			if _, here := c.entries[k]; k.TypeURL == typeURL && !here && chosen(k.Name) {
				return true
			}
		}
	}
	return false
}

// held tells whether each stream that asked for a resource has the form that is here now.
func (c *Cache) held(k Key) (bool, error) {
	e, ok := c.entries[k]
	for s := range c.streams {
		if !ok || !s.subscribed(k) {
			continue
		}
		if done, err := s.state(k, e.version); !done || err != nil {
			return false, err
		}
	}
	return true, nil
}

// state tells whether there are streams that asked for a resource, and all of them have a version of it.
func (c *Cache) state(k Key, version string) (bool, error) {
	if e := c.entries[Key{TypeCluster, k.Name}]; k.TypeURL == TypeEndpoints && e.assignment != "" {
		if text, refused := c.refusal(Key{TypeCluster, k.Name}, e.version); refused {
			return c.behindRefused(k, version, text)
		}
		k.Name = e.assignment
	}
	seen := false
	for s := range c.streams {
		if !s.subscribed(k) {
			continue
		}
		if done, err := s.state(k, version); !done || err != nil {
			return false, err
		}
		seen = true
	}
	return seen, nil
}

// refusal is what Envoy said against a version of a resource.
func (c *Cache) refusal(k Key, version string) (text string, refused bool) {
	for s := range c.streams {
		if text, refused := s.refused[k]; refused && s.sent[k] == version {
			return text, true
		}
	}
	return "", false
}

// behindRefused is state for the endpoints of a cluster that Envoy refused: they reach the form of it that Envoy has kept, if
// that can speak to them.
func (c *Cache) behindRefused(k Key, version, text string) (bool, error) {
	for s := range c.streams {
		for at := range s.named {
			if at.TypeURL != TypeEndpoints || origin(at.Name) != k.Name {
				continue
			}
			if s.pending[at] || s.sent[at] == version {
				return s.state(at, version)
			}
		}
	}
	return false, &Refused{k.Name, "its cluster was refused: " + text}
}

// Connected tells whether a generation of Envoy has an ADS stream open.
func (c *Cache) Connected(generation uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.streams {
		if s.ads && s.known && s.generation == generation {
			return true
		}
	}
	return false
}

func (c *Cache) notify() {
	close(c.answered)
	c.answered = make(chan struct{})
}

// Subscribed tells whether Envoy has asked for a type as a whole.
func (c *Cache) Subscribed(typeURL string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.streams {
		if s.wild[typeURL] {
			return true
		}
	}
	return false
}
