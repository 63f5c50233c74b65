#!/usr/bin/env bash
# Runs the command that runs the tests, and then fails unless each test that
# docs/compat.md names has run and passed. The output is shown as it comes; the
# tests that passed are left in target/tests-run.txt, as binary::module::name.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ]; then
	echo "usage: $0 COMMAND [ARGUMENT...]" >&2
	exit 2
fi
mkdir -p target
log=target/tests-run.log
passed=target/tests-run.txt

"$@" 2>&1 | tee "$log"

# cargo names each binary before its tests: "Running tests/e2e.rs
# (target/debug/deps/e2e-0123456789abcdef)".
awk '
	/^ *Running / && match($0, /\/deps\/[^\/)]+\)$/) {
		binary = substr($0, RSTART + 6, RLENGTH - 7)
		sub(/-[0-9a-f]+$/, "", binary)
		if (binary == "meridio_proxy") binary = "lib"
	}
	/^test .* \.\.\. ok$/ { print binary "::" $2 }
' "$log" | sort -u >"$passed"

# Rows are "| id | what must hold | where | `test`, `test` |".
named=$(awk -F '|' '
	$2 ~ /^ [MEP][0-9]+ $/ {
		count = split($5, parts, "`")
		for (i = 2; i <= count; i += 2) print parts[i]
	}
' docs/compat.md | sort -u)

if [ -z "$named" ]; then
	echo "check-compat: docs/compat.md names no test" >&2
	exit 1
fi
if missing=$(grep -Fvx -f "$passed" <<<"$named"); then
	echo "check-compat: docs/compat.md names tests that did not pass in this run:" >&2
	echo "$missing" >&2
	exit 1
fi
echo "check-compat: all $(wc -l <<<"$named") tests that docs/compat.md names have passed"
