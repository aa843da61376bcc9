package svid

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
)

// Account is a service account that a pod runs as.
type Account struct{ Namespace, Name string }

// StoreConfig of a Store.
type StoreConfig struct {
	// Conn is the connection to the controller; it may wait.
	Conn func(ctx context.Context) (grpc.ClientConnInterface, error)
	// Give hands a new or renewed SVID on; Drop takes one back that no pod uses any more.
	Give func(*SVID) error
	Drop func(id string)
	Log  *slog.Logger
}

// Store keeps one SVID for each account that has an enrolled pod here.
type Store struct {
	config StoreConfig
	// giving is held while an SVID is handed on or taken back, so that none is handed on after its last pod has left. It is
	// taken before mu.
	giving sync.Mutex

	mu       sync.Mutex
	accounts map[Account]*account
}

type account struct {
	users  map[string]bool // pod uids
	svid   *SVID
	cancel context.CancelFunc
	// ready is closed when there is an SVID; err is why there is none yet.
	ready chan struct{}
	err   error
}

// NewStore makes an empty Store.
func NewStore(c StoreConfig) *Store { return &Store{config: c, accounts: map[Account]*account{}} }

// Use makes sure that an account has an SVID for as long as a pod uses it, and waits for it.
func (s *Store) Use(ctx context.Context, a Account, podUID string) (*SVID, error) {
	s.mu.Lock()
	known := s.accounts[a]
	if known == nil {
		life, cancel := context.WithCancel(context.Background())
		known = &account{users: map[string]bool{}, cancel: cancel, ready: make(chan struct{})}
		s.accounts[a] = known
		go s.keep(life, a, known, podUID)
	}
	known.users[podUID] = true
	s.mu.Unlock()
	select {
	case <-known.ready:
		s.mu.Lock()
		defer s.mu.Unlock()
		return known.svid, nil
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		if known.err != nil {
			return nil, fmt.Errorf("get an SVID for %s/%s: %w", a.Namespace, a.Name, known.err)
		}
		return nil, fmt.Errorf("get an SVID for %s/%s: %w", a.Namespace, a.Name, ctx.Err())
	}
}

// Coming tells whether an identity is that of an account that a pod uses and that has no SVID yet.
func (s *Store) Coming(id string) bool {
	_, namespace, name, err := names.ParseSPIFFEID(id)
	if err != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.accounts[Account{namespace, name}]
	return known != nil && known.svid == nil
}

// Leave says that a pod no longer uses its account.
func (s *Store) Leave(a Account, podUID string) {
	s.giving.Lock()
	defer s.giving.Unlock()
	s.mu.Lock()
	known := s.accounts[a]
	if known == nil {
		s.mu.Unlock()
		return
	}
	delete(known.users, podUID)
	last := len(known.users) == 0
	var id string
	if last {
		known.cancel()
		delete(s.accounts, a)
		if known.svid != nil {
			id = known.svid.ID
		}
	}
	s.mu.Unlock()
	if id != "" {
		s.config.Drop(id)
	}
}

// keep gets an SVID and renews it at half of its life.
func (s *Store) keep(ctx context.Context, a Account, k *account, podUID string) {
	wait := 100 * time.Millisecond
	for {
		svid, err := s.sign(ctx, a, podUID)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = s.give(a, k, svid)
		}
		s.mu.Lock()
		k.err = err
		for uid := range k.users { // the pod that came first may be gone by now
			podUID = uid
			break
		}
		s.mu.Unlock()
		next := time.Now().Add(wait)
		if err == nil {
			next, wait = svid.renewAt(), 100*time.Millisecond
		} else {
			s.config.Log.Warn("no SVID yet, trying again", "namespace", a.Namespace, "account", a.Name, "error", err)
			wait = min(2*wait, 10*time.Second)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Until(next)):
		}
	}
}

// give hands an SVID on, unless the account's last pod has left.
func (s *Store) give(a Account, k *account, svid *SVID) error {
	s.giving.Lock()
	defer s.giving.Unlock()
	s.mu.Lock()
	used := s.accounts[a] == k
	s.mu.Unlock()
	if !used {
		return nil
	}
	if err := s.config.Give(svid); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.svid == nil {
		close(k.ready)
	}
	k.svid = svid
	return nil
}

func (s *Store) sign(ctx context.Context, a Account, podUID string) (*SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := s.config.Conn(ctx)
	if err != nil {
		return nil, err
	}
	key, csr, err := newRequest()
	if err != nil {
		return nil, err
	}
	c, err := meshv1.NewIdentityClient(conn).Sign(ctx, &meshv1.SignRequest{Namespace: a.Namespace, ServiceAccount: a.Name, PodUid: podUID, Csr: csr})
	if err != nil {
		return nil, err
	}
	return received(c, key)
}
