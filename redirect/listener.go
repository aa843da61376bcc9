package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
)

const (
	sockDiagByFamily = 20 // linux/sock_diag.h
	tcpListen        = 10 // TCP_LISTEN in net/tcp_states.h
)

// diagRequest is struct inet_diag_req_v2 of linux/inet_diag.h: the listening stream sockets of one family.
type diagRequest struct{ family uint8 }

func (diagRequest) Len() int { return 56 }

func (d diagRequest) Serialize() []byte {
	b := make([]byte, d.Len())
	b[0], b[1] = d.family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 1<<tcpListen)
	return b
}

// checkProxyPorts fails if a stream socket listens on a proxy port in the netns of the calling thread, other than those
// of Envoy: a pod may come back before Envoy has closed what it had there.
func checkProxyPorts(envoys []Listener) error {
	ports, err := listeningPorts()
	if errors.Is(err, unix.ENOENT) { // a kernel without inet_diag
		ports, err = listeningPortsOfProc()
	}
	if err != nil {
		return fmt.Errorf("list listeners: %w", err)
	}
	for _, port := range ports {
		ours := slices.ContainsFunc(envoys, func(l Listener) bool { return l.Port == port })
		if port >= names.PortFirst && port <= names.PortLast && !ours {
			return fmt.Errorf("it listens on port %d, which Envoy needs (%d to %d are reserved): move it to another port", port, names.PortFirst, names.PortLast)
		}
	}
	return nil
}

// listeningPorts asks the kernel for listeners alone, which takes microseconds.
func listeningPorts() (ports []uint16, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		messages, err := whole(func() ([][]byte, error) {
			request := nl.NewNetlinkRequest(sockDiagByFamily, unix.NLM_F_DUMP)
			request.AddData(diagRequest{family})
			return request.Execute(unix.NETLINK_SOCK_DIAG, 0)
		})
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			if len(m) >= 6 { // struct inet_diag_msg: four bytes, then the source port
				ports = append(ports, binary.BigEndian.Uint16(m[4:]))
			}
		}
	}
	return ports, nil
}

// listeningPortsOfProc reads what every kernel has, which takes milliseconds.
func listeningPortsOfProc() (ports []uint16, err error) {
	for _, table := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		b, err := os.ReadFile(table)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6
		} else if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			fields := strings.Fields(line)
			if len(fields) < 4 || fields[3] != "0A" { // TCP_LISTEN
				continue
			}
			_, hex, _ := strings.Cut(fields[1], ":")
			if port, err := strconv.ParseUint(hex, 16, 16); err == nil {
				ports = append(ports, uint16(port))
			}
		}
	}
	return ports, nil
}
