package relay

import (
	"cmp"
	"errors"
	"io"
	"slices"
	"strconv"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"github.com/weftmesh/weft/api/names"
)

// stream is one delta stream of Envoy. Its fields are guarded by the cache's mutex.
type stream struct {
	cache *Cache
	ads   bool
	// generation of Envoy, which its first request tells.
	generation uint32
	known      bool

	// asked types have had a request; wild ones are subscribed as a whole.
	asked, wild map[string]bool
	named       map[Key]bool
	// sent versions; "" after a removal. acked versions likewise.
	sent, acked map[Key]string
	refused     map[Key]string
	pending     map[Key]bool
	flight      map[string]map[Key]string
	// apart are the resources that Envoy refused, alone or with others, by the number of the response that they go in.
	apart  map[Key]uint64
	groups uint64
	// peers of the clusters that were sent, by the name of their endpoints.
	peers map[string]map[string]bool
	// greet holds wildcard types that have had no response yet: Envoy waits for the first, be it empty.
	greet map[string]bool
	// heard: it has answered something.
	heard bool
	nonce uint64
	wake  chan struct{}
}

type delta interface {
	Send(*discovery.DeltaDiscoveryResponse) error
	Recv() (*discovery.DeltaDiscoveryRequest, error)
}

// Service serves Envoy from a Cache.
type Service struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	secret.UnimplementedSecretDiscoveryServiceServer
	Cache *Cache
}

// Register adds ADS and SDS to a gRPC server.
func (s *Service) Register(g grpc.ServiceRegistrar) {
	discovery.RegisterAggregatedDiscoveryServiceServer(g, s)
	secret.RegisterSecretDiscoveryServiceServer(g, s)
}

// DeltaAggregatedResources is ADS.
func (s *Service) DeltaAggregatedResources(g discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return s.Cache.serve(g, true)
}

// DeltaSecrets is the on-demand certificate selector's own stream: on the ADS stream it would starve, for the listeners ask
// there for secrets of the same names.
func (s *Service) DeltaSecrets(g secret.SecretDiscoveryService_DeltaSecretsServer) error {
	return s.Cache.serve(g, false)
}

// open adds a stream of Envoy.
func (c *Cache) open(ads bool) *stream {
	s := &stream{
		cache: c, ads: ads, asked: map[string]bool{}, wild: map[string]bool{}, named: map[Key]bool{}, sent: map[Key]string{}, acked: map[Key]string{},
		refused: map[Key]string{}, pending: map[Key]bool{}, flight: map[string]map[Key]string{}, apart: map[Key]uint64{}, peers: map[string]map[string]bool{},
		greet: map[string]bool{}, wake: make(chan struct{}, 1),
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams[s] = true
	c.notify()
	return s
}

// close ends a stream; what it wanted is kept for a while.
func (c *Cache) close(s *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, s)
	var last []Key
	for k := range s.named {
		if k = upward(k); c.release(k) {
			last = append(last, k)
		}
	}
	c.keep(last)
	c.notify()
}

func (c *Cache) serve(g delta, ads bool) error {
	s := c.open(ads)
	defer c.close(s)
	ended := make(chan error, 1)
	go func() {
		for {
			r, err := g.Recv()
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = nil
				}
				ended <- err
				return
			}
			s.request(r)
		}
	}()
	for {
		select {
		case err := <-ended:
			return err
		case <-s.wake:
		}
		for _, r := range s.responses() {
			if err := g.Send(r); err != nil {
				return err
			}
		}
	}
}

func (s *stream) request(r *discovery.DeltaDiscoveryRequest) {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.streams[s] {
		return // it has ended: nobody would take back what it wishes now
	}
	defer s.rouse()
	if !s.known {
		s.generation, s.known = generationOf(r.Node), true
	}
	if r.ResponseNonce != "" {
		s.answer(r)
	}
	for name, version := range r.InitialResourceVersions {
		k := Key{r.TypeUrl, name}
		s.sent[k], s.acked[k] = version, version
		s.pending[k] = true
	}
	// Envoy omits "*" in the first request of a stream after a reconnect. Later it leaves and comes back by it, as with
	// scopes when the last outbound listener goes and the next one comes: then it waits for an answer again.
	if wild[r.TypeUrl] && (!s.asked[r.TypeUrl] || slices.Contains(r.ResourceNamesSubscribe, "*")) {
		s.wild[r.TypeUrl], s.greet[r.TypeUrl] = true, true
		for k, e := range c.entries {
			if k.TypeURL == r.TypeUrl && e.eager {
				s.pending[k] = true
			}
		}
	}
	s.asked[r.TypeUrl] = true
	if slices.Contains(r.ResourceNamesUnsubscribe, "*") {
		s.leave(r.TypeUrl)
	}
	for _, name := range r.ResourceNamesSubscribe {
		if name == "*" {
			continue
		}
		k := Key{r.TypeUrl, name}
		if !s.named[k] {
			s.named[k] = true
			c.want(upward(k))
		}
		if len(r.InitialResourceVersions) == 0 {
			delete(s.sent, k) // asked for again: answered again
		}
		s.pending[k] = true
	}
	for _, name := range r.ResourceNamesUnsubscribe {
		k := Key{r.TypeUrl, name}
		if s.named[k] {
			delete(s.named, k)
			if at := upward(k); c.release(at) {
				c.forget(at)
			}
		}
		delete(s.peers, name)
		s.drop(k)
	}
	c.notify()
}

// leave ends a wildcard subscription; what Envoy knew by it alone is forgotten.
func (s *stream) leave(typeURL string) {
	delete(s.wild, typeURL)
	delete(s.greet, typeURL)
	known := map[Key]bool{}
	for _, m := range []map[Key]string{s.sent, s.acked, s.refused} {
		for k := range m {
			known[k] = true
		}
	}
	for k := range s.pending {
		known[k] = true
	}
	for k := range known {
		if k.TypeURL == typeURL && !s.named[k] {
			s.drop(k)
		}
	}
}

// drop forgets what the stream has under a name.
func (s *stream) drop(k Key) {
	for _, m := range []map[Key]string{s.sent, s.acked, s.refused} {
		delete(m, k)
	}
	delete(s.pending, k)
	delete(s.apart, k)
}

// want counts a stream's wish for a relayed resource.
func (c *Cache) want(k Key) {
	if !relayed[k.TypeURL] || c.entries[k].eager {
		return
	}
	c.wanted[k]++
	if c.wanted[k] > 1 {
		return
	}
	if _, kept := c.kept[k]; kept {
		delete(c.kept, k)
		return
	}
	c.config.Want(k, true)
}

// release takes a wish back; true: it was the last one.
func (c *Cache) release(k Key) bool {
	if c.wanted[k] == 0 {
		return false
	}
	c.wanted[k]--
	if c.wanted[k] > 0 {
		return false
	}
	delete(c.wanted, k)
	return true
}

// keep lets relayed resources that no stream wants stay for a while.
func (c *Cache) keep(keys []Key) {
	if len(keys) == 0 {
		return
	}
	end := time.Now().Add(c.config.Keep)
	for _, k := range keys {
		c.kept[k] = end
	}
	time.AfterFunc(c.config.Keep, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, k := range keys {
			if until, kept := c.kept[k]; kept && !until.After(end) {
				c.forget(k)
			}
		}
	})
}

// forget drops a relayed resource that nobody wants: the controller keeps it no longer up to date.
func (c *Cache) forget(k Key) {
	delete(c.kept, k)
	if !c.entries[k].eager {
		delete(c.entries, k)
	}
	c.config.Want(k, false)
}

func (s *stream) answer(r *discovery.DeltaDiscoveryRequest) {
	keys, ok := s.flight[r.ResponseNonce]
	if !ok {
		return
	}
	delete(s.flight, r.ResponseNonce)
	s.heard = true
	log := s.cache.config.Log
	switch {
	case r.ErrorDetail == nil:
		for k, version := range keys {
			s.accept(k, version)
		}
	case len(keys) > 1:
		log.Warn("Envoy refused a response: its resources are sent apart", "type", r.TypeUrl, "count", len(keys), "error", r.ErrorDetail.Message)
		s.split(keys)
	default:
		for k := range keys {
			log.Error("Envoy refused a resource", "type", r.TypeUrl, "name", k.Name, "error", r.ErrorDetail.Message)
			s.refused[k] = r.ErrorDetail.Message
			if s.apart[k] == 0 { // its next form concerns no other
				s.groups++
				s.apart[k] = s.groups
			}
		}
	}
}

func (s *stream) accept(k Key, version string) {
	delete(s.refused, k)
	delete(s.apart, k)
	if version != "" {
		s.acked[k] = version
		return
	}
	delete(s.acked, k)
	if s.sent[k] == "" {
		delete(s.sent, k)
	}
}

// unsure is the version of what Envoy may have or not: it refused the response, for one of its resources.
const unsure = "?"

// split sends the resources of a refused response again, in two: after a few rounds the bad one is alone, and no other
// has to wait for it to become good.
func (s *stream) split(keys map[Key]string) {
	var again []Key
	for k, version := range keys {
		if s.sent[k] == version { // nothing newer is on its way
			again = append(again, k)
		}
	}
	s.arrange(again)
	for _, half := range [][]Key{again[:len(again)/2], again[len(again)/2:]} {
		s.groups++
		for _, k := range half {
			s.apart[k], s.sent[k], s.pending[k] = s.groups, unsure, true
		}
	}
}

// state tells whether Envoy has acknowledged a version of a resource ("": its removal) and been sent no other since.
func (s *stream) state(k Key, version string) (bool, error) {
	if s.sent[k] != version {
		return false, nil
	}
	for _, keys := range s.flight { // acknowledged or refused before, and sent again after something else
		if _, unanswered := keys[k]; unanswered {
			return false, nil
		}
	}
	if text, refused := s.refused[k]; refused {
		return false, &Refused{k.Name, text}
	}
	return s.acked[k] == version, nil
}

func (s *stream) subscribed(k Key) bool { return s.named[k] || s.wild[k.TypeURL] && s.concerns(k) }

func (s *stream) wants(k Key, e entry) bool {
	return s.named[k] || s.wild[k.TypeURL] && e.eager && s.concerns(k)
}

// concerns tells whether a resource is none that another generation of Envoy has for itself: the listeners in pods are each one's
// own.
func (s *stream) concerns(k Key) bool {
	if k.TypeURL != TypeListener {
		return true
	}
	of, one := names.ListenerGeneration(k.Name)
	return !one || of == s.generation
}

// generationOf is what an Envoy says of itself; the first one if it says nothing.
func generationOf(node *core.Node) uint32 {
	return uint32(node.GetMetadata().GetFields()[names.MetadataGeneration].GetNumberValue())
}

func (s *stream) rouse() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// find is what the stream is to have under a name; false: nothing.
func (s *stream) find(k Key) (entry, bool) {
	if k.TypeURL == TypeEndpoints {
		return s.endpoints(k)
	}
	e, ok := s.cache.entries[k]
	return e, ok && s.wants(k, e)
}

// silent: the stream is not told that a resource does not exist, for it knows, never heard of it, or it is on its way.
func (s *stream) silent(k Key) bool {
	sent, was := s.sent[k]
	switch {
	case was && sent == "" || relayed[k.TypeURL] && s.named[k]:
		return true
	case k.TypeURL == TypeListener && s.cache.expected[podOf(k.Name)]:
		return true
	case k.TypeURL == TypeSecret && (!was || sent == unsure) && s.named[k]:
		return s.cache.config.Coming(k.Name)
	case k.TypeURL == TypeSecret:
		return true // Envoy keeps what it has for as long as something uses it: a restarted agent may yet give it again
	}
	return !was
}

// due is what is pending of a type, in the order in which it came to the cache, what is gone first. What Envoy's listeners share
// is begun by the first of them, which should be the one that never goes (lds.Holder).
func (s *stream) due(typeURL string) []Key {
	var keys []Key
	for k := range s.pending {
		if k.TypeURL == typeURL {
			keys = append(keys, k)
		}
	}
	s.arrange(keys)
	return keys
}

// arrange puts keys in the order in which they are sent; those that go in one response stand together.
func (s *stream) arrange(keys []Key) {
	slices.SortFunc(keys, func(a, b Key) int {
		return cmp.Or(cmp.Compare(s.apart[a], s.apart[b]), cmp.Compare(s.cache.entries[a].place, s.cache.entries[b].place), cmp.Compare(a.Name, b.Name))
	})
}

// responses takes what is pending. Listeners go one to a response, anything else together until Envoy refuses it: what is
// refused in the end is one resource.
func (s *stream) responses() []*discovery.DeltaDiscoveryResponse {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.primed || !s.known || c.paused[s.generation] {
		return nil
	}
	var out []*discovery.DeltaDiscoveryResponse
	for _, typeURL := range order {
		var r *discovery.DeltaDiscoveryResponse
		var keys map[Key]string
		flush := func() {
			if r == nil {
				return
			}
			s.nonce++
			r.Nonce = strconv.FormatUint(s.nonce, 10)
			s.flight[r.Nonce] = keys
			out, r = append(out, r), nil
		}
		group := uint64(0)
		for _, k := range s.due(typeURL) {
			delete(s.pending, k)
			if s.apart[k] != group {
				flush()
				group = s.apart[k]
			}
			e, exists := s.find(k)
			sent, was := s.sent[k]
			if exists && was && sent == e.version {
				continue
			}
			if !exists && s.silent(k) {
				continue
			}
			if r == nil {
				r, keys = &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}, map[Key]string{}
			}
			if exists {
				r.Resources = append(r.Resources, &discovery.Resource{Name: k.Name, Version: e.version, Resource: e.body})
			} else {
				r.RemovedResources = append(r.RemovedResources, k.Name)
			}
			s.sent[k], keys[k] = e.version, e.version
			if e.assignment != "" {
				s.peers[e.assignment] = e.peers
			}
			if typeURL == TypeListener {
				flush()
			}
		}
		if s.greet[typeURL] {
			delete(s.greet, typeURL)
			if r == nil && keys == nil {
				r, keys = &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}, map[Key]string{}
			}
		}
		flush()
	}
	if len(out) == 0 {
		c.notify()
	}
	return out
}
