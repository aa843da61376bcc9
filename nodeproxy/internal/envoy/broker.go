package envoy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
)

// Envoy has no capability, and yet makes sockets in the network namespaces of pods. Its seccomp filter hands setns(2), socket(2) and
// listen(2) over to the broker (seccomp user notification, seccomp_unotify(2)), a process in Envoy's own cgroup, for a socket's
// cgroup is its maker's. The broker notes which namespace a thread "entered", and gives it the sockets that it makes there. No
// memory of Envoy is read: the namespace is the file that Envoy has open, taken by pidfd_getfd(2).
//
// The supervisor keeps the listener of the notifications, so that Envoy waits when a broker dies; the next one goes on from the
// ledger.

// Descriptors that the supervisor gives a broker.
const (
	brokerNotifications = 3 + iota
	brokerTarget        // pidfd of Envoy
	brokerLedger        // a memfd
	brokerListening     // a socket to the supervisor, for duplicates of what Envoy listens on
)

// Variables of a broker's environment.
const (
	brokerCgroup     = "WEFT_BROKER_CGROUP"     // the cgroup that it joins
	brokerNamespaces = "WEFT_BROKER_NAMESPACES" // the file of the namespaces that it may enter
)

// namespacesFile lies in a generation's folder, and goes with it.
const namespacesFile = "namespaces"

// AllowNamespaces replaces the network namespaces, by their cookies (SO_NETNS_COOKIE), in which the node's Envoys may have sockets
// made. It counts from its return on, for the supervisors that run; they forget it when they end.
func AllowNamespaces(runDir string, cookies []uint64) error {
	var text []byte
	for _, cookie := range slices.Sorted(slices.Values(cookies)) {
		text = fmt.Appendln(text, cookie)
	}
	var failed []error
	for generation := range uint32(names.Generations) {
		err := ReplaceFile(filepath.Join(folderOf(runDir, generation), namespacesFile), text)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // else there is no supervisor
			failed = append(failed, fmt.Errorf("write the namespaces of pods in the mesh: %w", err))
		}
	}
	return errors.Join(failed...)
}

// notification is struct seccomp_notif.
type notification struct {
	ID         uint64
	PID, Flags uint32
	Number     int32
	Arch       uint32
	IP         uint64
	Args       [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	ID    uint64
	Value int64
	Error int32
	Flags uint32
}

// addition is struct seccomp_notif_addfd.
type addition struct {
	ID                           uint64
	Flags, Source, Target, Inner uint32
}

// entered is the namespace that a thread of Envoy is in, as Envoy's descriptor of it.
type entered struct {
	thread uint32
	fd     int32
}

// ledger is what a broker has in hand; it outlives the broker.
type ledger struct {
	// current is zero but for the time that a notification is answered.
	current notification
	// attempts counts the brokers that took it up after one that died over it.
	attempts uint32
	threads  [512]entered
}

const (
	maySetFlags       = 0x40082104 // SECCOMP_IOCTL_NOTIF_SET_FLAGS, since Linux 6.6
	syncWakeUp        = 1          // SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
	letGo             = 1          // SECCOMP_USER_NOTIF_FLAG_CONTINUE
	namespaceType     = 0xb703     // NS_GET_NSTYPE
	socketTypeMask    = 0xf
	socketTypeAllowed = socketTypeMask | unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
)

type broker struct {
	*ledger
	own   unix.Stat_t // the network namespace of the container
	ownFD int
	// allowed are the namespaces in file, as it was in version.
	file    string
	version unix.Stat_t
	allowed map[uint64]bool
	answer  response
	add     addition
}

// Broker serves Envoy's notifications until Envoy is gone. It runs on one thread, which goes in and out of namespaces.
func Broker() error {
	runtime.LockOSThread()
	if err := joinCgroup(os.Getenv(brokerCgroup)); err != nil {
		return err
	}
	memory, err := unix.Mmap(brokerLedger, 0, int(unsafe.Sizeof(ledger{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the ledger: %w", err)
	}
	b := &broker{ledger: (*ledger)(unsafe.Pointer(&memory[0])), file: os.Getenv(brokerNamespaces)}
	if b.ownFD, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open own network namespace: %w", err)
	}
	if err := unix.Fstat(b.ownFD, &b.own); err != nil {
		return fmt.Errorf("look at own network namespace: %w", err)
	}
	// Before Linux 6.6 the answer wakes Envoy a little later.
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, brokerNotifications, maySetFlags, syncWakeUp)
	return b.serve()
}

// newLedger makes an empty one for a new Envoy.
func newLedger() (*os.File, error) {
	fd, err := unix.MemfdCreate("weft-broker", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make the broker's ledger: %w", err)
	}
	f := os.NewFile(uintptr(fd), "ledger")
	if err := f.Truncate(int64(unsafe.Sizeof(ledger{}))); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("make the broker's ledger: %w", err)
	}
	return f, nil
}

func ioctl(request uintptr, argument unsafe.Pointer) (uintptr, unix.Errno) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, brokerNotifications, request, uintptr(argument))
	return r, errno
}

func (b *broker) serve() error {
	if id := b.current.ID; id != 0 { // the broker before this one died over it
		_, errno := ioctl(unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id))
		b.attempts++
		switch {
		case errno != 0: // Envoy does not wait for it any more
		case b.attempts >= 3:
			b.reply(0, unix.EIO, 0)
		default:
			b.handle()
		}
	}
	for {
		b.attempts = 0
		b.current = notification{} // the kernel wants zeros
		_, errno := ioctl(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&b.current))
		switch errno {
		case 0:
			b.handle()
		case unix.EINTR:
		case unix.ENOENT, unix.ENOTCONN: // the caller is gone, or Envoy
			fds := []unix.PollFd{{Fd: brokerNotifications, Events: unix.POLLIN}}
			if n, err := unix.Poll(fds, 0); err == nil && n == 1 && fds[0].Revents&unix.POLLHUP != 0 {
				return nil
			}
		default:
			return fmt.Errorf("receive a notification: %w", errno)
		}
	}
}

// handle answers the current notification.
func (b *broker) handle() {
	switch n := &b.current; n.Number {
	case unix.SYS_SETNS:
		b.enter(n)
	case unix.SYS_LISTEN:
		keepListening(int(int32(n.Args[0])))
		b.reply(0, 0, letGo)
	case unix.SYS_SOCKET:
		if at := b.where(n.PID); at >= 0 {
			b.give(n, at)
		} else {
			b.reply(0, 0, letGo) // in Envoy's own namespace it may do so itself
		}
	default:
		b.reply(0, unix.EPERM, 0)
	}
}

func (b *broker) reply(value int64, errno unix.Errno, flags uint32) {
	b.answer = response{ID: b.current.ID, Value: value, Error: -int32(errno), Flags: flags}
	for {
		if _, e := ioctl(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&b.answer)); e != unix.EINTR {
			return // ENOENT: Envoy has gone
		}
	}
}

// slot is a thread's entry, or a free one; nil: more threads than Envoy ever has.
func (b *broker) slot(thread uint32) *entered {
	for i := range uint32(len(b.threads)) {
		e := &b.threads[(thread+i)%uint32(len(b.threads))]
		if e.thread == thread || e.thread == 0 {
			return e
		}
	}
	return nil
}

// where is Envoy's descriptor of the namespace that a thread is in; -1: Envoy's own.
func (b *broker) where(thread uint32) int {
	if e := b.slot(thread); e != nil && e.thread == thread {
		return int(e.fd)
	}
	return -1
}

// network takes Envoy's descriptor of a network namespace.
func network(fd int) (int, unix.Stat_t, error) {
	var stat unix.Stat_t
	own, err := unix.PidfdGetfd(brokerTarget, fd, 0)
	if err != nil {
		return -1, stat, err
	}
	kind, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(own), namespaceType, 0)
	if errno != 0 || kind != unix.CLONE_NEWNET {
		_ = unix.Close(own)
		return -1, stat, unix.EINVAL
	}
	if err := unix.Fstat(own, &stat); err != nil {
		_ = unix.Close(own)
		return -1, stat, err
	}
	return own, stat, nil
}

// enter answers setns: the thread stays where it is, and what it makes from now on is made there for it.
func (b *broker) enter(n *notification) {
	fd := int(int32(n.Args[0]))
	if uint32(n.Args[1]) != unix.CLONE_NEWNET {
		b.reply(0, unix.EPERM, 0)
		return
	}
	own, stat, err := network(fd)
	if err != nil {
		b.reply(0, errnoOf(err), 0)
		return
	}
	_ = unix.Close(own)
	e := b.slot(n.PID)
	if e == nil {
		b.reply(0, unix.ENOMEM, 0)
		return
	}
	if stat.Ino == b.own.Ino && stat.Dev == b.own.Dev {
		fd = -1
	}
	*e = entered{n.PID, int32(fd)}
	b.reply(0, 0, 0)
}

// may tells whether a namespace, by its cookie, is one of a pod in the mesh, as the file is now.
func (b *broker) may(cookie uint64) bool {
	var now unix.Stat_t
	if err := unix.Stat(b.file, &now); err != nil {
		return false
	}
	if now.Ino != b.version.Ino || now.Mtim != b.version.Mtim || now.Size != b.version.Size {
		text, err := os.ReadFile(b.file)
		if err != nil {
			return false
		}
		b.allowed = map[uint64]bool{}
		for _, f := range strings.Fields(string(text)) {
			if n, err := strconv.ParseUint(f, 10, 64); err == nil {
				b.allowed[n] = true
			}
		}
		b.version = now
	}
	return b.allowed[cookie]
}

// give makes a TCP socket in a namespace and hands it to Envoy. Adding and answering are two steps: in one, a signal that
// interrupts it makes Envoy's call return 0, and no descriptor (seen on Linux 6.18).
func (b *broker) give(n *notification, at int) {
	domain, kind, protocol := int(int32(n.Args[0])), int(int32(n.Args[1])), int(int32(n.Args[2]))
	if domain != unix.AF_INET && domain != unix.AF_INET6 || kind&socketTypeMask != unix.SOCK_STREAM || kind&^socketTypeAllowed != 0 ||
		protocol != 0 && protocol != unix.IPPROTO_TCP {
		b.reply(0, unix.EPERM, 0)
		return
	}
	s, err := b.socketIn(at, domain, kind, protocol)
	if err != nil {
		b.reply(0, errnoOf(err), 0)
		return
	}
	defer unix.Close(s)
	b.add = addition{ID: n.ID, Source: uint32(s)}
	if kind&unix.SOCK_CLOEXEC != 0 {
		b.add.Inner = unix.O_CLOEXEC
	}
	for {
		fd, errno := ioctl(unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&b.add))
		switch errno {
		case 0:
			b.reply(int64(fd), 0, 0)
		case unix.EINTR:
			continue
		default:
			b.reply(0, errno, 0)
		}
		return
	}
}

// socketIn makes a socket in the namespace that Envoy has open. The thread does not stay there: it would keep a pod's namespace.
func (b *broker) socketIn(at, domain, kind, protocol int) (int, error) {
	there, _, err := network(at)
	if err != nil {
		return -1, err
	}
	err = unix.Setns(there, unix.CLONE_NEWNET)
	_ = unix.Close(there)
	if err != nil {
		return -1, err
	}
	s, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
	if back := unix.Setns(b.ownFD, unix.CLONE_NEWNET); back != nil {
		panic(fmt.Sprintf("go back to the own network namespace: %v", back)) // the next broker starts there
	}
	if err != nil {
		return -1, err
	}
	if cookie, err := unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil || !b.may(cookie) {
		_ = unix.Close(s)
		return -1, unix.EPERM
	}
	return s, nil
}

// keepListening gives the supervisor a duplicate of a TCP socket that is about to listen: it outlives Envoy (listening.go). What
// cannot be kept is not: then connections are refused from Envoy's death until it listens again.
func keepListening(fd int) {
	own, err := unix.PidfdGetfd(brokerTarget, fd, 0)
	if err != nil {
		return
	}
	defer unix.Close(own)
	if domain, err := unix.GetsockoptInt(own, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain == unix.AF_UNIX {
		return
	}
	if err := unix.Sendmsg(brokerListening, strconv.AppendInt(nil, int64(fd), 10), unix.UnixRights(own), nil, 0); err != nil {
		fmt.Fprintln(os.Stderr, "weft: keep a listener of Envoy's:", err)
	}
}

func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return unix.EPERM
}
