//! The mesh of LB connections over mTLS with the lab's nsmgr, which refuses
//! what the real one refuses, and with leases of the lab's IPAM. Interfaces
//! are not made: the lab's forwarder tells this test what it would make.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's way to fail"
)]

#[path = "nsm/frames.rs"]
mod frames;
#[path = "nsm/rig.rs"]
mod rig;

use std::time::Duration;

use meridio_proxy::core::event::Event;
use meridio_proxy::nsm::ConnectionLog;
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::sync::clock;
use rig::{HOUR, PATIENCE, PROXY, Pair, Rig, TOKENS, enter_netns, id, ip, port, soon};

#[test]
fn lbs_are_connected_refreshed_and_closed() {
    let rig = Rig::new();
    rig.add("lb-1");
    let log = ConnectionLog::start(&rig.threads, rig.caller(), PROXY.to_owned()).unwrap();
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    let first = rig.nsmgr.connections();
    // Longer than any token on the path lives.
    let until = clock::now() + TOKENS + Duration::from_secs(2);
    let mut refreshes = 0;
    while clock::now() < until {
        rig.expect_up("lb-1");
        rig.expect_pair("lb-1");
        refreshes += 1;
    }
    assert!((4..=10).contains(&refreshes), "{refreshes} in 12 s");
    let last = rig.nsmgr.connections();
    assert_eq!((first.len(), last.len()), (1, 1));
    assert_eq!(first[0].id, last[0].id);
    assert_eq!(first[0].mechanism, last[0].mechanism);

    assert!(mesh.stop(soon()).is_empty());
    assert_eq!(rig.fact(), Event::PortReleased { key: port("lb-1") });
    rig.lab_ipam
        .wait(soon(), |table, _| {
            !table.keys().any(|key| key.child.starts_with(&id("lb-1")))
        })
        .unwrap();
    drop(log);
    rig.assert_clean();
}

#[test]
fn lbs_come_and_go() {
    let rig = Rig::new();
    let mesh = rig.mesh();
    for lb in ["lb-1", "lb-2", "lb-3"] {
        rig.add(lb);
        loop {
            if let Event::PortExpected { key, .. } = rig.fact()
                && key == port(lb)
            {
                break;
            }
        }
    }
    assert_eq!(rig.nsmgr.crosses(), 3);
    rig.expect_streams(3, 1);
    rig.nsmgr.remove_endpoint("lb-2");
    loop {
        match rig.fact() {
            Event::PortReleased { key } => {
                assert_eq!(key, port("lb-2"));
                break;
            }
            // nsmgr ends the connection before our Close does.
            Event::PeerDown { key } => assert_eq!(key, port("lb-2")),
            Event::PortExpected { .. } => {}
            other => panic!("{other}"),
        }
    }
    rig.expect_streams(2, 1);
    assert!(mesh.stop(soon()).is_empty());
    rig.expect_streams(0, 0);
    assert!(rig.nsmgr.connections().is_empty());
    assert_eq!(rig.nsmgr.crosses(), 0);
}

#[test]
fn a_new_nsmgr_is_told_the_connection_and_traffic_goes_on() {
    let rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    rig.nsmgr.restart().unwrap();
    assert!(rig.nsmgr.connections().is_empty());
    // Nothing but refreshes: the pair is neither removed nor made anew.
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    assert_eq!(rig.nsmgr.connections().len(), 1);
    rig.nsmgr.drop_streams();
    rig.nsmgr.cut_connections();
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    assert!(mesh.stop(soon()).is_empty());
    assert_eq!(rig.pairs.recv_timeout(PATIENCE).unwrap(), Pair::Disconnect);
    rig.assert_clean();
}

#[test]
fn a_new_svid_interrupts_nothing() {
    let rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    for _ in 0..4 {
        rig.expect_up("lb-1");
        rig.expect_pair("lb-1");
        rig.trust.refill(&rig.cell, &rig.trust.id("proxy"), HOUR);
    }
    assert!(mesh.stop(soon()).is_empty());
    rig.assert_clean();
}

#[test]
fn an_lb_that_dies_is_down_and_connected_again_when_it_is_back() {
    let rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    rig.nsmgr.kill_endpoint("lb-1");
    // The next refresh fails, which nsmgr reports as DOWN.
    assert_eq!(rig.fact(), Event::PeerDown { key: port("lb-1") });
    rig.add("lb-1");
    rig.expect_up("lb-1");
    assert_eq!(rig.nsmgr.connections().len(), 1);
    assert!(mesh.stop(soon()).is_empty());
    assert!(rig.nsmgr.connections().is_empty());
    assert_eq!(rig.nsmgr.crosses(), 0);
}

#[test]
fn a_first_request_that_fails_leaves_nothing_and_is_repeated() {
    let rig = Rig::new();
    let refused = RpcError::status(Code::UNKNOWN, "all forwarders have failed");
    rig.nsmgr.fail_next_requests([refused]);
    rig.add("lb-1");
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    assert_eq!(rig.nsmgr.connections().len(), 1);
    assert!(mesh.stop(soon()).is_empty());
    rig.assert_clean();
}

#[test]
fn a_predecessors_connection_is_rebuilt_not_doubled() {
    let mut rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    rig.kill(mesh);
    assert_eq!(rig.fact(), Event::PortReleased { key: port("lb-1") });
    assert_eq!(rig.nsmgr.connections().len(), 1);

    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    // Its port is in no bridge here, so it is not taken over.
    assert_eq!(rig.pairs.recv_timeout(PATIENCE).unwrap(), Pair::Disconnect);
    rig.expect_pair("lb-1");
    assert_eq!((rig.nsmgr.connections().len(), rig.nsmgr.crosses()), (1, 1));
    assert!(mesh.stop(soon()).is_empty());
    rig.assert_clean();
}

#[test]
fn a_predecessors_connection_whose_port_is_in_place_is_taken_over() {
    enter_netns();
    let mut rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    let Event::PortExpected { ifname, .. } = rig.fact() else {
        panic!("not up");
    };
    rig.expect_pair("lb-1");
    // As forwarder and `net` would leave it.
    ip("link add bridge0 type bridge");
    ip(&format!("link add {ifname} type veth peer name far"));
    ip(&format!(
        "link set {ifname} master bridge0 alias server-{}",
        id("lb-1")
    ));
    rig.kill(mesh);
    assert_eq!(rig.fact(), Event::PortReleased { key: port("lb-1") });

    let mesh = rig.mesh();
    match rig.fact() {
        Event::PortExpected { ifname: kept, .. } => assert_eq!(kept, ifname),
        other => panic!("{other} instead of a port"),
    }
    rig.expect_pair("lb-1");
    assert!(mesh.stop(soon()).is_empty());
    assert_eq!(rig.pairs.recv_timeout(PATIENCE).unwrap(), Pair::Disconnect);
    rig.assert_clean();
}

#[test]
fn an_absent_nsmgr_is_waited_for_and_does_not_hold_up_the_stop() {
    let rig = Rig::new();
    rig.nsmgr.stop();
    let mesh = rig.mesh();
    rig.nsmgr.restart().unwrap();
    rig.add("lb-1");
    rig.expect_up("lb-1");
    rig.nsmgr.stop();
    assert!(
        mesh.stop(clock::now() + Duration::from_secs(1)).is_empty(),
        "all threads ended in time"
    );
    assert_eq!(rig.fact(), Event::PortReleased { key: port("lb-1") });
}
