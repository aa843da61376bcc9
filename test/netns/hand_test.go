package netns

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

// A hand is a process in a cgroup of its own that does what it is told in any namespace: as Envoy it listens and
// dials with tags, as kubelet it probes. order and report are the lines of its pipes.
type order struct {
	Do    string // "listen", "unlisten", "accept", "dial", "reach", "give", "drop", "herd", "disband", "load", "probes"
	Netns string
	// listen, unlisten, accept
	Port       uint16
	Sockets    int  // listening sockets, one group
	Backlog    int  // 0: plenty
	Deaf       bool // do not accept until told
	Hold       bool // greet, and keep the connection without listening to it
	Multipath  bool // MPTCP sockets
	By         string
	Generation uint32
	// dial; of load and probes the cgroup root, and in Netns the pins
	To string
	// probes: kubelet's cgroup
	Kubelet string
	Tag     int // 0: none; else set by the private socket option
	// dial: bound to before as original_src does it, if given
	Client netip.Addr
	Keep   bool // the connection stays open until disband
	// herd: dial Count connections, spread over Targets, and keep them
	Targets []string
	Count   int
	// drop: which descriptor; give: the client's address, in To
	File int
}

type report struct {
	Error    string // of the system call, as errno's name, or ""
	Greeting greeting
	Local    netip.AddrPort
	Peer     netip.AddrPort
	File     int // reach, give: the connection's descriptor
	Wrong    int // herd: connections whose greeting does not name their target, or that failed
}

// hand is the tests' end of a hand's pipes.
type hand struct {
	t       testing.TB
	cmd     *exec.Cmd
	mu      sync.Mutex
	in      io.WriteCloser
	out     *bufio.Reader
	cgroup  string
	stopped bool
}

// newHand starts a hand in a new cgroup below root, without the capabilities named.
func newHand(t testing.TB, root, name string, without ...uintptr) *hand {
	t.Helper()
	return newHandIn(t, root, name, 0, without...)
}

// newHandIn is newHand in new namespaces, given as flags of clone(2).
func newHandIn(t testing.TB, root, name string, namespaces uintptr, without ...uintptr) *hand {
	t.Helper()
	dir := filepath.Join(root, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cgroup, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=hand")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd()), Cloneflags: namespaces}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan error)
	go func() {
		if len(without) > 0 {
			runtime.LockOSThread() // not unlocked: the thread is not whole any more
		}
		for _, c := range without {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
				started <- err
				return
			}
		}
		started <- cmd.Start()
	}()
	if err := <-started; err != nil {
		t.Fatal("start hand:", err)
	}
	h := &hand{t: t, cmd: cmd, in: in, out: bufio.NewReader(out), cgroup: dir}
	t.Cleanup(func() {
		h.kill()
		_ = os.Remove(dir)
	})
	return h
}

// kill ends the hand as a crash would.
func (h *hand) kill() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopped {
		return
	}
	h.stopped = true
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
}

func (h *hand) do(o order) report {
	h.t.Helper()
	r, err := h.try(o)
	if err != nil {
		h.t.Fatal(err)
	}
	return r
}

// try is do for goroutines, which cannot end the test.
func (h *hand) try(o order) (r report, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := json.NewEncoder(h.in).Encode(o); err != nil {
		return r, fmt.Errorf("tell hand to %s: %w", o.Do, err)
	}
	line, err := h.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		return r, fmt.Errorf("hear from hand about %s: %w", o.Do, err)
	}
	return r, nil
}

func (h *hand) must(o order) {
	h.t.Helper()
	if r := h.do(o); r.Error != "" {
		h.t.Fatalf("hand: %s %s port %d: %s", o.Do, o.Netns, o.Port, r.Error)
	}
}

// dial connects from a namespace and returns what became of it.
func (h *hand) dial(s *space, to string, tag int) report {
	h.t.Helper()
	return h.do(order{Do: "dial", Netns: s.path, To: to, Tag: tag})
}

// runHand is the hand's own main loop.
func runHand() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
	var w worker
	in := json.NewDecoder(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			os.Exit(0) // the tests are gone
		}
		if err := out.Encode(w.do(o)); err != nil {
			os.Exit(0)
		}
	}
}

type worker struct {
	listeners map[string]*listener
	herd      []*stream
}

func (w *worker) do(o order) (r report) {
	var err error
	switch o.Do {
	case "listen":
		err = w.listen(o)
	case "accept":
		w.listeners[listenerKey(o)].accept()
	case "unlisten":
		w.listeners[listenerKey(o)].close()
		delete(w.listeners, listenerKey(o))
	case "dial":
		err = w.dial(o, &r)
	case "reach":
		r.File, err = w.reach(o)
	case "give":
		r.File, err = w.listeners[listenerKey(o)].give(o.To)
	case "drop":
		err = unix.Close(o.File)
	case "herd":
		r.Wrong, err = w.gather(o)
	case "load":
		var r *redirect.Redirect
		if r, err = redirect.Load(redirect.Config{CgroupRoot: o.To, PinDir: o.Netns}); err == nil {
			err = errors.Join(errors.New("it loaded"), r.Release(true))
		} else {
			err = fmt.Errorf("%v", err) // in its own words, not the errno's
		}
	case "probes":
		err = probesRefused(o)
	case "disband":
		for _, st := range w.herd {
			st.reset()
		}
		w.herd = nil
	default:
		err = errors.New("no such order")
	}
	r.Error = errorName(err)
	return r
}

// probesRefused loads an instance of its own and tells why kubelet's probes do not pass.
func probesRefused(o order) error {
	r, err := redirect.Load(redirect.Config{CgroupRoot: o.To, PinDir: o.Netns, KubeletCgroup: o.Kubelet})
	if err != nil {
		return err
	}
	err = r.ProbesRefused()
	return errors.Join(err, r.Release(true))
}

// errorName is the errno's name where there is one.
func errorName(err error) string {
	var errno unix.Errno
	switch {
	case err == nil:
		return ""
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	default:
		return err.Error()
	}
}

func inPath(path string, f func() error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return inside(int(file.Fd()), f)
}

func (w *worker) dial(o order, r *report) error {
	var st *stream
	err := inPath(o.Netns, func() (err error) {
		st, err = socket(domainOf(netip.MustParseAddrPort(o.To)), 0, append(tagged(o.Tag), from(o.Client)...)...)
		return err
	})
	if err != nil {
		return err
	}
	if o.Keep {
		w.herd = append(w.herd, st)
	} else {
		defer st.close()
	}
	if err := st.connect(o.To); err != nil {
		return err
	}
	r.Local, r.Peer = st.local(), st.peer()
	r.Greeting, err = st.greeting()
	return err
}

// reach dials and keeps the connection; its descriptor is for the tests to take.
func (w *worker) reach(o order) (file int, err error) {
	var st *stream
	err = inPath(o.Netns, func() (err error) {
		if st, err = socket(domainOf(netip.MustParseAddrPort(o.To)), 0, tagged(o.Tag)...); err != nil {
			return err
		}
		return st.connectOrClose(o.To)
	})
	if err != nil {
		return 0, err
	}
	return st.fd, nil
}

// from binds to a client's address as Envoy's listener filter original_src has it done.
func from(client netip.Addr) []option {
	if !client.IsValid() {
		return nil
	}
	level, name := unix.SOL_IP, unix.IP_TRANSPARENT
	if client.Is6() {
		level, name = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	return []option{intOption(level, name, 1), func(fd int) error { return unix.Bind(fd, sockaddr(netip.AddrPortFrom(client, 0), false)) }}
}

func tagged(tag int) []option {
	if tag == 0 {
		return nil
	}
	return []option{intOption(names.SocketOptionLevel, names.SocketOptionName, tag<<16)}
}

// gather dials from as many sockets as told; each greeting must name what was dialled.
func (w *worker) gather(o order) (wrong int, err error) {
	var made []*stream
	err = inPath(o.Netns, func() error {
		for i := range o.Count {
			st, err := socket(domainOf(netip.MustParseAddrPort(o.Targets[i%len(o.Targets)])), 0)
			if err != nil {
				return err
			}
			made = append(made, st)
		}
		return nil
	})
	w.herd = append(w.herd, made...)
	for i, st := range made {
		to := o.Targets[i%len(o.Targets)]
		if st.connect(to) != nil {
			wrong++
			continue
		}
		g, err := st.greeting()
		if err != nil || g.Original.String() != to || st.peer().String() != to {
			wrong++
		}
	}
	return wrong, err
}

// listener is a group of listening sockets on [::]:port of one namespace.
type listener struct {
	order   order
	sockets []int
	once    sync.Once
	done    sync.WaitGroup
	mu      sync.Mutex
	held    []*stream
}

func listenerKey(o order) string { return fmt.Sprint(o.Netns, " ", o.Port) }

func (w *worker) listen(o order) error {
	l := &listener{order: o}
	backlog := o.Backlog
	if backlog == 0 {
		backlog = 4096
	}
	err := inPath(o.Netns, func() error {
		for range max(o.Sockets, 1) {
			protocol := 0
			if o.Multipath {
				protocol = protocolMPTCP
			}
			st, err := socket(unix.AF_INET6, protocol, intOption(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0),
				intOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), intOption(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
				bound(netip.AddrPortFrom(netip.IPv6Unspecified(), o.Port).String()))
			if err != nil {
				return err
			}
			l.sockets = append(l.sockets, st.fd)
			if err := unix.Listen(st.fd, backlog); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		for _, fd := range l.sockets {
			unix.Close(fd)
		}
		return err
	}
	if w.listeners == nil {
		w.listeners = map[string]*listener{}
	}
	w.listeners[listenerKey(o)] = l
	if !o.Deaf {
		l.accept()
	}
	return nil
}

func (l *listener) accept() {
	l.once.Do(func() {
		for _, fd := range l.sockets {
			l.done.Add(1)
			go func() {
				defer l.done.Done()
				for {
					if err := poll(fd, unix.POLLIN); errors.Is(err, os.ErrDeadlineExceeded) {
						continue
					} else if err != nil {
						return
					}
					conn, peer, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
					if err == unix.EAGAIN || err == unix.EINTR || err == unix.ECONNABORTED {
						continue
					} else if err != nil {
						return
					}
					go l.serve(&stream{conn}, addrPort(peer))
				}
			}()
		}
	})
}

// give returns the descriptor of a connection that is held, by its client, and forgets it.
func (l *listener) give(client string) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, st := range l.held {
		if unmap(st.peer()).String() == client {
			l.held = append(l.held[:i], l.held[i+1:]...)
			return st.fd, nil
		}
	}
	return 0, errors.New("no such connection yet")
}

func (l *listener) close() {
	for _, fd := range l.sockets {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // wakes the accept loop
	}
	l.done.Wait()
	for _, fd := range l.sockets {
		unix.Close(fd)
	}
	for _, st := range l.held {
		st.reset()
	}
}

// serve greets, then echoes lines; "relay" joins an inbound connection to the app by a local leg, as Envoy does.
func (l *listener) serve(st *stream, accepted netip.AddrPort) {
	g := greeting{By: l.order.By, Generation: l.order.Generation, Local: st.local(), Peer: st.peer(), Accepted: accepted}
	if l.order.By == "out" {
		original, err := originalDestination(st.fd, g.Local)
		g.Original, g.Error = original, errorName(err)
	} else {
		g.Original = unmap(g.Local)
	}
	line, _ := json.Marshal(g)
	if l.order.Hold {
		l.mu.Lock()
		l.held = append(l.held, st)
		l.mu.Unlock()
		_ = st.write(string(line) + "\n")
		return
	}
	// Waits in Go's poller from here on, for there may be thousands.
	file := os.NewFile(uintptr(st.fd), "accepted")
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		return
	}
	defer conn.Close()
	if _, err := conn.Write(append(line, '\n')); err != nil {
		return
	}
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		if lines.Text() == "relay" {
			l.relay(conn, g.Original, g.Peer.Addr().Unmap())
			return
		}
		if _, err := fmt.Fprintln(conn, lines.Text()); err != nil {
			return
		}
	}
}

func (l *listener) relay(conn net.Conn, to netip.AddrPort, client netip.Addr) {
	var leg *stream
	err := inPath(l.order.Netns, func() (err error) {
		if leg, err = socket(domainOf(to), 0, append(tagged(names.TagLocalLeg), from(client)...)...); err != nil {
			return err
		}
		return leg.connectOrClose(to.String())
	})
	if err != nil {
		fmt.Fprintf(conn, "local leg: %s\n", errorName(err))
		return
	}
	defer leg.close()
	line, err := leg.readLine()
	if err != nil {
		line = "local leg: " + err.Error()
	}
	fmt.Fprintln(conn, line)
}

func unmap(at netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(at.Addr().Unmap(), at.Port()) }

// originalDestination asks as Envoy's original_dst listener filter does: by the family of the local address.
func originalDestination(fd int, local netip.AddrPort) (netip.AddrPort, error) {
	level := unix.SOL_IPV6
	if local.Addr().Is4In6() || local.Addr().Is4() {
		level = unix.SOL_IP
	}
	var sa unix.RawSockaddrAny
	size := uint32(unsafe.Sizeof(sa))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), 80, uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return netip.AddrPort{}, errno
	}
	swap := func(p uint16) uint16 { return p<<8 | p>>8 }
	switch sa.Addr.Family {
	case unix.AF_INET:
		in := (*unix.RawSockaddrInet4)(unsafe.Pointer(&sa))
		return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), swap(in.Port)), nil
	case unix.AF_INET6:
		in := (*unix.RawSockaddrInet6)(unsafe.Pointer(&sa))
		return netip.AddrPortFrom(netip.AddrFrom16(in.Addr), swap(in.Port)), nil
	}
	return netip.AddrPort{}, unix.EAFNOSUPPORT
}
