// sk_msg, on every socket that has joined: what an app or Envoy sends goes straight to the other end's queue, without
// TCP, as long as that keeps the order and the bound. Whatever speaks against it, the message stays on TCP; the verdict
// is never to drop, which the sender would see as EACCES.
//
// Order holds both ways. To the short circuit: only when the reader has taken everything that was sent by TCP. Back to
// TCP: the reader takes what waits in the short circuit first, for stream_verdict (verdict.c) puts what TCP brings behind it.

// The other end, as it sees the connection.
INLINE bool other_end(struct sk_msg_md *ctx, struct tuple *end)
{
	end->netns = bpf_get_netns_cookie(ctx);
	if (ctx->family == AF_INET) {
		map_ipv4(end->source, ctx->remote_ip4);
		map_ipv4(end->destination, ctx->local_ip4);
	} else if (ctx->family == AF_INET6) {
		end->source[0] = ctx->remote_ip6[0];
		end->source[1] = ctx->remote_ip6[1];
		end->source[2] = ctx->remote_ip6[2];
		end->source[3] = ctx->remote_ip6[3];
		end->destination[0] = ctx->local_ip6[0];
		end->destination[1] = ctx->local_ip6[1];
		end->destination[2] = ctx->local_ip6[2];
		end->destination[3] = ctx->local_ip6[3];
	} else {
		return false;
	}
	end->source_port = bpf_ntohl(ctx->remote_port);
	end->destination_port = ctx->local_port;
	return true;
}

// True while somebody can read from the socket: it is accepted and not closed, and neither it nor its address is another's.
INLINE bool is_open(struct sock *sk, __u64 cookie)
{
	if ((__u64)BPF_CORE_READ(sk, __sk_common.skc_cookie.counter) != cookie)
		return false;
	unsigned char state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state != BPF_TCP_ESTABLISHED && state != BPF_TCP_FIN_WAIT1 && state != BPF_TCP_FIN_WAIT2)
		return false;
	if (!BPF_CORE_READ(sk, sk_socket))
		return false;
	// A socket with a protocol of its own on TCP (kTLS) would take these bytes for what has been through it.
	return !BPF_CORE_READ((struct inet_connection_sock *)sk, icsk_ulp_ops);
}

SEC("sk_msg")
int msg_verdict(struct sk_msg_md *ctx)
{
	__u32 size = ctx->size, zero = 0;
	struct tuple to = {};
	struct bpf_sock *sk = ctx->sk;
	struct instance *set = bpf_map_lookup_elem(&config, &zero);
	if (!sk || !set || !other_end(ctx, &to))
		return SK_PASS;
	struct pod *pod = find_pod(to.netns);
	if (!pod || !(pod->flags & POD_SHORTCUT)) { // switched off since the socket joined
		count_shortcut(SHORTCUT_PASSED_OFF_BYTES, size);
		return SK_PASS;
	}
	struct peer *peer = bpf_map_lookup_elem(&peers, &to);
	struct tcp_sock *self = bpf_skc_to_tcp_sock(sk);
	if (!peer || !self) { // the other end could not join, or has not yet
		count_shortcut(SHORTCUT_PASSED_ALONE_BYTES, size);
		return SK_PASS;
	}
	struct sock *reader = (struct sock *)peer->socket;
	if (!is_open(reader, peer->cookie) || self->inet_conn.icsk_ulp_ops) {
		count_shortcut(SHORTCUT_PASSED_CLOSED_BYTES, size);
		return SK_PASS;
	}
	if (self->write_seq != BPF_CORE_READ((struct tcp_sock *)reader, copied_seq)) {
		count_shortcut(SHORTCUT_PASSED_UNREAD_BYTES, size);
		return SK_PASS; // what TCP has of this sender is not read yet
	}
	__u64 waiting = (__u32)BPF_CORE_READ(reader, sk_backlog.rmem_alloc.counter);
	if (waiting + size > (__u64)set->bound << 10) {
		count_shortcut(SHORTCUT_PASSED_BOUND_BYTES, size);
		return SK_PASS; // the reader is slow: TCP holds the sender back
	}
	if (bpf_msg_redirect_hash(ctx, &joined, &to, BPF_F_INGRESS) == SK_PASS)
		count_shortcut(SHORTCUT_REDIRECTED_BYTES, size);
	else
		count_shortcut(SHORTCUT_PASSED_CLOSED_BYTES, size); // it closed just now
	return SK_PASS;
}
