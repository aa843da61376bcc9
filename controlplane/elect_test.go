package main

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
)

func candidate(clients *fake.Clientset, name string) *election {
	return &election{clients: clients, namespace: "weft-system", identity: name, log: slog.New(slog.DiscardHandler)}
}

// holder of the Lease; empty: nobody.
func holder(t *testing.T, clients *fake.Clientset) string {
	t.Helper()
	lease, err := clients.CoordinationV1().Leases("weft-system").Get(context.Background(), leaseName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if lease.Spec.HolderIdentity == nil {
		return ""
	}
	return *lease.Spec.HolderIdentity
}

// start runs an election until cancel; what lead did comes on ended.
func start(e *election, lead func(context.Context) error) (cancel context.CancelFunc, ended <-chan error) {
	ctx, cancel := context.WithCancel(context.Background())
	out := make(chan error, 1)
	go func() { out <- e.run(ctx, lead) }()
	return cancel, out
}

// TestLeaseIsHeldUntilTheLeaderHasEnded, however long that takes.
func TestLeaseIsHeldUntilTheLeaderHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients := fake.NewClientset()
		told, finish := make(chan struct{}), make(chan struct{})
		cancel, ended := start(candidate(clients, "one"), func(ctx context.Context) error {
			<-ctx.Done()
			close(told)
			<-finish
			return errors.New("the last write failed")
		})
		synctest.Wait()
		if got := holder(t, clients); got != "one" {
			t.Fatalf("the Lease is %q's", got)
		}
		next := make(chan struct{})
		stop, _ := start(candidate(clients, "two"), func(ctx context.Context) error { close(next); <-ctx.Done(); return nil })
		defer stop()
		cancel()
		<-told
		time.Sleep(10 * leaseLife) // synctest's
		select {
		case <-next:
			t.Error("the next leader began before this one had ended")
		case <-ended:
			t.Error("the election ended before its leader")
		default:
		}
		close(finish)
		if err := <-ended; err == nil || err.Error() != "the last write failed" {
			t.Errorf("the leader's error is lost: %v", err)
		}
		<-next
		stop()
		synctest.Wait()
		time.Sleep(renewEvery)
	})
}

func TestLeaderThatFailsEndsTheElection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients := fake.NewClientset()
		broken := errors.New("the port is taken")
		_, ended := start(candidate(clients, "one"), func(context.Context) error { return broken })
		if err := <-ended; !errors.Is(err, broken) {
			t.Errorf("ended with %v", err)
		}
		if got := holder(t, clients); got != "" {
			t.Errorf("the Lease stays %q's", got)
		}
	})
}

func TestCandidateLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients := fake.NewClientset()
		stop, _ := start(candidate(clients, "one"), func(ctx context.Context) error { <-ctx.Done(); return nil })
		synctest.Wait()
		cancel, ended := start(candidate(clients, "two"), func(context.Context) error { t.Error("two leads"); return nil })
		time.Sleep(leaseLife)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if got := holder(t, clients); got != "one" {
			t.Errorf("the Lease is %q's", got)
		}
		stop()
		time.Sleep(renewEvery)
	})
}

// TestLostLeaseIsNotTakenBack: a leader that cannot renew ends before another may begin, and leaves the Lease to it.
func TestLostLeaseIsNotTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients := fake.NewClientset()
		began := make(chan struct{})
		var away atomic.Bool
		clients.PrependReactor("update", "leases", func(k8stesting.Action) (bool, runtime.Object, error) {
			return away.Load(), nil, errors.New("the API server is away")
		})
		var renewed, toldAt time.Time
		_, ended := start(candidate(clients, "one"), func(ctx context.Context) error {
			close(began)
			<-ctx.Done()
			toldAt = time.Now()
			// Meanwhile somebody else has taken it.
			other, now, life := "two", metav1.NowMicro(), int32(60)
			return clients.Tracker().Update(coordinationv1.SchemeGroupVersion.WithResource("leases"), &coordinationv1.Lease{
				ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: leaseName},
				Spec:       coordinationv1.LeaseSpec{HolderIdentity: &other, RenewTime: &now, AcquireTime: &now, LeaseDurationSeconds: &life},
			}, "weft-system")
		})
		<-began
		renewed = time.Now()
		away.Store(true)
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if late := toldAt.Sub(renewed); late >= leaseLife {
			t.Errorf("the leader heard of it after %s, when another may lead already", late)
		}
		if got := holder(t, clients); got != "two" {
			t.Errorf("the Lease is %q's, want the new leader's", got)
		}
	})
}

func TestPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients := fake.NewClientset()
		one := newElection(clients, "weft-system", identity{"one", "10.0.0.1", "x"}, slog.New(slog.DiscardHandler))
		two := newElection(clients, "weft-system", identity{"two", "fd00::2", "y"}, slog.New(slog.DiscardHandler))
		var away atomic.Bool
		refuse := func(k8stesting.Action) (bool, runtime.Object, error) {
			return away.Load(), nil, errors.New("the API server is away")
		}
		clients.PrependReactor("get", "leases", refuse)
		clients.PrependReactor("update", "leases", refuse)
		stopOne, _ := start(one, func(ctx context.Context) error { <-ctx.Done(); return nil })
		synctest.Wait()
		stopTwo, _ := start(two, func(ctx context.Context) error { <-ctx.Done(); return nil })
		time.Sleep(2 * renewEvery)
		if p := one.presence(); !p.Self {
			t.Errorf("the leader: %+v", p)
		}
		if p := two.presence(); p.Self || p.Address != "10.0.0.1" {
			t.Errorf("the other: %+v", p)
		}
		away.Store(true)
		time.Sleep(2 * leaseLife)
		for _, e := range []*election{one, two} {
			if p := e.presence(); p.Self || p.Address != "" {
				t.Errorf("while the API server is away: %+v", p)
			}
		}
		away.Store(false)
		time.Sleep(2 * leaseLife)
		if p := two.presence(); !p.Self && p.Address == "" {
			t.Errorf("when it is back: %+v", p)
		}
		stopOne()
		stopTwo()
		time.Sleep(2 * leaseLife)
	})
	if got := addressOf("hostname"); got != "" {
		t.Errorf("an earlier version's holder is at %q", got)
	}
}

// TestWhoKnowsNothingLetsOthersLead, as long as there may be some.
func TestWhoKnowsNothingLetsOthersLead(t *testing.T) {
	waits := func(t *testing.T, clients *fake.Clientset, knows func() bool) time.Duration {
		t.Helper()
		began := time.Now()
		candidate(clients, "new").await(t.Context(), knows)
		return time.Since(began)
	}
	never := func() bool { return false }
	lease := func(holder string, renewed time.Time) *coordinationv1.Lease {
		at, life := metav1.NewMicroTime(renewed), int32(6)
		return &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: leaseName},
			Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder, RenewTime: &at, AcquireTime: &at, LeaseDurationSeconds: &life}}
	}
	synctest.Test(t, func(t *testing.T) {
		if took := waits(t, fake.NewClientset(), never); took != 0 {
			t.Errorf("nobody has ever led: %s", took)
		}
		if took := waits(t, fake.NewClientset(lease("", time.Now().Add(-time.Minute))), never); took != 0 {
			t.Errorf("the Lease was given up long ago: %s", took)
		}
		if took := waits(t, fake.NewClientset(lease("", time.Now())), never); took < vacancy {
			t.Errorf("the Lease was given up now: %s", took)
		}
		if took := waits(t, fake.NewClientset(lease("one_10.0.0.1_x", time.Now())), never); took < leaseLife+vacancy {
			t.Errorf("the leader died now: %s", took)
		}
		if took := waits(t, fake.NewClientset(lease("one_10.0.0.1_x", time.Now())), func() bool { return true }); took != 0 {
			t.Errorf("it knows the orders: %s", took)
		}
	})
}
