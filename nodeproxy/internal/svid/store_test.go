package svid

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

// signer is the controller's side of a Store.
type signer struct {
	grpc.ClientConnInterface
	t    *testing.T
	ca   *authority
	life time.Duration

	mu     sync.Mutex
	refuse error
	// giving, if not nil, is told of each SVID that is handed on, and holds it up.
	giving  chan chan struct{}
	asked   []*meshv1.SignRequest
	given   []*SVID
	dropped []string
}

func newSigner(t *testing.T, life time.Duration) (*signer, *Store) {
	s := &signer{t: t, ca: newAuthority(t), life: life}
	store := NewStore(StoreConfig{
		Conn: func(context.Context) (grpc.ClientConnInterface, error) { return s, nil },
		Give: func(v *SVID) error {
			if s.giving != nil {
				release := make(chan struct{})
				s.giving <- release
				<-release
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.given = append(s.given, v)
			return nil
		},
		Drop: func(id string) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.dropped = append(s.dropped, id)
		},
		Log: slog.New(slog.DiscardHandler),
	})
	t.Cleanup(func() {
		for a, k := range store.accounts {
			for uid := range k.users {
				store.Leave(a, uid)
			}
		}
	})
	return s, store
}

// Invoke is a call of Sign.
func (s *signer) Invoke(_ context.Context, _ string, request, reply any, _ ...grpc.CallOption) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := request.(*meshv1.SignRequest)
	s.asked = append(s.asked, r)
	if s.refuse != nil {
		return s.refuse
	}
	proto.Merge(reply.(proto.Message), s.ca.answer(s.t, r.Csr, "spiffe://cluster.local/ns/"+r.Namespace+"/sa/"+r.ServiceAccount, s.life))
	return nil
}

func (s *signer) counts() (asked, given, dropped int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.asked), len(s.given), len(s.dropped)
}

func (s *signer) until(what string, so func() bool) {
	s.t.Helper()
	for end := time.Now().Add(30 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func TestPodsOfAnAccountShareAnSVID(t *testing.T) {
	s, store := newSigner(t, time.Hour)
	a := Account{"shop", "till"}
	first, err := store.Use(t.Context(), a, "pod-1")
	if err != nil || first.ID != till {
		t.Fatalf("%v %v", first, err)
	}
	second, err := store.Use(t.Context(), a, "pod-2")
	if err != nil || second != first {
		t.Errorf("the second pod got %v %v", second, err)
	}
	store.Leave(a, "pod-1")
	if _, _, dropped := s.counts(); dropped != 0 {
		t.Error("the SVID went while a pod uses it")
	}
	store.Leave(a, "pod-2")
	if asked, given, dropped := s.counts(); asked != 1 || given != 1 || dropped != 1 || s.dropped[0] != till {
		t.Errorf("asked %d times, given %d, dropped %v", asked, given, s.dropped)
	}
	store.Leave(a, "pod-2") // twice is nothing
	if r := s.asked[0]; r.PodUid != "pod-1" || r.Namespace != "shop" || r.ServiceAccount != "till" {
		t.Errorf("asked for %v", r)
	}
}

// TestNoSVIDStaysBehind: its last pod leaves while it is handed on.
func TestNoSVIDStaysBehind(t *testing.T) {
	s, store := newSigner(t, time.Hour)
	s.giving = make(chan chan struct{})
	a := Account{"shop", "till"}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go store.Use(ctx, a, "pod-1") //nolint:errcheck // it leaves meanwhile
	release := <-s.giving
	left := make(chan struct{})
	go func() { defer close(left); store.Leave(a, "pod-1") }()
	select {
	case <-left: // it must not be over before what is under way
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	<-left
	if _, given, dropped := s.counts(); given != 1 || dropped != 1 {
		t.Errorf("handed on %d times, taken back %d times", given, dropped)
	}
	if store.Coming(till) {
		t.Error("an SVID that nobody uses is on its way")
	}
}

func TestRefusalIsTriedAgain(t *testing.T) {
	s, store := newSigner(t, time.Hour)
	s.refuse = errors.New("no such pod")
	a := Account{"shop", "till"}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := store.Use(ctx, a, "pod-1"); err == nil || !strings.Contains(err.Error(), "shop/till: no such pod") {
		t.Errorf("refused: %v", err)
	}
	if !store.Coming(till) {
		t.Error("an SVID that is asked for is not on its way")
	}
	s.mu.Lock()
	s.refuse = nil
	s.mu.Unlock()
	if _, err := store.Use(t.Context(), a, "pod-1"); err != nil {
		t.Error(err)
	}
	for id, want := range map[string]bool{till: false, "spiffe://cluster.local/ns/shop/sa/other": false, "bundle": false} {
		if store.Coming(id) != want {
			t.Errorf("%s on its way: %t", id, !want)
		}
	}
}

// TestRenewal: the new one is there well before the old one ends, for a pod that is there.
func TestRenewal(t *testing.T) {
	s, store := newSigner(t, 8*time.Second)
	a := Account{"shop", "till"}
	first, err := store.Use(t.Context(), a, "pod-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Use(t.Context(), a, "pod-2"); err != nil {
		t.Fatal(err)
	}
	store.Leave(a, "pod-1")
	s.until("a renewal", func() bool { _, given, _ := s.counts(); return given > 1 })
	if !time.Now().Before(first.NotAfter) {
		t.Error("the renewal came after the end of the first one")
	}
	second, err := store.Use(t.Context(), a, "pod-2")
	if err != nil || second == first || !second.NotAfter.After(first.NotAfter.Add(-time.Second)) {
		t.Errorf("after the renewal: %v %v", second, err)
	}
	if first.Key.key.Equal(second.Key.key) {
		t.Error("the renewal has the old key")
	}
}
