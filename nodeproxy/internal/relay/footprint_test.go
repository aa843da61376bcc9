package relay

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// heap is what is in use after all that is not has been collected.
func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestFootprint: what one agent keeps in memory of each pod in the mesh and each service, of which there may be tens of thousands;
// both with an address of each family.
func TestFootprint(t *testing.T) {
	u := NewUpstream(UpstreamConfig{Cache: NewCache(Config{Want: func(Key, bool) {}}), Log: slog.New(slog.DiscardHandler)})
	give := func(typeURL string, n int, most float64, each func(i int) (string, proto.Message)) {
		t.Helper()
		r := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}
		for i := range n {
			name, m := each(i)
			body, err := anypb.New(m)
			if err != nil {
				t.Fatal(err)
			}
			r.Resources = append(r.Resources, &discovery.Resource{Name: name, Version: fmt.Sprintf("%016x", i), Resource: body})
		}
		raw, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		r = &discovery.DeltaDiscoveryResponse{}
		before := heap()
		if err := proto.Unmarshal(raw, r); err != nil {
			t.Fatal(err)
		}
		if err := u.index(r); err != nil {
			t.Fatal(err)
		}
		wire := len(raw) / n
		r, raw = nil, nil
		kept := float64(int64(heap())-int64(before))/float64(n) + float64(wire) // raw was part of before
		t.Logf("%s: %d bytes on the wire, %.0f kept", typeURL, wire, kept)
		if kept > most {
			t.Errorf("%s: %.0f bytes are kept of each, at most %.0f are allowed", typeURL, kept, most)
		}
	}
	addresses := func(i int) [][]byte {
		v4 := netip.AddrFrom4([4]byte{10, 40, byte(i >> 8), byte(i)}).As4()
		v6 := netip.MustParseAddr("fd00::").As16()
		copy(v6[12:], v4[:])
		return [][]byte{v4[:], v6[:]}
	}
	give(TypeWorkload, 20000, 150, func(i int) (string, proto.Message) {
		ns := fmt.Sprintf("team-%03d", i%400)
		w := &meshv1.Workload{Uid: fmt.Sprintf("%08x-3f1e-4a55-9f43-%012x", i*7919, i), Namespace: ns, Name: fmt.Sprintf("checkout-%05d-7d9f8b6c5d-%05x", i/4, i),
			Node: fmt.Sprintf("node-%04d", 1+i/100), Addresses: addresses(i), SpiffeId: "spiffe://cluster.local/ns/" + ns + "/sa/" + fmt.Sprintf("checkout-%05d", i/4), Mtls: true}
		return w.Uid, w
	})
	give(TypeService, 5000, 600, func(i int) (string, proto.Message) {
		s := &meshv1.Service{Namespace: fmt.Sprintf("team-%03d", i%400), Name: fmt.Sprintf("checkout-%05d", i), Addresses: addresses(i), Ports: []*meshv1.ServicePort{{Port: 80, Class: meshv1.Class_CLASS_HTTP}}}
		return s.Namespace + "/" + s.Name, s
	})
	runtime.KeepAlive(u)
}

// TestWorkloadIsKept: what the agent acts on is there, and comes back from the last known state under its version; what cannot be an
// address is left out.
func TestWorkloadIsKept(t *testing.T) {
	upstream := func() *Upstream {
		return NewUpstream(UpstreamConfig{Cache: NewCache(Config{Want: func(Key, bool) {}}), Log: slog.New(slog.DiscardHandler)})
	}
	v6 := netip.MustParseAddr("fd00::7")
	give := &discovery.DeltaDiscoveryResponse{TypeUrl: TypeWorkload}
	for name, m := range map[string]*meshv1.Workload{
		"in":    {Uid: "in", Name: "in", Mtls: true, Addresses: [][]byte{{10, 1, 0, 7}, v6.AsSlice(), {1, 2}, nil, netip.MustParseAddr("::ffff:10.1.0.8").AsSlice()}},
		"plain": {Uid: "plain", Addresses: [][]byte{{10, 1, 0, 9}}},
		"bare":  {Uid: "bare", Mtls: true},
		"gone":  {Uid: "gone", Mtls: true, Addresses: [][]byte{{10, 1, 0, 10}}},
	} {
		body, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		give.Resources = append(give.Resources, &discovery.Resource{Name: name, Version: "v-" + name, Resource: body})
	}
	first := upstream()
	if err := first.index(give); err != nil {
		t.Fatal(err)
	}
	if err := first.index(&discovery.DeltaDiscoveryResponse{TypeUrl: TypeWorkload, RemovedResources: []string{"gone"}}); err != nil {
		t.Fatal(err)
	}
	state, err := first.Index()
	if err != nil {
		t.Fatal(err)
	}
	second := upstream()
	second.Restore(state)
	want := []netip.Addr{netip.MustParseAddr("10.1.0.7"), netip.MustParseAddr("10.1.0.8"), v6}
	for name, u := range map[string]*Upstream{"as it came": first, "restored": second} {
		if got := u.Captured(); !slices.Equal(got, want) {
			t.Errorf("%s: captured are %v, want %v", name, got, want)
		}
		var versions map[string]string
		for _, r := range u.opening() {
			if r.TypeUrl == TypeWorkload {
				versions = r.InitialResourceVersions
			}
		}
		if want := map[string]string{"in": "v-in", "plain": "v-plain", "bare": "v-bare"}; !maps.Equal(versions, want) {
			t.Errorf("%s: the next stream says it has %v, want %v", name, versions, want)
		}
	}
	if !second.Restored() {
		t.Error("the restored index does not count")
	}
}

// TestCompactForms: whatever a name or a version is, it comes back.
func TestCompactForms(t *testing.T) {
	for name, size := range map[string]int{
		"0b6c5f0e-3f1e-4a55-9f43-51b1a9c9d3a1": 17, "": 0, "a": 1, "static-pod": 10,
		"0B6C5F0E-3F1E-4A55-9F43-51B1A9C9D3A1": 36, "0b6c5f0e3f1e4a559f4351b1a9c9d3a1": 32, "0b6c5f0e3f-1e-4a55-9f43-51b1a9c9d3a1": 36,
		"0b6c5f0e-3f1e-4a55-9f43-51b1a9c9d3a1-": 37, "seventeen bytes!!": 17,
	} {
		if got := compactUID(name); got.name() != name || len(got) != size {
			t.Errorf("%q became %q of %d bytes, want %d", name, got.name(), len(got), size)
		}
	}
	for _, version := range []string{"0123456789abcdef", "0123456789ABCDEF", "0123456789abcde", "", "instead", strings.Repeat("v", 300)} {
		w := compact(&meshv1.Workload{Mtls: true, Addresses: [][]byte{{10, 0, 0, 1}}}, version)
		if got, _ := w.parts(); got != version || !w.mtls() || len(w.message().Addresses) != 1 {
			t.Errorf("version %q became %q with %v", version, got, w.message())
		}
	}
}
