package relaytest

import (
	"context"
	"sync"

	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// identity gives the trust bundle, and takes reports.
type identity struct {
	meshv1.UnimplementedIdentityServer
	meshv1.UnimplementedReportsServer

	mu      sync.Mutex
	bundle  *meshv1.TrustBundle
	changed chan struct{}
	health  *meshv1.NodeHealth
	cut     context.CancelFunc
}

func newIdentity() *identity { return &identity{changed: make(chan struct{})} }

// SetBundle gives every agent a trust bundle.
func (c *Controller) SetBundle(b *meshv1.TrustBundle) {
	i := c.identity
	i.mu.Lock()
	defer i.mu.Unlock()
	i.bundle = b
	close(i.changed)
	i.changed = make(chan struct{})
}

// Health is what the agent said of its node since its last Hello; nil: nothing.
func (c *Controller) Health() *meshv1.NodeHealth {
	c.identity.mu.Lock()
	defer c.identity.mu.Unlock()
	if c.identity.health == nil {
		return nil
	}
	return proto.Clone(c.identity.health).(*meshv1.NodeHealth)
}

// CutReports ends the stream of reports, and forgets the health.
func (c *Controller) CutReports() {
	c.identity.mu.Lock()
	defer c.identity.mu.Unlock()
	c.identity.health = nil
	if c.identity.cut != nil {
		c.identity.cut()
	}
}

// Bundle streams the trust bundle.
func (i *identity) Bundle(_ *meshv1.BundleRequest, s meshv1.Identity_BundleServer) error {
	for {
		i.mu.Lock()
		bundle, changed := i.bundle, i.changed
		i.mu.Unlock()
		if bundle != nil {
			if err := s.Send(bundle); err != nil {
				return err
			}
		}
		select {
		case <-s.Context().Done():
			return nil
		case <-changed:
		}
	}
}

// Report takes one agent's reports.
func (i *identity) Report(s meshv1.Reports_ReportServer) error {
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	i.mu.Lock()
	i.cut = cancel
	i.mu.Unlock()
	go func() {
		defer cancel()
		for {
			r, err := s.Recv()
			if err != nil {
				return
			}
			i.mu.Lock()
			switch {
			case ctx.Err() != nil:
			case r.GetHello() != nil:
				i.health = nil
			case r.GetHealth() != nil:
				i.health = r.GetHealth()
			}
			i.mu.Unlock()
		}
	}()
	<-ctx.Done()
	return ctx.Err()
}
