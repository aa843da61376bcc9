#!/usr/bin/env bash
# generated.sh COMMAND...: runs a command that generates files, and fails if it changes any that .gitattributes marks as
# generated. What else is not committed in the clone does not matter.
set -euo pipefail
cd "$(dirname "$0")/.."
sums() {
	git ls-files --cached --others --exclude-standard | git check-attr --stdin linguist-generated |
		sed -nE 's,: linguist-generated: (set|true)$,,p' | sort | while read -r name; do [[ ! -e $name ]] || sha256sum "$name"; done
}
before=$(sums)
"$@"
changed=$(diff <(echo "$before") <(sums) | sed -n 's/^[<>] [0-9a-f]*  //p' | sort -u || true)
if [[ -n $changed ]]; then
	printf 'not what its sources make: %s\n' $changed >&2
	echo "they are now: look at the change and commit it" >&2
	exit 1
fi
