#!/usr/bin/env bash
# deps.sh [--missing] [LIST...]: installs the Debian packages named in hack/packages/LIST.txt (default: in all lists) that
# are missing; --missing only names them. No service is started by it.
set -euo pipefail
cd "$(dirname "$0")/.."
ask=
if [[ ${1-} == --missing ]]; then
	ask=1
	shift
fi
lists=(hack/packages/*.txt)
if (($#)); then
	lists=("${@/#/hack/packages/}")
	lists=("${lists[@]/%/.txt}")
fi

missing=()
while read -r package; do
	[[ -z $package || $package == \#* ]] && continue
	[[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done < <(sort -u "${lists[@]}")
((${#missing[@]})) || exit 0
if [[ -n $ask ]]; then
	echo "${missing[*]}"
	exit 0
fi

if ((EUID != 0)); then
	echo "these Debian packages are missing: ${missing[*]}" >&2
	echo "install them with apt-get, or run make deps as root" >&2
	exit 1
fi
echo "installing ${missing[*]}"
# Servers among the packages are used as programs, not as services of this machine.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
	trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
	tail -n 20 "$log" >&2
	echo "apt-get failed; its whole output is in $log" >&2
	exit 1
fi
rm -f "$log"
