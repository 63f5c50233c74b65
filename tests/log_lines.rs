//! What an operator reads: lines that are wanted, and lines that are not. The
//! real binary with the peers of the lab.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests end by panicking too"
)]

use std::time::Duration;

use meridio_lab::process::Daemon;
use meridio_lab::topology::{LIMIT, Topology, TopologyOptions};
use meridio_proxy::sync::clock;
use serde_json::Value;

fn lab(lbs: usize, targets: usize) -> Topology {
    Topology::start(TopologyOptions {
        lbs,
        targets,
        ..TopologyOptions::default()
    })
    .unwrap()
}

/// The lines from number `since` on that are more than information.
fn troubles(daemon: &Daemon, since: usize) -> Vec<String> {
    let lines = daemon.lines();
    lines[since..]
        .iter()
        .filter(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            !["info", "debug"].contains(&line["severity"].as_str().unwrap())
        })
        .cloned()
        .collect()
}

fn count(daemon: &Daemon, text: &str) -> usize {
    let lines = daemon.lines();
    lines.iter().filter(|line| line.contains(text)).count()
}

fn wait(daemon: &Daemon, since: usize, text: &str) {
    let line = daemon.wait_line(since, |line| line.contains(text), LIMIT);
    assert!(line.is_some(), "{text}: {}", daemon.tail(30));
}

/// What operators search the log for, word for word as Meridio's proxy writes it.
#[test]
fn the_words_of_meridio_are_there() {
    let mut lab = lab(2, 1);
    let vip = std::net::IpAddr::from([20, 0, 0, 9]);
    lab.add_vip(vip).unwrap();
    lab.remove_vip(vip).unwrap();
    lab.remove_lb("lb-1").unwrap();
    // The other one goes without a word.
    lab.nsmgr.remove_endpoint("lb-2");
    let daemon = lab.daemon().unwrap();
    wait(daemon, 0, "Connection monitor received delete event");
    wait(daemon, 0, "no load balancer is connected");
    daemon.health("Readiness").unwrap_err();
    let daemon = lab.stop_daemon(Duration::from_secs(28)).unwrap();
    let found: Vec<Value> = daemon
        .lines()
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for (words, key) in [
        ("Configuration read", "config"),
        ("Set bridge IP", "ip"),
        ("Add network service endpoint", "name"),
        ("InterfaceCreated", "intf"),
        ("InterfaceDeleted", "intf"),
        ("Add VIP", "vip"),
        ("Delete VIP", "vip"),
        ("Added nexthop", "nexthop"),
        ("Removed nexthop", "nexthop"),
        ("Probe service", "service"),
    ] {
        let line = found.iter().find(|line| line["message"] == words);
        let line = line.unwrap_or_else(|| panic!("no {words:?}"));
        assert!(!line["extra_data"][key].is_null(), "{line}");
    }
    for words in [
        "Connected network service endpoint: ",
        "Closed network service endpoint: ",
        "release IP: ",
    ] {
        let begins = |line: &Value| line["message"].as_str().unwrap().starts_with(words);
        assert!(found.iter().any(begins), "no {words:?}");
    }
    assert_eq!(found.last().unwrap()["message"], "Proxy shutting done");
}

#[test]
fn a_start_with_all_peers_there_warns_of_nothing() {
    let lab = lab(2, 1);
    let daemon = lab.daemon().unwrap();
    // A busy machine may make a turn of the data plane long.
    let mut found = troubles(daemon, 0);
    found.retain(|line| !line.contains("a turn of the data plane took"));
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Nothing is wrong when SPIRE renews the certificate: peers close what was made
/// with the old one, and everything is asked again on new connections.
#[test]
fn a_rotation_of_the_svid_warns_of_nothing() {
    let lab = lab(2, 1);
    let daemon = lab.daemon().unwrap();
    let service = lab.proxy_service();
    for _ in 0..3 {
        let since = daemon.line_count();
        lab.agent.rotate();
        wait(daemon, since, "new SVID");
        wait(daemon, since, "connected to");
        lab.nsmgr
            .wait_registered(&service, "proxy-1", clock::now() + LIMIT)
            .unwrap();
        let later = daemon.wait_exit(Duration::from_secs(2));
        assert!(later.is_none(), "{}", daemon.tail(30));
        let troubles = troubles(daemon, since);
        assert!(troubles.is_empty(), "{}", troubles.join("\n"));
    }
}

/// A SPIRE agent ends its streams when it restarts, and now and then besides.
#[test]
fn a_stream_of_the_workload_api_that_comes_back_warns_of_nothing() {
    let mut lab = lab(1, 0);
    let calls = lab.agent.calls().get();
    let since = lab.daemon().unwrap().line_count();
    lab.agent.drop_streams();
    let changes = lab.agent.calls().subscribe();
    while lab.agent.calls().get() == calls {
        changes.recv_timeout(LIMIT).unwrap();
    }
    wait(lab.daemon().unwrap(), since, "SVID was sent again");
    let found = troubles(lab.daemon().unwrap(), since);
    assert!(found.is_empty(), "{}", found.join("\n"));
    // One that stays away is told.
    let since = lab.daemon().unwrap().line_count();
    lab.agent.stop();
    wait(lab.daemon().unwrap(), since, "\"warning\"");
    assert!(count(lab.daemon().unwrap(), "Workload API at") >= 2);
}

/// An NSP that tells its list and ends the stream, again and again, is
/// followed, but it does not fill the log.
#[test]
fn an_nsp_that_lists_and_ends_is_a_line_a_minute() {
    let lab = lab(1, 0);
    for round in 0..6 {
        let deadline = clock::now() + LIMIT;
        lab.nsp.wait_vip_watches(round + 1, deadline).unwrap();
        lab.nsp.close_streams();
    }
    let daemon = lab.daemon().unwrap();
    let told = daemon
        .lines()
        .iter()
        .filter(|line| line.contains("stream of VIPs ended") && line.contains("\"info\""))
        .count();
    assert_eq!(told, 1, "{}", daemon.tail(30));
}
