package envoy

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"
)

// errNoFD: a message came without a descriptor.
var errNoFD = errors.New("a message without one descriptor")

// receiveFD takes a message with one descriptor from a Unix socket. io.EOF: the other end is closed.
func receiveFD(socket int) (text string, fd int, err error) {
	payload, control := make([]byte, 16), make([]byte, unix.CmsgSpace(4))
	n, oob := 0, 0
	for {
		n, oob, _, _, err = unix.Recvmsg(socket, payload, control, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return "", -1, err
	}
	if n == 0 {
		return "", -1, io.EOF
	}
	fd, err = descriptor(control[:oob])
	return string(payload[:n]), fd, err
}

// descriptor is the one in a message's control part.
func descriptor(control []byte) (int, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 {
		return -1, errNoFD
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, errNoFD
	}
	return fds[0], nil
}
