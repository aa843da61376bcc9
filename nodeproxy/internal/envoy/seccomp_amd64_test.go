package envoy

import (
	"testing"

	"golang.org/x/sys/unix"
)

// call is a system call as the kernel shows it to a filter.
type call struct {
	number, arch uint32
	args         [6]uint64
}

// run is the kernel's interpreter, as far as the filter needs it.
func run(t *testing.T, program []unix.SockFilter, c call) uint32 {
	t.Helper()
	load := func(offset uint32) uint32 {
		switch {
		case offset == offsetNumber:
			return c.number
		case offset == offsetArch:
			return c.arch
		case offset >= offsetArgs && offset < offsetArgs+48 && offset%4 == 0:
			arg := c.args[(offset-offsetArgs)/8]
			if offset%8 == 4 {
				return uint32(arg >> 32)
			}
			return uint32(arg)
		}
		t.Fatalf("load from %d", offset)
		return 0
	}
	var a uint32
	for at := 0; at < len(program); at++ {
		i := program[at]
		jump := func(yes bool) {
			if yes {
				at += int(i.Jt)
			} else {
				at += int(i.Jf)
			}
		}
		switch i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = load(i.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == i.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(a >= i.K)
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			jump(a&i.K != 0)
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= i.K
		case unix.BPF_RET | unix.BPF_K:
			return i.K
		default:
			t.Fatalf("instruction %d has code %#x", at, i.Code)
		}
	}
	t.Fatal("the filter ends without an answer")
	return 0
}

func TestFilter(t *testing.T) {
	// Arguments that differ in one half each.
	exec := [3]uintptr{0x7f0011112222, 0x7f0033334444, 0x7f0055556666}
	program := filter(exec)
	const denied = returnErrno | uint32(unix.EPERM)
	execve := func(path, argv, env uint64) [6]uint64 { return [6]uint64{path, argv, env} }
	for name, c := range map[string]struct {
		call call
		want uint32
	}{
		"read":                        {call{number: unix.SYS_READ}, returnAllow},
		"accept a connection":         {call{number: unix.SYS_ACCEPT4}, returnAllow},
		"another architecture":        {call{number: unix.SYS_READ, arch: 0x40000003}, returnKill},
		"x32":                         {call{number: x32Bit | unix.SYS_READ}, returnKill},
		"ptrace":                      {call{number: unix.SYS_PTRACE}, denied},
		"mount":                       {call{number: unix.SYS_MOUNT}, denied},
		"bpf":                         {call{number: unix.SYS_BPF}, denied},
		"io_uring":                    {call{number: unix.SYS_IO_URING_SETUP}, denied},
		"unshare":                     {call{number: unix.SYS_UNSHARE}, denied},
		"kill another":                {call{number: unix.SYS_KILL}, denied},
		"read another's memory":       {call{number: unix.SYS_PROCESS_VM_READV}, denied},
		"fork":                        {call{number: unix.SYS_FORK}, denied},
		"execveat":                    {call{number: unix.SYS_EXECVEAT}, denied},
		"enter a network namespace":   {call{number: unix.SYS_SETNS, args: [6]uint64{3, unix.CLONE_NEWNET}}, returnAsk},
		"enter a mount namespace":     {call{number: unix.SYS_SETNS, args: [6]uint64{3, unix.CLONE_NEWNS}}, denied},
		"enter whatever it is":        {call{number: unix.SYS_SETNS, args: [6]uint64{3, 0}}, denied},
		"IPv4 socket":                 {call{number: unix.SYS_SOCKET, args: [6]uint64{unix.AF_INET, unix.SOCK_STREAM | unix.SOCK_NONBLOCK}}, returnAsk},
		"IPv6 socket":                 {call{number: unix.SYS_SOCKET, args: [6]uint64{unix.AF_INET6, unix.SOCK_STREAM | unix.SOCK_CLOEXEC}}, returnAsk},
		"UDP socket":                  {call{number: unix.SYS_SOCKET, args: [6]uint64{unix.AF_INET, unix.SOCK_DGRAM}}, denied},
		"raw socket":                  {call{number: unix.SYS_SOCKET, args: [6]uint64{unix.AF_INET6, unix.SOCK_RAW}}, denied},
		"listen":                      {call{number: unix.SYS_LISTEN}, returnAsk},
		"Unix socket":                 {call{number: unix.SYS_SOCKET, args: [6]uint64{unix.AF_UNIX}}, returnAllow},
		"netlink socket":              {call{number: unix.SYS_SOCKET, args: [6]uint64{unix.AF_NETLINK}}, denied},
		"packet socket":               {call{number: unix.SYS_SOCKET, args: [6]uint64{unix.AF_PACKET}}, denied},
		"vsock":                       {call{number: unix.SYS_SOCKET, args: [6]uint64{unix.AF_VSOCK}}, denied},
		"thread":                      {call{number: unix.SYS_CLONE, args: [6]uint64{unix.CLONE_THREAD | unix.CLONE_VM | unix.CLONE_SIGHAND}}, returnAllow},
		"process":                     {call{number: unix.SYS_CLONE, args: [6]uint64{unix.CLONE_VM}}, denied},
		"thread with a new namespace": {call{number: unix.SYS_CLONE, args: [6]uint64{unix.CLONE_THREAD | unix.CLONE_NEWUSER}}, denied},
		"clone3":                      {call{number: unix.SYS_CLONE3}, returnErrno | uint32(unix.ENOSYS)},
		"the one execve":              {call{number: unix.SYS_EXECVE, args: execve(0x7f0011112222, 0x7f0033334444, 0x7f0055556666)}, returnAllow},
		"execve of another path":      {call{number: unix.SYS_EXECVE, args: execve(0x7f0011112223, 0x7f0033334444, 0x7f0055556666)}, denied},
		"path differs above 32 bits":  {call{number: unix.SYS_EXECVE, args: execve(0x7f0111112222, 0x7f0033334444, 0x7f0055556666)}, denied},
		"execve with other arguments": {call{number: unix.SYS_EXECVE, args: execve(0x7f0011112222, 0x7f0033334445, 0x7f0055556666)}, denied},
		"arguments differ above":      {call{number: unix.SYS_EXECVE, args: execve(0x7f0011112222, 0x7f0133334444, 0x7f0055556666)}, denied},
		"another environment":         {call{number: unix.SYS_EXECVE, args: execve(0x7f0011112222, 0x7f0033334444, 0x7f0055556667)}, denied},
		"environment differs above":   {call{number: unix.SYS_EXECVE, args: execve(0x7f0011112222, 0x7f0033334444, 0x7f0155556666)}, denied},
	} {
		if c.call.arch == 0 {
			c.call.arch = auditArch
		}
		if got := run(t, program, c.call); got != c.want {
			t.Errorf("%s: %#x, want %#x", name, got, c.want)
		}
	}
}
