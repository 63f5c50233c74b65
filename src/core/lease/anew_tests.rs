//! An IPAM that has forgotten, call by call.

use std::time::Duration;

use super::anew::PACE;
use super::sim::{DELAY, Sim};
use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Two connections hold addresses, the one that comes first by name the
/// higher ones.
fn two() -> Sim {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", SECOND);
    sim.allocate("a-src", "172.16.0.4/24");
    sim.allocate("a-dst", "172.16.0.5/24");
    sim.acquire(2, "b", SECOND);
    sim.allocate("b-src", "172.16.0.2/24");
    sim.allocate("b-dst", "172.16.0.3/24");
    sim
}

fn allocates(ids: &[&str]) -> Vec<String> {
    let both = |id: &&str| ["src", "dst"].map(|end| format!("Allocate {id}-{end} (IPv4)"));
    ids.iter().flat_map(both).collect()
}

#[test]
fn when_ipam_is_back_the_bridge_is_asked_for_and_then_the_connections_in_order() {
    let mut sim = two();
    sim.acquire(3, "c", SECOND);
    sim.allocate("c-src", "172.16.0.6/24");
    sim.allocate("c-dst", "172.16.0.7/24");
    sim.release_later("c");
    sim.reconnected();
    assert_eq!(sim.in_flight(), ["Allocate bridge (IPv4)"]);
    sim.acquire(4, "d", SECOND);
    assert_eq!(sim.calls.len(), 1, "who comes new waits for the bridge");
    sim.allocate("bridge", "172.16.0.1/24");
    assert_eq!(sim.in_flight(), allocates(&["b", "d"]));
    sim.pass(3 * PACE);
    assert_eq!(
        sim.in_flight(),
        allocates(&["b", "d", "a"]),
        "not what is closed"
    );
    assert_eq!(sim.bridges.len(), 1);
}

#[test]
fn a_bridge_that_is_not_answered_holds_nobody_up() {
    let mut sim = two();
    sim.reconnected();
    sim.fail("bridge", Failure::Lost("gone".to_owned()));
    assert_eq!(sim.in_flight(), allocates(&["b"]));
}

#[test]
fn a_renewal_that_was_under_way_is_none_of_the_new_ipam() {
    let mut sim = Sim::ready();
    sim.reconnected();
    sim.reconnected();
    assert_eq!(sim.in_flight(), ["Allocate bridge (IPv4)"]);
    sim.fail("bridge", Failure::Lost("the old connection".to_owned()));
    assert_eq!(sim.in_flight(), ["Allocate bridge (IPv4)"]);
    sim.allocate("bridge", "172.16.0.1/24");
    assert!(sim.calls.is_empty());
}

#[test]
fn who_is_given_the_address_of_another_gives_it_back_first() {
    for (src, dst, of) in [
        ("172.16.0.1/24", "172.16.0.6/24", "the bridge's own"),
        ("172.16.0.6/24", "172.16.0.5/24", "that of a"),
    ] {
        let mut sim = two();
        sim.acquire(3, "c", SECOND);
        sim.allocate("c-src", src);
        sim.allocate("c-dst", dst);
        assert!(
            matches!(sim.answer(3), Err(AcquireError::Unusable(why)) if why.contains(of)),
            "{:?}",
            sim.answer(3)
        );
        assert_eq!(
            sim.in_flight(),
            ["Release c-src (IPv4)", "Release c-dst (IPv4)"]
        );
        sim.release("c-src", Ok(()));
        sim.acquire(4, "c", SECOND);
        assert_eq!(sim.in_flight(), ["Release c-dst (IPv4)"]);
        sim.release("c-dst", Ok(()));
        assert_eq!(sim.in_flight(), ["Allocate bridge (IPv4)"]);
        sim.allocate("bridge", "172.16.0.1/24");
        assert_eq!(sim.in_flight(), allocates(&["b"]));
        sim.allocate("b-src", "172.16.0.2/24");
        sim.allocate("b-dst", "172.16.0.3/24");
        sim.pass(PACE);
        assert_eq!(sim.in_flight(), allocates(&["a"]), "c waits for all others");
        sim.allocate("a-src", "172.16.0.4/24");
        sim.allocate("a-dst", "172.16.0.5/24");
        sim.pass(PACE);
        sim.allocate("c-src", "172.16.0.6/24");
        sim.allocate("c-dst", "172.16.0.7/24");
        assert!(sim.answer(4).is_ok());
        sim.pass(DELAY);
        assert!(sim.calls.is_empty(), "{:?}", sim.in_flight());
    }
}

#[test]
fn addresses_that_changed_places_are_taken_as_they_are() {
    let mut sim = two();
    sim.reconnected();
    sim.allocate("bridge", "172.16.0.1/24");
    sim.allocate("b-src", "172.16.0.4/24");
    sim.allocate("b-dst", "172.16.0.5/24");
    // It uses them already, and is told so while `a` does not know better.
    sim.acquire(4, "b", SECOND);
    sim.allocate("b-src", "172.16.0.4/24");
    sim.allocate("b-dst", "172.16.0.5/24");
    assert_eq!(sim.src(4), "172.16.0.4/24");
    sim.pass(PACE);
    sim.allocate("a-src", "172.16.0.2/24");
    sim.allocate("a-dst", "172.16.0.3/24");
    sim.acquire(3, "a", SECOND);
    sim.allocate("a-src", "172.16.0.2/24");
    sim.allocate("a-dst", "172.16.0.3/24");
    assert_eq!(sim.src(3), "172.16.0.2/24");
}

#[test]
fn who_stops_asks_for_nothing() {
    let mut sim = two();
    sim.flush();
    sim.reconnected();
    assert!(sim.calls.is_empty());
}
