//! What comes and goes while traffic runs.

use std::collections::BTreeSet;
use std::net::IpAddr;

use meridio_lab::burst;
use meridio_lab::topology::{LIMIT, destination};

use super::{during, in_good_order, lab, lost, steady};

#[test]
fn load_balancers_join_and_leave() {
    let mut lab = lab(2, 2);
    let traffic = steady(&lab);
    let step = during(&traffic, || drop(lab.add_lb().unwrap()));
    assert_eq!((lost(&lab, &step), step.moved_target), (0, 0), "{step}");
    assert!(step.moved_back > 0, "{step}");
    let step = during(&traffic, || lab.remove_lb("lb-1").unwrap());
    // What was on its way over the one that left arrives, too.
    assert_eq!(lost(&lab, &step), 0, "{step}");
    assert_eq!(traffic.shares_back().keys().collect::<Vec<_>>(), [&2, &3]);
    in_good_order(&lab);
}

#[test]
fn targets_join_and_leave() {
    let mut lab = lab(2, 2);
    let traffic = steady(&lab);
    let step = during(&traffic, || drop(lab.add_target().unwrap()));
    assert_eq!((step.lost, step.moved_back), (0, 0), "{step}");
    assert!(step.moved_target > 0, "{step}");
    let step = during(&traffic, || {
        lab.unregister("target-1").unwrap();
        assert!(traffic.run_for(10, LIMIT));
        lab.stop_target("target-1").unwrap();
    });
    assert_eq!(step.lost, 0, "{step}");
    let addresses = lab.targets["target-1"].addresses();
    assert!(addresses.is_empty(), "{addresses:?}");
    let step = during(&traffic, || lab.start_target("target-1").unwrap());
    assert_eq!(step.lost, 0, "{step}");
    in_good_order(&lab);
}

/// More VIPs than are kept as a list of rules, and back.
#[test]
fn many_vips_come_and_go_without_touching_the_others() {
    let mut lab = lab(2, 2);
    let traffic = steady(&lab);
    let more: Vec<IpAddr> = (2..=20)
        .flat_map(|n: u8| {
            [
                IpAddr::from([20, 0, n / 3, n]),
                IpAddr::from([0x2000, 0, 0, 0, 0, 0, u16::from(n), 1]),
            ]
        })
        .collect();
    let step = during(&traffic, || {
        more.iter().for_each(|vip| lab.add_vip(*vip).unwrap());
    });
    assert_eq!((step.lost, step.moved_back), (0, 0), "{step}");
    for vip in &more {
        let burst = burst::udp(lab.router.client(), destination(*vip), 5).unwrap();
        assert!(burst.complete(), "{vip}: {burst}");
    }
    let step = during(&traffic, || {
        more.iter().for_each(|vip| lab.remove_vip(*vip).unwrap());
    });
    assert_eq!((step.lost, step.moved_back), (0, 0), "{step}");
    in_good_order(&lab);
}

#[test]
fn many_targets_come_at_once() {
    let mut lab = lab(1, 0);
    let names: Vec<String> = (0..16).map(|_| lab.make_target().unwrap()).collect();
    std::thread::scope(|scope| {
        let started: Vec<_> = (lab.targets.values())
            .map(|target| scope.spawn(move || target.connect()))
            .collect();
        for thread in started {
            thread.join().unwrap().unwrap();
        }
    });
    let mut addresses = BTreeSet::new();
    for name in &names {
        let target = &lab.targets[name];
        lab.wait_port(&target.connection_id()).unwrap();
        let own = target.addresses();
        assert_eq!(own.len(), 2, "{name}: {own:?}");
        addresses.extend(own);
    }
    assert_eq!(addresses.len(), 32, "{addresses:?}");
    for name in &names {
        lab.register(name).unwrap();
    }
    for vip in lab.vips() {
        let burst = burst::udp(lab.router.client(), destination(*vip), 400).unwrap();
        assert!(burst.complete(), "{burst}");
        assert_eq!(burst.by_target.len(), 16, "{burst}");
    }
    in_good_order(&lab);
}

/// Without any load balancer what targets send must go nowhere.
#[test]
fn the_last_load_balancer_leaves() {
    let mut lab = lab(1, 1);
    let traffic = steady(&lab);
    let step = during(&traffic, || {
        lab.remove_lb("lb-1").unwrap();
        let daemon = lab.daemon().unwrap();
        daemon.health("Egress").unwrap_err();
        daemon.health("Liveness").unwrap();
        assert!(traffic.run_for(10, LIMIT));
        lab.add_lb().unwrap();
        lab.wait_ready().unwrap();
    });
    assert!(step.lost > 0, "{step}");
    in_good_order(&lab);
}
