// cgroup/getpeername4 and 6, at the cgroup root: shows an app the address it dialled instead of the steering address, and
// the client's address instead of a local leg's. accept(2) runs them too.

// The service that a steering address stands for, for sockets without state: connect saw MPTCP's subflow, not the
// socket that the app holds. The port is 0 where the app dialled a pod's address.
INLINE struct endpoint *find_steered(struct bpf_sock_addr *ctx, __u32 id)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	if (!is_proxy_port(bpf_ntohs(ctx->user_port)) || !find_pod(netns))
		return NULL;
	return bpf_map_lookup_elem(&service_ids, &id);
}

// True for a local leg whose client is not known: there was no memory to note it. Its own address would look like the
// loopback's, which apps trust; the pod's is shown instead.
INLINE bool is_unknown_client(struct bpf_sock_addr *ctx, const __u32 *addr)
{
	if (!is_leg(addr))
		return false;
	__u64 netns = bpf_get_netns_cookie(ctx);
	if (!find_pod(netns))
		return false;
	count(COUNT_CLIENT_UNKNOWN);
	return true;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	if (!ctx->sk)
		return PASS;
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	if (state && state->kind == KIND_OUT && is_ipv4(state->addr)) {
		ctx->user_ip4 = state->addr[3];
		ctx->user_port = bpf_htons(state->port);
		return PASS;
	}
	if (state && state->kind == KIND_LOCAL_ACCEPTED) {
		ctx->user_ip4 = state->addr[3]; // the port is the leg's
		return PASS;
	}
	__u32 addr = ctx->user_ip4;
	__u32 whole[4];
	map_ipv4(whole, addr);
	if (is_unknown_client(ctx, whole)) {
		ctx->user_ip4 = ctx->sk->src_ip4;
		return PASS;
	}
	if (state || (addr & STEER4_MASK) != STEER4)
		return PASS;
	struct endpoint *meant = find_steered(ctx, bpf_ntohl(addr) & STEER4_HOST);
	if (meant && is_ipv4(meant->addr)) {
		ctx->user_ip4 = meant->addr[3];
		ctx->user_port = bpf_htons(meant->port);
	}
	return PASS;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	if (!ctx->sk)
		return PASS;
	struct socket_state *state = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	if (state && state->kind == KIND_OUT) {
		COPY(ctx->user_ip6, state->addr);
		ctx->user_port = bpf_htons(state->port);
		return PASS;
	}
	if (state && state->kind == KIND_LOCAL_ACCEPTED) {
		COPY(ctx->user_ip6, state->addr);
		return PASS;
	}
	__u32 addr[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	if (is_unknown_client(ctx, addr)) {
		ctx->user_ip6[0] = ctx->sk->src_ip6[0];
		ctx->user_ip6[1] = ctx->sk->src_ip6[1];
		ctx->user_ip6[2] = ctx->sk->src_ip6[2];
		ctx->user_ip6[3] = ctx->sk->src_ip6[3];
		return PASS;
	}
	if (state)
		return PASS;
	__u32 id;
	if (is_steering6(addr))
		id = bpf_ntohl(addr[3]);
	else if (is_ipv4(addr) && (addr[3] & STEER4_MASK) == STEER4)
		id = bpf_ntohl(addr[3]) & STEER4_HOST;
	else
		return PASS;
	struct endpoint *meant = find_steered(ctx, id);
	if (meant) {
		COPY(ctx->user_ip6, meant->addr);
		ctx->user_port = bpf_htons(meant->port);
	}
	return PASS;
}
