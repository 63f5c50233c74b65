#!/usr/bin/env bash
# The real Network Service Mesh SDK, and with "full" the real SPIRE, judge the
# daemon, and the lab that the other tests use: tests/interop, docs/interop.md.
# Builds what it needs from the Go module proxy; says what is missing otherwise.
# At the end there is a table in Markdown, target/interop/table.md too.
#
#   scripts/interop.sh            one SDK version, in-process Workload API
#   scripts/interop.sh full       all versions and identities, long refresh
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-short}
out=$PWD/target/interop
mkdir -p "$out"

# Where the archive of go.dev is unpacked, often outside of PATH.
PATH="$PATH:/usr/local/go/bin"
if ! command -v go >/dev/null 2>&1; then
	echo "interop: Go 1.26 or newer is missing: install it (https://go.dev/dl; Debian 12's golang-go is too old)" >&2
	exit 1
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

# Whether the last scenario failed by what grpcfd in the SDK's endpoint does under
# load (docs/interop.md, finding 12), of which it says nothing about the daemon.
struck_by_grpcfd() {
	grep -q '"step":"every refresh of the daemon succeeded","failed":.*file already closed' "$out/last.log"
}

# judged TITLE MESH run|judge [FLAG...]: one scenario, and how it ended
judged() {
	local title=$1 mesh=$2 role=$3 begun=$SECONDS ended=passed
	shift 3
	printf '\n== interop: %s: %s\n' "$title" "$role"
	if [ "$role" = run ]; then
		set -- -daemon target/debug/proxy -probe "$out/grpc-health-probe" "$@"
	fi
	if ! scripts/netns-run.sh "$out/$mesh" "$role" -services target/debug/services -title "$title" "$@" | tee "$out/last.log"; then
		ended=FAILED
	fi
	grep '^{' "$out/last.log" >>"$table" || true
	printf '== interop: %s: %s: %s, %d s\n' "$title" "$role" "$ended" "$((SECONDS - begun))"
	[ "$ended" = passed ]
}

# scenario TITLE MESH run|judge [FLAG...]
scenario() {
	judged "$@" && return
	if struck_by_grpcfd; then
		local title=$1
		shift
		printf '== interop: a Request met the race of grpcfd: once more\n'
		judged "$title, again" "$@" && return
	fi
	failed=1
}

if [ "$mode" = full ]; then
	build tests/interop go.v1.18.mod "$out/mesh-1.18" .
	build tests/interop/tools/spire go.mod "$out/spire-server" github.com/spiffe/spire/cmd/spire-server
	build tests/interop/tools/spire go.mod "$out/spire-agent" github.com/spiffe/spire/cmd/spire-agent
	scenario "SDK v1.14.5" mesh-1.14 judge
	scenario "SDK v1.18.0" mesh-1.18 judge
	scenario "SDK v1.14.5" mesh-1.14 run
	scenario "SDK v1.18.0, SPIRE" mesh-1.18 run -spire "$out"
	scenario "SDK v1.14.5, SPIRE, 30 s tokens, rotation" mesh-1.14 run -long -spire "$out"
	scenario "SDK v1.18.0, 30 s tokens, rotation" mesh-1.18 run -long
else
	scenario "SDK v1.14.5" mesh-1.14 judge
	scenario "SDK v1.14.5" mesh-1.14 run -short
fi
"$out/mesh-1.14" table "$table" | tee "$out/table.md"
printf '\n== interop: all done in %d s, %s\n' "$SECONDS" "$([ "$failed" = 0 ] && echo passed || echo FAILED)"
exit "$failed"
