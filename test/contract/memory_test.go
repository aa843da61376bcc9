package contract

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/weftmesh/weft/test/contract/ads"
	"github.com/weftmesh/weft/test/contract/golden"
	"github.com/weftmesh/weft/test/contract/proxy"
)

// keptStats is the StatsConfig that Envoy has on a node.
func keptStats(t *testing.T) string {
	t.Helper()
	notes, ok := load(t, "nodeproxy/internal/envoy")["bootstrap"].Notes.(map[string]any)
	if !ok || notes["statsConfig"] == nil {
		t.Fatal("the node's bootstrap has no statsConfig")
	}
	stats, err := json.Marshal(notes["statsConfig"])
	if err != nil {
		t.Fatal(err)
	}
	return string(stats)
}

// TestMemoryPerPod: what Envoy grows by for each of 100 pods, every pod with an identity of its own.
func TestMemoryPerPod(t *testing.T) {
	stats := keptStats(t)
	for name, bound := range map[string]uint64{"strict": 180, "all-chains": 300} {
		t.Run(name, func(t *testing.T) {
			b := startWith(t, proxy.Config{Stats: stats})
			node := load(t, "nodeproxy/internal/lds")["node"]
			for _, m := range node.Clusters {
				b.Set(ads.Clusters, m.(interface{ GetName() string }).GetName(), m)
			}
			raw, err := os.ReadFile(filepath.Join("..", "..", "nodeproxy", "internal", "lds", "testdata", name+".yaml"))
			if err != nil {
				t.Fatal(err)
			}
			add := func(from, to int) {
				for i := from; i < to; i++ {
					_, netns := b.netns(t)
					var file golden.File
					text := strings.NewReplacer("/run/netns/cni-0b6c5f0e", netns, "0b6c5f0e-3f1e-4a55-9f43-51b1a9c9d3a1", fmt.Sprintf("0b6c5f0e-3f1e-4a55-9f43-51b1a9c9d%03d", i),
						"sa/catalogue", fmt.Sprintf("sa/catalogue%d", i)).Replace(string(raw))
					if err := golden.Decode([]byte(text), &file); err != nil {
						t.Fatal(err)
					}
					b.rules(file)
					for _, m := range file.Listeners {
						b.Set(ads.Listeners, m.(*listener.Listener).GetName(), m)
						b.acked(t, ads.Listeners, m.(*listener.Listener).GetName())
					}
				}
				b.stat(t, "listener_manager.total_listeners_active", uint64(2*to))
				b.stat(t, "listener_manager.total_listeners_warming", 0)
			}
			// The first pods pay for what all share.
			add(0, 10)
			before, err := b.envoy.Resident()
			if err != nil {
				t.Fatal(err)
			}
			add(10, 110)
			after, err := b.envoy.Resident()
			if err != nil {
				t.Fatal(err)
			}
			each := (after - before) / 100 >> 10
			t.Logf("%s: %d KiB per pod", name, each)
			if each > bound {
				t.Errorf("%d KiB per pod, at most %d are allowed", each, bound)
			}
		})
	}
}
