package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// Peer tells which node a call comes from, by its mTLS certificate.
type Peer func(ctx context.Context) (node string, err error)

// Service is the gRPC service; Register it with discovery.RegisterAggregatedDiscoveryServiceServer.
type Service struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	Server *Server
	Peer   Peer
	// HangUp ends the connection of a call soon, so that the agent finds another replica.
	HangUp func(ctx context.Context)
}

// stream is one node's ADS stream.
type stream struct {
	server *Server
	node   string

	mu sync.Mutex
	// wild types and named resources that are subscribed.
	wild  map[string]bool
	named map[Resource]bool
	// sent versions; "" after a removal was sent, until it is acknowledged.
	sent map[Resource]string
	// pending resources to look at, with the oldest generation that made them so.
	pending map[Resource]uint64
	// flight are responses that have not been answered, by nonce.
	flight map[string]*flight
	// generation is the newest one whose changes are all in pending or flight.
	generation uint64
	refused    map[Resource]string
	// greet holds wildcard types that have had no response yet: the first is sent even if it is empty, so that the agent
	// knows that it has everything.
	greet map[string]bool
	// untold is the oldest generation whose orders the agent has not been told of, be it by an empty response; 0: none.
	untold uint64
	nonce  uint64
	wake   chan struct{}
}

type flight struct {
	// generation is the oldest of its resources'.
	generation uint64
	keys       []Resource
}

func newStream(s *Server, node string) *stream {
	return &stream{
		server: s, node: node, wild: map[string]bool{}, named: map[Resource]bool{}, sent: map[Resource]string{},
		pending: map[Resource]uint64{}, flight: map[string]*flight{}, refused: map[Resource]string{}, greet: map[string]bool{}, wake: make(chan struct{}, 1),
	}
}

// DeltaAggregatedResources serves one agent.
func (s *Service) DeltaAggregatedResources(g discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	node, err := s.Peer(g.Context())
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	if err := s.Server.admit(g.Context(), node); err != nil {
		s.HangUp(g.Context())
		return err
	}
	st := newStream(s.Server, node)
	if !s.Server.add(st) {
		s.HangUp(g.Context())
		return errSuspended
	}
	defer s.Server.remove(st)
	ctx, cancel := context.WithCancel(g.Context())
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		defer cancel()
		for {
			r, err := g.Recv()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					failed <- err
				}
				return
			}
			st.request(r)
		}
	}()
	for {
		select {
		case <-ctx.Done():
			select {
			case err := <-failed:
				return err
			default:
				return nil
			}
		case <-st.wake:
		}
		if s.Server.Suspended() {
			s.HangUp(g.Context())
			return errSuspended
		}
		for _, r := range st.responses() {
			if err := g.Send(r); err != nil {
				return fmt.Errorf("send to %s: %w", node, err)
			}
		}
	}
}

// add takes a stream in, unless the Server is suspended.
func (s *Server) add(st *stream) bool {
	s.mu.Lock()
	if s.suspended {
		s.mu.Unlock()
		return false
	}
	s.streams[st] = true
	if s.byNode[st.node] == nil {
		s.byNode[st.node] = map[*stream]bool{}
	}
	s.byNode[st.node][st] = true
	if len(s.away[st.node].routes) > 0 {
		s.routes = nil
	}
	delete(s.away, st.node)
	st.generation = s.generation
	s.mu.Unlock()
	s.config.Log.Info("node connected", "node", st.node)
	s.config.Changed()
	return true
}

func (s *Server) remove(st *stream) {
	s.mu.Lock()
	delete(s.streams, st)
	gone := absence{since: time.Now()}
	for k := range st.named {
		s.unsubscribe(st, k)
		if k.TypeURL == xds.TypeRoute {
			gone.routes = append(gone.routes, k.Name)
		}
	}
	if delete(s.byNode[st.node], st); len(s.byNode[st.node]) == 0 {
		delete(s.byNode, st.node)
		s.leaves(st.node, gone)
	}
	s.mu.Unlock()
	s.config.Log.Info("node disconnected", "node", st.node)
	s.config.Changed()
}

// request takes a subscription, an ACK or a NACK.
func (st *stream) request(r *discovery.DeltaDiscoveryRequest) {
	s := st.server
	s.mu.Lock()
	if !s.streams[st] { // it has ended meanwhile
		s.mu.Unlock()
		return
	}
	st.mu.Lock()
	if r.ResponseNonce != "" {
		st.answer(r)
	}
	for name, version := range r.InitialResourceVersions {
		st.sent[Resource{r.TypeUrl, name}] = version
	}
	if wildcard[r.TypeUrl] {
		if !st.wild[r.TypeUrl] {
			st.wild[r.TypeUrl], st.greet[r.TypeUrl] = true, true
			st.subscribeAll(r)
		}
	} else {
		for _, name := range r.ResourceNamesSubscribe {
			if name == "*" {
				continue
			}
			k := Resource{r.TypeUrl, name}
			st.named[k] = true
			s.subscribe(st, k)
			if len(r.InitialResourceVersions) == 0 {
				delete(st.sent, k) // asked for again: answer again
			}
			if _, had := r.InitialResourceVersions[name]; had {
				st.mark(k, unanswered)
			} else {
				st.mark(k, s.generation)
			}
		}
		for _, name := range r.ResourceNamesUnsubscribe {
			k := Resource{r.TypeUrl, name}
			delete(st.named, k)
			delete(st.sent, k)
			delete(st.pending, k)
			delete(st.refused, k)
			s.unsubscribe(st, k)
		}
	}
	st.mu.Unlock()
	s.mu.Unlock()
	st.rouse()
	s.config.Changed()
}

// unanswered is older than every generation: what an agent brings along may be as old as can be.
const unanswered = 0

// subscribeAll marks everything of a wildcard type; what the agent holds and is no more is removed.
func (st *stream) subscribeAll(r *discovery.DeltaDiscoveryRequest) {
	s := st.server
	if s.snapshot == nil {
		return
	}
	if r.TypeUrl == xds.TypeLocalPod {
		for uid := range s.local[st.node] {
			st.mark(Resource{r.TypeUrl, localName(st.node, uid)}, unanswered)
		}
	} else {
		for _, name := range xds.Names(s.snapshot, r.TypeUrl, st.node) {
			st.mark(Resource{r.TypeUrl, name}, unanswered)
		}
	}
	for name := range r.InitialResourceVersions {
		if r.TypeUrl == xds.TypeLocalPod && !strings.HasPrefix(name, st.node+"/") {
			continue // another node's, whatever the agent says that it holds
		}
		st.mark(Resource{r.TypeUrl, name}, unanswered)
	}
}

// answer takes an ACK, or a NACK: of the resources that it names, or of all.
func (st *stream) answer(r *discovery.DeltaDiscoveryRequest) {
	f := st.flight[r.ResponseNonce]
	if f == nil {
		return
	}
	delete(st.flight, r.ResponseNonce)
	refused := map[Resource]string{}
	if r.ErrorDetail != nil {
		lines := names.ParseRefused(r.ErrorDetail.Message)
		for _, k := range f.keys {
			if text, ok := lines[k.Name]; ok {
				refused[k] = clip(text)
			}
		}
		if len(refused) == 0 { // it names none
			for _, k := range f.keys {
				refused[k] = clip(r.ErrorDetail.Message)
			}
		}
		st.server.config.Log.Warn("node refused resources", "node", st.node, "type", r.TypeUrl, "count", len(refused), "error", clip(r.ErrorDetail.Message))
	}
	for _, k := range f.keys {
		if text, ok := refused[k]; ok {
			st.refused[k] = text
			continue
		}
		delete(st.refused, k)
		if version, was := st.sent[k]; was && version == "" {
			delete(st.sent, k)
		}
	}
}

// responses are one for each type with something to send, in order; each is in flight from now on.
func (st *stream) responses() []*discovery.DeltaDiscoveryResponse {
	out := st.form()
	if len(out) == 0 {
		st.server.config.Changed() // there was nothing to answer
	}
	return out
}

// form makes responses of what is pending.
func (st *stream) form() []*discovery.DeltaDiscoveryResponse {
	s := st.server
	s.mu.Lock()
	defer s.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	pending, mark := st.pending, s.mark.String()
	st.pending = map[Resource]uint64{}
	byType := map[string]*discovery.DeltaDiscoveryResponse{}
	flights := map[string]*flight{}
	for k, generation := range pending {
		version, body := s.current(k)
		known, was := st.sent[k]
		if body != nil && version == known {
			continue
		}
		if body == nil && (!was && wildcard[k.TypeURL] || was && known == "") {
			continue
		}
		r := byType[k.TypeURL]
		if r == nil {
			r = &discovery.DeltaDiscoveryResponse{TypeUrl: k.TypeURL, SystemVersionInfo: mark}
			byType[k.TypeURL], flights[k.TypeURL] = r, &flight{generation: generation}
		}
		if body == nil {
			r.RemovedResources = append(r.RemovedResources, k.Name)
		} else {
			r.Resources = append(r.Resources, &discovery.Resource{Name: k.Name, Version: version, Resource: body})
		}
		f := flights[k.TypeURL]
		f.keys = append(f.keys, k)
		f.generation = min(f.generation, generation)
		st.sent[k] = version
	}
	untold := st.untold
	if st.untold = 0; untold > 0 && len(byType) == 0 && len(st.greet) == 0 && st.wild[xds.TypeMesh] {
		byType[xds.TypeMesh], flights[xds.TypeMesh] = &discovery.DeltaDiscoveryResponse{TypeUrl: xds.TypeMesh, SystemVersionInfo: mark}, &flight{generation: untold}
	}
	for _, f := range flights {
		if untold > 0 {
			f.generation = min(f.generation, untold)
		}
	}
	var out []*discovery.DeltaDiscoveryResponse
	for _, typeURL := range order {
		r := byType[typeURL]
		if r == nil && st.greet[typeURL] {
			r = &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL, SystemVersionInfo: mark}
			flights[typeURL] = &flight{}
		}
		if r == nil {
			continue
		}
		delete(st.greet, typeURL)
		st.nonce++
		r.Nonce = strconv.FormatUint(st.nonce, 10)
		st.flight[r.Nonce] = flights[typeURL]
		out = append(out, r)
	}
	return out
}

// inform lets the agent be told of a generation's orders.
func (st *stream) inform(generation uint64) {
	st.mu.Lock()
	if st.untold == 0 {
		st.untold = generation
	}
	st.mu.Unlock()
	st.rouse()
}

func (st *stream) dirty(k Resource, generation uint64) {
	st.mu.Lock()
	st.mark(k, generation)
	st.mu.Unlock()
	st.rouse()
}

// mark makes a resource pending. An older generation that made it so stays: until it is sent, that one is not answered.
func (st *stream) mark(k Resource, generation uint64) {
	if was, ok := st.pending[k]; !ok || generation < was {
		st.pending[k] = generation
	}
}

// reach says that all changes up to a generation have been handed over.
func (st *stream) reach(generation uint64) {
	st.mu.Lock()
	st.generation = generation
	st.mu.Unlock()
}

func (st *stream) rouse() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

func (st *stream) wants(typeURL string) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.wild[typeURL]
}

// clip bounds what a node says.
func clip(text string) string {
	const limit = 2048
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(strings.Clone(text[:limit]), "")
}
