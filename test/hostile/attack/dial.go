package attack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// most of what comes back is kept.
const most = 4096

// open makes a stream socket with the attempt's options, bound to From, not connected yet.
func (a Attempt) open(to netip.AddrPort) (fd int, err error) {
	domain, protocol := unix.AF_INET, 0
	if to.Addr().Is6() || a.Mapped {
		domain = unix.AF_INET6
	}
	if slices.Contains(a.Options, "mptcp") {
		protocol = protocolMPTCP
	}
	fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return 0, at("socket", err)
	}
	for _, option := range a.Options {
		if err := apply(fd, option, a.To); err != nil {
			unix.Close(fd)
			return 0, at("option", err)
		}
	}
	if a.From == "" {
		return fd, nil
	}
	from, err := netip.ParseAddrPort(a.From)
	if err == nil {
		err = unix.Bind(fd, sockaddr(from, domain == unix.AF_INET6))
	}
	if err != nil {
		unix.Close(fd)
		return 0, at("bind", err)
	}
	return fd, nil
}

// connect connects a socket that does not block.
func connect(fd int, to netip.AddrPort, six bool, limit time.Duration) error {
	err := unix.Connect(fd, sockaddr(to, six))
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR) {
		return err
	}
	return connected(fd, limit)
}

// connected waits for the end of a handshake.
func connected(fd int, limit time.Duration) error {
	end := time.Now().Add(limit)
	for {
		left := time.Until(end)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(left.Milliseconds())+1)
		if errors.Is(err, unix.EINTR) || err == nil && n == 0 {
			continue
		}
		if err != nil {
			return err
		}
		number, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && number != 0 {
			err = unix.Errno(number)
		}
		return err
	}
}

// resolved is an address to dial: To may name a host.
func resolved(to string) (netip.AddrPort, error) {
	if at, err := netip.ParseAddrPort(to); err == nil {
		return at, nil
	}
	found, err := net.ResolveTCPAddr("tcp4", to)
	if err != nil {
		return netip.AddrPort{}, err
	}
	end := found.AddrPort()
	return netip.AddrPortFrom(end.Addr().Unmap(), end.Port()), nil
}

// conn connects as the attempt says.
func (a Attempt) conn(o *Outcome) (net.Conn, error) {
	to, err := resolved(a.To)
	if err != nil {
		return nil, at("resolve", err)
	}
	fd, err := a.open(to)
	if err != nil {
		return nil, err
	}
	six := to.Addr().Is6() || a.Mapped
	if slices.Contains(a.Options, "fastopen") {
		err = unix.Sendto(fd, a.Send, unix.MSG_FASTOPEN, sockaddr(to, six))
		early := err == nil
		if early || errors.Is(err, unix.EINPROGRESS) {
			err = connected(fd, a.limit())
		}
		if err == nil && !early { // the kernel had no cookie yet: nothing was sent
			_, err = unix.Write(fd, a.Send)
		}
	} else {
		err = connect(fd, to, six, a.limit())
	}
	if err != nil {
		unix.Close(fd)
		return nil, at("connect", err)
	}
	file := os.NewFile(uintptr(fd), a.ID)
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, at("connect", err)
	}
	o.Local = conn.LocalAddr().String()
	return conn, conn.SetDeadline(time.Now().Add(a.limit()))
}

// quiet is how long an answer may pause before it counts as whole.
const quiet = 500 * time.Millisecond

// dial connects, speaks TLS if asked to, sends, and keeps what comes back until the other side ends or is quiet, or the
// limit.
func dial(a Attempt, o *Outcome) error {
	conn, err := a.conn(o)
	if err != nil {
		return err
	}
	defer conn.Close()
	if a.TLS != nil {
		if conn, err = a.TLS.client(conn, o); err != nil {
			return at("handshake", err)
		}
	}
	switch {
	case slices.Contains(a.Options, "fastopen"):
	case slices.Contains(a.Options, "urgent"):
		err = urgent(conn, a.Send)
	case a.Pieces:
		for i := range a.Send {
			if _, err = conn.Write(a.Send[i : i+1]); err != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
	case len(a.Send) > 0:
		_, err = conn.Write(a.Send)
	}
	wrote := at("write", err) // what was answered before is there all the same
	buffer := make([]byte, most)
	for len(o.Got) < most {
		n, err := conn.Read(buffer[:most-len(o.Got)])
		o.Got = append(o.Got, buffer[:n]...)
		if err != nil {
			return errors.Join(wrote, at("read", err))
		}
		if err := conn.SetReadDeadline(time.Now().Add(quiet)); err != nil {
			return at("read", err)
		}
	}
	return wrote
}

// urgent sends as TCP's urgent data.
func urgent(conn net.Conn, data []byte) error {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) { sent = unix.Sendto(int(fd), data, unix.MSG_OOB, nil) }); err != nil {
		return err
	}
	return sent
}

// hold opens connections one after the other, keeps them for the time, and counts what became of each.
func hold(a Attempt, o *Outcome) error {
	to, err := resolved(a.To)
	if err != nil {
		return at("resolve", err)
	}
	o.Counts = map[string]int{}
	var held []int
	defer func() {
		for _, fd := range held {
			unix.Close(fd)
		}
	}()
	for range a.Count {
		fd, err := a.open(to)
		if err == nil {
			if err = connect(fd, to, to.Addr().Is6(), 2*time.Second); err != nil {
				unix.Close(fd)
			}
		}
		if err != nil {
			if name := errno(err); name != "" {
				o.Counts[name]++
			} else {
				return at("connect", err)
			}
			continue
		}
		o.Counts["open"]++
		held = append(held, fd)
		if len(a.Send) > 0 {
			_, _ = unix.Write(fd, a.Send)
		}
	}
	time.Sleep(a.limit())
	for _, fd := range held {
		got, ended := drain(fd)
		if len(got) > 0 {
			o.Counts["answered"]++
		}
		if ended {
			o.Counts["closed"]++
		} else {
			o.Counts["still open"]++
		}
		o.Got = got // the last one's
	}
	return nil
}

// drain reads what waits on a socket that does not block, and tells whether the other side has ended.
func drain(fd int) (got []byte, ended bool) {
	buffer := make([]byte, most)
	for {
		n, err := unix.Read(fd, buffer)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return got, false
		case err != nil || n == 0:
			return got, true
		default:
			got = append(got, buffer[:min(n, most-len(got))]...)
		}
	}
}

// scan connects to every port from First to Last, some at a time, and counts what became of each.
func scan(a Attempt, o *Outcome) error {
	host, err := netip.ParseAddr(a.To)
	if err != nil {
		return at("resolve", err)
	}
	type result struct {
		name string
		got  int
	}
	ports, results := make(chan int), make(chan result)
	for range max(a.Count, 1) {
		go func() {
			for port := range ports {
				one := Attempt{ID: a.ID, Kind: "dial", Mapped: a.Mapped, To: netip.AddrPortFrom(host, uint16(port)).String(), Millis: 2000, Send: a.Send}
				done := one.Run()
				name := done.Stage + " " + done.Errno
				if done.Stage == "read" && done.Errno == "timeout" {
					name = "silent"
				}
				results <- result{name, len(done.Got)}
			}
		}()
	}
	go func() {
		for port := a.First; port <= a.Last; port++ {
			ports <- port
		}
		close(ports)
	}()
	o.Counts = map[string]int{}
	for range a.Last - a.First + 1 {
		r := <-results
		o.Counts[r.name]++
		if r.got > 0 {
			o.Counts["answered"]++
		}
	}
	return nil
}

// bind tries to have every port from First to Last at the address To, by the time limit again and again, and
// counts what the kernel said.
func bind(a Attempt, o *Outcome) error {
	host, err := netip.ParseAddr(a.To)
	if err != nil {
		return at("resolve", err)
	}
	o.Counts = map[string]int{}
	began := time.Now()
	for again := true; again; again = a.Millis > 0 && time.Since(began) < a.limit() {
		for port := a.First; port <= a.Last; port++ {
			one := Attempt{Options: a.Options, Mapped: a.Mapped, From: netip.AddrPortFrom(host, uint16(port)).String()}
			fd, err := one.open(netip.AddrPortFrom(host, 1))
			if err == nil {
				err = at("listen", unix.Listen(fd, 16))
				unix.Close(fd)
			}
			var f failure
			if errors.As(err, &f) && f.stage != "bind" && f.stage != "listen" {
				return err
			}
			name := errno(err)
			if name == "" {
				name = "bound"
			}
			o.Counts[name]++
		}
	}
	return nil
}

// original asks the kernel where a connection was meant to go, as Envoy does.
func original(a Attempt, o *Outcome) error {
	conn, err := a.conn(o)
	if err != nil {
		return err
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return at("connect", err)
	}
	var answer string
	var failed error
	level := unix.SOL_IP
	if a.Mapped {
		level = unix.SOL_IPV6
	}
	if err := raw.Control(func(fd uintptr) {
		var info *unix.IPv6MTUInfo
		if info, failed = unix.GetsockoptIPv6MTUInfo(int(fd), level, originalDst); failed == nil {
			answer = fmt.Sprintf("%v", info.Addr)
		}
	}); err != nil {
		return at("connect", err)
	}
	o.Got = []byte(answer)
	return at("option", failed)
}
