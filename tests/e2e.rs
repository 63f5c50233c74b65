//! The whole daemon: the real binary with the strict peers of the lab, each in
//! a network namespace of its own, and packets. A test may be run alone; none
//! needs more than a minute.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests end by panicking too"
)]

#[path = "e2e/bad_days.rs"]
mod bad_days;
#[path = "e2e/changes.rs"]
mod changes;
#[path = "e2e/descriptors.rs"]
mod descriptors;
#[path = "e2e/hostile.rs"]
mod hostile;
#[path = "e2e/hostile_addresses.rs"]
mod hostile_addresses;
#[path = "e2e/hostile_answers.rs"]
mod hostile_answers;
#[path = "e2e/hostile_bytes.rs"]
mod hostile_bytes;
#[path = "e2e/life.rs"]
mod life;
#[path = "e2e/outages.rs"]
mod outages;
#[path = "e2e/repair.rs"]
mod repair;

use std::time::Duration;

use meridio_lab::topology::{LIMIT, Topology, TopologyOptions};
use meridio_lab::traffic::{Flows, Pace, Step};

/// Intervals of traffic before and after a change.
const REST: usize = 10;

fn lab(lbs: usize, targets: usize) -> Topology {
    Topology::start(TopologyOptions {
        lbs,
        targets,
        ..TopologyOptions::default()
    })
    .unwrap()
}

/// 25 flows to each VIP, a packet of each in every 25 ms, for a minute.
fn steady(lab: &Topology) -> Flows {
    let pace = Pace {
        interval: Duration::from_millis(25),
        limit: Duration::from_secs(60),
    };
    lab.steady(&pace, 25).unwrap()
}

/// What became of the packets around a change, from a while before it until
/// every flow is answered again.
fn during(traffic: &Flows, change: impl FnOnce()) -> Step {
    let mark = traffic.mark();
    assert!(traffic.run_for(REST, LIMIT));
    change();
    assert!(traffic.run_for(REST, LIMIT));
    assert!(
        traffic.all_answered_since(traffic.mark(), LIMIT),
        "not every flow recovers: {}",
        traffic.step(mark)
    );
    traffic.step(mark)
}

/// The packets that were lost, but for at most two that met the gap in which the
/// kernel replaces an IPv6 multipath route, and at most five that the machine
/// discarded since other tests filled its queue; it counts both.
fn lost(lab: &Topology, step: &Step) -> usize {
    let gap = lab.without_ipv6_route().unwrap().min(2);
    let excused = step.discarded + usize::try_from(gap).unwrap();
    step.lost.saturating_sub(excused)
}

/// No call was refused, and nothing of a VIP left by the primary interface.
fn in_good_order(lab: &Topology) {
    assert_eq!(lab.nsmgr.refusals(), Vec::<String>::new());
    assert_eq!(lab.infra.leaked().unwrap(), 0, "leaked packets");
}
