#!/usr/bin/env bash
# Runs every tier of the tests and prints what ran. Heavy builds run beside the tiers that do not need them.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .out
rm -f .out/tiers .out/builds.*
start=$SECONDS

say() { printf '\n\033[1m[%4d s] %s\033[0m\n' $((SECONDS - start)) "$*"; }
failed=()
tier() { # name, target
	say "$1"
	if ! make --no-print-directory "$2"; then failed+=("$1"); fi
}

make --no-print-directory preflight
say "install Debian packages and Envoy (make deps)"
make --no-print-directory deps
make --no-print-directory cluster-check

say "start the builds of the embedded Kubernetes (log: .out/builds.log)"
builds_begun=$(date +%s)
make --no-print-directory cluster-build >.out/builds.log 2>&1 &
builds=$!
trap 'kill $builds 2>/dev/null || true' EXIT

tier "lint" lint
tier "unit and golden tests" test-unit
tier "the real Envoy takes every generated configuration" test-contract
tier "the small demo" test-demo-small
tier "the supervisor on the real Envoy" test-envoy
tier "hooks in network namespaces" test-netns
tier "hooks on other kernels" test-kernels

say "wait for the builds of the embedded Kubernetes"
if ! wait $builds; then
	tail -n 40 .out/builds.log
	failed+=("builds of the embedded Kubernetes")
else
	tier "the embedded Kubernetes" test-cluster
	tier "weft on the embedded Kubernetes" test-e2e
	tier "weft's processes with the race detector" test-race
	make --no-print-directory cluster-down || failed+=("ending the cluster of the e2e tests")
	tier "the demo, on a fresh cluster" test-demo
fi
trap - EXIT

# Seconds that each tier may take on two cores, cold. With the builds all ends within 75 minutes. A tier that needs more is
# marked.
declare -A budget=([unit]=200 [contract]=500 [demo-small]=30 [envoy]=120 [netns]=200 [kernels]=300 [cluster]=200 [e2e]=2300 [race]=330 [demo]=180)
builds_budget=1200

say "what ran"
over() { (($1 <= $2)) || printf ', OVER'; }
built=$(($(stat -c %Y .out/builds.log) - builds_begun)) # the log ends when they do
printf 'builds of the embedded Kubernetes, beside the first tiers: %d s of %d s%s\n' $built $builds_budget "$(over $built $builds_budget)"
while read -r name passed _ bad _ skipped _ seconds _ mark; do
	most=${budget[$name]:-0}
	printf '%-12s %5d passed %3d failed %3d skipped  %6d s of %d s%s%s\n' "$name" "$passed" "$bad" "$skipped" "$seconds" "$most" "$(over "$seconds" "$most")" "${mark:+  $mark}"
done <.out/tiers
passed=$(awk '{p += $2} END {print p + 0}' .out/tiers)
bad=$(awk '{f += $4} END {print f + 0}' .out/tiers)
skipped=$(awk '{s += $6} END {print s + 0}' .out/tiers)
printf '%d passed, %d failed, %d skipped\n' "$passed" "$bad" "$skipped"
if ((${#failed[@]})); then
	printf 'failed: %s\n' "${failed[@]}"
	exit 1
fi
