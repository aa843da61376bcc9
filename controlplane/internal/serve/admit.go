package serve

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/controlplane/internal/epoch"
)

var (
	errSuspended = status.Error(codes.Unavailable, "this replica is behind the leader: another one serves")
	errOlder     = status.Error(codes.Unavailable, "another replica has given newer orders than are known here")
)

// admit waits until an agent can be served without taking it back: it says which state it was given last. Older orders are
// never given; objects that are older only after a while, for what was read may be gone for good.
func (s *Server) admit(ctx context.Context, node string) error {
	var held epoch.Mark
	if m, ok := metadata.FromIncomingContext(ctx); ok && len(m.Get(epoch.Metadata)) == 1 {
		var err error
		if held, err = epoch.Parse(m.Get(epoch.Metadata)[0]); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
	}
	limit := time.NewTimer(s.config.Patience)
	defer limit.Stop()
	for out := false; ; {
		s.mu.Lock()
		changed, suspended, ready := s.changed, s.suspended, s.snapshot != nil
		older, stale := s.outdated(held)
		s.mu.Unlock()
		switch {
		case suspended:
			return errSuspended
		case !older && !stale:
			return nil
		case out && older && ready:
			return errOlder
		case out && !older:
			s.config.Log.Warn("node was given newer objects by another replica: it is served older ones from now on", "node", node, "held", held.String())
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-limit.C:
			out = true
		}
	}
}

// outdated tells whether what is served is older than what an agent holds: by its orders, by its objects.
func (s *Server) outdated(held epoch.Mark) (older, stale bool) {
	return s.snapshot == nil || s.mark.Orders.Before(held.Orders), !s.seen.Covers(held.Made)
}

// Suspend ends all streams and takes no new ones, or takes some again: a replica that is behind its leader must not keep
// agents.
func (s *Server) Suspend(suspended bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.suspended == suspended {
		return
	}
	s.suspended = suspended
	for st := range s.streams {
		st.rouse()
	}
	s.notify()
}

// Suspended tells whether no agent is served.
func (s *Server) Suspended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.suspended
}

// Ready tells whether agents are served.
func (s *Server) Ready() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshot != nil && !s.suspended
}

// Connected is how many nodes have a stream to this replica.
func (s *Server) Connected() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byNode)
}

// Orders are those of the current snapshot, by the number of the leader's.
func (s *Server) Orders() epoch.Orders {
	s.mu.Lock()
	defer s.mu.Unlock()
	return epoch.Orders{Term: s.mark.Term, Number: s.number}
}
