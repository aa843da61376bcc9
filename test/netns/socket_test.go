package netns

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// patience bounds every wait; what is waited for takes milliseconds, or a second where TCP has to retransmit.
const patience = 20 * time.Second

// stream is a plain TCP socket on which every call is ours to see: Go's own dialer makes several connects and MPTCP.
type stream struct{ fd int }

func sockaddr(at netip.AddrPort, mapped bool) unix.Sockaddr {
	if at.Addr().Is4() && !mapped {
		return &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// option prepares a socket before it connects or listens.
type option func(fd int) error

func intOption(level, name, value int) option {
	return func(fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
}

func bound(at string) option {
	return func(fd int) error {
		domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
		return unix.Bind(fd, sockaddr(netip.MustParseAddrPort(at), domain == unix.AF_INET6))
	}
}

func toDevice(name string) option {
	return func(fd int) error { return unix.BindToDevice(fd, name) }
}

// socket makes a stream socket in the calling thread's namespace. Reading, writing and connecting give up after patience.
func socket(domain, protocol int, options ...option) (*stream, error) {
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	limit := unix.NsecToTimeval(int64(patience))
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit))
	for _, o := range options {
		if err == nil {
			err = o(fd)
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &stream{fd}, nil
}

func domainOf(at netip.AddrPort) int {
	if at.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// socket makes a socket of the namespace.
func (s *space) socket(domain, protocol int, options ...option) (st *stream, err error) {
	err = s.run(func() error {
		st, err = socket(domain, protocol, options...)
		return err
	})
	return st, err
}

// dial connects from the namespace.
func (s *space) dial(to string, options ...option) (*stream, error) {
	at := netip.MustParseAddrPort(to)
	st, err := s.socket(domainOf(at), 0, options...)
	if err != nil {
		return nil, err
	}
	return st, st.connectOrClose(to)
}

func (st *stream) connectOrClose(to string) error {
	err := st.connect(to)
	if err != nil {
		st.close()
	}
	return err
}

// connect connects; an address is mapped where the socket is IPv6.
func (st *stream) connect(to string) error {
	domain, err := unix.GetsockoptInt(st.fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	at := netip.MustParseAddrPort(to)
	sa := sockaddr(at, domain == unix.AF_INET6)
	if zone := at.Addr().Zone(); zone != "" {
		var index uint32
		if _, err := fmt.Sscan(zone, &index); err != nil {
			return err
		}
		sa.(*unix.SockaddrInet6).ZoneId = index
	}
	for {
		// A signal of Go's scheduler may interrupt; the connect goes on and the next call waits for it.
		switch err := unix.Connect(st.fd, sa); err {
		case unix.EINTR:
		case unix.EALREADY:
			return st.waitConnected()
		default:
			return os.NewSyscallError("connect", err)
		}
	}
}

// waitConnected waits until a connect under way ends, and returns its error.
func (st *stream) waitConnected() error {
	if err := poll(st.fd, unix.POLLOUT); err != nil {
		return err
	}
	code, err := unix.GetsockoptInt(st.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err
	}
	if code != 0 {
		return os.NewSyscallError("connect", unix.Errno(code))
	}
	return nil
}

func poll(fd int, events int16) error {
	deadline := time.Now().Add(patience)
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(fds, int(time.Until(deadline).Milliseconds())+1)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n > 0:
			return nil
		default:
			return os.ErrDeadlineExceeded
		}
	}
}

// unconnect is connect(2) to AF_UNSPEC, which makes the socket one that never connected.
func (st *stream) unconnect() error {
	unspec := [16]byte{}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(st.fd), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec))
	if errno != 0 {
		return os.NewSyscallError("connect", errno)
	}
	return nil
}

// close closes once: the number may be another socket's afterwards.
func (st *stream) close() {
	if st.fd >= 0 {
		unix.Close(st.fd)
		st.fd = -1
	}
}

// reset closes without waiting for anything.
func (st *stream) reset() {
	_ = unix.SetsockoptLinger(st.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	st.close()
}

func (st *stream) local() netip.AddrPort {
	sa, err := unix.Getsockname(st.fd)
	if err != nil {
		return netip.AddrPort{}
	}
	return addrPort(sa)
}

// peer is what getpeername shows the app.
func (st *stream) peer() netip.AddrPort {
	sa, err := unix.Getpeername(st.fd)
	if err != nil {
		return netip.AddrPort{}
	}
	return addrPort(sa)
}

func (st *stream) write(s string) error {
	_, err := unix.Write(st.fd, []byte(s))
	return os.NewSyscallError("write", err)
}

func (st *stream) readLine() (string, error) {
	var line []byte
	one := make([]byte, 1)
	for {
		n, err := unix.Read(st.fd, one)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return string(line), os.NewSyscallError("read", err)
		case n == 0:
			return string(line), errors.New("closed by the peer")
		case one[0] == '\n':
			return string(line), nil
		default:
			line = append(line, one[0])
		}
	}
}

// greeting is the first line that every listener of the tests sends: who accepted, and what it knows.
type greeting struct {
	By         string         // "out", "in", "in-first" for the stand-in's listeners, else the server's name
	Generation uint32         // of the stand-in
	Original   netip.AddrPort // what SO_ORIGINAL_DST answers; for "in" the local address
	Local      netip.AddrPort
	Peer       netip.AddrPort // what getpeername answers
	Accepted   netip.AddrPort // what accept answered
	Error      string         // of SO_ORIGINAL_DST
}

func (st *stream) greeting() (g greeting, err error) {
	line, err := st.readLine()
	if err != nil {
		return g, err
	}
	return g, json.NewDecoder(bytes.NewReader([]byte(line))).Decode(&g)
}
