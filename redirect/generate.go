package redirect

// The headers' path is Debian's for amd64; the objects are the same on every little-endian machine.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target bpfel -cc clang -no-global-types -type pod_flag -type port -type option -type role -type counter -type shortcut_counter -type pod -type pod_record -type usage -type pod_address -type pod_port -type endpoint -type address -type service -type tuple -type handover -type listener -type instance -type peer -type passed weft bpf/weft.c -- -O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target bpfel -cc clang -no-global-types shortcut bpf/shortcut.c -- -O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu
