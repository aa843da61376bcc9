package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	trialSize     = 4096 // bytes that the trial redirects
	trialPatience = 3 * time.Second
)

// tryShortcut moves bytes past TCP on a connection of its own, in a network namespace that ends with it, and fails unless
// the kernel counts them as msg.c expects. Redirected bytes must be charged to the reader, or the bound bounds nothing,
// must be seen by FIONREAD, and must not count as read from TCP: copied_seq would then let later bytes overtake
// earlier ones.
func tryShortcut() error {
	spec, err := loadShortcut()
	if err != nil {
		return fmt.Errorf("read the object of the short circuit: %w", err)
	}
	for name := range spec.Programs {
		if name != shortcutProgTrialVerdict && name != shortcutProgStreamVerdict {
			delete(spec.Programs, name)
		}
	}
	for name, m := range spec.Maps {
		switch name {
		case shortcutMapTrialJoined, shortcutMapTrialSeen:
		case shortcutMapReceived, shortcutMapShortcuts: // stream_verdict's own, empty here
			m.MaxEntries = min(m.MaxEntries, 64)
		default:
			delete(spec.Maps, name)
		}
	}
	loaded, err := ebpf.NewCollection(spec)
	if err != nil {
		return fmt.Errorf("load the trial of the short circuit: %w: %w", ErrUnsupported, err)
	}
	defer loaded.Close()
	joined := loaded.Maps[shortcutMapTrialJoined]
	for attach, name := range map[ebpf.AttachType]string{
		ebpf.AttachSkSKBStreamVerdict: shortcutProgStreamVerdict, ebpf.AttachSkMsgVerdict: shortcutProgTrialVerdict,
	} {
		if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: joined.FD(), Program: loaded.Programs[name], Attach: attach}); err != nil {
			return fmt.Errorf("attach the trial of the short circuit: %w: %w", ErrUnsupported, err)
		}
	}
	sender, reader, err := trialConnection()
	if err != nil {
		return fmt.Errorf("connect the trial of the short circuit: %w", err)
	}
	defer sender.Close()
	defer reader.Close()
	return tryRedirect(joined, loaded.Maps[shortcutMapTrialSeen], sender, reader)
}

// trialConnection connects two sockets over the loopback of a new network namespace.
func trialConnection() (client, server *net.TCPConn, err error) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends, and the namespace with the sockets
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make network namespace: %w", err)
			}
			lo, err := netlink.LinkByName("lo")
			if err == nil {
				err = netlink.LinkSetUp(lo)
			}
			if err != nil {
				return fmt.Errorf("set lo up: %w", err)
			}
			l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				return err
			}
			defer l.Close()
			if client, err = net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr)); err != nil {
				return err
			}
			if server, err = l.AcceptTCP(); err != nil {
				client.Close()
			}
			return err
		}()
	}()
	err = <-done
	return client, server, err
}

func tryRedirect(joined, seen *ebpf.Map, sender, reader *net.TCPConn) error {
	deadline := time.Now().Add(trialPatience)
	if err := errors.Join(sender.SetDeadline(deadline), reader.SetDeadline(deadline)); err != nil {
		return err
	}
	for key, conn := range []*net.TCPConn{sender, reader} {
		err := control(conn, func(fd int) error { return joined.Put(uint32(key), uint64(fd)) })
		if err != nil {
			return fmt.Errorf("take a socket into the short circuit: %w: %w", ErrUnsupported, err)
		}
	}
	before, err := readSequence(seen, sender, reader)
	if err != nil {
		return err
	}
	sent := bytes.Repeat([]byte("weft"), trialSize/4)
	if _, err := sender.Write(sent); err != nil {
		return fmt.Errorf("redirect: %w: %w", ErrUnsupported, err)
	}
	var waiting, charged int
	err = control(reader, func(fd int) (err error) {
		if waiting, err = unix.IoctlGetInt(fd, unix.SIOCINQ); err != nil {
			return err
		}
		charged, err = memory(fd)
		return err
	})
	if err != nil {
		return fmt.Errorf("look at the reader: %w", err)
	}
	got := make([]byte, trialSize)
	if _, err := io.ReadFull(reader, got); err != nil || !bytes.Equal(got, sent) {
		return fmt.Errorf("which loses bytes that it redirects: %w", errors.Join(ErrUnsupported, err))
	}
	after, err := readSequence(seen, sender, reader)
	if err != nil {
		return err
	}
	switch {
	case charged < trialSize:
		return fmt.Errorf("which does not charge the reader for redirected bytes (%d of %d): %w", charged, trialSize, ErrUnsupported)
	case waiting != trialSize:
		return fmt.Errorf("whose FIONREAD shows %d of %d redirected bytes: %w", waiting, trialSize, ErrUnsupported)
	case after != before:
		return fmt.Errorf("which counts %d of %d redirected bytes as TCP's: %w", after-before, trialSize, ErrUnsupported)
	}
	return nil
}

// readSequence has the reader send a byte by TCP, and returns the copied_seq that it had then.
func readSequence(seen *ebpf.Map, sender, reader *net.TCPConn) (sequence uint32, err error) {
	if _, err := reader.Write([]byte{0}); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(sender, make([]byte, 1)); err != nil {
		return 0, fmt.Errorf("which loses bytes that arrive by TCP: %w: %w", ErrUnsupported, err)
	}
	return sequence, seen.Lookup(uint32(0), &sequence)
}

// memory returns what a socket's unread bytes take of the kernel's memory.
func memory(fd int) (int, error) {
	var info [9]uint32 // the first is SK_MEMINFO_RMEM_ALLOC
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(info[0]), nil
}

func control(conn *net.TCPConn, f func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = f(int(fd)) })
	return errors.Join(err, inner)
}
