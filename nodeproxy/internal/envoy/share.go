package envoy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The supervisor's duplicates of Envoy's listening sockets end with the supervisor, and Envoy does too. So the agent, in another
// container, holds duplicates as well: connections queue until the supervisor is back and its Envoy listens.

const (
	// listenersSocket, in a generation's folder, gives the agent duplicates: messages "+<inode>" with a descriptor, "-<inode>", and
	// "." when the supervisor ends by itself.
	listenersSocket = "listeners.sock"
	// supervisorBack is how long a supervisor may take to be back until what its Envoy listened on is closed: connections would
	// wait for nobody.
	supervisorBack = 30 * time.Second
)

// share gives every reader of a socket what is kept, as it comes and goes, until ctx ends.
func (l *keptListeners) share(ctx context.Context, at *net.UnixListener) {
	context.AfterFunc(ctx, func() { _ = at.Close() })
	for {
		c, err := at.AcceptUnix()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_ = l.tell(ctx, c) // it comes again
		}()
	}
}

func (l *keptListeners) tell(ctx context.Context, c *net.UnixConn) error {
	told := map[uint64]bool{}
	for {
		added, gone, changed, err := l.news(told)
		for _, d := range added {
			if err == nil {
				_, _, err = c.WriteMsgUnix(strconv.AppendUint([]byte("+"), d.inode, 10), unix.UnixRights(d.fd), nil)
				told[d.inode] = true
			}
			_ = unix.Close(d.fd)
		}
		for _, inode := range gone {
			if err == nil {
				_, err = c.Write(strconv.AppendUint([]byte("-"), inode, 10))
				delete(told, inode)
			}
		}
		if err != nil {
			return fmt.Errorf("give listeners to the agent: %w", err)
		}
		select {
		case <-ctx.Done():
			_, err := c.Write([]byte("."))
			return err
		case <-changed:
		}
	}
}

// news are descriptors, the caller's, of what a reader has not been told, and what is no more of what it was told.
func (l *keptListeners) news(told map[uint64]bool) (added []duplicate, gone []uint64, changed <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	now := map[uint64]bool{}
	for _, d := range l.kept {
		if now[d.inode] = true; !told[d.inode] && err == nil {
			if d.fd, err = unix.FcntlInt(uintptr(d.fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
				added = append(added, d)
			}
		}
	}
	for inode := range told {
		if !now[inode] {
			gone = append(gone, inode)
		}
	}
	return added, gone, l.changed, err
}

// KeepListeners holds duplicates of what a generation of Envoy listens on in pods, as long as its supervisor says, and until
// another one's Envoy listens there if that ends. It ends with ctx, and lets go of all.
func KeepListeners(ctx context.Context, runDir string, generation uint32) {
	var l keptListeners
	var session atomic.Int64
	defer l.close(func(duplicate) bool { return true })
	go func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-tick.C:
				l.expire(int(session.Load()), now, supervisorBack)
			}
		}
	}()
	for ctx.Err() == nil {
		session.Add(1)
		_ = l.hear(ctx, filepath.Join(folderOf(runDir, generation), listenersSocket), int(session.Load())) // there may be none
		session.Add(1)                                                                                     // nobody's
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// hear keeps what a supervisor tells of, until it ends.
func (l *keptListeners) hear(ctx context.Context, socket string, session int) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unixpacket", socket)
	if err != nil {
		return fmt.Errorf("ask for listeners: %w", err)
	}
	c := conn.(*net.UnixConn)
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	payload, control := make([]byte, 32), make([]byte, unix.CmsgSpace(4))
	for {
		n, oob, _, _, err := c.ReadMsgUnix(payload, control)
		if err != nil || n == 0 {
			return fmt.Errorf("hear of listeners: %w", errors.Join(err, ctx.Err()))
		}
		if payload[0] == '.' {
			l.close(func(d duplicate) bool { return d.envoy == session })
			continue
		}
		inode, err := strconv.ParseUint(string(payload[1:n]), 10, 64)
		if err != nil {
			return fmt.Errorf("hear of listeners: %w", err)
		}
		if payload[0] == '-' {
			l.close(func(d duplicate) bool { return d.inode == inode })
			continue
		}
		fd, err := descriptor(control[:oob])
		if err != nil {
			return fmt.Errorf("hear of listeners: %w", err)
		}
		d, err := describe(fd)
		d.envoy, d.since = session, time.Now()
		if err != nil || !l.add(d) {
			_ = unix.Close(fd)
			continue
		}
		l.replace(d, time.Now())
	}
}
