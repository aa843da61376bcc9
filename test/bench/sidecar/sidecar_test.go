package sidecar

import (
	"encoding/json"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var ports = []Port{
	{80, 8080, HTTP1, false}, {81, 8081, HTTP1, true}, {90, 9090, HTTP2, false}, {91, 9091, HTTP2, true}, {7000, 7000, TCP, false},
}

func example(name string) Config {
	c := Config{Name: name, Admin: "/run/" + name + ".admin", Chain: "/run/" + name + ".crt", Key: "/run/" + name + ".key", Roots: "/run/roots.crt", Stats: json.RawMessage(`{}`)}
	if name == "caller" {
		c.Services = []Service{{"near", "10.96.88.11", ports, "10.88.0.13", "spiffe://cluster.local/ns/shop/sa/server"}, {"far", "10.96.88.12", ports, "10.88.1.14", "spiffe://cluster.local/ns/shop/sa/server"}}
	} else {
		c.Ports, c.Allowed = ports, "spiffe://cluster.local/ns/shop/sa/client"
	}
	return c
}

func TestGolden(t *testing.T) {
	for _, name := range []string{"caller", "callee"} {
		raw, err := Bootstrap(example(name))
		if err != nil {
			t.Fatal(err)
		}
		compare(t, name+".json", raw)
	}
	compare(t, "rules.nft", []byte(Rules()))
}

func compare(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != string(got) {
		t.Errorf("%s is not what its golden says (go test -update rewrites it):\n%s", name, got)
	}
}

// find collects the objects of a type within a configuration.
func find(in any, typed string) (out []object) {
	switch v := in.(type) {
	case object:
		if v["@type"] == kind+typed {
			out = append(out, v)
		}
		for _, k := range slices.Sorted(maps.Keys(v)) {
			out = append(out, find(v[k], typed)...)
		}
	case list:
		for _, e := range v {
			out = append(out, find(e, typed)...)
		}
	}
	return out
}

func read(t *testing.T, path string) any {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, raw)
}

func parse(t *testing.T, raw []byte) (out any) {
	t.Helper()
	if err := yaml.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestFair compares with weft's own configuration: a sidecar's connection manager, caller's and callee's, has the same
// settings but for what is listed here.
func TestFair(t *testing.T) {
	const manager = "filters.network.http_connection_manager.v3.HttpConnectionManager"
	// codec_type: weft's callers on undeclared ports let Envoy see; local_reply_config: weft's words for its own errors; the rest is who
	// picks the route, and by what.
	own := []string{"stat_prefix", "codec_type", "local_reply_config", "http_filters", "route_config", "scoped_routes", "early_header_mutation_extensions", "merge_slashes", "path_with_escaped_slashes_action"}
	weft := find(read(t, "../../../nodeproxy/internal/lds/testdata/strict-http.yaml"), manager)
	var sidecars []object
	for _, name := range []string{"caller", "callee"} {
		raw, err := Bootstrap(example(name))
		if err != nil {
			t.Fatal(err)
		}
		sidecars = append(sidecars, find(parse(t, raw), manager)...)
	}
	if len(weft) == 0 || len(sidecars) != 8 {
		t.Fatalf("%d connection managers of weft, %d of sidecars", len(weft), len(sidecars))
	}
	strip := func(m object) object {
		m = maps.Clone(m)
		for _, k := range own {
			delete(m, k)
		}
		return m
	}
	for _, theirs := range sidecars {
		for _, ours := range weft {
			a, b := strip(ours), strip(theirs)
			if !reflect.DeepEqual(a, b) {
				t.Errorf("%s differs from weft's %s:\nweft:    %v\nsidecar: %v", theirs["stat_prefix"], ours["stat_prefix"], a, b)
			}
		}
	}
}
