package serve

import (
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/weftmesh/weft/controlplane/internal/epoch"
)

// Agent is a node's stream that acts only when it is told to.
type Agent struct {
	st     *stream
	flight []*discovery.DeltaDiscoveryResponse
}

// Connect opens a stream of an agent that holds resources of a state; nil: it is not admitted now.
func Connect(s *Server, node string, held epoch.Mark, versions map[Resource]string) *Agent {
	s.mu.Lock()
	older, stale := s.outdated(held)
	s.mu.Unlock()
	st := newStream(s, node)
	if older || stale || !s.add(st) {
		return nil
	}
	for typeURL := range wildcard {
		r := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: map[string]string{}}
		for k, v := range versions {
			if k.TypeURL == typeURL {
				r.InitialResourceVersions[k.Name] = v
			}
		}
		st.request(r)
	}
	return &Agent{st: st}
}

// Receive takes what there is; it is not answered yet.
func (a *Agent) Receive() []*discovery.DeltaDiscoveryResponse {
	out := a.st.responses()
	a.flight = append(a.flight, out...)
	return out
}

// Answer acknowledges everything that was received.
func (a *Agent) Answer() {
	answer(a.st, a.flight)
	a.flight = nil
}

// Close ends the stream.
func (a *Agent) Close() { a.st.server.remove(a.st) }
