#!/usr/bin/env bash
# Runs a command (default: make test) on this clone's HEAD in a fresh Debian 12 root with empty caches: what the
# command needs and does not install itself is missing there. Only Go and the kernel's modules are lent to it.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$(pwd)
self=$source/hack/fresh.sh
base=$source/.out/fresh/base root=$source/.out/fresh/root
# Each clone has a path of its own in there, so that two clones' clusters have names of their own on the machine.
clone=/work$source

# What runs in the root: the command in a process group of its own, so that Ctrl-C and SIGTERM reach all of it and this
# shell outlives it. A cluster that the command leaves is ended.
inside='
set -eum
cd "$1"
shift
umount -l /.machine
trap "[ ! -x .cluster/bin/cluster ] || .cluster/bin/cluster down || exit 1" EXIT
"$@" 9>&- &
set +m
trap "kill -INT -- -$!" INT
trap "kill -TERM -- -$!" TERM
code=0
while wait $! || code=$?; kill -0 $! 2>/dev/null; do :; done
exit $code
'

# enter runs in a mount namespace of its own, whose mounts do not reach the machine and end with it. The root becomes
# the namespace's own: tests and nodes make their mounts private, which only the root of a mount takes, and nsenter
# must come out in it.
enter() {
	mount --bind "$root" "$root"
	mount -t proc proc "$root/proc"
	mount --rbind /sys "$root/sys"
	mount --rbind /dev "$root/dev"
	mount -t tmpfs tmpfs "$root/run"
	lend "$(go env GOROOT)" /usr/local/go
	[[ ! -d /lib/modules ]] || lend /lib/modules /lib/modules
	local name keep=()
	while IFS='=' read -r name _; do
		case $name in *_proxy | *_PROXY | GOPROXY | GOSUMDB | GONOSUMDB | GOFLAGS | PIP_* | SSL_CERT_* | REQUESTS_CA_BUNDLE | CURL_CA_BUNDLE) keep+=("$name=${!name}") ;; esac
	done < <(env)
	mkdir -p "$root/.machine"
	cd "$root"
	pivot_root . .machine
	exec env -i "${keep[@]}" HOME=/root TERM="${TERM:-dumb}" PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		chroot . /bin/bash -c "$inside" fresh "$clone" "$@"
}

# lend shows a folder of the machine in the root, read-only.
lend() { # folder, place
	mkdir -p "$root$2"
	mount --bind "$1" "$root$2"
	mount -o remount,bind,ro "$root$2"
}

in_namespace=(unshare --mount --propagation slave -- "$self" --entered)

# make_base makes a Debian 12 with nothing but what one needs to get at a clone and to start make.
make_base() {
	# The mirror is the one that this machine's own apt uses.
	local mirror
	mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security | sort -u | sed -n 1p)
	[[ -n $mirror ]] || { echo "fresh: apt on this machine names no mirror: add one to /etc/apt" >&2; exit 1; }
	echo "fresh: making a Debian 12 root in $base"
	rm -rf "$base.part"
	debootstrap --variant=minbase --include=ca-certificates,kmod,make,git bookworm "$base.part" "$mirror" >"$base.log" 2>&1 || { tail -n 20 "$base.log" >&2; exit 1; }
	mv "$base.part" "$base"
}

# make_root copies the base, and into it what apt, pip and go were told on this machine about mirrors and certificates.
make_root() {
	rm -rf --one-file-system "$root"
	cp -a --reflink=auto "$base" "$root"
	cp -a /etc/apt/. "$root/etc/apt/"
	cp -a /usr/share/keyrings/. "$root/usr/share/keyrings/"
	cp -L --remove-destination /etc/resolv.conf /etc/hosts "$root/etc/"
	cp -a /etc/ssl/certs/. "$root/etc/ssl/certs/"
	[[ ! -d /usr/local/share/ca-certificates ]] || cp -a /usr/local/share/ca-certificates/. "$root/usr/local/share/ca-certificates/"
	local f
	for f in /etc/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.config/go/env"; do
		[[ ! -e $f ]] || install -D -m 644 "$f" "$root/${f/#$HOME//root}"
	done
	git clone -q --no-hardlinks . "$root$clone"
}

if [[ ${1-} == --entered ]]; then
	shift
	enter "$@"
fi
if ((EUID != 0)); then
	echo "fresh: a new root file system needs root: run it as root" >&2
	exit 1
fi
command -v debootstrap >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends debootstrap >/dev/null ||
	{ echo "fresh: debootstrap is missing: install it with apt-get install debootstrap" >&2; exit 1; }
mkdir -p .out/fresh
exec 9>.out/fresh/lock
flock --nonblock 9 || { echo "fresh: another run works in $root: wait for its end" >&2; exit 1; }
# A run that was killed may have left its cluster.
[[ ! -e $root$clone/.cluster/cluster.json ]] || "${in_namespace[@]}" true
[[ -d $base ]] || make_base
make_root
(($#)) || set -- make test
exec "${in_namespace[@]}" "$@"
