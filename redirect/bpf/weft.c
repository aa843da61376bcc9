// Umbrella of the hooks: one object, one file per hook. Plain UAPI, no CO-RE: it loads on Linux 6.1 and later.
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25

#include "types.h"
#include "maps.h"
#include "inline.h"

#include "connect.c"
#include "getpeername.c"
#include "bind.c"
#include "sockops.c"
#include "proxy_sockops.c"
#include "proxy_sockopt.c"
#include "lookup.c"

char LICENSE[] SEC("license") = "GPL";
