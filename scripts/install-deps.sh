#!/bin/sh
# Installs the system packages that building and testing need (Debian and its
# kin), or, where it may not, says exactly what to install and fails.
set -eu

missing=""
# need COMMAND PACKAGE
need() {
	command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] || missing="$missing $2"
}

need cc gcc
need c++ g++
need make make
need cmake cmake
need pkg-config pkg-config
need ip iproute2
need unshare util-linux
need nft nftables
if command -v pkg-config >/dev/null 2>&1; then
	pkg-config --exists openssl || missing="$missing libssl-dev"
else
	missing="$missing libssl-dev"
fi

if ! command -v cargo >/dev/null 2>&1; then
	echo "install-deps: cargo is missing: install Rust 1.95 or newer (rustup, or your distribution's package)" >&2
	exit 1
fi

[ -z "$missing" ] && exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
	echo "install-deps: installing$missing"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	# shellcheck disable=SC2086 # a list of package names
	apt-get install -y -qq --no-install-recommends $missing >/dev/null
	exit 0
fi

echo "install-deps: missing; install with: sudo apt-get install$missing" >&2
exit 1
