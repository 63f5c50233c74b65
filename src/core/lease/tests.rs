//! The machine in virtual time, call by call.

use std::time::Duration;

use super::sim::{DELAY, RENEW, SHORT, Sim};
use super::*;

fn lost() -> Failure<String> {
    Failure::Lost("gone".to_owned())
}

fn refused() -> Failure<String> {
    Failure::Refused("no".to_owned())
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn all_calls_of_a_lease_are_made_at_once() {
    let mut sim = Sim::new(IpFamilies::Dual);
    assert_eq!(
        sim.in_flight(),
        ["Allocate bridge (IPv4)", "Allocate bridge (IPv6)"]
    );
    sim.acquire(1, "a", secs(10));
    assert_eq!(sim.calls.len(), 2, "the bridge comes first");
    sim.allocate("bridge", "172.16.0.1/24");
    assert_eq!((sim.bridges.len(), sim.calls.len()), (0, 1));
    sim.allocate("bridge", "fd00::1/64");
    assert_eq!(sim.bridges.len(), 1);
    assert_eq!(
        sim.in_flight(),
        [
            "Allocate a-src (IPv4)",
            "Allocate a-dst (IPv4)",
            "Allocate a-src (IPv6)",
            "Allocate a-dst (IPv6)"
        ]
    );
    sim.acquire(2, "b", secs(10));
    assert_eq!(sim.calls.len(), 8, "no connection waits for another");
    sim.allocate("a-dst", "fd00::3/64");
    sim.allocate("a-src", "172.16.0.2/24");
    sim.allocate("a-src", "fd00::2/64");
    assert!(sim.answers.is_empty(), "half a lease is none");
    sim.allocate("a-dst", "172.16.0.3/24");
    let addresses = sim.answer(1).as_ref().unwrap();
    assert!(addresses.leases.covers(IpFamilies::Dual));
    assert!(addresses.bridge.covers(IpFamilies::Dual));
    assert_eq!(addresses.leases.v6.unwrap().dst.to_string(), "fd00::3/64");
}

#[test]
fn every_acquire_renews_and_two_at_once_share_a_round() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.acquire(2, "a", secs(10));
    assert_eq!(sim.calls.len(), 2);
    sim.grant();
    assert_eq!(sim.src(1), sim.src(2));
    sim.acquire(3, "a", secs(10));
    assert_eq!(
        sim.in_flight(),
        ["Allocate a-src (IPv4)", "Allocate a-dst (IPv4)"]
    );
    assert!(!sim.answers.contains_key(&3));
    sim.grant();
    assert_eq!(sim.src(3), "172.16.0.2/24");
}

#[test]
fn the_bridge_is_asked_for_until_it_is_there_and_then_renewed() {
    let mut sim = Sim::new(IpFamilies::V4);
    sim.acquire(1, "a", secs(1));
    for _ in 0..3 {
        sim.fail("bridge", lost());
        assert!(sim.calls.is_empty());
        sim.pass(SHORT);
        assert_eq!(sim.in_flight(), ["Allocate bridge (IPv4)"]);
    }
    assert_eq!(sim.notes.len(), 1, "not a line for each try");
    sim.pass(secs(1));
    assert!(
        matches!(sim.answer(1), Err(AcquireError::Deadline(why)) if why.contains("gone")),
        "{:?}",
        sim.answer(1)
    );
    sim.allocate("bridge", "172.16.0.1/24");
    assert_eq!(sim.bridges.len(), 1);
    sim.pass(RENEW);
    sim.fail("bridge", lost());
    sim.pass(secs(10));
    sim.allocate("bridge", "172.16.0.1/24");
    assert_eq!(sim.bridges.len(), 1, "told on change only");
    sim.pass(RENEW);
    sim.allocate("bridge", "172.16.7.1/24");
    assert_eq!(sim.bridges.len(), 2);
    sim.pass(RENEW);
    sim.allocate("bridge", "172.16.7.0/24");
    assert_eq!(sim.bridges.len(), 2, "an unusable one changes nothing");
}

#[test]
fn a_first_acquire_fails_and_a_refresh_goes_on() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.allocate("a-src", "172.16.0.2/24");
    sim.fail("a-dst", refused());
    assert_eq!(*sim.answer(1), Err(AcquireError::Refused("no".to_owned())));
    sim.acquire(2, "a", secs(10));
    sim.grant();
    sim.acquire(3, "a", secs(10));
    sim.fail("a-src", refused());
    assert_eq!(sim.src(3), "172.16.0.2/24", "the known addresses");
    sim.allocate("a-dst", "172.16.0.3/24");
    // In the background it goes on with growing pauses until it succeeds.
    for pause in [2, 4, 8, 16, 30, 30] {
        assert!(sim.calls.is_empty(), "{:?}", sim.in_flight());
        sim.pass(secs(pause));
        sim.fail("a-src", lost());
        sim.allocate("a-dst", "172.16.0.3/24");
    }
    sim.pass(secs(30));
    sim.grant();
    let texts: Vec<_> = sim.notes.iter().map(|note| note.is_problem).collect();
    assert_eq!(texts, [true, false], "{:?}", sim.notes);
    sim.pass(secs(100));
    assert!(sim.calls.is_empty());
}

#[test]
fn a_first_acquire_is_tried_again_while_ipam_is_away() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(1));
    for _ in 0..4 {
        sim.fail("a-src", Failure::Unsent("away".to_owned()));
        sim.fail("a-dst", Failure::Unsent("away".to_owned()));
        assert!(sim.calls.is_empty());
        sim.pass(SHORT);
    }
    sim.grant();
    assert_eq!(sim.src(1), "172.16.0.2/24");
    sim.acquire(2, "b", secs(1));
    for _ in 0..5 {
        sim.fail("b-src", Failure::Unsent("away".to_owned()));
        sim.fail("b-dst", Failure::Unsent("away".to_owned()));
        sim.pass(SHORT);
    }
    assert!(matches!(sim.answer(2), Err(AcquireError::Deadline(why)) if why.contains("away")));
    // Nothing was ever sent for it, so nothing is left to do.
    sim.pass(secs(250));
    assert!(sim.calls.is_empty(), "{:?}", sim.in_flight());
}

#[test]
fn a_silent_ipam_delays_no_refresh_beyond_its_deadline() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.grant();
    sim.acquire(2, "a", secs(3));
    sim.pass(secs(3));
    assert_eq!(sim.src(2), "172.16.0.2/24");
    sim.acquire(3, "b", secs(3));
    sim.pass(secs(3));
    assert!(matches!(sim.answer(3), Err(AcquireError::Deadline(_))));
}

#[test]
fn a_release_waits_and_can_be_cancelled() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.grant();
    sim.release_later("a");
    sim.release_later("a");
    sim.pass(DELAY - secs(1));
    assert!(sim.calls.is_empty());
    sim.acquire(2, "a", secs(10));
    sim.grant();
    sim.pass(DELAY * 2);
    assert!(sim.calls.is_empty());
    sim.release_later("a");
    sim.pass(DELAY);
    assert_eq!(
        sim.in_flight(),
        ["Release a-src (IPv4)", "Release a-dst (IPv4)"]
    );
    sim.release("a-dst", Ok(()));
    sim.release("a-src", Err(lost()));
    for _ in 0..3 {
        assert!(sim.calls.is_empty());
        sim.pass(secs(2));
        sim.release("a-src", Err(refused()));
    }
    sim.pass(secs(2));
    assert_eq!(sim.book.pending_releases(), 1);
    sim.release("a-src", Ok(()));
    assert_eq!(sim.book.pending_releases(), 0);
    sim.pass(secs(200));
    assert!(sim.calls.is_empty());
}

#[test]
fn an_acquire_waits_for_the_end_of_a_release_in_flight() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.grant();
    sim.release_later("a");
    sim.pass(DELAY);
    sim.acquire(2, "a", secs(10));
    assert_eq!(
        sim.in_flight(),
        ["Release a-src (IPv4)", "Release a-dst (IPv4)"]
    );
    sim.release("a-src", Ok(()));
    assert_eq!(
        sim.in_flight(),
        ["Release a-dst (IPv4)", "Allocate a-src (IPv4)"]
    );
    // The outcome of this one stays unknown: what IPAM answers then may be
    // taken away by the Release yet, so it is asked once more.
    sim.release("a-dst", Err(lost()));
    assert_eq!(
        sim.in_flight(),
        ["Allocate a-src (IPv4)", "Allocate a-dst (IPv4)"]
    );
    sim.grant();
    assert_eq!(sim.src(2), "172.16.0.2/24");
    sim.pass(secs(10));
    sim.grant();
    sim.pass(secs(200));
    assert!(sim.calls.is_empty());
}

#[test]
fn a_lease_on_its_way_back_is_not_known() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.grant();
    sim.release_later("a");
    sim.pass(DELAY);
    sim.acquire(2, "a", secs(1));
    sim.pass(secs(1));
    assert!(matches!(sim.answer(2), Err(AcquireError::Deadline(_))));
}

#[test]
fn half_a_lease_is_released_in_the_end() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.allocate("a-src", "172.16.0.2/24");
    sim.fail("a-dst", lost());
    sim.pass(secs(10));
    assert!(sim.answer(1).is_err());
    sim.fail("a-dst", lost());
    sim.pass(secs(590));
    sim.allocate("bridge", "172.16.0.1/24");
    assert!(sim.calls.is_empty(), "{:?}", sim.in_flight());
    sim.pass(secs(10));
    assert_eq!(
        sim.in_flight(),
        ["Release a-src (IPv4)", "Release a-dst (IPv4)"]
    );
    // Asked for, it goes by the usual delay.
    sim.acquire(2, "b", secs(10));
    sim.fail("b-src", refused());
    sim.allocate("b-dst", "172.16.0.5/24");
    sim.release_later("b");
    sim.pass(DELAY);
    assert_eq!(sim.calls.len(), 4, "{:?}", sim.in_flight());
}

#[test]
fn a_lease_that_was_not_put_to_use_is_released_in_the_end() {
    let mut sim = Sim::ready();
    for ticket in [1, 2] {
        sim.acquire(ticket, "a", secs(10));
        sim.grant();
        sim.abandon("a");
        sim.pass(secs(200));
    }
    // Its target came back in between, which counts.
    sim.allocate("bridge", "172.16.0.1/24");
    sim.pass(secs(399));
    sim.allocate("bridge", "172.16.0.1/24");
    assert!(sim.calls.is_empty(), "{:?}", sim.in_flight());
    sim.pass(secs(1));
    assert_eq!(
        sim.in_flight(),
        ["Release a-src (IPv4)", "Release a-dst (IPv4)"]
    );
    sim.release("a-src", Ok(()));
    sim.release("a-dst", Ok(()));
    // Nothing is remembered, nothing of the unknown is released, and whoever
    // waits meanwhile gets what he waits for.
    sim.abandon("unknown");
    sim.acquire(3, "a", secs(10));
    sim.abandon("a");
    sim.grant();
    assert!(sim.answer(3).is_ok());
    sim.pass(secs(250));
    assert!(sim.calls.is_empty(), "{:?}", sim.in_flight());
}

#[test]
fn what_a_predecessor_allocated_can_be_released() {
    let mut sim = Sim::ready();
    sim.release_later("old");
    sim.pass(DELAY);
    sim.release("old-src", Ok(()));
    sim.release("old-dst", Ok(()));
    assert_eq!(sim.book.pending_releases(), 0);
}

#[test]
fn a_flush_does_not_wait() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.grant();
    sim.acquire(2, "b", secs(10));
    sim.allocate("b-src", "172.16.0.4/24");
    sim.allocate("b-dst", "172.16.0.5/24");
    sim.release_later("a");
    sim.flush();
    assert_eq!(sim.book.pending_releases(), 1);
    sim.release("a-src", Err(lost()));
    sim.pass(SHORT);
    sim.release("a-src", Ok(()));
    sim.release("a-dst", Ok(()));
    assert_eq!(sim.book.pending_releases(), 0);
    sim.pass(secs(60));
    assert!(
        sim.calls.is_empty(),
        "who was not closed keeps its addresses"
    );
}

#[test]
fn unusable_answers() {
    for (src, dst) in [
        ("172.16.0.2/24", "172.16.0.2/24"),
        ("172.16.0.1/24", "172.16.0.2/24"),
        ("172.16.0.2/24", "172.16.0.255/24"),
    ] {
        let mut sim = Sim::ready();
        sim.acquire(1, "a", secs(10));
        sim.allocate("a-src", src);
        sim.allocate("a-dst", dst);
        assert!(
            matches!(sim.answer(1), Err(AcquireError::Unusable(_))),
            "{src} {dst}: {:?}",
            sim.answer(1)
        );
    }
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.fail("a-src", Failure::Unusable("nonsense".to_owned()));
    assert_eq!(
        *sim.answer(1),
        Err(AcquireError::Unusable("nonsense".to_owned()))
    );
}

#[test]
fn a_failure_of_an_earlier_round_is_not_this_ones() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.fail("a-src", refused());
    assert!(sim.answer(1).is_err());
    sim.acquire(2, "a", secs(10));
    sim.fail("a-dst", refused());
    assert!(!sim.answers.contains_key(&2));
    sim.grant();
    assert_eq!(sim.src(2), "172.16.0.2/24");
}

#[test]
fn another_subnet_leads_to_a_new_bridge_address_first() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    sim.allocate("a-src", "172.16.9.2/24");
    sim.allocate("a-dst", "172.16.9.3/24");
    assert!(sim.answers.is_empty());
    assert_eq!(sim.in_flight(), ["Allocate bridge (IPv4)"]);
    sim.allocate("bridge", "172.16.9.1/24");
    assert_eq!(sim.bridges.len(), 2);
    assert_eq!(sim.src(1), "172.16.9.2/24");

    // When the bridge stays where it is, the answer is wrong.
    sim.acquire(2, "a", secs(10));
    sim.allocate("a-src", "172.16.3.2/24");
    sim.allocate("a-dst", "172.16.3.3/24");
    sim.allocate("bridge", "172.16.9.1/24");
    assert!(matches!(sim.answer(2), Err(AcquireError::Unusable(_))));
    assert!(sim.calls.is_empty());
}

#[test]
fn the_end_of_a_call_that_is_not_in_flight_changes_nothing() {
    let mut sim = Sim::ready();
    sim.acquire(1, "a", secs(10));
    let call = sim.calls[0].clone();
    sim.grant();
    let late = sim.book.allocated(&call, Err(refused()), sim.now);
    assert_eq!(late, []);
    let stranger = IpamCall {
        number: 99,
        verb: Verb::Release,
        child: IpamChild::Src(LeaseId::new("nobody")),
        family: Family::V4,
    };
    assert_eq!(sim.book.released(&stranger, Ok(()), sim.now), []);
}
