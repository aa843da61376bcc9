package enrol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
	"github.com/weftmesh/weft/test/contract/ads"
	"github.com/weftmesh/weft/test/contract/proxy"
)

// patience is at least ten times what anything here may take but Envoy's drain.
const patience = time.Minute

// node is a world whose Envoy is a real one, with a pod's network namespace. The kernel stays a fake.
type node struct {
	*world
	dir       string
	authority *ads.Authority
	envoy     *proxy.Envoy
	server    *grpc.Server
}

// both gives a real Envoy what the world notes.
type both struct {
	*relay.Cache
	world *world
}

func (b both) Set(name string, m proto.Message) (string, error) {
	if _, err := (*fakeEnvoy)(b.world).Set(name, m); err != nil {
		return "", err
	}
	return b.Cache.Set(name, m)
}

func (b both) Delete(k relay.Key) {
	(*fakeEnvoy)(b.world).Delete(k)
	b.Cache.Delete(k)
}

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("Envoy listens in a pod's network namespace here: needs root")
	}
	dir, err := os.MkdirTemp("", "weft-enrol-") // short, for Unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n := &node{world: newWorld(), dir: dir}
	if n.authority, err = ads.NewAuthority(); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("wenrol%d-%d", os.Getpid(), time.Now().UnixNano()%1e6)
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Fatalf("make a network namespace: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", name).Run() })
	p := n.running[uid]
	p.NetnsPath = "/run/netns/" + name
	n.running[uid] = p
	n.roots, n.policies = string(n.authority.Roots()), written()
	n.policies["broken"] = &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: strict, Http: true, Deny: []*meshv1.Rule{{
		Name: "shop/broken", Requests: []*meshv1.Request{{Paths: []*meshv1.StringMatch{{Match: &meshv1.StringMatch_Regex{Regex: "("}}}}}}}}}
	return n
}

// agent makes an enroller with a cache of its own, as a starting agent has them.
func (n *node) agent(t *testing.T) *Enroller {
	t.Helper()
	cache := relay.NewCache(relay.Config{Want: func(relay.Key, bool) {}, Log: slog.New(slog.DiscardHandler)})
	give := func(name string, m proto.Message) {
		if _, err := cache.Set(name, m); err != nil {
			t.Fatal(err)
		}
	}
	svid, err := n.authority.SVID(till)
	if err != nil {
		t.Fatal(err)
	}
	give(till, svid)
	give(names.SecretBundle, n.authority.Bundle(names.SecretBundle))
	give("holder", lds.Holder())
	for _, c := range lds.Clusters() {
		give(c.Name, c)
	}
	socket := filepath.Join(n.dir, "xds")
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	(&relay.Service{Cache: cache}).Register(server)
	go server.Serve(l) // ends with Stop
	t.Cleanup(server.Stop)
	n.server = server
	cache.Prime()
	if n.envoy == nil {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if n.envoy, err = proxy.Start(ctx, proxy.Config{Node: "enrol", Dir: n.dir, XDS: socket}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			n.envoy.Stop()
			if t.Failed() {
				t.Logf("Envoy's log:\n%s", n.envoy.Log())
			}
		})
	}
	e := n.enroller()
	e.config.Envoy = both{cache, n.world}
	return e
}

// stat is one of Envoy's listener manager.
func (n *node) stat(t *testing.T, name string) uint64 {
	t.Helper()
	v, err := n.envoy.Stat("listener_manager." + name)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// drained waits until no chain of Envoy's is on its way out.
func (n *node) drained(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := proxy.Until(ctx, func() error {
		if left := n.stat(t, "total_filter_chains_draining"); left > 0 {
			return fmt.Errorf("%d chains are draining", left)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// The real Envoy drains nothing before callers have moved, the old chains then, and nothing because of another agent.
func TestEnvoyDrainsOnlyWhatCallersHaveLeft(t *testing.T) {
	n := newNode(t)
	e := n.agent(t)
	n.wish.Stage, n.wish.InboundPolicy, n.wish.MovedPolicy = enforced, "wide", "wide"
	turn(t, e)
	n.drained(t)
	for _, hash := range []string{"narrow", "admin", "reads", "wide"} {
		n.wish.InboundPolicy = hash
		turn(t, e)
		if left := n.stat(t, "total_filter_chains_draining"); left > 0 {
			t.Errorf("%s: %d chains drain before callers have moved", hash, left)
		}
		n.wish.MovedPolicy = hash
		turn(t, e)
		if left := n.stat(t, "total_filter_chains_draining"); left == 0 {
			t.Errorf("%s: no chain drains after callers have moved", hash)
		}
		n.drained(t)
	}
	n.wish.InboundPolicy = "narrow"
	turn(t, e)
	modified := n.stat(t, "listener_in_place_updated")

	n.server.Stop()
	e = n.agent(t)
	turn(t, e) // waits until Envoy has come back and acknowledged
	n.expect(t, "with another agent", "narrow", "", n.chains(t))
	if now := n.stat(t, "listener_in_place_updated"); now != modified || n.stat(t, "total_filter_chains_draining") > 0 {
		t.Errorf("another agent changed listeners %d times", now-modified)
	}
	if failed := n.stat(t, "listener_create_failure"); failed > 0 {
		t.Errorf("Envoy refused %d listeners", failed)
	}
}

// What the real Envoy refuses is told from what it has not answered yet, and the last good listener serves on.
func TestEnvoyRefusesPolicy(t *testing.T) {
	n := newNode(t)
	e := n.agent(t)
	n.wish.Stage, n.wish.InboundPolicy = enforced, "broken"
	var no *relay.Refused
	if _, err := e.reconcile(t.Context(), uid); !errors.As(err, &no) {
		t.Fatalf("Envoy took a broken expression: %v", err)
	}
	n.expect(t, "nobody is let in", "", "", "closed")
	n.wish.InboundPolicy = "wide"
	turn(t, e)
	n.wish.InboundPolicy = "broken"
	if _, err := e.reconcile(t.Context(), uid); !errors.As(err, &no) {
		t.Fatalf("Envoy took a broken expression: %v", err)
	}
	if r := n.report(t); r.InboundPolicy != "wide" || r.Refused == "" {
		t.Errorf("reported %v", r)
	}
	n.wish.InboundPolicy = "narrow"
	turn(t, e)
	if r := n.report(t); r.InboundPolicy != "narrow" || r.Refused != "" {
		t.Errorf("reported %v", r)
	}
}
