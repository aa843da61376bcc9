package envoy

import (
	"encoding/json"
	"testing"

	"github.com/weftmesh/weft/test/contract/golden"
)

// TestBootstrap: what Envoy starts with. The contract tests take its statistics from here.
func TestBootstrap(t *testing.T) {
	raw, err := Bootstrap(BootstrapConfig{NodeID: "node-1", Generation: 1, AdminSocket: "/run/weft/generation-1/envoy/admin.sock", AgentSocket: "/run/weft/agent.sock", MemoryLimit: 256 << 20})
	if err != nil {
		t.Fatal(err)
	}
	var notes map[string]any
	if err := json.Unmarshal(raw, &notes); err != nil {
		t.Fatal(err)
	}
	golden.Open(t, "testdata").Check(t, "bootstrap", golden.File{Notes: notes})
}
