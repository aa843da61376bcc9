// Package ads is a delta xDS server for tests: one Envoy, resources set one by one, every ACK and NACK recorded.
package ads

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Type URLs of Envoy's resources.
const (
	prefix    = "type.googleapis.com/"
	Listeners = prefix + "envoy.config.listener.v3.Listener"
	Clusters  = prefix + "envoy.config.cluster.v3.Cluster"
	Endpoints = prefix + "envoy.config.endpoint.v3.ClusterLoadAssignment"
	Routes    = prefix + "envoy.config.route.v3.RouteConfiguration"
	Scopes    = prefix + "envoy.config.route.v3.ScopedRouteConfiguration"
	Secrets   = prefix + "envoy.extensions.transport_sockets.tls.v3.Secret"
)

// Server serves one Envoy.
type Server struct {
	grpc *grpc.Server

	mu        sync.Mutex
	changed   chan struct{}
	resources map[string]map[string]*resource
	answer    func(typeURL, name string) proto.Message
	streams   map[*stream]bool
	nacks     []string
	acked     map[string]string
	version   int
}

type resource struct {
	body    *anypb.Any
	version string
	// eager resources go to wildcard subscribers; others only to who names them.
	eager bool
}

// Serve listens on a Unix socket. answer, if not nil, makes a resource that Envoy names and that was never Set; nil
// from it means there is none.
func Serve(socket string, answer func(typeURL, name string) proto.Message) (*Server, error) {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen for Envoy: %w", err)
	}
	s := &Server{
		grpc: grpc.NewServer(), changed: make(chan struct{}), resources: map[string]map[string]*resource{}, answer: answer,
		streams: map[*stream]bool{}, acked: map[string]string{},
	}
	discovery.RegisterAggregatedDiscoveryServiceServer(s.grpc, aggregated{s: s})
	secret.RegisterSecretDiscoveryServiceServer(s.grpc, secrets{s: s})
	go s.grpc.Serve(listener) // ends with Stop
	return s, nil
}

// Stop ends all streams.
func (s *Server) Stop() { s.grpc.Stop() }

// Set offers a resource, or its new version, to wildcard subscribers and to who names it.
func (s *Server) Set(typeURL, name string, m proto.Message) { s.set(typeURL, name, m, true) }

// Offer offers a resource only to who names it.
func (s *Server) Offer(typeURL, name string, m proto.Message) { s.set(typeURL, name, m, false) }

func (s *Server) set(typeURL, name string, m proto.Message, eager bool) {
	body := &anypb.Any{}
	if err := anypb.MarshalFrom(body, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.resources[typeURL][name]; old != nil && proto.Equal(old.body, body) {
		return
	}
	s.version++
	if s.resources[typeURL] == nil {
		s.resources[typeURL] = map[string]*resource{}
	}
	s.resources[typeURL][name] = &resource{body: body, version: fmt.Sprint(s.version), eager: eager}
	s.push(typeURL)
	if typeURL == Clusters {
		s.resend()
	}
}

// Remove withdraws a resource.
func (s *Server) Remove(typeURL, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.resources[typeURL], name)
	s.push(typeURL)
}

// Nacks returns what Envoy refused, with its words.
func (s *Server) Nacks() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.nacks)
}

// Asked lists the names that Envoy is subscribed to by name.
func (s *Server) Asked(typeURL string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for st := range s.streams {
		if sub := st.subs[typeURL]; sub != nil {
			for name := range sub.named {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Acked waits until Envoy has acknowledged the resource's present version, or refused anything.
func (s *Server) Acked(ctx context.Context, typeURL, name string) error {
	for {
		s.mu.Lock()
		r, changed := s.resources[typeURL][name], s.changed
		done := r != nil && s.acked[typeURL+" "+name] == r.version
		nacks := slices.Clone(s.nacks)
		s.mu.Unlock()
		switch {
		case len(nacks) > 0:
			return fmt.Errorf("Envoy refused: %s", strings.Join(nacks, "\n"))
		case done:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for Envoy to acknowledge %s %s: %w", typeURL, name, ctx.Err())
		}
	}
}

func (s *Server) notify() {
	close(s.changed)
	s.changed = make(chan struct{})
}

type stream struct {
	send func(*discovery.DeltaDiscoveryResponse) error
	subs map[string]*subscription
	next int
	// sent holds what a nonce carried: names to versions.
	sent map[string]map[string]string
}

type subscription struct {
	wildcard bool
	named    map[string]bool
	greeted  bool
	// known is what Envoy has: name to version; "" for "there is none".
	known map[string]string
}

type conversation interface {
	Send(*discovery.DeltaDiscoveryResponse) error
	Recv() (*discovery.DeltaDiscoveryRequest, error)
}

func (s *Server) serve(c conversation) error {
	st := &stream{send: c.Send, subs: map[string]*subscription{}, sent: map[string]map[string]string{}}
	s.mu.Lock()
	s.streams[st] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.streams, st)
		s.mu.Unlock()
	}()
	for {
		request, err := c.Recv()
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.hear(st, request)
		s.mu.Unlock()
	}
}

func (s *Server) hear(st *stream, request *discovery.DeltaDiscoveryRequest) {
	typeURL := request.GetTypeUrl()
	sub := st.subs[typeURL]
	if sub == nil {
		sub = &subscription{named: map[string]bool{}, known: map[string]string{}, wildcard: len(request.GetResourceNamesSubscribe()) == 0}
		for name, version := range request.GetInitialResourceVersions() {
			sub.known[name] = version
		}
		st.subs[typeURL] = sub
	}
	if nonce := request.GetResponseNonce(); nonce != "" {
		if fault := request.GetErrorDetail(); fault != nil {
			s.nacks = append(s.nacks, fmt.Sprintf("%s: %s", typeURL[strings.LastIndexByte(typeURL, '.')+1:], fault.GetMessage()))
		} else {
			for name, version := range st.sent[nonce] {
				s.acked[typeURL+" "+name] = version
			}
		}
		delete(st.sent, nonce)
	}
	for _, name := range request.GetResourceNamesSubscribe() {
		if name == "*" {
			sub.wildcard = true
			continue
		}
		sub.named[name] = true
		if sub.known[name] == "" {
			delete(sub.known, name) // asked again: answer again
		}
	}
	for _, name := range request.GetResourceNamesUnsubscribe() {
		delete(sub.named, name)
		delete(sub.known, name)
	}
	s.pushTo(st, typeURL)
	s.notify()
}

func (s *Server) push(typeURL string) {
	for st := range s.streams {
		s.pushTo(st, typeURL)
	}
}

func (s *Server) pushTo(st *stream, typeURL string) {
	sub := st.subs[typeURL]
	if sub == nil {
		return
	}
	response := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}
	sent := map[string]string{}
	for name := range sub.named {
		if s.resources[typeURL][name] == nil && s.answer != nil {
			if m := s.answer(typeURL, name); m != nil {
				body := &anypb.Any{}
				if err := anypb.MarshalFrom(body, m, proto.MarshalOptions{Deterministic: true}); err != nil {
					panic(err)
				}
				s.version++
				if s.resources[typeURL] == nil {
					s.resources[typeURL] = map[string]*resource{}
				}
				s.resources[typeURL][name] = &resource{body: body, version: fmt.Sprint(s.version)}
			}
		}
		if _, told := sub.known[name]; s.resources[typeURL][name] == nil && !told {
			sub.known[name] = ""
			response.RemovedResources = append(response.RemovedResources, name)
		}
	}
	for name, r := range s.resources[typeURL] {
		if (sub.named[name] || sub.wildcard && r.eager) && sub.known[name] != r.version {
			sub.known[name], sent[name] = r.version, r.version
			response.Resources = append(response.Resources, &discovery.Resource{Name: name, Version: r.version, Resource: r.body})
		}
	}
	for name, version := range sub.known {
		if s.resources[typeURL][name] == nil && version != "" {
			delete(sub.known, name)
			response.RemovedResources = append(response.RemovedResources, name)
		}
	}
	// The first answer to a wildcard goes out even if it is empty: Envoy waits for it before it goes on.
	if len(response.Resources)+len(response.RemovedResources) == 0 && (!sub.wildcard || sub.greeted) {
		return
	}
	sub.greeted = true
	st.next++
	response.Nonce = fmt.Sprint(st.next)
	st.sent[response.Nonce] = sent
	_ = st.send(response) // a broken stream ends in serve
}

// resend sends endpoints again after a cluster changed: Envoy waits for them and does not ask.
func (s *Server) resend() {
	for st := range s.streams {
		if sub := st.subs[Endpoints]; sub != nil {
			for known := range sub.known {
				sub.known[known] = "stale"
			}
			s.pushTo(st, Endpoints)
		}
	}
}

type aggregated struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	s *Server
}

func (a aggregated) DeltaAggregatedResources(c discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return a.s.serve(c)
}

type secrets struct {
	secret.UnimplementedSecretDiscoveryServiceServer
	s *Server
}

func (x secrets) DeltaSecrets(c secret.SecretDiscoveryService_DeltaSecretsServer) error {
	return x.s.serve(c)
}

// Deadline is a context for one wait: generous, for machines under load.
func Deadline(parent context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(parent, 30*time.Second)
}

// Has reports whether there is such a resource.
func (s *Server) Has(typeURL, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.resources[typeURL][name] != nil
}

// Answer replaces what makes resources that Envoy names and that were never Set.
func (s *Server) Answer(answer func(typeURL, name string) proto.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}
