#!/usr/bin/env bash
# Shows that the tests of docs/compat.md can fail: for ten MUSTs, drawn by the
# hash of the commit, breaks the daemon's code as tests/mutations.txt says, runs
# the first test of the row, and expects it to fail; M19/2 is for the row's second
# test. Prints a table in Markdown.
#
#   scripts/mutate.sh               ten of the commit
#   scripts/mutate.sh 25            so many of it
#   scripts/mutate.sh E17 P5        these
#
# The sources must be as committed, and are so again at the end, whatever ends
# it. A mutation that does not apply, or does not build, is an error.
set -euo pipefail
shopt -u patsub_replacement 2>/dev/null || true
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
read -r -a flags <<<"${CARGO_FLAGS:---locked}"
# A property test would write down what it failed with.
export PROPTEST_DISABLE_FAILURE_PERSISTENCE=true
# Longer than any test of the table takes.
limit=300
log=$(mktemp)
backup=$(mktemp)
changed=

die() {
	echo "mutate: $*" >&2
	exit 1
}

# With a new time stamp, so that cargo builds it again.
restore() {
	if [ -n "$changed" ]; then
		cat "$backup" >"$changed"
		changed=
	fi
}
trap 'restore; rm -f "$log" "$backup"' EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM

declare -A place old new
read_mutations() {
	local line id=
	while IFS= read -r line; do
		case $line in
		'' | '#'*) ;;
		'['*'] '*)
			id=${line%%]*}
			id=${id#[}
			place[$id]=${line#*] }
			old[$id]=
			new[$id]=
			;;
		'- '*) old[$id]+=${old[$id]:+$'\n'}${line#- } ;;
		'+ '*) new[$id]+=${new[$id]:+$'\n'}${line#+ } ;;
		*) die "tests/mutations.txt: not understood: $line" ;;
		esac
	done <tests/mutations.txt
}

# The test of the row: the first one, or the one behind the id's slash.
test_of() {
	local nth=1
	[[ $1 != */* ]] || nth=${1#*/}
	awk -F '|' -v id=" ${1%%/*} " -v nth="$nth" \
		'$2 == id { split($5, parts, "`"); print parts[2 * nth] }' docs/compat.md
}

# The ids in the order that the commit gives them.
drawn() {
	local id
	for id in "${!place[@]}"; do
		echo "$(printf '%s %s' "$commit" "$id" | sha256sum | cut -d ' ' -f 1) $id"
	done | sort | cut -d ' ' -f 2
}

# Breaks the code; leaves the file in $changed.
apply() {
	local id=$1 file text rest found= count total=0
	for file in $(git ls-files -- 'src/*.rs'); do
		[[ $file == "${place[$id]}"* ]] || continue
		text=$(cat "$file"; echo .)
		rest=${text//"${old[$id]}"/}
		count=$(((${#text} - ${#rest}) / ${#old[$id]}))
		total=$((total + count))
		[ "$count" -eq 0 ] || found=$file
	done
	[ "$total" -eq 1 ] || die "$id applies $total times in ${place[$id]}"
	cat "$found" >"$backup"
	changed=$found
	text=$(cat "$found"; echo .)
	text=${text/"${old[$id]}"/"${new[$id]}"}
	printf '%s' "${text%.}" >"$found"
}

# What became of the test, for the table.
judge() {
	local test=$1 binary name status=0
	binary=${test%%::*}
	name=${test#*::}
	local target=(--test "$binary")
	[ "$binary" != lib ] || target=(--lib)
	"$cargo" test "${flags[@]}" "${target[@]}" --no-run >"$log" 2>&1 || {
		tail -n 30 "$log" >&2
		die "$id does not build"
	}
	timeout "$limit" scripts/netns-run.sh \
		"$cargo" test "${flags[@]}" "${target[@]}" -- --exact "$name" >"$log" 2>&1 || status=$?
	if [ "$status" -eq 124 ]; then
		echo "red: no end in $limit s"
	elif ! grep -q '^running 1 test$' "$log"; then
		tail -n 30 "$log" >&2
		die "$id: $test did not run"
	elif [ "$status" -eq 0 ]; then
		echo SURVIVED
	elif grep -q "^test result: FAILED" "$log"; then
		echo red
	else
		echo "red: the test ended by $(grep -o 'signal: [^)]*' "$log" | head -n 1)"
	fi
}

commit=$(git rev-parse HEAD)
[ -z "$(git status --porcelain -- src tests docs/compat.md)" ] ||
	die "src, tests or docs/compat.md are not as committed"
read_mutations
case ${1:-10} in
*[!0-9]*) ids=("$@") ;;
*) mapfile -t ids < <(drawn | head -n "${1:-10}") ;;
esac

survivors=0
rows=()
for id in "${ids[@]}"; do
	[ -n "${place[$id]:-}" ] || die "$id: tests/mutations.txt has no such mutation"
	test=$(test_of "$id")
	[ -n "$test" ] || die "$id: docs/compat.md names no test"
	apply "$id"
	file=$changed
	begun=$SECONDS
	verdict=$(judge "$test")
	restore
	rows+=("| $id | \`$file\` | \`$test\` | $verdict | $((SECONDS - begun)) s |")
	echo "mutate: ${rows[-1]}" >&2
	[ "$verdict" != SURVIVED ] || survivors=$((survivors + 1))
done
git diff --quiet HEAD -- src || die "the sources are not as before: see git diff"

printf '\n%s of %s mutations of commit %s were seen.\n\n' \
	"$((${#ids[@]} - survivors))" "${#ids[@]}" "$commit"
printf '| MUST | broken | test | outcome | took |\n|---|---|---|---|---|\n'
printf '%s\n' "${rows[@]}"
[ "$survivors" -eq 0 ]
