//! Interfaces and who holds them, in any order.

use super::*;

fn target(id: &str) -> PortKey {
    PortKey::Target(SegmentId::new(id))
}

fn expect_target(daemon: &Daemon, id: &str, ifname: &str) {
    daemon.net.tell(Event::PortExpected {
        key: target(id),
        ifname: name(ifname),
        peers: addresses(["172.16.0.20", "fd00::20"]),
    });
}

/// All that was told and seen before is done.
fn until_all_is_done(daemon: &Daemon, last: u8) {
    let link = format!("nsm-{last}");
    veth(&link);
    daemon.lb(&link, &link, last);
    until_port(&link, true);
}

#[test]
fn a_target_s_interface_may_come_before_or_after_and_not_at_all() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    expect_target(&daemon, "after", "nsm-t");
    expect_target(&daemon, "never", "nsm-u");
    daemon.net.tell(Event::PortReleased {
        key: target("never"),
    });
    until_all_is_done(&daemon, 5);
    for link in ["nsm-t", "nsm-u", "nsm-v"] {
        veth(link);
    }
    until_port("nsm-t", true);
    until_all_is_done(&daemon, 6);
    // Nobody waits for it any more, and for the other nobody does yet.
    assert!(!is_port("nsm-u") && !is_port("nsm-v"));
    expect_target(&daemon, "before", "nsm-v");
    until_port("nsm-v", true);
    until_hops(&[5, 6]);
    daemon.stop();
}

#[test]
fn an_index_that_another_interface_gets_is_no_port_of_ours() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    let with_index = |name: &str| {
        ip(&format!(
            "link add {name} index 77 up type veth peer name {name}-p"
        ));
        ip(&format!("link set {name}-p up"));
    };
    with_index("nsm-a");
    daemon.lb("a", "nsm-a", 7);
    until_port("nsm-a", true);
    until_hops(&[7]);
    ip("link del nsm-a");
    with_index("other");
    until_hops(&[]);
    until_all_is_done(&daemon, 5);
    assert!(!is_port("other"));
    // Somebody's port stays when the LB whose index it has is closed.
    ip("link set other master bridge0");
    daemon.net.tell(Event::PortReleased { key: lb("a") });
    until_all_is_done(&daemon, 6);
    assert!(is_port("other"));
    until_hops(&[5, 6]);
    daemon.stop();
}

#[test]
fn an_lb_s_changed_address_replaces_its_hop() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    for (id, last) in [("a", 7), ("b", 8)] {
        let link = format!("nsm-{id}");
        veth(&link);
        daemon.lb(id, &link, last);
    }
    until_hops(&[7, 8]);
    let stale = "lladdr 02:00:00:00:00:01 nud stale dev bridge0";
    ip(&format!("neigh add 172.16.0.9 {stale}"));
    ip(&format!("neigh add fd00::9 {stale}"));
    daemon.lb("a", "nsm-a", 9);
    until_hops(&[8, 9]);
    assert!(is_port("nsm-a"));
    until_all_is_done(&daemon, 5);
    // Whoever had the address before had another hardware address.
    let left = ip("neigh show dev bridge0");
    assert!(!left.contains("02:00:00:00:00:01"), "{left}");
    daemon.stop();
}

#[test]
fn a_port_that_another_bridge_takes_comes_back() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    veth("nsm-a");
    daemon.lb("a", "nsm-a", 7);
    until_port("nsm-a", true);
    ip("link add br1 up type bridge");
    ip("link set nsm-a master br1");
    until_port("nsm-a", true);
    until_hops(&[7]);
    daemon.stop();
}
