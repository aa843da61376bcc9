package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
)

// Sysctls of a pod's netns, below /proc/sys/net.
const (
	sysctlReservedPorts   = "ipv4/ip_local_reserved_ports"
	sysctlMigrateRequests = "ipv4/tcp_migrate_req"
	sysctlLoopbackIPv6    = "ipv6/conf/lo/disable_ipv6"
)

// readSysctl and writeSysctl act on the netns of the calling thread.
func readSysctl(name string) (string, error) {
	b, err := os.ReadFile("/proc/sys/net/" + name)
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return string(bytes.TrimSpace(b)), nil
}

func writeSysctl(name, value string) error {
	err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
	if errors.Is(err, unix.EROFS) {
		err = writeSysctlDetached(name, value)
	}
	if err != nil {
		return fmt.Errorf("write sysctl net/%s=%q: %w", name, value, err)
	}
	return nil
}

// writeSysctlDetached writes through a proc of our own, mounted nowhere: container runtimes mount /proc/sys read-only.
func writeSysctlDetached(name, value string) error {
	context, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open proc: %w", err)
	}
	defer unix.Close(context)
	if err := unix.FsconfigCreate(context); err != nil {
		return fmt.Errorf("create proc: %w", err)
	}
	mount, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	defer unix.Close(mount)
	fd, err := unix.Openat(mount, "sys/net/"+name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(value))
	return err
}

// allProxyPorts is the mask of every proxy port, names.PortFirst in the lowest bit.
const allProxyPorts = 1<<(names.PortLast-names.PortFirst+1) - 1

// reservePorts makes those proxy ports that the mask has, and no other, reserved: out of the kernel's choice for
// listen(2) without bind(2). Ports outside the range stay as they are.
func reservePorts(mask uint32) error {
	ports, err := reservedPorts()
	if err != nil {
		return err
	}
	if maskOf(ports) == mask {
		return nil
	}
	for p := names.PortFirst; p <= names.PortLast; p++ {
		ports[p] = mask>>(p-names.PortFirst)&1 != 0
	}
	return writeSysctl(sysctlReservedPorts, formatPorts(ports)+"\n")
}

func reservedPorts() (*[65536]bool, error) {
	current, err := readSysctl(sysctlReservedPorts)
	if err != nil {
		return nil, err
	}
	ports, err := parsePorts(current)
	if err != nil {
		return nil, fmt.Errorf("parse sysctl net/%s: %w", sysctlReservedPorts, err)
	}
	return ports, nil
}

// maskOf tells which proxy ports are set.
func maskOf(ports *[65536]bool) (mask uint32) {
	for p := names.PortFirst; p <= names.PortLast; p++ {
		if ports[p] {
			mask |= 1 << (p - names.PortFirst)
		}
	}
	return mask
}

// parsePorts reads the kernel's "1-3,8" form.
func parsePorts(s string) (*[65536]bool, error) {
	ports := new([65536]bool)
	if s == "" {
		return ports, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		first, last, ranged := strings.Cut(part, "-")
		if !ranged {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 16)
		if err != nil {
			return nil, err
		}
		to, err := strconv.ParseUint(last, 10, 16)
		if err != nil {
			return nil, err
		}
		for p := from; p <= to; p++ {
			ports[p] = true
		}
	}
	return ports, nil
}

func formatPorts(ports *[65536]bool) string {
	var parts []string
	for p := 0; p < len(ports); p++ {
		if !ports[p] {
			continue
		}
		first := p
		for p+1 < len(ports) && ports[p+1] {
			p++
		}
		if first == p {
			parts = append(parts, strconv.Itoa(p))
		} else {
			parts = append(parts, fmt.Sprintf("%d-%d", first, p))
		}
	}
	return strings.Join(parts, ",")
}
