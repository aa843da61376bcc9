// cgroup/setsockopt and getsockopt, at Envoy's own cgroup: the tag by which Envoy names a leg, and the original
// destination of what it accepted. From any other process the kernel answers ENOPROTOOPT and netfilter's view.

#define SO_ORIGINAL_DST 80 // the same number as IP6T_SO_ORIGINAL_DST
#define SOL_IP 0
#define SOL_IPV6 41
#define IP_TRANSPARENT 19
#define IPV6_TRANSPARENT 75
#define IPV6_FREEBIND 78

SEC("cgroup/setsockopt")
int proxy_setsockopt(struct bpf_sockopt *ctx)
{
	// Before it binds to a client's address Envoy asks for what needs CAP_NET_ADMIN. What the bind hook makes of that
	// address needs less: nothing where it is the loopback's, and no right where it is of no interface.
	if (ctx->level == SOL_IP && ctx->optname == IP_TRANSPARENT) {
		ctx->optlen = -1;
		return PASS;
	}
	if (ctx->level == SOL_IPV6 && ctx->optname == IPV6_TRANSPARENT) {
		ctx->optname = IPV6_FREEBIND;
		return PASS;
	}
	if (ctx->level != OPTION_LEVEL || ctx->optname != OPTION_NAME)
		return PASS;
	struct bpf_sock *sk = ctx->sk;
	__u32 *value = ctx->optval;
	if (!sk || (void *)(value + 1) > ctx->optval_end)
		return REFUSE;
	struct socket_state *state = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state)
		return REFUSE;
	state->tag = *value;
	ctx->optlen = -1; // done: the kernel does not know this option
	return PASS;
}

struct socket_address4 {
	__u16 family, port;
	__u32 addr, zero[2];
};

struct socket_address6 {
	__u16 family, port;
	__u32 flow, addr[4], scope;
};

SEC("cgroup/getsockopt")
int proxy_getsockopt(struct bpf_sockopt *ctx)
{
	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		return PASS;
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return REFUSE;
	struct socket_state *state = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!state || state->kind != KIND_OUT_ACCEPTED) {
		count(COUNT_ORIGINAL_DST_MISSING); // an error: netfilter's answer would be somebody else's
		return REFUSE;
	}
	// Both are loaded before any branch: clang 14 otherwise computes on ctx, which the verifier refuses.
	void *value = ctx->optval, *end = ctx->optval_end;
	if (is_ipv4(state->addr)) {
		struct socket_address4 *to = value;
		if ((void *)(to + 1) > end)
			return REFUSE;
		to->family = AF_INET;
		to->port = bpf_htons(state->port);
		to->addr = state->addr[3];
		to->zero[0] = 0;
		to->zero[1] = 0;
		ctx->optlen = sizeof(*to);
	} else {
		struct socket_address6 *to = value;
		if ((void *)(to + 1) > end)
			return REFUSE;
		to->family = AF_INET6;
		to->port = bpf_htons(state->port);
		to->flow = 0;
		to->scope = 0;
		COPY(to->addr, state->addr);
		ctx->optlen = sizeof(*to);
	}
	asm volatile("" ::: "memory"); // keeps optlen and retval two 32-bit stores, which is all the verifier takes
	ctx->retval = 0;
	return PASS;
}
