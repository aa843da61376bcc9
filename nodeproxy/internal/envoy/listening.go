package envoy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// keptListeners holds duplicates of the sockets that Envoy listens on. When Envoy dies they go on listening: connections queue instead
// of being refused. The next Envoy listens beside them (SO_REUSEPORT), and when they are closed then, the kernel moves what has
// queued to it (net.ipv4.tcp_migrate_req, since Linux 5.14, which pods in the mesh have set).
type keptListeners struct {
	// own is the container's network namespace.
	own  uint64
	mu   sync.Mutex
	kept []duplicate
	// changed, unless nil, is closed when they change.
	changed chan struct{}
}

// duplicate is one socket.
type duplicate struct {
	fd    int
	inode uint64
	at    place
	// envoy is the process that listens on it, number its descriptor there; at the agent, who told of it.
	envoy  int
	number string
	since  time.Time
	// orphaned is when that process was first seen to be gone.
	orphaned time.Time
}

// place is where a socket listens.
type place struct {
	netns uint64 // SO_NETNS_COOKIE
	port  uint16
}

const (
	// listeningPoll is how soon a socket that Envoy has closed is closed here: it would keep a dead pod's network namespace.
	listeningPoll = 200 * time.Millisecond
	// moveAfter is how soon the next Envoy's socket is looked at that is about to listen.
	moveAfter = 20 * time.Millisecond
	// forgetAfter is how long Envoy may take to listen where the one before did.
	forgetAfter = 15 * time.Second
	// mostListeners bounds what is kept.
	mostListeners = 16384
)

// take keeps the sockets that brokers send until they and the supervisor have closed the other end. current is Envoy's process.
func (l *keptListeners) take(socket *os.File, current func() int) {
	for {
		number, fd, err := receiveFD(int(socket.Fd()))
		if errors.Is(err, errNoFD) {
			continue
		}
		if err != nil {
			return
		}
		d, err := describe(fd)
		d.envoy, d.number, d.since = current(), number, time.Now()
		if err != nil || !l.add(d) {
			_ = unix.Close(fd)
			continue
		}
		l.replace(d, time.Now())
	}
}

// add keeps a socket; false: it is no pod's, or kept already, or there are too many.
func (l *keptListeners) add(d duplicate) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	again := func(k duplicate) bool { return k.envoy == d.envoy && k.inode == d.inode }
	if d.at.netns == l.own || len(l.kept) >= mostListeners || slices.ContainsFunc(l.kept, again) {
		return false
	}
	l.kept = append(l.kept, d)
	l.notify()
	return true
}

// notify is called with the lock held.
func (l *keptListeners) notify() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// replace closes what Envoys before listened on at the same place, as soon as a new socket does.
func (l *keptListeners) replace(d duplicate, began time.Time) {
	time.AfterFunc(moveAfter, func() {
		l.mu.Lock()
		kept := slices.ContainsFunc(l.kept, func(k duplicate) bool { return k.fd == d.fd && k.inode == d.inode })
		listens := false
		if kept { // else the descriptor may be another's by now
			n, err := unix.GetsockoptInt(d.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
			listens = err == nil && n == 1
		}
		l.mu.Unlock()
		switch {
		case listens:
			l.close(func(old duplicate) bool { return old.at == d.at && old.envoy != d.envoy })
		case kept && time.Since(began) < forgetAfter:
			l.replace(d, began)
		}
	})
}

// ownNetns is the cookie of the calling thread's network namespace.
func ownNetns() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("make a socket: %w", err)
	}
	defer unix.Close(fd)
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}

func describe(fd int) (duplicate, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return duplicate{}, fmt.Errorf("look at a socket: %w", err)
	}
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return duplicate{}, fmt.Errorf("ask for a socket's network namespace: %w", err)
	}
	d := duplicate{fd: fd, inode: stat.Ino, at: place{netns: cookie}}
	if _, err := unix.Getpeername(fd); !errors.Is(err, unix.ENOTCONN) {
		return d, errors.New("a socket is connected")
	}
	address, err := unix.Getsockname(fd)
	switch a := address.(type) {
	case *unix.SockaddrInet4:
		d.at.port = uint16(a.Port)
	case *unix.SockaddrInet6:
		d.at.port = uint16(a.Port)
	default:
		return d, errors.Join(errors.New("a socket has no port"), err)
	}
	return d, nil
}

// tend closes what need not be kept, until ctx ends; then all of it. envoy is the process that runs, 0: none.
func (l *keptListeners) tend(ctx context.Context, envoy func() int) {
	tick := time.NewTicker(listeningPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			l.close(func(duplicate) bool { return true })
			return
		case <-tick.C:
			l.tidy(envoy(), time.Now())
		}
	}
}

// tidy closes what Envoy has closed, and what the next one does not come back to.
func (l *keptListeners) tidy(pid int, now time.Time) {
	var all map[uint64]bool // read if a descriptor is not what it was: Envoy may have duplicated it
	l.mu.Lock()
	kept := slices.Clone(l.kept)
	l.mu.Unlock()
	gone := map[uint64]bool{}
	for _, d := range kept {
		if d.envoy != pid || now.Sub(d.since) < listeningPoll || socketOf(pid, d.number) == d.inode {
			continue
		}
		if all == nil {
			if all = sockets(pid); len(all) == 0 {
				return // Envoy is about to end: this is when they are needed
			}
		}
		gone[d.inode] = !all[d.inode]
	}
	l.close(func(d duplicate) bool { return d.envoy == pid && gone[d.inode] })
	l.expire(pid, now, forgetAfter)
}

// expire closes what others than the current one listened on, if nobody has come back to it within a limit.
func (l *keptListeners) expire(current int, now time.Time, limit time.Duration) {
	l.mu.Lock()
	for i, d := range l.kept {
		if d.envoy != current && d.orphaned.IsZero() {
			l.kept[i].orphaned = now
		}
	}
	l.mu.Unlock()
	l.close(func(d duplicate) bool {
		return d.envoy != current && !d.orphaned.IsZero() && now.Sub(d.orphaned) > limit
	})
}

func (l *keptListeners) close(which func(duplicate) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept = slices.DeleteFunc(l.kept, func(d duplicate) bool {
		if !which(d) {
			return false
		}
		_ = unix.Close(d.fd)
		l.notify()
		return true
	})
}

// sockets are the inodes of those that a process has open.
func sockets(pid int) map[uint64]bool {
	open := map[uint64]bool{}
	files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	for _, f := range files {
		open[socketOf(pid, f.Name())] = true
	}
	return open
}

// socketOf is the inode of the socket that a process has under a number; 0: none.
func socketOf(pid int, number string) uint64 {
	to, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "fd", number))
	if err != nil {
		return 0
	}
	inode, _ := strings.CutPrefix(to, "socket:[")
	n, err := strconv.ParseUint(strings.TrimSuffix(inode, "]"), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
