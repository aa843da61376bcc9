// What an attacker would try who runs code in Envoy's place: a line for each attempt, "allowed" or why not.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static void tried(const char *what, long result) {
	fprintf(stderr, "attempt %s: %s\n", what, result < 0 ? strerror(errno) : "allowed");
}

static long enter(int fd, int kind) { return syscall(SYS_setns, fd, kind); }

int main(void) {
	int pod = open(POD, O_RDONLY), own = open("/proc/self/ns/net", O_RDONLY);
	char where[64];
	struct iovec to = {where, 8}, from = {(void *)0x400000, 8};
	unsigned zeros[32] = {0};
	pid_t parent = getppid();

	// What Envoy needs. The control: these must go.
	tried("control enter a network namespace", enter(pod, CLONE_NEWNET));
	tried("control TCP socket there", socket(AF_INET, SOCK_STREAM, 0));
	tried("control TCP socket of IPv6 there", socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP));
	tried("packet socket there", socket(AF_PACKET, SOCK_RAW, htons(3)));
	tried("netlink socket there", socket(AF_NETLINK, SOCK_RAW, 0));
	tried("raw socket there", socket(AF_INET, SOCK_RAW, 1));
	tried("UDP socket there", socket(AF_INET, SOCK_DGRAM, 0));
	tried("MPTCP socket there", socket(AF_INET, SOCK_STREAM, 262));
	tried("family beyond 32 bits", syscall(SYS_socket, AF_INET | (1L << 32), SOCK_RAW | (1L << 40), 0));
	tried("control leave it", enter(own, CLONE_NEWNET));
	tried("control TCP socket", socket(AF_INET, SOCK_STREAM, 0));

	enter(open(OTHER, O_RDONLY), CLONE_NEWNET);
	tried("TCP socket of a pod outside the mesh", socket(AF_INET, SOCK_STREAM, 0));
	enter(own, CLONE_NEWNET);
	tried("enter what is no namespace", enter(open("/etc/hostname", O_RDONLY), CLONE_NEWNET));
	tried("enter nothing", enter(9999, CLONE_NEWNET));
	tried("enter whatever it is", enter(pod, 0));
	tried("enter a mount namespace", enter(open("/proc/self/ns/mnt", O_RDONLY), CLONE_NEWNS));
	tried("enter a mount namespace as a network", enter(open("/proc/self/ns/mnt", O_RDONLY), CLONE_NEWNET));
	tried("enter a user namespace", enter(open("/proc/self/ns/user", O_RDONLY), CLONE_NEWUSER));
	tried("enter the supervisor's network", open("/proc/1/ns/net", O_RDONLY));

	tried("packet socket", socket(AF_PACKET, SOCK_RAW, htons(3)));
	tried("netlink socket", socket(AF_NETLINK, SOCK_RAW, 0));
	tried("vsock", socket(AF_VSOCK, SOCK_STREAM, 0));
	tried("XDP socket", socket(44, SOCK_RAW, 0));
	tried("crypto socket", socket(AF_ALG, SOCK_SEQPACKET, 0));
	tried("raw socket", socket(AF_INET, SOCK_RAW, 1));
	tried("socket pair", ({ int pair[2]; socketpair(AF_UNIX, SOCK_STREAM, 0, pair); }));

	snprintf(where, sizeof where, "/proc/%d/mem", parent);
	tried("the supervisor's memory", open(where, O_RDWR));
	snprintf(where, sizeof where, "/proc/%d/environ", parent);
	tried("the supervisor's environment", open(where, O_RDONLY));
	snprintf(where, sizeof where, "/proc/%d/root/etc/shadow", parent);
	tried("the supervisor's files", open(where, O_RDONLY));
	tried("trace the supervisor", ptrace(PTRACE_SEIZE, parent, 0, 0));
	tried("be traced", ptrace(PTRACE_TRACEME, 0, 0, 0));
	tried("read another's memory", process_vm_readv(parent, &to, 1, &from, 1, 0));
	tried("name another by a descriptor", syscall(SYS_pidfd_open, parent, 0));
	tried("take another's descriptor", syscall(SYS_pidfd_getfd, 0, 3, 0));
	tried("signal another", kill(parent, 0));

	tried("new user namespace", unshare(CLONE_NEWUSER));
	tried("new network namespace", unshare(CLONE_NEWNET));
	tried("process", syscall(SYS_fork));
	tried("process by clone", syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
	tried("process by clone3", syscall(SYS_clone3, zeros, 88));
	tried("thread in a new user namespace", syscall(SYS_clone, CLONE_THREAD | CLONE_VM | CLONE_SIGHAND | CLONE_NEWUSER, 0, 0, 0, 0));
	tried("another program", execl("/bin/true", "true", NULL));
	tried("memory file", syscall(SYS_memfd_create, "x", 0));

	tried("io_uring", syscall(SYS_io_uring_setup, 4, zeros));
	tried("bpf", syscall(SYS_bpf, 0, zeros, 72));
	tried("perf", syscall(SYS_perf_event_open, zeros, 0, -1, -1, 0));
	tried("userfaultfd", syscall(SYS_userfaultfd, 1));
	tried("keys", syscall(SYS_keyctl, 0, -3, 0));
	tried("another filter", syscall(SYS_seccomp, 1, 0, zeros));
	tried("be dumped", prctl(PR_SET_DUMPABLE, 1));
	tried("outlive the supervisor", prctl(PR_SET_PDEATHSIG, 0));

	tried("mount", mount("x", "/tmp", "tmpfs", 0, 0));
	tried("mount by descriptor", syscall(SYS_fsopen, "tmpfs", 0));
	tried("change the root", chroot("/"));
	tried("device", mknod("/tmp/weft-escape", S_IFBLK | 0600, 0x800));
	tried("become root", setuid(0));
	tried("change the kernel's settings", open("/proc/sys/net/ipv4/ip_forward", O_WRONLY));
	tried("read shadow", open("/etc/shadow", O_RDONLY));
	fprintf(stderr, "attempts end\n");
	return 0;
}
