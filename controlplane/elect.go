package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

const leaseName = "weft-controlplane"

// Times of the Lease. A leader that cannot renew it has leaseLife - renewLimit to end before another may begin.
const (
	leaseLife    = 6 * time.Second
	renewLimit   = 4 * time.Second
	renewEvery   = time.Second
	releaseLimit = 2 * time.Second
)

// election is for the Lease of weft's leader.
type election struct {
	clients             kubernetes.Interface
	namespace, identity string
	log                 *slog.Logger
}

// run runs lead while this process holds the Lease, ends when lead does or when it loses the Lease, and returns what lead
// did. The Lease is given up only after lead has ended: until then it may write.
func (e election) run(ctx context.Context, lead func(context.Context) error) error {
	lock := &resourcelock.LeaseLock{
		LeaseMeta: metav1.ObjectMeta{Namespace: e.namespace, Name: leaseName}, Client: e.clients.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: e.identity},
	}
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
				ended <- lead(leading)
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
func (e election) release(ctx context.Context, lock *resourcelock.LeaseLock) {
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
