//! Somebody else changes what is the daemon's in the kernel, or a peer's
//! interface dies without a word.

use meridio_lab::link::{Route, any};
use meridio_lab::topology::{TABLE, Topology};

use super::{during, in_good_order, lab, steady};

fn routes_with_hops(lab: &Topology) -> Vec<Route> {
    let routes = lab.rtnl.routes(TABLE).unwrap();
    routes
        .into_iter()
        .filter(|route| !route.hops.is_empty())
        .collect()
}

#[test]
fn rules_routes_ports_and_addresses_come_back() {
    let lab = lab(2, 1);
    let traffic = steady(&lab);
    let bridge = lab.rtnl.link("bridge0").unwrap().index;
    let step = during(&traffic, || {
        for vip in lab.vips() {
            let rules = lab.rtnl.rules(*vip).unwrap();
            let ours = rules.iter().find(|rule| rule.from.is_some()).unwrap();
            lab.rtnl.delete_rule(ours, *vip).unwrap();
            lab.wait_vip(*vip, true).unwrap();
        }
        for route in lab.rtnl.routes(TABLE).unwrap() {
            lab.rtnl.delete_route(&route).unwrap();
        }
        lab.wait_hops().unwrap();
        let links = lab.rtnl.links().unwrap();
        for port in links.iter().filter(|link| link.master == Some(bridge)) {
            lab.rtnl.set_master(port.index, None).unwrap();
            lab.wait("port", || {
                let port = lab.rtnl.find(&port.name)?;
                Ok(port.is_some_and(|port| port.master == Some(bridge)))
            })
            .unwrap();
        }
        for text in ["172.16.0.1/24", "fd00::1/64"] {
            let address = text.parse().unwrap();
            lab.rtnl.delete_address(bridge, address).unwrap();
            lab.wait("address", || {
                let mut all = lab.rtnl.addresses()?.into_iter();
                Ok(all.any(|a| a.index == bridge && a.network == address))
            })
            .unwrap();
        }
        lab.wait_hops().unwrap();
        lab.rtnl.set_up(bridge, false).unwrap();
        lab.wait("bridge", || Ok(lab.rtnl.link("bridge0")?.up))
            .unwrap();
        lab.wait_hops().unwrap();
    });
    // Broken for a moment each time, and for longer the more often somebody
    // fights; that all flows recovered was judged already.
    assert!(step.lost > 0, "{step:?}");
    let fallback = lab.rtnl.routes(TABLE).unwrap();
    assert_eq!(fallback.len(), 4, "{fallback:?}");
}

#[test]
fn foreign_rules_and_routes_are_left_alone() {
    let mut lab = lab(1, 1);
    let vip = lab.vips()[0];
    let foreign = meridio_lab::link::Rule {
        mark: Some(7),
        priority: 5,
        table: 77,
        ..Default::default()
    };
    lab.rtnl.add_rule(&foreign, vip).unwrap();
    let gateway = lab.infra.address();
    let eth0 = lab.rtnl.link("eth0").unwrap().index;
    let route = Route::via(any(gateway), gateway, eth0).in_table(77);
    lab.rtnl.replace_route(&route).unwrap();
    lab.add_vip([20, 0, 0, 2].into()).unwrap();
    lab.remove_vip([20, 0, 0, 2].into()).unwrap();
    lab.add_lb().unwrap();
    let rules = lab.rtnl.rules(vip).unwrap();
    assert!(rules.iter().any(|rule| rule.mark == Some(7)), "{rules:?}");
    assert_eq!(lab.rtnl.routes(77).unwrap(), [route]);
    in_good_order(&lab);
}

/// The interface of a load balancer is gone, and no peer says so.
#[test]
fn a_dead_port_takes_its_next_hop_along() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    lab.router.spread_over(&["lb-2".to_owned()]).unwrap();
    let ids = lab.datapath.ids();
    let dead = (lab.nsmgr.connections().into_iter())
        .find(|c| c.network_service_endpoint_name == "lb-1")
        .unwrap();
    let aliases = format!("server-{}", dead.path.path_segments[0].id);
    let step = during(&traffic, || {
        let links = lab.rtnl.links().unwrap();
        let port = links.iter().find(|link| link.alias == aliases).unwrap();
        lab.nsmgr.kill_endpoint("lb-1");
        lab.lbs.remove("lb-1");
        lab.rtnl.delete_link(port.index).unwrap();
        lab.wait_hops().unwrap();
    });
    assert_eq!(step.lost_steady, 0, "{step}");
    assert!(step.lost_moved <= 2 * step.flows, "{step}");
    assert_eq!(routes_with_hops(&lab).len(), 2);
    assert!(!ids.is_empty());
    assert_eq!(lab.infra.leaked().unwrap(), 0);
}
