//! The IPAM client against the lab's IPAM, over mTLS on loopback.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

#[path = "ipam/bench.rs"]
mod bench;

use std::time::Duration;

use bench::{Bench, allocates, lease_id, secs, soon};
use meridio_lab::ipam::IpamOptions as LabOptions;
use meridio_proxy::core::family::{Family, IpFamilies, PerFamily};
use meridio_proxy::core::lease::Verb;
use meridio_proxy::ipam::IpamError;
use meridio_proxy::proto::ipam::IPFamily;
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::sync::clock;

#[test]
fn each_acquire_asks_for_both_children_in_both_families() {
    let bench = Bench::start();
    let prefixes = bench.bridge();
    assert_eq!(prefixes.v4.unwrap().to_string(), "172.16.0.1/24");
    assert_eq!(prefixes.v6.unwrap().to_string(), "fd00::1/64");

    let addresses = bench.acquire("proxy-lb-1").unwrap();
    assert!(addresses.leases.covers(IpFamilies::Dual));
    assert_eq!(addresses.bridge, prefixes);
    let mut asked: Vec<_> = bench
        .lab
        .calls()
        .into_iter()
        .map(|call| {
            let subnet = call.child.subnet.clone().unwrap();
            assert_eq!(call.verb, Verb::Allocate);
            assert_eq!(subnet.node, "worker-1");
            assert_eq!(subnet.conduit.name, "load-balancer");
            assert_eq!(subnet.conduit.trench.name, "trench-a");
            (
                call.child.name.clone(),
                subnet.ipFamily.enum_value().unwrap(),
            )
        })
        .collect();
    asked.sort_by_key(|(name, family)| (name.clone(), *family as i32));
    let both = |name: &str| {
        [
            (name.to_owned(), IPFamily::IPV4),
            (name.to_owned(), IPFamily::IPV6),
        ]
    };
    let expected = ["bridge", "proxy-lb-1-dst", "proxy-lb-1-src"].map(both);
    assert_eq!(asked, expected.concat());

    assert_eq!(bench.acquire("proxy-lb-1").unwrap(), addresses);
    assert_eq!(bench.lab.calls().len(), 10, "a refresh asks again");
    assert_eq!(bench.lab.allocations().len(), 6);
}

#[test]
fn one_family_asks_for_one_family() {
    let bench = Bench::with(|options| options.families = IpFamilies::V6);
    let addresses = bench.acquire("a").unwrap();
    assert!(addresses.leases.v4.is_none() && addresses.bridge.v4.is_none());
    assert_eq!(addresses.leases.v6.unwrap().src.prefix(), 64);
    assert_eq!(bench.lab.calls().len(), 3);
}

#[test]
fn calls_of_many_connections_run_beside_each_other() {
    let bench = Bench::start();
    bench.bridge();
    bench
        .lab
        .set_delay(Verb::Allocate, Duration::from_millis(5));
    let begun = clock::now();
    let answers: Vec<_> = (0..120)
        .map(|n| bench.ask(&format!("target-{n}"), secs(10)))
        .collect();
    let mut seen = std::collections::BTreeSet::new();
    for answer in answers {
        let addresses = answer.recv().unwrap().unwrap();
        for lease in addresses.leases.values() {
            assert!(seen.insert(lease.src.ip()) && seen.insert(lease.dst.ip()));
        }
    }
    // One after the other the 480 calls would take 2.4 s.
    let took = begun.elapsed();
    println!("120 acquires took {took:?}");
    assert!(took < Duration::from_millis(1200), "{took:?}");
}

/// All targets of a node come at once, and IPAM works its calls off one after
/// the other: none waits there for so long that it is given up and repeated.
#[test]
fn a_slow_ipam_is_not_flooded() {
    let bench = Bench::start();
    bench.bridge();
    bench.lab.set_turn(Duration::from_millis(18));
    let answers: Vec<_> = (0..120)
        .map(|n| bench.ask(&format!("target-{n}"), secs(15)))
        .collect();
    for answer in answers {
        answer.recv().unwrap().unwrap();
    }
    assert_eq!(bench.lab.calls().len(), 2 + 480, "none was repeated");
}

#[test]
fn what_is_slow_delays_itself_only() {
    let bench = Bench::start();
    bench.bridge();
    bench.lab.set_child_delay("slow-src", secs(2));
    let slow = bench.ask("slow", secs(10));
    let begun = clock::now();
    for n in 0..5 {
        bench.acquire(&format!("quick-{n}")).unwrap();
    }
    assert!(begun.elapsed() < secs(1), "{:?}", begun.elapsed());
    assert!(slow.is_empty());
    slow.recv().unwrap().unwrap();
}

#[test]
fn a_failure_ends_a_first_acquire_and_not_a_refresh() {
    let bench = Bench::start();
    let known = bench.acquire("known").unwrap();
    bench.lab.set_failure(Some("database is locked"));
    assert_eq!(
        bench.acquire("new"),
        Err(IpamError::Rpc(RpcError::status(
            Code::UNKNOWN,
            "database is locked"
        )))
    );
    assert_eq!(bench.acquire("known"), Ok(known));
    // It is tried again in the background, after 2 s and longer.
    let before = allocates(&bench.lab.calls(), "known-src");
    bench.lab.set_failure(None);
    bench
        .lab
        .wait(soon(10), |_, calls| {
            allocates(calls, "known-src") > before && allocates(calls, "known-dst") > before
        })
        .unwrap();
    bench.acquire("new").unwrap();
}

#[test]
fn a_release_waits_and_an_acquire_cancels_it() {
    let delay = Duration::from_millis(700);
    let bench = Bench::with(|options| options.release_delay = delay);
    bench.acquire("stays").unwrap();
    bench.acquire("goes").unwrap();
    let asked = clock::now();
    bench.ipam().release_later(lease_id("stays"));
    bench.ipam().release_later(lease_id("goes"));
    bench.acquire("stays").unwrap();
    bench
        .lab
        .wait(soon(10), |table, _| {
            !table.keys().any(|key| key.child.starts_with("goes"))
        })
        .unwrap();
    let released: Vec<_> = bench
        .lab
        .calls()
        .into_iter()
        .filter(|call| call.verb == Verb::Release)
        .collect();
    assert_eq!(released.len(), 4, "{released:?}");
    for call in &released {
        assert!(call.child.name.starts_with("goes"), "{}", call.child.name);
        assert!(call.arrived >= asked + delay);
    }
    assert_eq!(bench.lab.allocations().len(), 6);
}

#[test]
fn a_release_on_the_wire_is_over_before_an_allocate_begins() {
    let bench = Bench::with(|options| options.release_delay = Duration::ZERO);
    bench.acquire("a").unwrap();
    bench
        .lab
        .set_delay(Verb::Release, Duration::from_millis(500));
    bench.ipam().release_later(lease_id("a"));
    bench
        .lab
        .wait(soon(5), |_, calls| {
            calls
                .iter()
                .filter(|call| call.verb == Verb::Release)
                .count()
                == 4
        })
        .unwrap();
    let addresses = bench.acquire("a").unwrap();
    let calls = bench.lab.calls();
    let executed = calls.iter().filter(|call| call.verb == Verb::Release);
    let last = executed.map(|call| call.executed.unwrap()).max().unwrap();
    let again = calls.iter().rev().take(4);
    for call in again {
        assert_eq!(call.verb, Verb::Allocate);
        let own = calls.iter().find(|other| {
            other.verb == Verb::Release
                && other.child.name == call.child.name
                && other.child.subnet.ipFamily == call.child.subnet.ipFamily
        });
        assert!(call.arrived > own.unwrap().executed.unwrap());
    }
    assert!(clock::now() > last);
    assert_eq!(bench.held("a"), addresses.leases);
}

#[test]
fn a_stop_releases_what_is_pending_and_nothing_else() {
    let mut bench = Bench::with(|options| options.release_delay = secs(3600));
    for id in ["a", "b", "target"] {
        bench.acquire(id).unwrap();
    }
    bench.ipam().release_later(lease_id("a"));
    bench.ipam().release_later(lease_id("b"));
    assert_eq!(bench.stop(secs(8)), Vec::<String>::new());
    let left: Vec<_> = bench.lab.allocations().into_keys().collect();
    assert_eq!(left.len(), 6, "{left:?}");
    assert!(
        left.iter()
            .all(|key| key.child == "bridge" || key.child.starts_with("target"))
    );
}

#[test]
fn a_stop_without_ipam_ends_in_time() {
    let mut bench = Bench::with(|options| options.release_delay = secs(3600));
    bench.acquire("a").unwrap();
    bench.lab.stop();
    bench.ipam().release_later(lease_id("a"));
    let waiting = bench.ask("new", secs(60));
    let begun = clock::now();
    assert_eq!(bench.stop(secs(1)), Vec::<String>::new());
    let took = begun.elapsed();
    assert!(
        took > Duration::from_millis(800) && took < secs(2),
        "{took:?}"
    );
    assert_eq!(waiting.recv().unwrap(), Err(IpamError::Stopped));
}

#[test]
fn a_restart_of_ipam_ends_no_refresh_and_delays_the_first_acquires() {
    let bench = Bench::start();
    let known = bench.acquire("known").unwrap();
    bench.lab.stop();
    let begun = clock::now();
    assert_eq!(bench.acquire("known"), Ok(known));
    assert!(begun.elapsed() < secs(5), "{:?}", begun.elapsed());
    let new = bench.ask("new", secs(20));
    bench.serve();
    let addresses = new.recv().unwrap().unwrap();
    assert_eq!(bench.held("new"), addresses.leases);
    assert_eq!(bench.acquire("known"), Ok(known));
}

#[test]
fn a_late_ipam_is_waited_for() {
    let bench = Bench::away();
    let early = bench.ask("early", Duration::from_millis(500));
    let patient = bench.ask("patient", secs(20));
    assert!(matches!(early.recv().unwrap(), Err(IpamError::Deadline(_))));
    let addressed = bench.ipam().addressed();
    assert!(!addressed.is_set());
    bench.serve();
    assert!(addressed.wait(secs(20)));
    patient.recv().unwrap().unwrap();
    bench.bridge();
}

#[test]
fn a_rotation_of_the_certificate_fails_no_call() {
    let bench = Bench::start();
    bench.bridge();
    bench
        .lab
        .set_delay(Verb::Allocate, Duration::from_millis(20));
    for n in 0..40 {
        let answers = ["a", "b", "c"].map(|id| bench.ask(&format!("{id}{n}"), secs(10)));
        bench.rotate();
        for answer in answers {
            answer.recv().unwrap().unwrap();
        }
    }
    let calls = bench.lab.calls();
    assert_eq!(calls.len(), 2 + 40 * 3 * 4, "none was repeated");
}

#[test]
fn unusable_answers_are_errors() {
    let bench = Bench::start();
    bench.bridge();
    for (address, length) in [
        ("999.1.1.1", 24),
        ("", 24),
        ("172.16.0.9/24", 24),
        ("172.16.0.9", -1),
        ("172.16.0.9", 4096),
        ("fd00::9", 24),
        // The same for both ends, and for both families.
        ("172.16.0.9", 24),
        ("0.0.0.0", 0),
    ] {
        bench.lab.set_answer(Some((address, length)));
        let result = bench.acquire("a");
        assert!(
            matches!(result, Err(IpamError::Unusable(_))),
            "{address}/{length}: {result:?}"
        );
    }
    bench.lab.set_answer(None);
    bench.acquire("a").unwrap();
}

#[test]
fn a_new_subnet_is_followed_with_the_bridge_first() {
    let bench = Bench::start();
    bench.bridge();
    bench.acquire("a").unwrap();
    bench.lab.forget();
    for family in Family::ALL {
        bench
            .lab
            .allocate(&bench.child("worker-2", "bridge", family))
            .unwrap();
    }
    let addresses = bench.acquire("a").unwrap();
    assert_eq!(
        addresses.bridge.v4.unwrap().network().to_string(),
        "172.16.1.0"
    );
    // One family may have moved before the other.
    while bench.bridge() != addresses.bridge {}
    assert_eq!(bench.held("a"), addresses.leases);
}

#[test]
fn an_ipam_that_comes_back_without_its_table_gives_everybody_the_same() {
    let bench = Bench::start();
    let prefixes = bench.bridge();
    let names = ["c", "b", "a"];
    for name in names {
        bench.acquire(name).unwrap();
    }
    let before = bench.lab.allocations();
    bench.lab.stop();
    bench.lab.forget();
    bench.serve();
    let all = before.len();
    bench
        .lab
        .wait(soon(20), |table, _| table.len() == all)
        .unwrap();
    let after = bench.lab.allocations();
    let bridge = |family| {
        after
            .iter()
            .find(|(key, _)| key.family == family && key.child == "bridge")
    };
    assert_eq!(
        prefixes,
        PerFamily::from_fn(|family| bridge(family).map(|(_, at)| *at))
    );
    assert!(after.keys().eq(before.keys()));
}

#[test]
fn an_ipam_that_forgot_unseen_is_noticed_by_what_it_gives() {
    let bench = Bench::start();
    bench.bridge();
    bench.acquire("a").unwrap();
    bench.lab.forget();
    let refused = bench.acquire("new");
    assert!(
        matches!(&refused, Err(IpamError::Unusable(why)) if why.contains("the bridge's own")),
        "{refused:?}"
    );
    let again = clock::now();
    let new = bench.acquire("new").unwrap();
    assert!(again.elapsed() < secs(2), "{:?}", again.elapsed());
    assert_eq!(bench.held("new"), new.leases);
    let known = bench.acquire("a").unwrap();
    assert_eq!(bench.held("a"), known.leases);
    assert_eq!(bench.lab.allocations().len(), 10);
}

#[test]
fn a_conduit_that_ipam_does_not_know_yet_is_waited_for() {
    let mut options = LabOptions::new("trench-a", "load-balancer");
    options.conduits.clear();
    let bench = Bench::new(&options, true, |_| {});
    let waiting = bench.ask("a", secs(10));
    bench
        .lab
        .wait(soon(5), |_, calls| calls.len() >= 2)
        .unwrap();
    bench.lab.add_conduit("load-balancer");
    waiting.recv().unwrap().unwrap();
}

#[test]
fn a_full_node_refuses_and_leaves_nothing_behind() {
    let bench = Bench::with(|options| {
        options.families = IpFamilies::V4;
        options.release_delay = Duration::ZERO;
    });
    for n in 0..126 {
        bench.acquire(&format!("c{n}")).unwrap();
    }
    // One address is left: half a lease.
    let result = bench.acquire("last");
    assert!(
        matches!(&result, Err(IpamError::Rpc(error)) if error.to_string().contains("no more prefix")),
        "{result:?}"
    );
    bench.ipam().release_later(lease_id("last"));
    bench.ipam().release_later(lease_id("c0"));
    bench
        .lab
        .wait(soon(5), |table, _| table.len() == 1 + 2 * 125)
        .unwrap();
    bench.acquire("last").unwrap();
}
