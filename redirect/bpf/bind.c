// cgroup/bind4, bind6, post_bind4 and post_bind6, at the cgroup root: only Envoy binds a stream socket to a proxy port
// of an enrolled pod, and only its local legs to the addresses that they come from. post_bind sees ports that the kernel
// chose; listen(2) without bind runs no hook, which net.ipv4.ip_local_reserved_ports covers.

INLINE int bind(void *ctx, __u32 type, __u32 port)
{
	if (type != SOCK_STREAM || !is_proxy_port(port))
		return PASS;
	__u64 netns = bpf_get_netns_cookie(ctx);
	if (!find_pod(netns) || in_proxy())
		return PASS;
	count(COUNT_REFUSED_BIND);
	return REFUSE;
}

// The address that a client's local legs come from, the same for all of them: the kernel then gives each another port,
// as on the client itself, so that no two connections look alike to the app.
INLINE void choose_leg(__u32 *addr)
{
	__u32 hash = addr[0] ^ addr[1] * 0x85ebca6b ^ addr[2] * 0xc2b2ae35 ^ addr[3];
	bool ipv4 = is_ipv4(addr);
	hash = (hash ^ hash >> 16) * 0x7feb352d;
	hash = (hash ^ hash >> 15) * 0x846ca68b;
	hash ^= hash >> 16;
	if (ipv4) {
		addr[3] = LEG4 | bpf_htonl(hash & LEG4_HOST);
	} else {
		addr[0] = STEER6;
		addr[1] = 0;
		addr[2] = LEG6;
		addr[3] = bpf_htonl(hash);
	}
}

// Envoy binds a local leg to the client's address (its listener filter original_src). That address is not the pod's: it
// is kept for the app's end, and replaced by what the leg can come from. False: this is another bind.
INLINE bool bind_leg(struct bpf_sock_addr *ctx, __u32 *addr)
{
	if (ctx->type != SOCK_STREAM || ctx->user_port || is_unspecified(addr) || !ctx->sk || !in_proxy())
		return false;
	__u64 netns = bpf_get_netns_cookie(ctx);
	__u32 zero = 0;
	struct instance *set = bpf_map_lookup_elem(&config, &zero);
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	if (!set || !find_pod(netns) || !state || state->tag >> 16 != TAG_LOCAL_LEG)
		return false;
	bool whole = !set->own_address;
	if (whole) {
		COPY(state->addr, addr);
		state->kind = KIND_LEG;
	}
	if (whole && !is_link_local(addr)) { // a link's addresses do not mix with others
		choose_leg(addr);
		return true;
	}
	addr[0] = 0;
	addr[1] = 0;
	addr[2] = 0;
	addr[3] = 0;
	return true;
}

INLINE int bind_address(struct bpf_sock_addr *ctx, const __u32 *addr)
{
	if (ctx->type == SOCK_STREAM && is_leg(addr)) {
		__u64 netns = bpf_get_netns_cookie(ctx);
		if (find_pod(netns)) {
			count(COUNT_REFUSED_LEG_ADDRESS);
			return REFUSE;
		}
	}
	return bind(ctx, ctx->type, bpf_ntohs(ctx->user_port));
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	__u32 addr[4];
	map_ipv4(addr, ctx->user_ip4);
	if (bind_leg(ctx, addr)) {
		ctx->user_ip4 = addr[3];
		return PASS;
	}
	return bind_address(ctx, addr);
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	__u32 addr[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	if (bind_leg(ctx, addr)) {
		COPY(ctx->user_ip6, addr);
		return PASS;
	}
	return bind_address(ctx, addr);
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	return bind(ctx, ctx->type, ctx->src_port);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	return bind(ctx, ctx->type, ctx->src_port);
}
