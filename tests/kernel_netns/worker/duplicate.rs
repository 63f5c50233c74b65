//! Addresses that somebody else on the link has, too.

use super::*;
use crate::pod::Pod;

const OTHERS_MAC: &str = "02:00:00:00:00:99";

/// Duplicate address detection as most kernels have it.
fn detect() {
    for interfaces in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{interfaces}/accept_dad");
        std::fs::write(path, "1").unwrap();
    }
}

/// The bridge's IPv6 addresses with their flags.
fn shown() -> String {
    ip("-6 -o address show dev bridge0")
}

fn until_failed(address: &str) {
    eventually("a failed detection", || {
        let seen = shown();
        (seen.lines())
            .any(|line| line.contains(address) && line.contains("dadfailed"))
            .then_some(())
            .ok_or(seen)
    });
}

fn until_in_use(addresses: [&str; 2]) {
    eventually("addresses in use", || {
        let seen = shown();
        let there = |address| seen.contains(&format!("inet6 {address}"));
        let usable = !seen.contains("dadfailed") && !seen.contains("tentative");
        (usable && addresses.iter().all(there))
            .then_some(())
            .ok_or(seen)
    });
}

/// Taken anew without detection, whether it was a predecessor's or somebody
/// gave it to the bridge since.
#[test]
fn a_bridge_address_that_failed_detection_is_taken_anew() {
    const LINK_LOCAL: &str = "fe80::11:22ff:fe33:4455/64";
    enter_netns();
    detect();
    let other = Pod::new();
    other.connect("nsm-x", OTHERS_MAC, Some(1));
    other.inside(|| ip(&format!("address add {LINK_LOCAL} dev nsm0 nodad")));
    ip("link add bridge0 up address 02:11:22:33:44:55 type bridge");
    ip("address add fd00::1/64 dev bridge0");
    ip("link set nsm-x master bridge0");
    until_failed("fd00::1/64");
    until_failed(LINK_LOCAL);

    let daemon = Daemon::with_addresses();
    until_in_use(["fd00::1/64", LINK_LOCAL]);

    eventually("the address without NODAD", || {
        ip("address del fd00::1/64 dev bridge0");
        let added = std::process::Command::new("ip")
            .args(["address", "add", "fd00::1/64", "dev", "bridge0"])
            .output()
            .unwrap();
        added.status.success().then_some(()).ok_or(added)
    });
    until_failed("fd00::1/64");
    until_in_use(["fd00::1/64", LINK_LOCAL]);
    daemon.stop();
}
