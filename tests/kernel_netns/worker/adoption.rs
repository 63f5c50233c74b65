//! What a predecessor left.

use super::*;
use crate::harness::Monitor;

#[test]
fn a_predecessor_s_state_carries_traffic_until_told_otherwise() {
    enter_netns();
    // As Meridio's proxy leaves it: no priority, protocol or interface.
    ip("link add bridge0 up address 02:aa:aa:aa:aa:aa type bridge");
    ip("address add 172.16.0.1/24 dev bridge0");
    ip("address add fd00::1/64 dev bridge0 nodad");
    for link in ["nsm-a", "nsm-b", "nsm-x"] {
        veth(link);
        ip(&format!("link set {link} master bridge0"));
    }
    ip("route add default table 1 nexthop via 172.16.0.8 nexthop via 172.16.0.7");
    ip("-6 route add default table 1 nexthop via fd00::8 nexthop via fd00::7");
    for rule in [
        "-4 rule add from 20.0.0.1",
        "-4 rule add from 20.0.0.1",
        "-4 rule add from 20.0.0.9",
        // Host bits, which the kernel keeps, and a VIP of length 0.
        "-4 rule add from 40.0.0.7/24",
        "-4 rule add from all",
        "-6 rule add from all",
        "-6 rule add from fd20::/64",
    ] {
        ip(&format!("{rule} lookup 1 protocol 0"));
    }
    let before = (rules("-4"), rules("-6"));
    let kept = before
        .0
        .iter()
        .find(|rule| rule.contains("20.0.0.1 "))
        .unwrap()
        .clone();

    let daemon = Daemon::with_addresses();
    // The last thing done at the start.
    eventually("fallback", || {
        let seen = (table("-4"), table("-6"));
        (seen.0.ends_with(FALLBACK4) && seen.1.ends_with(FALLBACK6))
            .then_some(())
            .ok_or(seen)
    });
    assert_eq!(
        json("link show dev bridge0")[0]["address"],
        "02:aa:aa:aa:aa:aa"
    );
    assert_eq!(hops(), (vec![8, 7], vec![8, 7]));
    assert_eq!((rules("-4"), rules("-6")), before);

    daemon.vips(&["20.0.0.1/32", "20.0.0.2/32", "fd20::/64"]);
    let kept6 = before.1.iter().find(|rule| rule.contains("fd20")).unwrap();
    let expected = ["20000 20.0.0.2 77".to_owned(), kept, kept6.clone()];
    until_rules(&expected.each_ref().map(String::as_str));

    // One after the other they are told again, and nothing moves, not even to
    // a sorted order.
    let routes = (table("-4"), table("-6"));
    daemon.lb("b", "nsm-b", 8);
    daemon.lb("a", "nsm-a", 7);
    daemon.vips(&["20.0.0.1/32"]);
    until_rules(&[&expected[1]]);
    assert_eq!((table("-4"), table("-6")), routes);
    assert_eq!(hops(), (vec![8, 7], vec![8, 7]));
    // A port that nobody told us of is left alone.
    assert!(is_port("nsm-x"));
    daemon.stop();
    assert!(is_port("nsm-x"));
}

/// Earlier versions answered VIP traffic that has no LB.
#[test]
fn a_predecessor_s_unreachable_route_becomes_a_blackhole_in_place() {
    enter_netns();
    ip("link add bridge0 up type bridge");
    for family in ["-4", "-6"] {
        let fallback = "unreachable default table 1 metric 4294967295 proto 77";
        ip(&format!("{family} route add {fallback}"));
    }
    let mut monitor = Monitor::start("route");
    let daemon = Daemon::with_addresses();
    eventually("one fallback, and no other route", || {
        let seen = (table("-4"), table("-6"));
        (seen.0 == FALLBACK4 && seen.1 == FALLBACK6)
            .then_some(())
            .ok_or(seen)
    });
    // Replaced, not deleted and added: there was one all the time.
    ip("route add 192.0.2.0/24 dev lo");
    let seen = monitor.until("192.0.2.0");
    let of_table: Vec<&String> = seen
        .iter()
        .filter(|line| line.contains("table 1"))
        .collect();
    assert_eq!(of_table.len(), 2, "{seen:?}");
    assert!(of_table.iter().all(|line| line.starts_with("blackhole")));
    daemon.stop();
}

#[test]
fn a_predecessor_s_hop_that_does_not_answer_goes_first_and_one_untold_later() {
    enter_netns();
    ip("link add bridge0 up type bridge");
    ip("address add 172.16.0.1/24 dev bridge0");
    ip("address add fd00::1/64 dev bridge0 nodad");
    for link in ["nsm-a", "nsm-b"] {
        veth(link);
        ip(&format!("link set {link} master bridge0"));
    }
    for (subnet, family) in [("172.16.0.", "-4"), ("fd00::", "-6")] {
        let via = [7, 8, 9].map(|n| format!("nexthop via {subnet}{n}"));
        ip(&format!(
            "{family} route add default table 1 {}",
            via.join(" ")
        ));
        ip(&format!("neigh replace {subnet}8 dev bridge0 nud failed"));
    }
    let daemon = Daemon::with_addresses();
    daemon.lb("a", "nsm-a", 7);
    until_hops(&[7, 9]);
    until_hops(&[7]);
    daemon.stop();
}
