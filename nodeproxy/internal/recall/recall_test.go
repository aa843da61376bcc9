package recall

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

func resource(t *testing.T, name string, m proto.Message) relay.Resource {
	t.Helper()
	body, version, err := relay.Pack(m)
	if err != nil {
		t.Fatal(err)
	}
	return relay.Resource{Key: relay.Key{TypeURL: body.TypeUrl, Name: name}, Version: version, Body: body}
}

func TestSaveAndLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index")
	if got, err := Load(path); err != nil || got != nil {
		t.Errorf("a missing file: %v %v", got, err)
	}
	want := []relay.Resource{
		resource(t, "shop/till", &meshv1.Service{Namespace: "shop", Name: "till", Ports: []*meshv1.ServicePort{{Port: 80}}}),
		resource(t, "node/1", &meshv1.LocalPod{Uid: "1", Stage: meshv1.Stage_STAGE_ENFORCED}),
	}
	for range 2 { // the second time over the first
		if err := Save(path, want); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Load(path)
	if err != nil || len(got) != len(want) {
		t.Fatalf("read back %v %v", got, err)
	}
	for i := range want {
		if got[i].Key != want[i].Key || got[i].Version != want[i].Version || !proto.Equal(got[i].Body, want[i].Body) {
			t.Errorf("read back %v, want %v", got[i], want[i])
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v %v, want 0600", info.Mode(), err)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBrokenFilesAreRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index")
	if err := Save(path, []relay.Resource{resource(t, "shop/till", &meshv1.Service{Namespace: "shop", Name: "till"})}); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := []byte(string(whole))
	flipped[len(flipped)-1] ^= 1
	for name, c := range map[string]struct{ text, want string }{
		"empty":           {"", "version"},
		"cut short":       {string(whole[:len(whole)-3]), "damaged"},
		"a bit flipped":   {string(flipped), "damaged"},
		"another version": {strings.Replace(string(whole), "weft-state 1", "weft-state 2", 1), "version"},
		"nothing":         {header + "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", ""},
	} {
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Load(path)
		if c.want == "" {
			if err != nil || len(got) != 0 {
				t.Errorf("%s: %v %v", name, got, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, c.want)
		}
	}
}

func TestSecretsAreNotWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index")
	if err := Save(path, []relay.Resource{resource(t, "spiffe://x", &tls.Secret{Name: "spiffe://x"})}); err == nil {
		t.Error("a secret was written")
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("there is a file")
	}
}
