package relay_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

// TestKeptIsNotSettled: an Envoy that has yet to say what it has may have something older.
func TestKeptIsNotSettled(t *testing.T) {
	c := relay.NewCache(relay.Config{Want: func(relay.Key, bool) {}, Log: slog.New(slog.DiscardHandler)})
	k := relay.Key{TypeURL: relay.TypeEndpoints, Name: "shop/api:80"}
	c.Restore(relay.Resource{Key: k, Version: "1", Body: &anypb.Any{TypeUrl: k.TypeURL}})
	settled := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		return c.Settled(ctx, k, "1")
	}
	if err := settled(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while nothing is known of Envoy: %v", err)
	}
	c.Ended(true)
	if err := settled(); err != nil {
		t.Errorf("no Envoy runs: %v", err)
	}
}
