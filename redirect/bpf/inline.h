// Address arithmetic and lookups that several hooks use.
#pragma once

#define INLINE static __always_inline
#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define E2BIG 7
#define EAGAIN 11

// Return values of cgroup hooks. A refusal reaches the app as EPERM unless bpf_set_retval says otherwise.
#define PASS 1
#define REFUSE 0

#define STEER4 bpf_htonl(0x7f400000) // 127.64.0.0/10
#define STEER4_MASK bpf_htonl(0xffc00000)
#define STEER4_HOST 0x003fffff
#define STEER6 bpf_htonl(0xfd775eed) // fd77:5eed::/64

// Of these ranges the parts from which local legs come; no id is in them.
#define LEG4 bpf_htonl(0x7f700000) // 127.112.0.0/12
#define LEG4_MASK bpf_htonl(0xfff00000)
#define LEG4_HOST 0x000fffff
#define LEG6 bpf_htonl(1) // fd77:5eed::1:0:0/96

// Replaced by the loader, once per program instance: the netns cookie of a pod, or the generation of an Envoy.
#define PATCHED(VARIABLE) asm volatile("%0 = 0x1122334455667788 ll" : "=r"(VARIABLE))

#define COPY(TO, FROM)               \
	do {                         \
		(TO)[0] = (FROM)[0]; \
		(TO)[1] = (FROM)[1]; \
		(TO)[2] = (FROM)[2]; \
		(TO)[3] = (FROM)[3]; \
	} while (0)

INLINE void count(enum counter which)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &which);
	if (value)
		(*value)++;
}

INLINE void count_shortcut(enum shortcut_counter which, __u64 n)
{
	__u64 *value = bpf_map_lookup_elem(&shortcuts, &which);
	if (value)
		*value += n;
}

INLINE void map_ipv4(__u32 *addr, __u32 ipv4)
{
	addr[0] = 0;
	addr[1] = 0;
	addr[2] = bpf_htonl(0xffff);
	addr[3] = ipv4;
}

INLINE bool is_ipv4(const __u32 *addr)
{
	return addr[0] == 0 && addr[1] == 0 && addr[2] == bpf_htonl(0xffff);
}

// Loopback or unspecified, which connect(2) takes for loopback. 127.64.0.0/10 is loopback, fd77:5eed::/64 is not.
INLINE bool is_loopback(const __u32 *addr)
{
	if (is_ipv4(addr))
		return (addr[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) || addr[3] == 0;
	return addr[0] == 0 && addr[1] == 0 && addr[2] == 0 && (addr[3] == bpf_htonl(1) || addr[3] == 0);
}

INLINE bool is_steering6(const __u32 *addr)
{
	return addr[0] == STEER6 && addr[1] == 0;
}

// An address from which Envoy's local legs come: nobody else binds to it or dials it.
INLINE bool is_leg(const __u32 *addr)
{
	if (is_ipv4(addr))
		return (addr[3] & LEG4_MASK) == LEG4;
	return is_steering6(addr) && addr[2] == LEG6;
}

INLINE bool is_unspecified(const __u32 *addr)
{
	return addr[0] == 0 && addr[1] == 0 && addr[3] == 0 && (addr[2] == 0 || addr[2] == bpf_htonl(0xffff));
}

INLINE bool is_link_local(const __u32 *addr)
{
	return (addr[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

INLINE bool is_proxy_port(__u32 port)
{
	return port >= PORT_FIRST && port <= PORT_LAST;
}

INLINE struct pod *find_pod(__u64 netns)
{
	return bpf_map_lookup_elem(&pods, &netns);
}

// How long an agent may be silent: longer than a restart of its container takes.
#define SILENT_NS 30000000000ULL

// True where no agent has lived for a while. Where no Envoy listens either, weft is gone from the node without having been told to
// go, and a pod that takes plaintext is as it would be without weft.
INLINE bool abandoned(void)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&seen, &zero);
	return last && *last && bpf_ktime_get_ns() - *last > SILENT_NS;
}

// True for a process in the cgroup of one of this instance's Envoys. Only where a process runs the hook.
INLINE bool in_proxy(void)
{
	__u64 cgroup = bpf_get_current_cgroup_id();
	return bpf_map_lookup_elem(&proxies, &cgroup) != NULL;
}
