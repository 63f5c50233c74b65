//! Load balancers that hold a target's old hardware address. Each pod is a
//! network namespace, with its port in the bridge of the test's own.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use meridio_proxy::core::event::Event;
use meridio_proxy::core::ids::{PortKey, SegmentId};
use meridio_proxy::kernel::capability;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;

use crate::harness::{addresses, enter_netns, eventually, ip, json, name};
use crate::pod::Pod;
use crate::worker::Daemon;

const ADDRESSES: [&str; 2] = ["172.16.0.9", "fd00::9"];
const OLD: &str = "02:00:00:00:00:0a";
const NEW: &str = "02:00:00:00:00:0b";

struct World {
    daemon: Daemon,
    lb: Pod,
}

impl World {
    /// An LB whose entries of both addresses are of who had them before, and
    /// taken for good.
    fn new() -> Self {
        let daemon = Daemon::with_addresses();
        eventually("bridge0", || {
            json("link show").len().ge(&2).then_some(()).ok_or(())
        });
        let lb = Pod::new();
        lb.connect("nsm-lb", "02:00:00:00:00:07", Some(7));
        daemon.lb("lb", "nsm-lb", 7);
        crate::worker::until_hops(&[7]);
        lb.inside(|| {
            for address in ADDRESSES {
                ip(&format!(
                    "neigh replace {address} lladdr {OLD} dev nsm0 nud reachable"
                ));
            }
        });
        Self { daemon, lb }
    }

    fn target(&self, id: &str, port: &str) {
        self.daemon.net.tell(Event::PortExpected {
            key: PortKey::Target(SegmentId::new(id)),
            ifname: name(port),
            peers: addresses(ADDRESSES),
        });
    }

    fn believes(&self) -> [Option<String>; 2] {
        ADDRESSES.map(|address| self.lb.neighbour(address))
    }

    fn believes_the_old(&self) {
        assert_eq!(self.believes(), [OLD, OLD].map(|mac| Some(mac.to_owned())));
    }
}

fn pass(time: Duration) {
    let (_stopper, stop) = stop_pair();
    let _ = stop.wait(time);
}

/// Whether the kernel has learned who answers for the addresses.
fn until_bridge_knows(mac: &str) {
    for address in ADDRESSES {
        eventually("the bridge's neighbour", || {
            let seen = json(&format!("neigh show to {address} dev bridge0"));
            let known = seen.iter().any(|entry| entry["lladdr"] == mac);
            known.then_some(()).ok_or(seen)
        });
    }
}

#[test]
fn a_target_with_a_new_hardware_address_is_reached_within_a_second() {
    enter_netns();
    let world = World::new();
    let target = Pod::new();
    target.connect("nsm-t", OLD, Some(9));
    world.target("t", "nsm-t");
    until_bridge_knows(OLD);
    world.believes_the_old();
    for mac in [NEW, OLD, NEW] {
        ip("link del nsm-t");
        target.connect("nsm-t", mac, Some(9));
        let begun = clock::now();
        for address in ADDRESSES {
            let at: SocketAddr = (address.parse::<IpAddr>().unwrap(), 7000).into();
            let receiver = target.socket(address);
            let own = if at.is_ipv4() {
                "172.16.0.7"
            } else {
                "fd00::7"
            };
            let sender = world.lb.socket(own);
            eventually("a packet from the LB at the target", || {
                sender
                    .send_to(b"x", at)
                    .map_err(|error| error.to_string())?;
                let got = receiver.recv(&mut [0; 8]);
                got.map(|_| ()).map_err(|error| error.to_string())
            });
        }
        let taken = clock::now().saturating_duration_since(begun);
        println!("reached at {mac} after {} ms", taken.as_millis());
        assert!(taken < Duration::from_secs(1), "{taken:?}");
        assert_eq!(world.believes(), [mac, mac].map(|mac| Some(mac.to_owned())));
    }
    world.daemon.stop();
}

#[test]
fn without_the_capability_nobody_is_told_and_nothing_fails() {
    enter_netns();
    capability::drop(capability::NET_RAW).unwrap();
    let world = World::new();
    let target = Pod::new();
    target.connect("nsm-t", NEW, Some(9));
    world.target("t", "nsm-t");
    // It is asked for all the same, so that bridge and kernel know it.
    until_bridge_knows(NEW);
    pass(Duration::from_millis(1500));
    world.believes_the_old();
    world.daemon.stop();
}

#[test]
fn who_answers_from_another_port_is_not_announced() {
    enter_netns();
    let world = World::new();
    let (target, thief) = (Pod::new(), Pod::new());
    target.connect("nsm-t", "02:00:00:00:00:0c", None);
    thief.connect("nsm-x", NEW, Some(9));
    world.daemon.lb("x", "nsm-x", 20);
    world.target("t", "nsm-t");
    until_bridge_knows(NEW);
    pass(Duration::from_millis(1500));
    world.believes_the_old();
    world.daemon.stop();
}

#[test]
fn a_burst_of_targets_is_announced_and_holds_up_no_change() {
    enter_netns();
    let world = World::new();
    let pods: Vec<Pod> = (0..24)
        .map(|n| {
            let pod = Pod::new();
            pod.connect(
                &format!("nsm-{n}"),
                &format!("02:00:00:00:01:{n:02x}"),
                Some(100 + n),
            );
            pod
        })
        .collect();
    world.lb.inside(|| {
        for n in 0..24 {
            let last = 100 + n;
            ip(&format!(
                "neigh replace 172.16.0.{last} lladdr {OLD} dev nsm0 nud reachable"
            ));
            ip(&format!(
                "neigh replace fd00::{last} lladdr {OLD} dev nsm0 nud reachable"
            ));
        }
    });
    for n in 0..24 {
        let last = 100 + n;
        world.daemon.net.tell(Event::PortExpected {
            key: PortKey::Target(SegmentId::new(format!("t{n}"))),
            ifname: name(&format!("nsm-{n}")),
            peers: addresses([&format!("172.16.0.{last}"), &format!("fd00::{last}")]),
        });
    }
    let begun = clock::now();
    world.daemon.vips(&["20.0.0.1/32"]);
    crate::worker::until_rules(&["20000 20.0.0.1 77"]);
    let ruled = clock::now().saturating_duration_since(begun);
    eventually("no old entry at the LB", || {
        let entries = world.lb.inside(|| json("neigh show dev nsm0"));
        let old = entries.iter().filter(|entry| {
            entry["lladdr"] == OLD && !ADDRESSES.map(Some).contains(&entry["dst"].as_str())
        });
        let old = old.count();
        (old == 0).then_some(()).ok_or(old)
    });
    let all = clock::now().saturating_duration_since(begun);
    println!("rule after {ruled:?}, all 48 addresses after {all:?}");
    drop(pods);
    world.daemon.stop();
}
