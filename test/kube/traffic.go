package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/weftmesh/weft/test/load"
)

// Traffic follows the counters that load pods print.
type Traffic struct {
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu   sync.Mutex
	last map[string]map[string]load.Stats // by pod, by target
}

// Follow follows all pods that match until ctx ends or Stop.
func (c *Cluster) Follow(ctx context.Context, namespace, selector string) (*Traffic, error) {
	pods, err := c.Pods(ctx, namespace, selector)
	if err != nil {
		return nil, err
	}
	if len(pods) == 0 {
		return nil, fmt.Errorf("follow traffic: no pod in %s matches %s", namespace, selector)
	}
	ctx, cancel := context.WithCancel(ctx)
	w := &Traffic{cancel: cancel, last: map[string]map[string]load.Stats{}}
	for _, p := range pods {
		w.done.Go(func() {
			c.followLog(ctx, namespace, p.Name, "", func(line []byte) {
				var s map[string]load.Stats
				if json.Unmarshal(line, &s) != nil {
					return
				}
				w.mu.Lock()
				defer w.mu.Unlock()
				if !load.Sum(s).At.Before(load.Sum(w.last[p.Name]).At) {
					w.last[p.Name] = s
				}
			})
		})
	}
	return w, Until(ctx, 30*time.Second, "counters of the load pods", nil, func(context.Context) (bool, string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.last) == len(pods), fmt.Sprintf("%d/%d pods report", len(w.last), len(pods))
	})
}

// Stop ends following.
func (w *Traffic) Stop() { w.cancel(); w.done.Wait() }

// ByTarget sums the pods' counters for each target.
func (w *Traffic) ByTarget() map[string]load.Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	grouped := map[string]map[string]load.Stats{}
	for pod, targets := range w.last {
		for name, s := range targets {
			if grouped[name] == nil {
				grouped[name] = map[string]load.Stats{}
			}
			grouped[name][pod] = s
		}
	}
	sums := map[string]load.Stats{}
	for name, s := range grouped {
		sums[name] = load.Sum(s)
	}
	return sums
}

// Fresh waits until every pod has printed counters that it read after now, and returns them.
func (w *Traffic) Fresh(ctx context.Context) (map[string]load.Stats, error) {
	now := time.Now()
	err := Until(ctx, 20*time.Second, "fresh counters", nil, func(context.Context) (bool, string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		for pod, targets := range w.last {
			if at := load.Sum(targets).At; at.Before(now) {
				return false, fmt.Sprintf("the last line of %s is of %s", pod, at.Format(time.TimeOnly))
			}
		}
		return true, ""
	})
	return w.ByTarget(), err
}

// ByPod returns each pod's last counters.
func (w *Traffic) ByPod() map[string]map[string]load.Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.last)
}

// Between subtracts counters; errors are those that were not there before.
func Between(from, to load.Stats) load.Stats {
	d := to
	d.Requests -= from.Requests
	d.Failed -= from.Failed
	d.Connections -= from.Connections
	d.Broken -= from.Broken
	d.Closed -= from.Closed
	d.Direct -= from.Direct
	d.Proxied -= from.Proxied
	d.Errors = slices.DeleteFunc(slices.Clone(to.Errors), func(e string) bool { return slices.Contains(from.Errors, e) })
	d.Callees = maps.Clone(to.Callees)
	for k, v := range from.Callees {
		d.Callees[k] = load.View{Direct: d.Callees[k].Direct - v.Direct, Proxied: d.Callees[k].Proxied - v.Proxied}
	}
	d.Versions = maps.Clone(to.Versions)
	for k, v := range from.Versions {
		d.Versions[k] -= v
	}
	d.Statuses = maps.Clone(to.Statuses)
	for k, v := range from.Statuses {
		d.Statuses[k] -= v
	}
	return d
}
