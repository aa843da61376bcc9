// sockops, at the cgroup root: carries the original destination from the client's socket to the accepted one, and lets
// both ends join the short circuit.

// Both ends of the socket, its own first; false for a family that is not IP.
INLINE bool read_ends(struct bpf_sock_ops *ctx, __u32 *local, __u32 *remote, __u16 *local_port, __u16 *remote_port)
{
	if (ctx->family == AF_INET) {
		map_ipv4(local, ctx->local_ip4);
		map_ipv4(remote, ctx->remote_ip4);
	} else if (ctx->family == AF_INET6) {
		local[0] = ctx->local_ip6[0];
		local[1] = ctx->local_ip6[1];
		local[2] = ctx->local_ip6[2];
		local[3] = ctx->local_ip6[3];
		remote[0] = ctx->remote_ip6[0];
		remote[1] = ctx->remote_ip6[1];
		remote[2] = ctx->remote_ip6[2];
		remote[3] = ctx->remote_ip6[3];
	} else {
		return false;
	}
	*local_port = ctx->local_port;
	*remote_port = bpf_ntohl(ctx->remote_port);
	return true;
}

// Other meshes and CNIs set flags of their own on the same socket.
INLINE void watch_close(struct bpf_sock_ops *ctx)
{
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

INLINE bool is_client(struct socket_state *state)
{
	return state->kind == KIND_OUT || state->kind == KIND_LOCAL || state->kind == KIND_PROBE;
}

// Lets a socket of a pod that has the short circuit join it. One that cannot stays on TCP, like its peer's payload.
INLINE void join(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u64 netns)
{
	struct pod *pod = find_pod(netns);
	if (!pod || !(pod->flags & POD_SHORTCUT))
		return;
	struct tuple key = { .netns = netns };
	if (!read_ends(ctx, key.source, key.destination, &key.source_port, &key.destination_port))
		return;
	struct peer self = { .socket = (__u64)sk, .cookie = bpf_get_socket_cookie(ctx) };
	struct passed nothing = {};
	if (bpf_map_update_elem(&peers, &key, &self, BPF_ANY)) {
		count_shortcut(SHORTCUT_FULL, 1);
		return;
	}
	long failed = bpf_map_update_elem(&received, &self.cookie, &nothing, BPF_ANY);
	if (!failed)
		failed = bpf_sock_hash_update(ctx, &joined, &key, BPF_NOEXIST);
	if (failed) { // no room, or no plain TCP socket
		bpf_map_delete_elem(&peers, &key);
		bpf_map_delete_elem(&received, &self.cookie);
		count_shortcut(failed == -E2BIG ? SHORTCUT_FULL : SHORTCUT_REFUSED, 1);
		return;
	}
	count_shortcut(SHORTCUT_JOINED, 1);
	watch_close(ctx);
}

// The kernel itself takes a closed socket out of joined.
INLINE void leave(struct bpf_sock_ops *ctx)
{
	struct tuple key = { .netns = bpf_get_netns_cookie(ctx) };
	if (!read_ends(ctx, key.source, key.destination, &key.source_port, &key.destination_port))
		return;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct peer *self = bpf_map_lookup_elem(&peers, &key);
	if (!self || self->cookie != cookie) // a later connection's on the same ports
		return;
	bpf_map_delete_elem(&peers, &key);
	bpf_map_delete_elem(&received, &cookie);
}

// The client's end of a captured connection, or of Envoy's last hop.
INLINE void on_connected(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return;
	struct socket_state *state = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (state && (state->kind == KIND_OUT || state->kind == KIND_LOCAL))
		join(ctx, sk, state->netns);
}

// The source port is known, the SYN not sent.
INLINE void on_connect(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return;
	struct socket_state *state = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!state || !is_client(state))
		return;
	struct tuple key = { .netns = state->netns };
	if (!read_ends(ctx, key.source, key.destination, &key.source_port, &key.destination_port))
		return;
	struct handover value = {
		.socket = bpf_get_socket_cookie(ctx),
		.time = bpf_ktime_get_ns(),
		.port = state->port,
		.kind = state->kind,
	};
	COPY(value.addr, state->addr);
	if (bpf_map_update_elem(&handovers, &key, &value, BPF_ANY)) {
		count(COUNT_OUT_LOST_FULL); // sk_lookup refuses a steering address that it does not find
		if (state->kind == KIND_LOCAL && !is_leg(key.source)) // the pod's own address it would take for anybody's dial
			bpf_map_update_elem(&lost_legs, &key.netns, &value.time, BPF_ANY);
		return;
	}
	watch_close(ctx);
	if (state->counted)
		return;
	if (state->kind == KIND_LOCAL) {
		__u64 *open = bpf_map_lookup_elem(&legs, &key.netns);
		if (open) {
			__sync_fetch_and_add(open, 1);
			state->counted = 1;
		}
		return;
	}
	if (state->kind != KIND_OUT)
		return;
	struct usage *usage = bpf_map_lookup_elem(&usages, &key.netns);
	if (usage) {
		__sync_fetch_and_add(&usage->outgoing, 1);
		state->counted = 1;
	}
}

// The server's end of any connection that arrives in an enrolled pod: Envoy's, or for a local leg or probe the app's.
INLINE void on_accept(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	if (!find_pod(netns))
		return;
	struct tuple key = { .netns = netns };
	if (!read_ends(ctx, key.destination, key.source, &key.destination_port, &key.source_port))
		return;
	struct handover *value = bpf_map_lookup_elem(&handovers, &key);
	if (!value)
		return;
	struct bpf_sock *sk = ctx->sk;
	if (sk && (value->kind == KIND_OUT || value->kind == KIND_LOCAL))
		join(ctx, sk, netns);
	if (sk && value->kind == KIND_OUT) {
		struct socket_state *state = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (state) {
			COPY(state->addr, value->addr);
			state->port = value->port;
			state->kind = KIND_OUT_ACCEPTED;
		}
	}
	if (sk && value->kind == KIND_LOCAL && !is_unspecified(value->addr)) {
		struct socket_state *state = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (state) { // else getpeername shows the pod's own address
			COPY(state->addr, value->addr);
			state->kind = KIND_LOCAL_ACCEPTED;
		}
	}
	bpf_map_delete_elem(&handovers, &key);
}

// Takes a connection out of its pod's count. The entry may be a later one of the same netns, which starts at zero.
INLINE void uncount(struct socket_state *state)
{
	__u64 netns = state->netns;
	struct usage *usage = bpf_map_lookup_elem(&usages, &netns);
	if (usage && state->kind == KIND_OUT && usage->outgoing)
		__sync_fetch_and_add(&usage->outgoing, -1);
	if (usage && state->kind == KIND_IN_ACCEPTED && usage->incoming)
		__sync_fetch_and_add(&usage->incoming, -1);
	__u64 *open = state->kind == KIND_LOCAL ? bpf_map_lookup_elem(&legs, &netns) : NULL;
	if (open && *open)
		__sync_fetch_and_add(open, -1);
	state->counted = 0;
}

// A counted socket, or a client's end, is gone: with it goes its hand-over if no server took it.
INLINE void on_close(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return;
	leave(ctx);
	struct socket_state *state = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!state)
		return;
	if (state->counted)
		uncount(state);
	if (!is_client(state))
		return;
	struct tuple key = { .netns = state->netns };
	if (!read_ends(ctx, key.source, key.destination, &key.source_port, &key.destination_port))
		return;
	struct handover *value = bpf_map_lookup_elem(&handovers, &key);
	if (value && value->socket == bpf_get_socket_cookie(ctx)) { // not a later connection's on the same ports
		bpf_map_delete_elem(&handovers, &key);
		count(COUNT_CLOSED_BEFORE_ACCEPT);
	}
}

SEC("sockops")
int socket_ops(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op;
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		on_connect(ctx);
	else if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		on_connected(ctx);
	else if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		on_accept(ctx);
	else if (op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE)
		on_close(ctx);
	return 1;
}
