package main

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/peer"
)

// hangUpDelay lets a call's answer out before its connection ends.
const hangUpDelay = 100 * time.Millisecond

// connectionTable ends single connections: an agent stays on its connection as long as it lives, and gets to another replica by
// a new one alone.
type connectionTable struct {
	mu   sync.Mutex
	open map[string]*tracked
}

func newConnectionTable() *connectionTable { return &connectionTable{open: map[string]*tracked{}} }

type tracked struct {
	net.Conn
	table *connectionTable
}

func (c *tracked) Close() error {
	c.table.mu.Lock()
	if key := c.RemoteAddr().String(); c.table.open[key] == c {
		delete(c.table.open, key)
	}
	c.table.mu.Unlock()
	return c.Conn.Close()
}

// listen keeps the connections of a listener in the table.
func (t *connectionTable) listen(l net.Listener) net.Listener { return &trackedListener{l, t} }

type trackedListener struct {
	net.Listener
	table *connectionTable
}

func (l *trackedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tracks := &tracked{c, l.table}
	l.table.mu.Lock()
	l.table.open[c.RemoteAddr().String()] = tracks
	l.table.mu.Unlock()
	return tracks, nil
}

// hangUp ends the connection of a call soon.
func (t *connectionTable) hangUp(ctx context.Context) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return
	}
	t.mu.Lock()
	c := t.open[p.Addr.String()]
	t.mu.Unlock()
	if c != nil {
		time.AfterFunc(hangUpDelay, func() { _ = c.Close() })
	}
}
