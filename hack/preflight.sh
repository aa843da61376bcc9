#!/usr/bin/env bash
# preflight.sh MEMORY DISK [LIST...]: lists everything that this machine lacks to start at all, each with its remedy:
# root, Go, MiB of free memory and disk, and Debian packages (of hack/packages/LIST.txt, default all) that only root
# can install. It needs no program but bash, changes nothing and takes a second. What a cluster needs of the kernel,
# make cluster-check lists.
set -euo pipefail
memory=$1 disk=$2
shift 2
cd "${BASH_SOURCE%/*}/.."
found=()
lacks() { found+=("  - $1"$'\n'"    remedy: $2"); }

((EUID == 0)) || lacks "root: namespaces, mounts and BPF programs are made by root alone" "run it as root (sudo -E make ...)"

need=$(while read -r word value _; do [[ $word != go ]] || echo "${value%.*}"; done <go.mod)
remedy="install Go $need or later (https://go.dev/doc/install) and put its folder bin first in PATH"
# Asked outside the clone: an old one refuses to answer inside.
if ! version=$(cd / && GOTOOLCHAIN=local go env GOVERSION 2>/dev/null); then
	lacks "Go: there is none in PATH, or it does not run" "$remedy"
elif IFS=. read -r major minor _ <<<"${version#go}" && ((${major//[!0-9]/} * 1000 + ${minor//[!0-9]/} < ${need%.*} * 1000 + ${need#*.})); then
	lacks "Go $need: this is $version" "$remedy"
fi

while read -r word value _; do
	[[ $word != MemAvailable: ]] || ((value / 1024 >= memory)) ||
		lacks "memory: $((value / 1024)) MiB free, $memory MiB are needed" "end other programs or use a larger machine"
done </proc/meminfo

for place in "${XDG_CACHE_HOME:-${HOME:-/root}/.cache}" "$PWD"; do
	while [[ ! -e $place ]]; do place=${place%/*} place=${place:-/}; done
	free=$(df -Pk "$place" 2>/dev/null | while read -r _ _ _ free _; do echo "$free"; done) || continue
	free=${free##*$'\n'}
	if ((free / 1024 < disk)); then
		lacks "disk: $((free / 1024)) MiB free at $place, $disk MiB are needed" "free some (make cache-clean deletes what was built before), or set XDG_CACHE_HOME"
		break
	fi
done

if ! command -v apt-get >/dev/null; then
	lacks "Debian: there is no apt-get to install packages with" "use Debian 12"
elif ((EUID != 0)) && missing=$("$BASH" hack/deps.sh --missing "$@") && [[ -n $missing ]]; then
	lacks "Debian packages: $missing" "run make as root, which installs them, or apt-get install $missing"
fi

((${#found[@]})) || exit 0
echo "this machine lacks:" >&2
printf '%s\n' "${found[@]}" >&2
exit 1
