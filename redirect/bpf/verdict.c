// sk_skb/stream_verdict, on every socket that has joined: what arrives by TCP goes into the queue that the short circuit
// fills as well. With two queues the kernel would tell readers only of one: FIONREAD, MSG_WAITALL and edge-triggered
// epoll go wrong.
//
// The kernel hands segments over whole (tcp_read_skb), even one whose first bytes an earlier segment has brought, as it
// happens when segments overtake each other and are sent again in other pieces. A reader would get those bytes twice, so
// they are taken off here.

extern void *bpf_cast_to_kern_ctx(void *ctx) __ksym;

#define TRIM_STEP 4095 // what bpf_skb_adjust_room takes at most
#define TRIM_STEPS 160 // beyond the longest segment

INLINE bool trim(struct __sk_buff *ctx, __u32 n)
{
	if (bpf_skb_pull_data(ctx, n)) // once, for the steps
		return false;
	for (int i = 0; i < TRIM_STEPS && n; i++) {
		__u32 step = n < TRIM_STEP ? n : TRIM_STEP;
		if (bpf_skb_adjust_room(ctx, -(__s32)step, 0, 0))
			return false;
		n -= step;
	}
	return !n;
}

SEC("sk_skb/stream_verdict")
int stream_verdict(struct __sk_buff *ctx)
{
	struct sk_buff *skb = bpf_cast_to_kern_ctx(ctx);
	struct tcp_skb_cb segment;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct passed *passed = bpf_map_lookup_elem(&received, &cookie);
	if (!passed || bpf_core_read(&segment, sizeof(segment), &skb->cb))
		return SK_PASS; // it closes: sockops.c has let go of it
	__s32 again = passed->next - segment.seq;
	__u32 size = ctx->len;
	if (passed->known && again > 0 && size) {
		__u32 n = (__u32)again < size ? again : size;
		if (trim(ctx, n))
			count_shortcut(SHORTCUT_TRIMMED_BYTES, n);
		else
			count_shortcut(SHORTCUT_TRIM_FAILED, 1);
	}
	passed->next = segment.end_seq;
	passed->known = 1;
	return SK_PASS;
}
