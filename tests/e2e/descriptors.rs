//! The daemon with few descriptors.

use std::time::Duration;

use meridio_lab::client::{NsmClient, Session};
use meridio_lab::policy::Hop;
use meridio_lab::topology::{LIMIT, Topology, TopologyOptions};
use meridio_proxy::rpc::env::Rpc;

const SOFT: u64 = 200;
const HARD: u64 = 400;
/// More than the hard limit leaves room for, with three descriptors each.
const PEERS: usize = 140;

/// Whether the daemon writes a line with all of `words` after `since`.
fn says(lab: &Topology, since: usize, words: &[&str]) {
    let daemon = lab.daemon().unwrap();
    let all = |line: &str| words.iter().all(|word| line.contains(word));
    let line = daemon.wait_line(since, all, LIMIT);
    assert!(line.is_some(), "no {words:?}:\n{}", daemon.tail(20));
}

#[test]
fn more_peers_than_descriptors_take_nothing_from_the_probe_and_from_others() {
    let mut lab = Topology::peers(TopologyOptions {
        descriptors: Some((SOFT, HARD)),
        ..TopologyOptions::default()
    })
    .unwrap();
    lab.start_daemon().unwrap();
    says(
        &lab,
        0,
        &["descriptor", &SOFT.to_string(), &HARD.to_string()],
    );
    let daemon = lab.daemon().unwrap();
    daemon.wait_health("NSMEndpoint", LIMIT).unwrap();

    let hop = Hop::new(
        lab.pki(),
        "ns/red/sa/forwarder",
        "forwarder",
        Duration::from_secs(3600),
    );
    let client = NsmClient::new(hop, Rpc::new());
    let socket = lab.endpoint_socket().unwrap();
    let established = client.dial(&socket).unwrap();
    established.health("", LIMIT).unwrap();
    // A refused one ends during its handshake, or right after it.
    let others: Vec<Session> = (0..PEERS)
        .filter_map(|_| client.dial(&socket).ok())
        .collect();
    let served = |session: &&Session| session.health("", LIMIT).is_ok();
    let served = others.iter().filter(served).count();
    assert!((10..PEERS).contains(&served), "{served} are served");
    established.health("", LIMIT).unwrap();

    // Each probe dials anew.
    let since = daemon.line_count();
    says(&lab, since, &["accepted a connection", "sa/proxy"]);
    daemon.health("Liveness").unwrap();
    let lines = daemon.lines();
    let refusals = |word: &str| lines.iter().filter(|line| line.contains(word)).count();
    assert_eq!(refusals("too many connections"), 1, "{}", daemon.tail(20));
    assert_eq!(refusals("accepting:"), 0, "{}", daemon.tail(20));

    let since = daemon.line_count();
    drop(others);
    says(&lab, since, &["connections are accepted again"]);
    let again = client.dial(&socket).unwrap();
    again.health("", LIMIT).unwrap();
}
