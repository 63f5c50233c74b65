#!/bin/sh
# Runs a command where it may make network namespaces: as root in mount and
# network namespaces of its own, as an ordinary user in a user namespace, too.
# Fails, and says why, where the system denies that: nothing is skipped.
set -eu

if [ $# -eq 0 ]; then
	echo "usage: $0 COMMAND [ARGUMENT...]" >&2
	exit 2
fi
# util-linux and iproute2 live there on Debian, outside of a user's PATH.
PATH="$PATH:/usr/sbin:/sbin"
export PATH

flags="--mount --net"
[ "$(id -u)" -eq 0 ] || flags="--user --map-root-user $flags"

# shellcheck disable=SC2086 # a list of flags
if ! reason=$(unshare $flags true 2>&1); then
	cat >&2 <<-EOT
		netns-run: namespaces are denied here: $reason
		  In a container: run it privileged, or with CAP_SYS_ADMIN and CAP_NET_ADMIN.
		  As an ordinary user: the sysctls kernel.unprivileged_userns_clone and
		  kernel.apparmor_restrict_unprivileged_userns decide; or run as root.
		  "No space left on device": the sysctl user.max_net_namespaces is too low.
	EOT
	exit 1
fi

# shellcheck disable=SC2086,SC2016 # a list of flags; expanded by the inner shell
exec unshare $flags -- sh -c 'ip link set lo up && exec "$@"' netns-run "$@"
