//! The stop where every peer is there, takes calls, and answers none.

use std::time::Duration;

use meridio_lab::fault::Fault;
use meridio_lab::topology::{Peer, Topology, TopologyOptions};
use meridio_proxy::daemon::shutdown::STAGES;
use meridio_proxy::sync::clock;
use serde_json::Value;

/// Peers that are gone refuse at once; those that are stopped use up the time of
/// each stage that talks to them.
#[test]
fn with_every_peer_paused_the_stop_is_over_within_25_seconds() {
    let mut lab = Topology::start(TopologyOptions {
        lbs: 2,
        targets: 1,
        ..TopologyOptions::default()
    })
    .unwrap();
    for peer in [
        Peer::Ipam,
        Peer::Nsp,
        Peer::Registry,
        Peer::Nsmgr,
        Peer::Agent,
    ] {
        lab.inflict(&peer, &Fault::Pause).unwrap();
    }
    let since = lab.daemon().unwrap().line_count();
    let begun = clock::now();
    let daemon = lab.stop_daemon(Duration::from_secs(29)).unwrap();
    let took = begun.elapsed();
    let lines: Vec<Value> = daemon.lines()[since..]
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let stages: Vec<&Value> = lines
        .iter()
        .map(|line| &line["extra_data"])
        .filter(|data| data["stage"].is_string())
        .collect();
    println!("the stop took {took:?}: {stages:?}");
    assert_eq!(stages.len(), STAGES.len(), "{stages:?}");
    // Nobody answered, or the measurement says nothing.
    assert!(took > Duration::from_secs(10), "{took:?}: {stages:?}");
    assert!(took <= Duration::from_secs(25), "{took:?}: {stages:?}");
    let status = daemon.wait_exit(Duration::ZERO).unwrap();
    assert_eq!(status.code(), Some(0), "{}", daemon.tail(30));
}
