//! Every peer's bad day: whatever is wrong with one of them, what is
//! established goes on, what is new is served once the peer is well again, and
//! nothing stays behind.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use grpcio::{RpcStatus, RpcStatusCode};
use meridio_lab::burst;
use meridio_lab::fault::Fault;
use meridio_lab::topology::{LIMIT, Peer, Topology, TopologyOptions, destination};
use meridio_lab::traffic::Flows;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::sync::thread::{STACK_LARGE, Threads};

use super::hostile::{assert_held, held};
use super::{lost, steady};

/// Intervals of traffic while the peer is unwell.
const ILL: usize = 12;
/// Registrations are refreshed at a third of it.
const EXPIRE: Duration = Duration::from_secs(6);

/// What a bad day may cost flows that are established.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cost {
    Nothing,
    /// Connections of LBs are made anew, so flows move; those that stay lose
    /// nothing.
    Moves,
    /// All connections of LBs are made anew at once.
    Gap,
}

fn late() -> Fault {
    Fault::Late(Duration::from_millis(60))
}

fn refuse() -> Fault {
    Fault::Refuse(RpcStatus::with_message(
        RpcStatusCode::INTERNAL,
        "unwell".to_owned(),
    ))
}

/// All faults, none of which may be noticed.
fn unnoticed() -> Vec<(Fault, Cost)> {
    let faults = [
        Fault::Pause,
        Fault::Kill,
        Fault::Restart,
        late(),
        refuse(),
        Fault::DropStreams,
        Fault::Forget,
    ];
    faults.map(|fault| (fault, Cost::Nothing)).into()
}

/// Two load balancers, a target, and short times of everything that is kept.
fn start() -> Topology {
    let options = TopologyOptions {
        env: BTreeMap::from([("NSM_IP_RELEASE_DELAY".to_owned(), "2s".to_owned())]),
        ..TopologyOptions::default()
    };
    let mut lab = Topology::peers(options).unwrap();
    lab.nsmgr.set_expire_period(EXPIRE);
    lab.start_daemon().unwrap();
    lab.add_lb().unwrap();
    lab.add_lb().unwrap();
    lab.wait_ready().unwrap();
    lab.add_target().unwrap();
    lab
}

/// The days of several peers, one after the other in one lab.
fn bad_days(lab: &mut Topology, peers: &[(Peer, Vec<(Fault, Cost)>)]) {
    let before = held(lab);
    for (peer, days) in peers {
        let traffic = steady(lab);
        for (fault, cost) in days {
            bad_day(lab, &traffic, peer, fault, *cost);
        }
    }
    assert_held(lab, &before);
    assert_eq!(lab.infra.leaked().unwrap(), 0, "leaked packets");
}

fn bad_day(lab: &mut Topology, traffic: &Flows, peer: &Peer, fault: &Fault, cost: Cost) {
    let what = format!("{peer}, {fault}");
    if let Peer::Lb(name) = peer {
        // The router hears of it, by means of its own.
        let others = lab.lbs.keys().filter(|lb| *lb != name).cloned();
        lab.router.spread_over(&others.collect::<Vec<_>>()).unwrap();
        assert!(traffic.all_answered_since(traffic.mark(), LIMIT), "{what}");
    }
    let mark = traffic.mark();
    let since = lab.daemon().unwrap().line_count();
    lab.inflict(peer, fault).unwrap();
    let target = lab.make_target().unwrap();
    let tried = Arc::clone(&lab.targets[&target]);
    let attempt = Threads::unsupervised()
        .spawn("attempt", STACK_LARGE, move |_| drop(tried.connect()))
        .unwrap();
    assert!(traffic.run_for(ILL, LIMIT), "{what}");
    lab.recover(peer).unwrap();
    drop(attempt);
    if *peer == Peer::Agent && matches!(fault, Fault::Forget) {
        // It asks again a second later, and the new SVID opens all streams anew:
        // a load balancer that left in between would not be missed.
        let asked = |line: &str| line.contains("new SVID");
        let again = |line: &str| line.contains("stream of LBs ended");
        let daemon = lab.daemon().unwrap();
        for wanted in [&asked as &dyn Fn(&str) -> bool, &again] {
            assert!(daemon.wait_line(since, wanted, LIMIT).is_some(), "{what}");
        }
    }
    connect(lab, &target);
    assert!(traffic.all_answered_since(traffic.mark(), LIMIT), "{what}");
    let step = traffic.step(mark);
    match cost {
        Cost::Nothing => assert_eq!(lost(lab, &step), 0, "{what}: {step}"),
        Cost::Moves => assert_eq!(step.lost_steady, 0, "{what}: {step}"),
        Cost::Gap => {}
    }
    serves_anew(lab, traffic, &target, &what, cost);
}

/// Connects a target, again and again as Meridio's TAPA does.
fn connect(lab: &mut Topology, target: &str) {
    let deadline = clock::now() + LIMIT;
    let (_stopper, pause) = stop_pair();
    while let Err(error) = lab.start_target(target) {
        assert!(clock::now() < deadline, "{error}");
        let _ = pause.wait(Duration::from_millis(50));
    }
}

/// A load balancer and a target that are new carry flows, and go again.
fn serves_anew(lab: &mut Topology, traffic: &Flows, target: &str, what: &str, cost: Cost) {
    let mark = traffic.mark();
    let lb = lab.add_lb().unwrap();
    let deadline = clock::now() + LIMIT;
    for vip in lab.vips().to_vec() {
        loop {
            let burst = burst::udp(lab.router.client(), destination(vip), 60).unwrap();
            if burst.complete() && burst.by_target.contains_key(target) {
                break;
            }
            let may_take_time = matches!(cost, Cost::Gap) && clock::now() < deadline;
            assert!(may_take_time, "{what}: {burst}");
        }
    }
    assert!(traffic.all_answered_since(traffic.mark(), LIMIT), "{what}");
    let number = lab.lbs[&lb].number();
    let shares = traffic.shares_back();
    assert!(shares.contains_key(&number), "{what}: {shares:?}");
    lab.unregister(target).unwrap();
    assert!(traffic.run_for(3, LIMIT));
    lab.stop_target(target).unwrap();
    lab.remove_lb(&lb).unwrap();
    assert!(traffic.all_answered_since(traffic.mark(), LIMIT), "{what}");
    let step = traffic.step(mark);
    // Pairs that a forwarder took with it are made anew when their clients notice,
    // which may be during this.
    if !matches!(cost, Cost::Gap) {
        assert_eq!(lost(lab, &step), 0, "{what}, afterwards: {step}");
    }
}

/// An LB's kernel goes on; the router keeps away from it.
fn days_of_a_load_balancer() -> Vec<(Fault, Cost)> {
    vec![
        (Fault::Pause, Cost::Nothing),
        (late(), Cost::Nothing),
        (refuse(), Cost::Nothing),
        (Fault::Kill, Cost::Nothing),
        (Fault::DropStreams, Cost::Moves),
        (Fault::Restart, Cost::Moves),
        (Fault::Forget, Cost::Moves),
    ]
}

fn days_of_the_forwarder() -> Vec<(Fault, Cost)> {
    vec![
        (Fault::Pause, Cost::Nothing),
        (late(), Cost::Nothing),
        (refuse(), Cost::Nothing),
        (Fault::Kill, Cost::Gap),
        (Fault::Restart, Cost::Gap),
        (Fault::DropStreams, Cost::Gap),
        (Fault::Forget, Cost::Gap),
    ]
}

#[test]
fn of_the_services_and_a_load_balancer() {
    let mut of_ipam = unnoticed();
    // See below.
    of_ipam.retain(|(fault, _)| !matches!(fault, Fault::Forget));
    let peers = [
        (Peer::Agent, unnoticed()),
        (Peer::Ipam, of_ipam),
        (Peer::Nsp, unnoticed()),
        (Peer::Lb("lb-1".to_owned()), days_of_a_load_balancer()),
    ];
    bad_days(&mut start(), &peers);
}

#[test]
fn of_the_mesh() {
    let peers = [
        (Peer::Nsmgr, unnoticed()),
        (Peer::Registry, unnoticed()),
        (Peer::Forwarder, days_of_the_forwarder()),
    ];
    let mut lab = start();
    bad_days(&mut lab, &peers);
    of_a_target(&mut lab);
}

/// Of one that serves nobody: `target-1` has the traffic.
fn of_a_target(lab: &mut Topology) {
    let name = lab.add_target().unwrap();
    lab.unregister(&name).unwrap();
    let peer = Peer::Target(name.clone());
    let before = held(lab);
    let traffic = steady(lab);
    for fault in [
        Fault::Kill,
        Fault::Restart,
        Fault::DropStreams,
        Fault::Forget,
    ] {
        bad_day(lab, &traffic, &peer, &fault, Cost::Nothing);
        lab.start_target(&name).unwrap();
        let burst = burst::udp(lab.router.client(), destination(lab.vips()[0]), 60).unwrap();
        assert!(burst.by_target.contains_key(&name), "{fault}: {burst}");
        lab.unregister(&name).unwrap();
    }
    assert_held(lab, &before);
    lab.inflict(&peer, &Fault::Pause).unwrap_err();
}

/// An IPAM that lost its table gives addresses away that are in use; nobody
/// gets them, and IPAM learns anew who has which.
#[test]
fn of_an_ipam_that_lost_its_table() {
    let mut lab = start();
    let before = lab.ipam.allocations();
    let traffic = steady(&lab);
    let mark = traffic.mark();
    lab.inflict(&Peer::Ipam, &Fault::Forget).unwrap();
    let name = lab.make_target().unwrap();
    let refused = lab.targets[&name].connect().unwrap_err();
    assert!(refused.contains("is the bridge's own"), "{refused}");
    connect(&mut lab, &name);
    assert!(traffic.run_for(ILL, LIMIT));
    let after = lab.ipam.allocations();
    assert!(
        before.keys().all(|key| after.contains_key(key)),
        "{after:?}"
    );
    let step = traffic.step(mark);
    assert_eq!(lost(&lab, &step), 0, "{step}");
    serves_anew(&mut lab, &traffic, &name, "forgotten", Cost::Nothing);
}
