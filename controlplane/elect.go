package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/weftmesh/weft/controlplane/internal/replica"
)

const leaseName = "weft-controlplane"

// Times of the Lease. A leader that cannot renew it has leaseLife - renewLimit to end before another may begin.
const (
	leaseLife    = 6 * time.Second
	renewLimit   = 4 * time.Second
	renewEvery   = time.Second
	releaseLimit = 2 * time.Second
)

// identity of a candidate, as the Lease names its holder: "<pod>_<address>_<process>".
type identity struct{ pod, address, process string }

func (i identity) String() string { return i.pod + "_" + i.address + "_" + i.process }

// addressOf is the address in a holder's name.
func addressOf(holder string) string {
	if parts := strings.Split(holder, "_"); len(parts) == 3 {
		return parts[1]
	}
	return ""
}

// election is for the Lease of weft's leader.
type election struct {
	clients   kubernetes.Interface
	namespace string
	identity  string
	log       *slog.Logger

	mu sync.Mutex
	// record is what the Lease said last, changed when it was first seen so, read when it was read last.
	record        resourcelock.LeaderElectionRecord
	changed, read time.Time
	leads         bool
}

func newElection(clients kubernetes.Interface, namespace string, self identity, log *slog.Logger) *election {
	return &election{clients: clients, namespace: namespace, identity: self.String(), log: log}
}

// watched is a Lease whose readings are noted.
type watched struct {
	*resourcelock.LeaseLock
	note func(*resourcelock.LeaderElectionRecord)
}

func (w *watched) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	record, raw, err := w.LeaseLock.Get(ctx)
	if err == nil {
		w.note(record)
	}
	return record, raw, err
}

func (e *election) note(record *resourcelock.LeaderElectionRecord) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.read = time.Now()
	if e.record.HolderIdentity != record.HolderIdentity || !e.record.RenewTime.Equal(&record.RenewTime) {
		e.record, e.changed = *record, e.read
	}
}

// presence tells who leads, as far as can be known: while the API server is away, or nobody renews the Lease, nobody does.
func (e *election) presence() replica.Presence {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.leads {
		return replica.Presence{Self: true}
	}
	if time.Since(e.read) > leaseLife || time.Since(e.changed) > leaseLife || e.record.HolderIdentity == e.identity {
		return replica.Presence{}
	}
	return replica.Presence{Address: addressOf(e.record.HolderIdentity)}
}

// vacancy is how long a replica that was told no leader's orders lets the others try first: they know more.
const vacancy = 4 * time.Second

// await waits until this replica may stand: it knows a leader's orders, or nobody has led for a while. A leader that knows
// nothing begins with what the pods' conditions say, which may be older than what agents were told.
func (e *election) await(ctx context.Context, knows func() bool) {
	lock := e.lock()
	vacant := time.Now()
	for !knows() {
		record, _, err := lock.Get(ctx)
		switch {
		case apierrors.IsNotFound(err):
			return // nobody has ever led
		case err == nil && record.HolderIdentity == "" && time.Since(record.RenewTime.Time) > leaseLife+vacancy:
			return // it was given up long ago
		case err != nil || e.presence().Address != "":
			vacant = time.Now()
		case time.Since(vacant) > vacancy:
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(renewEvery / 2):
		}
	}
}

func (e *election) lock() *watched {
	return &watched{note: e.note, LeaseLock: &resourcelock.LeaseLock{
		LeaseMeta: metav1.ObjectMeta{Namespace: e.namespace, Name: leaseName}, Client: e.clients.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: e.identity},
	}}
}

func (e *election) setLeads(leads bool) {
	e.mu.Lock()
	e.leads = leads
	e.mu.Unlock()
}

// run runs lead while this process holds the Lease, ends when lead does or when it loses the Lease, and returns what lead
// did. The Lease is given up only after lead has ended: until then it may write.
func (e *election) run(ctx context.Context, lead func(context.Context) error) error {
	lock := e.lock()
	// Renewing goes on after ctx, until lead has ended.
	renewing, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	leads, ended := make(chan struct{}), make(chan error, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: lock, LeaseDuration: leaseLife, RenewDeadline: renewLimit, RetryPeriod: renewEvery, Name: leaseName,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(held context.Context) {
				close(leads)
				leading, cancel := context.WithCancel(held)
				defer cancel()
				defer context.AfterFunc(ctx, cancel)()
				e.setLeads(true)
				err := lead(leading)
				e.setLeads(false)
				ended <- err
				stop()
			},
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return fmt.Errorf("elect a leader: %w", err)
	}
	defer context.AfterFunc(ctx, func() {
		select {
		case <-leads: // it stops when it has ended
		default:
			stop()
		}
	})()
	elector.Run(renewing)
	select {
	case <-leads:
	default:
		if renewing.Err() != nil && !elector.IsLeader() {
			return nil // ctx ended before there was a Lease to hold
		}
	}
	failed := <-ended
	e.release(ctx, lock)
	return failed
}

// release lets the next leader begin at once, if the Lease is still this process's.
func (e *election) release(ctx context.Context, lock *watched) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
	defer cancel()
	record, _, err := lock.Get(ctx)
	if err == nil && record.HolderIdentity != e.identity {
		e.log.Warn("the Lease was lost", "holder", record.HolderIdentity)
		return
	}
	if err == nil {
		now := metav1.Now()
		err = lock.Update(ctx, resourcelock.LeaderElectionRecord{LeaderTransitions: record.LeaderTransitions, LeaseDurationSeconds: 1, AcquireTime: now, RenewTime: now})
	}
	if err != nil {
		e.log.Warn("the Lease is not given up: the next leader waits until it ends", "error", err)
		return
	}
	e.log.Info("the Lease is given up")
}
