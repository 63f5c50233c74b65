//! The threads `net` and `link-monitor`: facts in, kernel state out.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use meridio_proxy::core::event::Event;
use meridio_proxy::core::family::{IpFamilies, PerFamily};
use meridio_proxy::core::ids::{EndpointName, PortKey, SegmentId};
use meridio_proxy::kernel::{Kernel, KernelOptions, NetHandle};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::sync::thread::Threads;
use parking_lot::Mutex;

use crate::harness::{
    MAC, addresses, bridge_addresses, enter_netns, eventually, ip, is_port, json, name, rules,
    table, veth,
};

mod adoption;
mod duplicate;
mod link_local;
mod ports;

const FALLBACK4: &str = "blackhole default proto 77 metric 4294967295";
const FALLBACK6: &str = "blackhole default dev lo proto 77 metric 4294967295 pref medium";

/// The running kernel side, and what it said of egress.
pub struct Daemon {
    kernel: Kernel,
    pub net: NetHandle,
    egress: Arc<Mutex<Vec<bool>>>,
}

impl Daemon {
    fn start() -> Self {
        let egress = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&egress);
        let options = KernelOptions {
            families: IpFamilies::Dual,
            bridge_mac: MAC,
        };
        let sink = Box::new(move |up, _: &str| told.lock().push(up));
        let kernel = Kernel::start_with(&Threads::unsupervised(), options, sink).unwrap();
        let net = kernel.handle();
        Self {
            kernel,
            net,
            egress,
        }
    }

    /// Started, and told the bridge's addresses.
    pub fn with_addresses() -> Self {
        let daemon = Self::start();
        daemon.net.tell(Event::BridgePrefixes(PerFamily {
            v4: Some("172.16.0.1/24".parse().unwrap()),
            v6: Some("fd00::1/64".parse().unwrap()),
        }));
        daemon
    }

    pub fn lb(&self, id: &str, ifname: &str, last: u8) {
        self.net.tell(Event::PortExpected {
            key: lb(id),
            ifname: name(ifname),
            peers: addresses([&format!("172.16.0.{last}"), &format!("fd00::{last}")]),
        });
    }

    pub fn vips(&self, vips: &[&str]) {
        let vips: BTreeSet<IpNetwork> = vips.iter().map(|vip| vip.parse().unwrap()).collect();
        self.net.tell(Event::Vips(vips));
    }

    pub fn stop(self) {
        let late = self.kernel.stop(clock::now() + Duration::from_secs(5));
        assert!(late.is_empty(), "{late:?}");
    }
}

fn lb(id: &str) -> PortKey {
    PortKey::Lb(EndpointName::new(id))
}

/// The hops of the table's route, in both families, by last number.
fn hops() -> (Vec<u8>, Vec<u8>) {
    let of = |family| {
        table(family)
            .split_whitespace()
            .filter_map(|word| word.parse::<IpAddr>().ok())
            .map(|address| match address {
                IpAddr::V4(v4) => v4.octets()[3],
                IpAddr::V6(v6) => v6.octets()[15],
            })
            .collect()
    };
    (of("-4"), of("-6"))
}

pub fn until_hops(expected: &[u8]) {
    eventually(&format!("hops {expected:?}"), || {
        let seen = hops();
        (seen == (expected.to_vec(), expected.to_vec()))
            .then_some(())
            .ok_or(seen)
    });
}

pub fn until_rules(expected: &[&str]) {
    eventually(&format!("rules {expected:?}"), || {
        let seen = [rules("-4"), rules("-6")].concat();
        (seen == expected).then_some(()).ok_or(seen)
    });
}

fn until_port(link: &str, expected: bool) {
    eventually(&format!("{link} a port: {expected}"), || {
        (is_port(link) == expected).then_some(()).ok_or(())
    });
}

fn until_addresses(expected: &[&str]) {
    let expected: BTreeSet<String> = expected.iter().map(|text| (*text).to_owned()).collect();
    eventually("the bridge's addresses", || {
        let seen = bridge_addresses_or_none();
        (seen == expected).then_some(()).ok_or(seen)
    });
}

fn bridge_addresses_or_none() -> BTreeSet<String> {
    let there = json("link show")
        .iter()
        .any(|link| link["ifname"] == "bridge0");
    if there {
        bridge_addresses()
    } else {
        BTreeSet::new()
    }
}

#[test]
fn facts_become_kernel_state_and_stay_after_the_end() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    until_addresses(&["172.16.0.1/24", "fd00::1/64"]);
    assert_eq!(
        json("link show dev bridge0")[0]["address"],
        "02:11:22:33:44:55"
    );
    for link in ["nsm-a", "nsm-b", "nsm-t"] {
        veth(link);
    }
    daemon.lb("b", "nsm-b", 5);
    daemon.lb("a", "nsm-a", 7);
    let target = PortKey::Target(SegmentId::new("t"));
    daemon.net.tell(Event::PortExpected {
        key: target.clone(),
        ifname: name("nsm-t"),
        peers: addresses(["172.16.0.9"]),
    });
    daemon.vips(&["20.0.0.1/32", "fd20::/64"]);
    until_hops(&[5, 7]);
    until_rules(&["20000 20.0.0.1 77", "20000 fd20::/64 77"]);
    for link in ["nsm-a", "nsm-b", "nsm-t"] {
        until_port(link, true);
    }
    assert!(table("-4").ends_with(FALLBACK4), "{}", table("-4"));
    assert!(table("-6").ends_with(FALLBACK6), "{}", table("-6"));

    daemon.net.tell(Event::PeerDown { key: lb("b") });
    until_hops(&[7]);
    assert!(is_port("nsm-b"));
    daemon.net.tell(Event::PortReleased { key: lb("b") });
    until_port("nsm-b", false);
    daemon.net.tell(Event::PortReleased { key: target });
    until_port("nsm-t", false);
    daemon.net.tell(Event::PortReleased { key: lb("a") });
    until_hops(&[]);
    assert_eq!(table("-4"), FALLBACK4);
    daemon.lb("a", "nsm-a", 7);
    until_hops(&[7]);
    daemon.vips(&["20.0.0.2/32"]);
    let mut egress = daemon.egress.lock().clone();
    egress.dedup();
    assert_eq!(egress, [true, false, true]);
    daemon.stop();
    // The last fact was applied before the end, and nothing is taken away.
    assert_eq!(rules("-4"), ["19999 20.0.0.2 77"]);
    assert!(rules("-6").is_empty());
    assert_eq!(hops(), (vec![7], vec![7]));
    assert!(is_port("nsm-a"));
}

#[test]
fn an_interface_may_come_later_go_and_come_again() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    daemon.lb("a", "nsm-a", 7);
    until_addresses(&["172.16.0.1/24", "fd00::1/64"]);
    for _ in 0..3 {
        veth("nsm-a");
        until_port("nsm-a", true);
        until_hops(&[7]);
        ip("link del nsm-a");
        until_hops(&[]);
    }
    // Renamed away and back: what counts is the name.
    veth("other");
    ip("link set other name nsm-a");
    until_port("nsm-a", true);
    until_hops(&[7]);
    daemon.stop();
}

#[test]
fn a_port_without_carrier_takes_no_traffic() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    veth("nsm-a");
    veth("nsm-b");
    daemon.lb("a", "nsm-a", 7);
    daemon.lb("b", "nsm-b", 8);
    until_hops(&[7, 8]);
    ip("link set nsm-a-p down");
    until_hops(&[8]);
    assert!(is_port("nsm-a"));
    ip("link set nsm-a-p up");
    until_hops(&[7, 8]);
    daemon.stop();
}

#[test]
fn what_others_break_is_mended() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    veth("nsm-a");
    veth("nsm-b");
    daemon.lb("a", "nsm-a", 7);
    daemon.lb("b", "nsm-b", 8);
    daemon.vips(&["20.0.0.1/32", "20.0.0.2/32", "fd20::/64"]);
    let whole = || {
        until_addresses(&["172.16.0.1/24", "fd00::1/64"]);
        until_port("nsm-a", true);
        until_port("nsm-b", true);
        until_hops(&[7, 8]);
        until_rules(&[
            "19999 20.0.0.2 77",
            "20000 20.0.0.1 77",
            "20000 fd20::/64 77",
        ]);
        eventually("fallback", || {
            let seen = (table("-4"), table("-6"));
            (seen.0.ends_with(FALLBACK4) && seen.1.ends_with(FALLBACK6))
                .then_some(())
                .ok_or(seen)
        });
    };
    whole();
    for damage in [
        "rule del from 20.0.0.1",
        "-6 rule del from fd20::/64",
        "rule add from 20.0.0.2 lookup 1",
        "route del default table 1",
        "-6 route flush table 1",
        "route flush table 1",
        "route replace default via 172.16.0.7 dev bridge0 table 1",
        "route add default via 172.16.0.7 dev bridge0 table 1 metric 5",
        "address del 172.16.0.1/24 dev bridge0",
        "address del fd00::1/64 dev bridge0",
        "address add 172.16.0.77/24 dev bridge0",
        "link set nsm-a nomaster",
        "link set bridge0 down",
        "link del bridge0",
    ] {
        ip(damage);
        whole();
    }
    ip("link set bridge0 down");
    ip("link set bridge0 up");
    whole();
    daemon.stop();
}

#[test]
fn a_changed_bridge_address_replaces_the_old_one() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    veth("nsm-a");
    daemon.lb("a", "nsm-a", 7);
    until_hops(&[7]);
    // Same subnet: the kernel drops the second address with the first.
    for (v4, v6) in [
        ("172.16.0.3/24", "fd00::3/64"),
        ("172.16.0.3/20", "fd00::3/60"),
        ("172.16.0.1/24", "fd00::1/64"),
    ] {
        daemon.net.tell(Event::BridgePrefixes(PerFamily {
            v4: Some(v4.parse().unwrap()),
            v6: Some(v6.parse().unwrap()),
        }));
        until_addresses(&[v4, v6]);
        until_hops(&[7]);
    }
    daemon.stop();
}

#[test]
fn bad_facts_do_not_hold_up_good_ones() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    veth("nsm-a");
    daemon.net.tell(Event::PortExpected {
        key: lb("a"),
        ifname: name("nsm-a"),
        peers: addresses([
            "172.16.0.7",
            "fd00::7",
            "10.1.1.1",
            "fd99::1",
            "172.16.0.1",
            "172.16.0.255",
            "fd00::",
        ]),
    });
    daemon.lb("lo", "lo", 20);
    daemon.lb("bridge", "bridge0", 21);
    daemon.vips(&[
        "172.16.0.0/16",
        "127.0.0.1/32",
        "fd00::/16",
        "0.0.0.0/0",
        "20.0.0.1/32",
    ]);
    until_hops(&[7]);
    until_rules(&["20000 20.0.0.1 77"]);
    daemon.stop();
}

/// How often the thread `net` of this namespace has waited.
fn waits_of_net() -> u64 {
    let ours = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file));
        let Ok(space) = std::fs::metadata(task.path().join("ns/net")) else {
            continue;
        };
        if space.ino() == ours && read("comm").is_ok_and(|comm| comm.trim() == "net") {
            let status = read("status").unwrap();
            let line = status
                .lines()
                .find(|line| line.starts_with("voluntary_ctxt_switches"))
                .unwrap();
            return line.split_whitespace().last().unwrap().parse().unwrap();
        }
    }
    panic!("no thread net in this namespace");
}

#[test]
fn our_own_changes_do_not_wake_us_for_ever() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    veth("nsm-a");
    daemon.lb("a", "nsm-a", 7);
    daemon.vips(&["20.0.0.1/32", "fd20::/64"]);
    until_hops(&[7]);
    until_rules(&["20000 20.0.0.1 77", "20000 fd20::/64 77"]);
    let (_stopper, stop) = stop_pair();
    eventually("quiet", || {
        let before = waits_of_net();
        let _ = stop.wait(Duration::from_millis(300));
        let waits = waits_of_net() - before;
        (waits == 0).then_some(()).ok_or(waits)
    });
    daemon.stop();
}

#[test]
fn dropping_it_ends_both_threads() {
    enter_netns();
    let daemon = Daemon::with_addresses();
    until_addresses(&["172.16.0.1/24", "fd00::1/64"]);
    let begun = clock::now();
    drop(daemon.kernel);
    assert!(begun.elapsed() < Duration::from_secs(1));
    // Telling nobody is no error.
    daemon.net.tell(Event::PeerDown { key: lb("a") });
}
