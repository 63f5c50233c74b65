//! Start, stop and restart.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use meridio_lab::link::host;
use meridio_lab::topology::{LIMIT, TABLE, Topology, TopologyOptions};
use meridio_proxy::core::family::IpFamilies;

use super::{during, in_good_order, lab, lost, steady};

#[test]
fn the_kernel_has_what_the_peers_told() {
    let lab = lab(2, 1);
    let bridge = lab.rtnl.link("bridge0").unwrap();
    assert!(bridge.up && bridge.carrier, "{bridge:?}");
    assert_eq!(bridge.mac[0] & 3, 2, "a local unicast address: {bridge:?}");
    let addresses = lab.rtnl.addresses().unwrap();
    let own: BTreeSet<String> = (addresses.iter())
        .filter(|address| address.index == bridge.index && address.global)
        .map(|address| address.network.to_string())
        .collect();
    let wanted = ["172.16.0.1/24", "fd00::1/64"].map(str::to_owned);
    assert_eq!(own, BTreeSet::from(wanted));
    assert!(
        !addresses
            .iter()
            .any(|address| address.index == bridge.index && address.tentative)
    );

    let links = lab.rtnl.links().unwrap();
    let ports: Vec<_> = (links.iter())
        .filter(|link| link.master == Some(bridge.index))
        .collect();
    assert_eq!(ports.len(), 3, "two load balancers and a target: {ports:?}");
    assert!(
        ports.iter().all(|port| port.mtu == 1500 && port.up),
        "{ports:?}"
    );

    let routes = lab.rtnl.routes(TABLE).unwrap();
    assert_eq!(routes.len(), 4, "{routes:?}");
    for route in &routes {
        assert_eq!(route.destination.prefix(), 0, "{route:?}");
        match route.metric {
            Some(u32::MAX) => assert!(route.hops.is_empty(), "{route:?}"),
            _ => {
                assert_eq!(route.hops.len(), 2, "{route:?}");
                assert!(route.hops.iter().all(|hop| hop.index == bridge.index));
            }
        }
    }
    for vip in lab.vips() {
        let rules = lab.rtnl.rules(*vip).unwrap();
        let ours: Vec<_> = rules.iter().filter(|rule| rule.from.is_some()).collect();
        assert_eq!(ours.len(), 1, "{rules:?}");
        assert_eq!((ours[0].from, ours[0].table), (Some(host(*vip)), TABLE));
    }
    in_good_order(&lab);
}

#[test]
fn sigterm_takes_back_what_must_go_and_leaves_what_must_stay() {
    let mut lab = lab(2, 1);
    let leases = lab.ipam.allocations().len();
    let daemon = lab.stop_daemon(Duration::from_secs(28)).unwrap();
    let status = daemon.wait_exit(Duration::ZERO).unwrap();
    assert_eq!(status.code(), Some(0), "{}", daemon.tail(20));
    let service = lab.proxy_service();
    assert_eq!(lab.nsmgr.registered(&service), Vec::<String>::new());
    let left: Vec<String> = lab
        .nsmgr
        .connections()
        .into_iter()
        .map(|c| c.network_service)
        .collect();
    assert_eq!(left, [service], "the target's connection alone");
    // Two load balancers, two addresses each, two families.
    assert_eq!(lab.ipam.allocations().len(), leases - 8);
    assert!(lab.rtnl.link("bridge0").unwrap().up);
    for vip in lab.vips() {
        let rules = lab.rtnl.rules(*vip).unwrap();
        assert!(rules.iter().any(|rule| rule.from == Some(host(*vip))));
    }
    let routes = lab.rtnl.routes(TABLE).unwrap();
    assert!(
        routes.iter().all(|route| route.hops.is_empty()),
        "{routes:?}"
    );
    in_good_order(&lab);
}

#[test]
fn after_a_stop_nothing_leaks_and_a_new_daemon_carries_on() {
    let mut lab = lab(2, 2);
    let traffic = steady(&lab);
    let mac = lab.rtnl.link("bridge0").unwrap().mac;
    let step = during(&traffic, || {
        drop(lab.stop_daemon(Duration::from_secs(28)).unwrap());
        assert!(traffic.run_for(10, LIMIT));
        lab.start_daemon().unwrap();
        lab.wait_ready().unwrap();
        lab.wait_hops().unwrap();
    });
    assert!(
        step.lost > 0,
        "without load balancers nothing comes back: {step}"
    );
    assert_eq!(lab.rtnl.link("bridge0").unwrap().mac, mac);
    in_good_order(&lab);
}

#[test]
fn killed_and_started_again_it_loses_no_packet_and_moves_no_flow() {
    let mut lab = lab(3, 2);
    let traffic = steady(&lab);
    let made = lab.datapath.made();
    let step = during(&traffic, || {
        lab.kill_daemon().unwrap();
        assert!(traffic.run_for(10, LIMIT));
        lab.start_daemon().unwrap();
        lab.wait_ready().unwrap();
        lab.wait_hops().unwrap();
    });
    assert_eq!((lost(&lab, &step), step.moved_back), (0, 0), "{step}");
    assert_eq!(lab.datapath.made(), made, "interfaces made anew");
    // What it adopted it also takes back; without traffic, since a VIP that is
    // none any more is an address like any other.
    drop(traffic);
    lab.remove_lb("lb-1").unwrap();
    let vip = lab.vips()[0];
    lab.remove_vip(vip).unwrap();
    in_good_order(&lab);
}

#[test]
fn what_changed_while_it_was_away_is_put_right() {
    let mut lab = lab(3, 2);
    let traffic = steady(&lab);
    lab.kill_daemon().unwrap();
    let gone = lab.vips()[1];
    let names: Vec<String> = vec!["lb-2".to_owned(), "lb-3".to_owned()];
    lab.router.spread_over(&names).unwrap();
    lab.nsmgr.remove_endpoint("lb-1");
    lab.lbs.remove("lb-1");
    lab.nsp.set_vips(["20.0.0.1/32", "20.0.0.7/32"]);
    traffic.end_flows(meridio_lab::topology::destination(gone));
    lab.start_daemon().unwrap();
    lab.wait_ready().unwrap();
    lab.wait_hops().unwrap();
    lab.wait_vip(gone, false).unwrap();
    lab.wait_vip(IpAddr::from([20, 0, 0, 7]), true).unwrap();
    let step = during(&traffic, || ());
    assert_eq!(step.lost, 0, "{step}");
    in_good_order(&lab);
}

#[test]
fn one_family_alone() {
    for families in [IpFamilies::V4, IpFamilies::V6] {
        let lab = Topology::start(TopologyOptions {
            families,
            lbs: 1,
            targets: 1,
            ..TopologyOptions::default()
        })
        .unwrap();
        let step = during(&steady(&lab), || ());
        assert_eq!((step.flows, step.lost), (25, 0), "{families:?}: {step}");
        in_good_order(&lab);
    }
}

#[test]
fn it_starts_before_everything_that_it_needs() {
    let mut lab = Topology::peers(TopologyOptions::default()).unwrap();
    lab.agent.withhold(true);
    lab.ipam.stop();
    lab.nsp.stop();
    lab.nsmgr.stop();
    lab.start_daemon().unwrap();
    lab.daemon().unwrap().wait_health("", LIMIT).unwrap();
    lab.daemon().unwrap().health("Readiness").unwrap_err();
    lab.agent.withhold(false);
    lab.nsmgr.restart().unwrap();
    lab.start_nsp().unwrap();
    let vip = lab.vips()[0];
    lab.wait_vip(vip, true).unwrap();
    lab.daemon().unwrap().health("Readiness").unwrap_err();
    lab.start_ipam().unwrap();
    lab.add_lb().unwrap();
    lab.wait_ready().unwrap();
    lab.add_target().unwrap();
    assert_eq!(during(&steady(&lab), || ()).lost, 0);
    in_good_order(&lab);
}
