package relay

import (
	"context"
	"errors"
	"fmt"
	"slices"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/anypb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

func (u *Upstream) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := u.config.Connect(ctx)
	if err != nil {
		return err
	}
	u.mu.Lock()
	seen := u.seen
	u.mu.Unlock()
	s, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(metadata.AppendToOutgoingContext(ctx, metadataSeen, seen))
	if err != nil {
		return fmt.Errorf("open stream to the controller: %w", err)
	}
	u.setLive(true)
	defer u.setLive(false)
	out := make(chan *discovery.DeltaDiscoveryRequest, 64)
	failed := make(chan error, 2)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case r := <-out:
				if err := s.Send(r); err != nil {
					failed <- fmt.Errorf("send to the controller: %w", err)
					return
				}
			}
		}
	}()
	for _, r := range u.opening() {
		out <- r
	}
	go func() {
		lanes := map[string]lane{}
		for {
			r, err := s.Recv()
			if err != nil {
				failed <- fmt.Errorf("receive from the controller: %w", err)
				return
			}
			if r.SystemVersionInfo != "" {
				u.mu.Lock()
				u.seen = r.SystemVersionInfo
				u.mu.Unlock()
			}
			if lanes[r.TypeUrl] == nil {
				lanes[r.TypeUrl] = newLane(ctx)
			}
			u.take(ctx, r, lanes[r.TypeUrl], out)
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return err
		case <-u.changes:
			for _, r := range u.subscriptions() {
				select {
				case out <- r:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
	}
}

// opening are the first requests of a stream: everything that is wanted, with the versions that are there.
func (u *Upstream) opening() []*discovery.DeltaDiscoveryRequest {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.queue = nil
	requests := map[string]*discovery.DeltaDiscoveryRequest{}
	var types []string
	request := func(typeURL string) *discovery.DeltaDiscoveryRequest {
		if requests[typeURL] == nil {
			requests[typeURL] = &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, Node: &core.Node{Id: u.config.Node}, InitialResourceVersions: map[string]string{}}
			types = append(types, typeURL)
		}
		return requests[typeURL]
	}
	for k := range u.wanted {
		r := request(k.TypeURL)
		r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, k.Name)
	}
	for _, t := range eager {
		r := request(t)
		r.ResourceNamesSubscribe = []string{"*"}
	}
	for k, v := range u.versions {
		if r := requests[k.TypeURL]; r != nil {
			r.InitialResourceVersions[k.Name] = v
		}
	}
	for id, w := range u.workloads {
		requests[TypeWorkload].InitialResourceVersions[id.name()], _ = w.parts()
	}
	var out []*discovery.DeltaDiscoveryRequest
	for _, t := range types {
		slices.Sort(requests[t].ResourceNamesSubscribe)
		out = append(out, requests[t])
	}
	return out
}

func (u *Upstream) subscriptions() []*discovery.DeltaDiscoveryRequest {
	u.mu.Lock()
	defer u.mu.Unlock()
	var out []*discovery.DeltaDiscoveryRequest
	for _, q := range u.queue {
		r := &discovery.DeltaDiscoveryRequest{TypeUrl: q.key.TypeURL}
		if q.wanted {
			r.ResourceNamesSubscribe = []string{q.key.Name}
		} else {
			r.ResourceNamesUnsubscribe = []string{q.key.Name}
		}
		out = append(out, r)
	}
	u.queue = nil
	return out
}

// lane does one thing after the other.
type lane chan func()

// backlog is how many answers of a type may wait to be put into force before the next response is read.
const backlog = 64

func newLane(ctx context.Context) lane {
	l := make(lane, backlog)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case do := <-l:
				do()
			}
		}
	}()
	return l
}

// take stores a response and answers it when it is in force; the stream goes on meanwhile. The index is put into force in
// order, type by type; what is relayed is with Envoy in order already, and waits for its answer alone.
func (u *Upstream) take(ctx context.Context, r *discovery.DeltaDiscoveryResponse, own lane, out chan<- *discovery.DeltaDiscoveryRequest) {
	if relayed[r.TypeUrl] {
		settled := u.relay(r)
		go u.answer(ctx, r, settled, out)
		return
	}
	if err := u.index(r); err != nil {
		u.config.Log.Error("controller sent what cannot be read", "type", r.TypeUrl, "error", err)
	}
	do := func() {
		u.answer(ctx, r, func(ctx context.Context) error { return u.config.Apply(ctx, r.TypeUrl) }, out)
	}
	select {
	case own <- do:
	case <-ctx.Done():
	}
}

// relay hands a response on and returns what waits for Envoy to take it. A removal changes nothing: Envoy would not ask for
// the name again, so the controller always sends what refuses instead.
func (u *Upstream) relay(r *discovery.DeltaDiscoveryResponse) func(context.Context) error {
	var relayed []Resource
	for _, res := range r.Resources {
		k := Key{r.TypeUrl, res.Name}
		u.mu.Lock()
		wanted := u.wanted[k]
		if wanted {
			u.versions[k] = res.Version
		}
		u.mu.Unlock()
		if !wanted {
			continue
		}
		body := res.Resource
		if u.config.Overlay != nil {
			body = u.config.Overlay(k, body)
		}
		u.config.Cache.Relay(k, res.Version, body)
		relayed = append(relayed, Resource{k, res.Version, body})
	}
	u.config.Changed(r.TypeUrl)
	return func(ctx context.Context) error {
		refusals := Refusals{}
		for _, x := range relayed {
			var refused *Refused
			if err := u.config.Cache.Settled(ctx, x.Key, x.Version); errors.As(err, &refused) {
				refusals[x.Key.Name] = refused.Text
			} else if err != nil {
				return err
			}
		}
		if len(refusals) > 0 {
			return refusals
		}
		return nil
	}
}

// answer waits until a response is in force, and says so or why not, by resource where it can.
func (u *Upstream) answer(ctx context.Context, r *discovery.DeltaDiscoveryResponse, inForce func(context.Context) error, out chan<- *discovery.DeltaDiscoveryRequest) {
	err := u.await(ctx, r, inForce)
	answer := &discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
	var refusals Refusals
	if errors.As(err, &refusals) {
		if refusals = refusals.of(r); len(refusals) > 0 {
			err = refusals
		} else { // they are about what came before
			err = nil
		}
	}
	if err != nil {
		answer.ErrorDetail = &rpcstatus.Status{Code: int32(codes.Internal), Message: err.Error()}
	}
	select {
	case out <- answer:
	case <-ctx.Done():
	}
}

// await waits until a response is in force, for as long as the stream lasts. After Settle it is looked at anew: what came
// since may be what is waited for.
func (u *Upstream) await(ctx context.Context, r *discovery.DeltaDiscoveryResponse, inForce func(context.Context) error) error {
	for {
		limited, cancel := context.WithTimeout(ctx, u.config.Settle)
		err := inForce(limited)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			return err
		}
		u.config.Log.Warn("Envoy does not answer, going on waiting", "type", r.TypeUrl, "count", len(r.Resources), "error", err)
	}
}

// store keeps one resource of the index.
func (u *Upstream) store(k Key, version string, body *anypb.Any) error {
	m, err := body.UnmarshalNew()
	if err != nil {
		return fmt.Errorf("read %s: %w", k.Name, err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if w, ok := m.(*meshv1.Workload); ok {
		u.workloads[compactUID(k.Name)] = compact(w, version)
		return nil
	}
	u.bodies[k], u.versions[k] = m, version
	return nil
}

// index stores own resources.
func (u *Upstream) index(r *discovery.DeltaDiscoveryResponse) error {
	var bad error
	for _, res := range r.Resources {
		if err := u.store(Key{r.TypeUrl, res.Name}, res.Version, res.Resource); err != nil {
			bad = err
		}
		res.Resource = nil // the answer, which may wait long, needs no more than the names
	}
	u.mu.Lock()
	for _, name := range r.RemovedResources {
		k := Key{r.TypeUrl, name}
		delete(u.bodies, k)
		delete(u.versions, k)
		if k.TypeURL == TypeWorkload {
			delete(u.workloads, compactUID(name))
		}
	}
	if u.missing[r.TypeUrl] {
		delete(u.missing, r.TypeUrl)
		if len(u.missing) == 0 {
			close(u.synced)
		}
	}
	u.mu.Unlock()
	u.config.Changed(r.TypeUrl)
	return bad
}
