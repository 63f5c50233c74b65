#!/usr/bin/env bash
# The real Network Service Mesh SDK, and with "full" the real SPIRE, judge the
# daemon: tests/interop, docs/interop.md. Builds what it needs from the Go module
# proxy; says what is missing otherwise.
#
#   scripts/interop.sh            one SDK version, in-process Workload API
#   scripts/interop.sh full       all versions and identities, long refresh; a table
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-short}
out=$PWD/target/interop
mkdir -p "$out"

if ! command -v go >/dev/null 2>&1; then
	if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends golang-go >/dev/null
	else
		echo "interop: Go 1.26 or newer is missing: install it (https://go.dev/dl, or your distribution's golang-go)" >&2
		exit 1
	fi
fi
version=$(go env GOVERSION)
case $version in
go1.2[6-9]* | go1.[3-9][0-9]*) ;;
*)
	echo "interop: $version is too old: Go 1.26 or newer is needed" >&2
	exit 1
	;;
esac

# NSM's modules are not in the checksum database; go.sum pins them.
export GONOSUMDB="github.com/networkservicemesh/*" GOTOOLCHAIN=local GOFLAGS=-buildvcs=false

# build MODULE_FOLDER GO_MOD OUTPUT PACKAGE
build() {
	(cd "$1" && nice go build -mod=readonly -modfile="$2" -o "$3" "$4")
}

build tests/interop go.mod "$out/mesh-1.14" .
build tests/interop/tools/probe go.mod "$out/grpc-health-probe" github.com/grpc-ecosystem/grpc-health-probe
# shellcheck disable=SC2086 # flags of the caller
cargo build --locked ${CARGO_BUILD_FLAGS:-} --workspace --bins

failed=0
table="$out/table.jsonl"
: >"$table"

# scenario TITLE MESH [FLAG...]: a table of its steps
scenario() {
	local title=$1 mesh=$2 begun=$SECONDS
	shift 2
	printf '\n== interop: %s\n' "$title"
	if ! scripts/netns-run.sh "$out/$mesh" run -daemon target/debug/proxy -services target/debug/services \
		-probe "$out/grpc-health-probe" -title "$title" "$@" | tee "$out/last.log"; then
		failed=1
		printf '== interop: %s FAILED\n' "$title"
	fi
	grep '^{' "$out/last.log" >>"$table" || true
	printf '== interop: %s: %d s\n' "$title" "$((SECONDS - begun))"
}

if [ "$mode" = full ]; then
	build tests/interop go.v1.18.mod "$out/mesh-1.18" .
	build tests/interop/tools/spire go.mod "$out/spire-server" github.com/spiffe/spire/cmd/spire-server
	build tests/interop/tools/spire go.mod "$out/spire-agent" github.com/spiffe/spire/cmd/spire-agent
	scenario "SDK v1.14.5" mesh-1.14
	scenario "SDK v1.14.5, SPIRE" mesh-1.14 -spire "$out"
	scenario "SDK v1.14.5, 30 s tokens, rotation" mesh-1.14 -long
	scenario "SDK v1.18.0" mesh-1.18
	scenario "SDK v1.18.0, SPIRE, 30 s tokens, rotation" mesh-1.18 -long -spire "$out"
else
	scenario "SDK v1.14.5" mesh-1.14
fi
printf '\ntable: %s\n' "$table"
exit "$failed"
