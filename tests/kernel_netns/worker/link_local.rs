//! The bridge's link-local address.

use super::*;
use crate::harness::Monitor;

/// While it were tentative, the kernel would ask for no IPv6 neighbour.
#[test]
fn the_link_local_address_is_never_tentative() {
    enter_netns();
    // Every change of an address, from before the bridge exists.
    let mut monitor = Monitor::start("address");
    let daemon = Daemon::with_addresses();
    daemon.lb("a", "nsm-a", 7);
    veth("nsm-a");
    until_hops(&[7]);
    let text = ip("-d link show dev bridge0");
    assert!(text.contains("addrgenmode none"), "{text}");
    let local = || {
        let text = ip("-6 -o address show dev bridge0 scope link");
        (text.contains("fe80::11:22ff:fe33:4455/64") && text.lines().count() == 1)
            .then_some(())
            .ok_or(text)
    };
    local().unwrap();
    // The kernel takes it with the link; it comes back from us.
    ip("link set bridge0 down");
    eventually("its return", local);
    until_hops(&[7]);
    // The last event that is waited for.
    ip("address add 192.0.2.1/32 dev lo");
    let seen = monitor.until("192.0.2.1");
    let of_bridge: Vec<&String> = (seen.iter())
        .filter(|line| line.contains("bridge0") && line.contains("inet6"))
        .collect();
    assert!(of_bridge.len() > 3, "{seen:?}");
    assert!(
        !of_bridge.iter().any(|line| line.contains("tentative")),
        "{of_bridge:?}"
    );
    daemon.stop();
}

#[test]
fn an_adopted_link_local_address_stays_alone() {
    enter_netns();
    ip("link add bridge0 type bridge");
    ip("link set bridge0 addrgenmode none");
    ip("link set bridge0 up");
    ip("address add fe80::5/64 dev bridge0 nodad");
    let daemon = Daemon::with_addresses();
    until_addresses(&["172.16.0.1/24", "fd00::1/64"]);
    let text = ip("-6 -o address show dev bridge0 scope link");
    assert!(
        text.contains("fe80::5/64") && text.lines().count() == 1,
        "{text}"
    );
    daemon.stop();
}
