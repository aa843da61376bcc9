package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/nodeproxy/internal/svid"
)

const (
	// lookAgain is how often it is asked whether there is an Envoy at all, while its word on the trust bundle is waited for.
	lookAgain = time.Second
	// trustRetry is how soon a trust bundle that Envoy refused is given to it again.
	trustRetry = 10 * time.Second
	// oldConnection is how long calls on a connection that has been replaced may take.
	oldConnection = time.Minute
)

// connection is the connection to the controller, made anew when the agent's SVID is to be renewed.
func (a *agent) connection(ctx context.Context) (grpc.ClientConnInterface, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn != nil && time.Now().Before(a.due) {
		return a.conn, nil
	}
	conn, due, err := a.self.Connect(ctx)
	if err != nil {
		return nil, err
	}
	if old := a.conn; old != nil {
		// Streams on it go on for a while; they come back on the new one.
		time.AfterFunc(oldConnection, func() { _ = old.Close() })
	}
	a.conn, a.due = conn, due
	return conn, nil
}

// giveBundle gives Envoy the trust bundle, and every rule that has it inside.
func (a *agent) giveBundle() error {
	roots, err := a.self.RootsPEM()
	if err != nil {
		return err
	}
	if _, err := a.cache.Set(names.SecretBundle, lds.ValidationSecret(lds.RuleSecret{Name: names.SecretBundle}, roots)); err != nil {
		return err
	}
	return a.enroller.TrustChanged()
}

// followBundle takes every trust bundle that the controller gives, until ctx ends.
func (a *agent) followBundle(ctx context.Context) {
	confirmed := func() {} // ends the wait for Envoy's word on the bundle before
	for ctx.Err() == nil {
		err := a.bundleStream(ctx, func(hash string) {
			confirmed()
			var waiting context.Context
			waiting, confirmed = context.WithCancel(ctx)
			go a.confirm(waiting, hash)
		})
		if err != nil && ctx.Err() == nil {
			a.config.Log.Debug("trust bundle stream ended", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	confirmed()
}

func (a *agent) bundleStream(ctx context.Context, given func(hash string)) error {
	conn, err := a.connection(ctx)
	if err != nil {
		return err
	}
	s, err := meshv1.NewIdentityClient(conn).Bundle(ctx, &meshv1.BundleRequest{})
	if err != nil {
		return fmt.Errorf("follow the trust bundle: %w", err)
	}
	for {
		b, err := s.Recv()
		if err != nil {
			return fmt.Errorf("follow the trust bundle: %w", err)
		}
		a.self.SetRoots(b.Roots)
		if err := a.giveBundle(); err != nil {
			return err
		}
		given(b.Hash)
	}
}

// confirm tells the controller that this node trusts a bundle, once it does: the agent does already.
func (a *agent) confirm(ctx context.Context, hash string) {
	for {
		err := a.envoyTrusts(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			a.config.Log.Info("the trust bundle is in force", "bundle", hash)
			a.reporter.Health(func(h *meshv1.NodeHealth) { h.TrustBundle = hash })
			return
		}
		a.config.Log.Error("Envoy does not take the trust bundle, trying again", "bundle", hash, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(trustRetry):
		}
		if err := a.giveBundle(); err != nil {
			a.config.Log.Error("give Envoy the trust bundle", "error", err)
		}
	}
}

// envoyTrusts waits until Envoy has acknowledged the newest form of every secret that holds roots, or until it is sure that
// no Envoy runs: the next one gets nothing older. An Envoy that runs without a stream may trust anything.
func (a *agent) envoyTrusts(ctx context.Context) error {
	for {
		if a.proxies.ended() {
			return nil
		}
		limited, cancel := context.WithTimeout(ctx, lookAgain)
		err := a.cache.CaughtUp(limited, relay.TypeSecret, holdsRoots)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
}

// holdsRoots tells whether a secret has the trust bundle inside.
func holdsRoots(name string) bool {
	return name == names.SecretBundle || strings.HasPrefix(name, names.RulePrefix)
}

// healthOf puts what the supervisor says of Envoy into the node's health.
func healthOf(s envoy.State) func(*meshv1.NodeHealth) {
	return func(h *meshv1.NodeHealth) { h.ProxyLive, h.ProxyRestarts = s.Live, s.Restarts }
}

func (a *agent) giveSVID(s *svid.SVID) error {
	key, err := s.Key.PEM()
	if err != nil {
		return err
	}
	_, err = a.cache.Set(s.ID, lds.TLSCertificateSecret(s.ID, s.ChainPEM(), key))
	return err
}

func (a *agent) dropSVID(id string) { a.cache.Delete(relay.Key{TypeURL: relay.TypeSecret, Name: id}) }
