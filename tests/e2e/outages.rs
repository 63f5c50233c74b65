//! What the daemon needs goes away and comes back.

use std::net::IpAddr;
use std::time::Duration;

use meridio_lab::topology::LIMIT;

use super::{during, in_good_order, lab, lost, steady};

#[test]
fn ipam_and_nsp_are_away_for_a_while() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let step = during(&traffic, || {
        lab.ipam.stop();
        lab.nsp.stop();
        let daemon = lab.daemon().unwrap();
        let line = daemon.wait_line(
            0,
            |line| line.contains("NSPCli") && line.contains("\"NOT_SERVING\""),
            LIMIT,
        );
        assert!(line.is_some(), "{}", daemon.tail(20));
        daemon.health("Readiness").unwrap_err();
        daemon.health("Liveness").unwrap();
        lab.start_ipam().unwrap();
        lab.start_nsp().unwrap();
        lab.wait_ready().unwrap();
    });
    assert_eq!(step.lost, 0, "{step}");
    lab.add_vip(IpAddr::from([20, 0, 0, 2])).unwrap();
    lab.add_target().unwrap();
    in_good_order(&lab);
}

#[test]
fn nsmgr_restarts() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let service = lab.proxy_service();
    let step = during(&traffic, || {
        lab.nsmgr.restart().unwrap();
        let deadline = meridio_proxy::sync::clock::now() + LIMIT;
        lab.nsmgr
            .wait_registered(&service, "proxy-1", deadline)
            .unwrap();
        lab.wait_ready().unwrap();
    });
    assert_eq!(step.lost_steady, 0, "{step}");
    lab.add_lb().unwrap();
    lab.add_target().unwrap();
    assert_eq!(lab.infra.leaked().unwrap(), 0);
}

#[test]
fn the_identity_is_renewed() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let step = during(&traffic, || {
        let since = lab.daemon().unwrap().line_count();
        lab.agent.rotate();
        let daemon = lab.daemon().unwrap();
        let renewed = |line: &str| line.contains("new SVID");
        assert!(daemon.wait_line(since, renewed, LIMIT).is_some());
        lab.nsmgr.rotate(Duration::from_secs(3600));
        lab.add_lb().unwrap();
        lab.add_target().unwrap();
        lab.add_vip(IpAddr::from([20, 0, 0, 2])).unwrap();
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    in_good_order(&lab);
}
