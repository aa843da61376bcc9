package kube

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Meeting is one connection or one request that a callee's Envoy took, as its access log has it.
type Meeting struct {
	// At is when it began.
	At time.Time
	// Request: HTTP was parsed, and Path is the request's.
	Request bool
	Path    string
	Caller  netip.Addr
	Callee  netip.AddrPort
	// Peer is the SPIFFE ID of the caller's certificate, Local that of the callee's; both empty without mesh TLS.
	Peer, Local string
}

// Secure tells whether the caller showed a certificate.
func (m Meeting) Secure() bool { return m.Peer != "" }

// AccessLogs follow what all nodes' Envoys log about callees: a node keeps only the newest part.
type AccessLogs struct {
	// Stop ends following.
	Stop func()

	mu    sync.Mutex
	heard []Meeting
}

// FollowAccessLogs follows the logs of weft's node pods in a namespace until ctx ends or Stop.
func (c *Cluster) FollowAccessLogs(ctx context.Context, namespace string) (*AccessLogs, error) {
	a := &AccessLogs{}
	stop, err := c.FollowEnvoys(ctx, namespace, func(_ string, line []byte) {
		if m, ok := meeting(line); ok {
			a.mu.Lock()
			a.heard = append(a.heard, m)
			a.mu.Unlock()
		}
	})
	a.Stop = stop
	return a, err
}

// FollowEnvoys hands each line that the Envoys of weft's node pods in a namespace log from now on to hear, with the node's
// name, until ctx ends or stop.
func (c *Cluster) FollowEnvoys(ctx context.Context, namespace string, hear func(node string, line []byte)) (stop func(), err error) {
	pods, err := c.Pods(ctx, namespace, "app=weft-nodeproxy")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	for _, p := range pods {
		done.Go(func() {
			c.followLog(ctx, namespace, p.Name, "envoy", func(line []byte) { hear(p.Node, line) })
		})
	}
	return func() { cancel(); done.Wait() }, nil
}

// followLog hears each line that a pod's container logs from now on. kubelet ends what follows a log now and then, with the
// container running: it goes on from the last second before, whose lines are heard twice, until the pod is gone. container "": the pod's only one.
func (c *Cluster) followLog(ctx context.Context, namespace, pod, container string, hear func(line []byte)) {
	from, choose := "--tail=1", []string{}
	if container != "" {
		choose = []string{"-c", container}
	}
	for ctx.Err() == nil {
		cmd := c.Command(ctx, append([]string{"logs", "-n", namespace, "-f", from, pod}, choose...)...)
		var complaint strings.Builder
		cmd.Stderr = &complaint
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err == nil {
			lines := bufio.NewScanner(out)
			lines.Buffer(make([]byte, 1<<20), 4<<20)
			for lines.Scan() {
				hear(lines.Bytes())
			}
			err = errors.Join(lines.Err(), cmd.Wait())
		}
		if ctx.Err() != nil || strings.Contains(complaint.String(), "(NotFound)") {
			return
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "the log of %s/%s ended, following it again: %v %s\n", namespace, pod, err, complaint.String())
		}
		from = "--since-time=" + time.Now().Add(-time.Second).UTC().Format(time.RFC3339Nano)
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Heard returns all meetings so far. Envoy writes its log once a second, and a connection's line when it has ended.
func (a *AccessLogs) Heard() []Meeting {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.heard)
}

// meeting reads one line; false: it is about no callee.
func meeting(line []byte) (Meeting, bool) {
	var l struct{ Kind, Direction, Time, Path, Remote, Destination, Peer, Local string }
	if json.Unmarshal(line, &l) != nil || l.Direction != "in" {
		return Meeting{}, false
	}
	at, err1 := time.Parse(time.RFC3339Nano, l.Time)
	caller, err2 := netip.ParseAddrPort(l.Remote)
	callee, err3 := netip.ParseAddrPort(l.Destination)
	if err1 != nil || err2 != nil || err3 != nil {
		return Meeting{}, false
	}
	m := Meeting{At: at, Request: l.Kind == "request", Path: l.Path, Caller: caller.Addr().Unmap(), Callee: netip.AddrPortFrom(callee.Addr().Unmap(), callee.Port())}
	if l.Peer != "-" {
		m.Peer, m.Local = l.Peer, l.Local
	}
	return m, true
}
