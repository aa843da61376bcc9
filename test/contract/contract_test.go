// Package contract loads what weft generates into the real Envoy. The golden files of the stages are the input, so a
// configuration that Envoy would refuse, or would read otherwise than meant, fails here and not on a node.
package contract

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_to_metadata/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/on_demand/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/set_filter_state/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/http/header_formatters/preserve_case/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/local_address_selectors/filter_state_override/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_mappers/filter_state_override/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_selectors/on_demand_secret/v3"
	envoytls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/proto"

	_ "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/test/contract/ads"
	"github.com/weftmesh/weft/test/contract/golden"
	"github.com/weftmesh/weft/test/contract/proxy"
)

// bench is one Envoy with its xDS server and CA.
type bench struct {
	*ads.Server
	envoy     *proxy.Envoy
	authority *ads.Authority
	spaces    int
}

func start(t *testing.T) *bench {
	t.Helper()
	return startWith(t, proxy.Config{})
}

func startWith(t *testing.T, cfg proxy.Config) *bench {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("Envoy opens listeners in network namespaces here: needs root")
	}
	dir, err := os.MkdirTemp("", "weft")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bench{}
	if b.authority, err = ads.NewAuthority(); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "xds")
	if b.Server, err = ads.Serve(socket, b.secret); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	ctx, cancel := ads.Deadline(t.Context())
	defer cancel()
	cfg.Node, cfg.Dir, cfg.XDS = "contract", dir, socket
	if b.envoy, err = proxy.Start(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.envoy.Stop)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Envoy's log:\n%s", b.envoy.Log())
		}
	})
	return b
}

// secret answers what Envoy names: the bundle and anybody's SVID. Rules are Offered by the tests.
func (b *bench) secret(typeURL, name string) proto.Message {
	switch {
	case typeURL != ads.Secrets:
		return nil
	case name == names.SecretBundle:
		return b.authority.Bundle(name)
	case strings.HasPrefix(name, "spiffe://"):
		svid, err := b.authority.SVID(name)
		if err != nil {
			panic(err)
		}
		return svid
	}
	return nil
}

// netns makes a network namespace for the test.
func (b *bench) netns(t *testing.T) (name, path string) {
	t.Helper()
	b.spaces++
	name = fmt.Sprintf("wct%d-%d", os.Getpid(), b.spaces)
	for _, args := range [][]string{{"netns", "add", name}, {"-n", name, "link", "set", "lo", "up"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", name).Run() })
	return name, "/run/netns/" + name
}

// rules offers a golden file's validation secrets with the test's own roots.
func (b *bench) rules(file golden.File) {
	for _, m := range file.Secrets {
		secret := m.(*envoytls.Secret)
		secret.GetValidationContext().TrustedCa = b.authority.Bundle("").GetValidationContext().GetTrustedCa()
		b.Offer(ads.Secrets, secret.GetName(), secret)
	}
}

func move(m proto.Message, name, netns string) *listener.Listener {
	l := proto.Clone(m).(*listener.Listener)
	l.Name = name
	l.Address.GetSocketAddress().NetworkNamespaceFilepath = netns
	return l
}

func (b *bench) acked(t *testing.T, typeURL, name string) {
	t.Helper()
	ctx, cancel := ads.Deadline(t.Context())
	defer cancel()
	if err := b.Acked(ctx, typeURL, name); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) stat(t *testing.T, name string, want uint64) {
	t.Helper()
	ctx, cancel := ads.Deadline(t.Context())
	defer cancel()
	err := proxy.Until(ctx, func() error {
		got, err := b.envoy.Stat(name)
		if err == nil && got != want {
			err = fmt.Errorf("%s is %d, want %d", name, got, want)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func load(t *testing.T, root string) map[string]golden.File {
	t.Helper()
	paths, err := golden.Find(filepath.Join("..", "..", root))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]golden.File{}
	for _, path := range paths {
		file, err := golden.Load(path)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		files[strings.TrimSuffix(filepath.Base(path), ".yaml")] = file
	}
	if len(files) == 0 {
		t.Fatalf("no golden files below %s", root)
	}
	return files
}

// TestEnvoyTakesEverything loads every golden file and wants an acknowledgement for every resource, listeners that
// listen, and nothing left warming.
func TestEnvoyTakesEverything(t *testing.T) {
	b := start(t)
	node, rest := load(t, "nodeproxy/internal/lds"), load(t, "controlplane/internal/xds")
	for _, m := range node["node"].Clusters {
		b.Set(ads.Clusters, m.(*cluster.Cluster).GetName(), m)
	}
	loaded := uint64(0)
	for name, file := range node {
		if len(file.Listeners) == 0 {
			continue
		}
		_, netns := b.netns(t)
		b.rules(file)
		for i, m := range file.Listeners {
			l := move(m, fmt.Sprintf("%s/%d", name, i), netns)
			b.Set(ads.Listeners, l.GetName(), l)
			b.acked(t, ads.Listeners, l.GetName())
			loaded++
		}
	}
	for name, file := range rest {
		for _, m := range file.Endpoints {
			e := m.(interface{ GetClusterName() string })
			b.Offer(ads.Endpoints, e.GetClusterName(), m)
		}
		for _, m := range file.Clusters {
			c := m.(*cluster.Cluster)
			b.Set(ads.Clusters, c.GetName(), c)
			b.acked(t, ads.Clusters, c.GetName())
		}
		for i, m := range file.Routes {
			// An eager scope makes Envoy ask for the route at once.
			r := m.(*route.RouteConfiguration)
			key := fmt.Sprintf("%s/%d", name, i)
			b.Offer(ads.Routes, r.GetName(), r)
			b.Set(ads.Scopes, key, &route.ScopedRouteConfiguration{Name: key, RouteConfigurationName: r.GetName(),
				Key: &route.ScopedRouteConfiguration_Key{Fragments: []*route.ScopedRouteConfiguration_Key_Fragment{{
					Type: &route.ScopedRouteConfiguration_Key_Fragment_StringKey{StringKey: key}}}}})
			b.acked(t, ads.Routes, r.GetName())
		}
	}
	for _, m := range node["node"].Scopes {
		s := m.(*route.ScopedRouteConfiguration)
		b.Set(ads.Scopes, s.GetName(), s)
		b.acked(t, ads.Scopes, s.GetName())
	}
	b.stat(t, "listener_manager.total_listeners_active", loaded)
	b.stat(t, "listener_manager.total_listeners_warming", 0)
	b.stat(t, "listener_manager.listener_create_failure", 0)
	b.stat(t, "cluster_manager.warming_clusters", 0)
	if nacks := b.Nacks(); len(nacks) > 0 {
		t.Errorf("Envoy refused:\n%s", strings.Join(nacks, "\n"))
	}
	if loaded < 30 {
		t.Errorf("only %d listeners were loaded", loaded)
	}
	t.Logf("%d listeners, %d files of the controller", loaded, len(rest))
}

// TestRefusalIsSeen: the tier must be able to fail.
func TestRefusalIsSeen(t *testing.T) {
	b := start(t)
	b.Set(ads.Clusters, "broken", &cluster.Cluster{Name: "broken", ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}, LbPolicy: cluster.Cluster_CLUSTER_PROVIDED})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := b.Acked(ctx, ads.Clusters, "broken"); err == nil || len(b.Nacks()) == 0 {
		t.Fatalf("a broken cluster was taken: %v", err)
	}
}
