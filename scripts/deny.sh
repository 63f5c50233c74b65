#!/bin/sh
# Dependency bans, licences and sources with cargo-deny (see deny.toml).
# Advisories are checked when a copy of the advisory database is at hand
# (ADVISORY_DB, a folder with a git clone of it); otherwise that is said.
set -eu

cargo_deny_version="0.20.2"
if ! cargo deny --version >/dev/null 2>&1; then
	echo "deny: installing cargo-deny $cargo_deny_version"
	cargo install --quiet --locked --debug --version "$cargo_deny_version" cargo-deny
fi

cargo deny --all-features --locked check bans licenses sources

if [ -n "${ADVISORY_DB:-}" ] && [ -d "${ADVISORY_DB:-}" ]; then
	cargo deny --all-features --locked --offline check advisories
else
	echo "deny: advisories NOT CHECKED: no advisory database at hand (set ADVISORY_DB)"
fi

for runtime in tokio async-std smol; do
	if cargo tree --locked --workspace --edges normal,build,dev --prefix none | grep -q "^$runtime v"; then
		echo "deny: $runtime is in the dependency tree" >&2
		exit 1
	fi
done
echo "deny: no async runtime in the dependency tree"
