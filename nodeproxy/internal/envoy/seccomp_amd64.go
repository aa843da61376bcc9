package envoy

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// allowed system calls of Envoy: seen under load, at start and at exit; see docs/SECURITY.md. What is not here answers
// EPERM. setns, clone and execve have conditions of their own in filter.
var allowed = []uint32{
	// Steady state.
	unix.SYS_ACCEPT4, unix.SYS_BIND, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOSE, unix.SYS_CONNECT, unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL,
	unix.SYS_EPOLL_WAIT, unix.SYS_EVENTFD2, unix.SYS_FUTEX, unix.SYS_GETPEERNAME, unix.SYS_GETPID, unix.SYS_GETRANDOM, unix.SYS_GETSOCKNAME,
	unix.SYS_GETSOCKOPT, unix.SYS_GETTID, unix.SYS_INOTIFY_ADD_WATCH, unix.SYS_INOTIFY_INIT1, unix.SYS_LSEEK, unix.SYS_MADVISE,
	unix.SYS_MMAP, unix.SYS_MPROTECT, unix.SYS_MUNMAP, unix.SYS_NEWFSTATAT, unix.SYS_OPENAT, unix.SYS_POLL, unix.SYS_READ, unix.SYS_READLINK,
	unix.SYS_READV, unix.SYS_RECVFROM, unix.SYS_RECVMSG, unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SCHED_YIELD,
	unix.SYS_SENDTO, unix.SYS_SETSOCKOPT, unix.SYS_SHUTDOWN, unix.SYS_SIGALTSTACK, unix.SYS_UNLINK, unix.SYS_WRITE, unix.SYS_WRITEV,
	// Start: loader, C library, threads, the admin socket's mode.
	unix.SYS_ACCESS, unix.SYS_ARCH_PRCTL, unix.SYS_BRK, unix.SYS_GETCWD, unix.SYS_MINCORE, unix.SYS_PIPE2, unix.SYS_PREAD64, unix.SYS_PRLIMIT64,
	unix.SYS_RSEQ, unix.SYS_SCHED_GETPARAM, unix.SYS_SCHED_GETSCHEDULER, unix.SYS_SET_ROBUST_LIST, unix.SYS_SET_TID_ADDRESS, unix.SYS_CHMOD,
	// The access log on standard output.
	unix.SYS_DUP,
	// Exit, allocator, gRPC, other C libraries.
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RESTART_SYSCALL, unix.SYS_FSTAT, unix.SYS_FCNTL, unix.SYS_SENDMSG, unix.SYS_EPOLL_PWAIT,
	unix.SYS_SCHED_GETAFFINITY, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_GETRES, unix.SYS_GETTIMEOFDAY, unix.SYS_NANOSLEEP, unix.SYS_MEMBARRIER,
	unix.SYS_MREMAP, unix.SYS_UNAME, unix.SYS_SYSINFO, unix.SYS_GETCPU, unix.SYS_INOTIFY_RM_WATCH, unix.SYS_STATX, unix.SYS_GETUID, unix.SYS_GETEUID,
	unix.SYS_GETGID, unix.SYS_GETEGID,
}

const (
	auditArch = 0xc000003e // AUDIT_ARCH_X86_64
	x32Bit    = 0x40000000
	// forbiddenClone are the flags of a fork or of a new namespace: all CLONE_NEW* flags.
	forbiddenClone = 0x7e020080

	returnKill  = 0x80000000
	returnErrno = 0x00050000
	returnAsk   = 0x7fc00000 // SECCOMP_RET_USER_NOTIF: the broker answers
	returnAllow = 0x7fff0000

	offsetNumber, offsetArch, offsetArgs = 0, 4, 16
)

// filter builds the seccomp program. The one execve that it allows is the call with exactly these three arguments, which
// are addresses of a mapping that is gone after it.
func filter(execve [3]uintptr) []unix.SockFilter {
	var f []unix.SockFilter
	statement := func(code uint16, k uint32) { f = append(f, unix.SockFilter{Code: code, K: k}) }
	jump := func(code uint16, k uint32, yes, no uint8) {
		f = append(f, unix.SockFilter{Code: code, Jt: yes, Jf: no, K: k})
	}
	load := func(offset uint32) { statement(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset) }
	give := func(k uint32) { statement(unix.BPF_RET|unix.BPF_K, k) }
	const equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	const set = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K

	load(offsetArch)
	jump(equal, auditArch, 1, 0)
	give(returnKill)
	load(offsetNumber)
	jump(unix.BPF_JMP|unix.BPF_JGE|unix.BPF_K, x32Bit, 0, 1)
	give(returnKill)

	// glibc falls back to clone, whose flags can be seen.
	jump(equal, unix.SYS_CLONE3, 0, 1)
	give(returnErrno | uint32(unix.ENOSYS))

	// setns: network namespaces alone.
	jump(equal, unix.SYS_SETNS, 0, 4)
	load(offsetArgs + 8)
	jump(equal, unix.CLONE_NEWNET, 0, 1)
	give(returnAsk)
	give(returnErrno | uint32(unix.EPERM))

	// socket: what proxies need; no netlink, packet, vsock, and of the Internet's TCP alone.
	jump(equal, unix.SYS_SOCKET, 0, 10)
	load(offsetArgs)
	jump(equal, unix.AF_UNIX, 6, 0)
	jump(equal, unix.AF_INET, 1, 0)
	jump(equal, unix.AF_INET6, 0, 5)
	load(offsetArgs + 8)
	statement(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, socketTypeMask)
	jump(equal, unix.SOCK_STREAM, 0, 2)
	give(returnAsk)
	give(returnAllow)
	give(returnErrno | uint32(unix.EPERM))

	// listen: the broker keeps a duplicate of the socket.
	jump(equal, unix.SYS_LISTEN, 0, 1)
	give(returnAsk)

	// clone: threads alone.
	jump(equal, unix.SYS_CLONE, 0, 5)
	load(offsetArgs)
	jump(set, forbiddenClone, 2, 0)
	jump(set, unix.CLONE_THREAD, 0, 1)
	give(returnAllow)
	give(returnErrno | uint32(unix.EPERM))

	// execve: this one alone.
	jump(equal, unix.SYS_EXECVE, 0, 14)
	for i, a := range execve {
		left := uint8(2*(2-i))*2 + 1 // instructions up to the refusal
		load(uint32(offsetArgs + 8*i))
		jump(equal, uint32(a), 0, left+2)
		load(uint32(offsetArgs + 8*i + 4))
		jump(equal, uint32(uint64(a)>>32), 0, left)
	}
	give(returnAllow)
	give(returnErrno | uint32(unix.EPERM))

	for _, number := range allowed {
		jump(equal, number, 0, 1)
		give(returnAllow)
	}
	give(returnErrno | uint32(unix.EPERM))
	return f
}

// confine installs the filter on the calling thread, hands the listener of its notifications over and replaces the process by
// argv. It returns only on failure.
func confine(path string, argv, env []string, handOver func(listener int) error) error {
	arguments, err := stringTable(append([]string{path}, argv...), env)
	if err != nil {
		return err
	}
	program := filter([3]uintptr{arguments.path, arguments.argv, arguments.env})
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	listener, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	// The kernel closes it at execve: Envoy cannot answer for the broker.
	if err := handOver(int(listener)); err != nil {
		return fmt.Errorf("hand the notifications over: %w", err)
	}
	_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, arguments.path, arguments.argv, arguments.env)
	return errno
}
