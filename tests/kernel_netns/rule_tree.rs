//! Many VIPs: the tree of rules on the real kernel.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use ipnetwork::IpNetwork;
use meridio_proxy::core::desired::Desired;
use meridio_proxy::core::event::Event;
use meridio_proxy::core::family::Family;
use meridio_proxy::core::ids::{PortKey, SegmentId};
use meridio_proxy::core::op::KernelOp;
use meridio_proxy::core::plan;
use meridio_proxy::kernel::Rtnl;
use meridio_proxy::kernel::netlink::Netlink;
use meridio_proxy::kernel::netlink::socket::RequestSocket;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{STACK_LARGE, Threads};

use crate::harness::{addresses, enter_netns, eventually, ip, json, name, veth};
use crate::pod::Pod;
use crate::worker::{Daemon, until_hops};

/// Every third address, so that each has neighbours that are no VIPs.
fn vip(family: Family, n: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(0x1400_0000 + 3 * n).into(),
        Family::V6 => Ipv6Addr::from_bits((0xfd20_u128 << 112) + 3 * u128::from(n)).into(),
    }
}

fn vips(numbers: std::ops::Range<u32>) -> BTreeSet<IpNetwork> {
    numbers
        .flat_map(|n| Family::ALL.map(|family| vip(family, n).into()))
        .collect()
}

/// A rule in numbers: `lookup 1`, all of ours.
fn counts(family: &str) -> (usize, usize) {
    let rules = json(&format!("{family} -N -d rule show"));
    let ours = rules.iter().filter(|rule| rule["protocol"] == "77");
    let lookups = ours.clone().filter(|rule| rule["table"] == "1");
    (lookups.count(), ours.count())
}

fn until_vips(n: usize) -> [(usize, usize); 2] {
    let mut last = [(0, 0); 2];
    let is_tree = |(lookups, all): &(usize, usize)| all > lookups;
    eventually(&format!("rules of {n} VIPs"), || {
        last = ["-4", "-6"].map(counts);
        // All VIPs, in one form.
        let whole = last
            .iter()
            .all(|seen| seen.0 == n && (is_tree(seen) == (n > 8) || (6..=8).contains(&n)));
        whole.then_some(()).ok_or(last)
    });
    last
}

/// How many of the sources the kernel would forward by table 1, and how many by
/// the main table.
fn routed(family: Family, sources: impl Iterator<Item = IpAddr>) -> (usize, usize) {
    let (flag, to) = match family {
        Family::V4 => ("-4", "198.51.100.1"),
        Family::V6 => ("-6", "2001:db8::1"),
    };
    let mut batch = String::new();
    for source in sources {
        batch += &format!("route get {to} from {source} iif bridge0\n");
    }
    let mut ip = Command::new("ip")
        .args([flag, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = ip.stdin.take().unwrap();
    let writer = Threads::unsupervised()
        .spawn("batch", STACK_LARGE, move |_| {
            input.write_all(batch.as_bytes()).unwrap();
        })
        .unwrap();
    let output = ip.wait_with_output().unwrap();
    drop(writer);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let by = |what: &str| text.lines().filter(|line| line.contains(what)).count();
    (by("dev bridge0 table 1"), by("dev main0"))
}

/// Forwards, and has a default route of its own that VIPs must not take.
fn as_a_node() {
    for (key, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv6/conf/all/forwarding", "1"),
    ] {
        std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
    }
    veth("main0");
    ip("address add 10.9.0.1/24 dev main0");
    ip("address add fd99::1/64 dev main0 nodad");
    ip("route add default via 10.9.0.2");
    ip("-6 route add default via fd99::2");
}

#[test]
fn a_thousand_vips_are_routed_and_nothing_else_is() {
    enter_netns();
    as_a_node();
    let daemon = Daemon::with_addresses();
    veth("nsm-a");
    daemon.lb("a", "nsm-a", 7);
    until_hops(&[7]);
    // A rule of somebody else's is between the nodes, and one behind them.
    ip("rule add from 20.0.0.0/8 iif lo lookup 99 priority 25000");
    ip("rule add from 20.0.0.0/8 iif lo lookup 99 priority 31500");
    for (from, to) in [(0, 1000), (1, 1001), (500, 1500)] {
        daemon.net.tell(Event::Vips(vips(from..to)));
        let mut seen = [(0, 0); 2];
        eventually("a thousand VIPs", || {
            seen = until_vips(1000);
            let last = routed(Family::V6, std::iter::once(vip(Family::V6, to - 1)));
            (last == (1, 0)).then_some(()).ok_or(last)
        });
        println!("VIPs {from}..{to}: {seen:?} rules `lookup` and of ours");
        for family in Family::ALL {
            let within = (from..to).map(|n| vip(family, n));
            assert_eq!(routed(family, within), (1000, 0), "{family}");
            // One more bit than each, and what was before and comes after.
            let beside = (from..to).map(|n| match vip(family, n) {
                IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() + 1).into(),
                IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() + 1).into(),
            });
            let outside = (0..from).chain(to..1600).map(|n| vip(family, n));
            let others: Vec<IpAddr> = beside.chain(outside).collect();
            let expected = (0, others.len());
            assert_eq!(routed(family, others.into_iter()), expected, "{family}");
        }
    }
    let foreign = ip("rule show");
    assert_eq!(foreign.matches("iif lo lookup 99").count(), 2, "{foreign}");

    // A new process takes the tree over as it is, and changes what has changed.
    let before = ip("rule show");
    daemon.stop();
    let daemon = Daemon::with_addresses();
    daemon.lb("a", "nsm-a", 7);
    daemon.net.tell(Event::Vips(vips(500..1501)));
    until_vips(1001);
    let after = ip("rule show");
    let lines = |text: &str| -> BTreeSet<String> { text.lines().map(str::to_owned).collect() };
    let (before, after) = (lines(&before), lines(&after));
    let changed = before.symmetric_difference(&after).count();
    assert!(changed <= 16, "{changed} rules changed for one VIP");
    assert_eq!(
        json("-4 rule show").len(),
        json("-6 rule show").len() + 2 + 1
    );
    daemon.net.tell(Event::Vips(BTreeSet::new()));
    until_vips(0);
    assert_eq!(counts("-4"), (0, 0));
    daemon.stop();
}

#[test]
fn the_cost_of_changes() {
    enter_netns();
    let mut netlink = Netlink::new(RequestSocket::open().unwrap());
    let mut change = |what: &str, wanted: BTreeSet<IpNetwork>| {
        let observed = netlink.snapshot().unwrap();
        let desired = Desired {
            vips: Some(wanted),
            ..Desired::default()
        };
        let begun = clock::now();
        let mut ops = plan::diff(&observed, &desired);
        let planned = clock::now();
        ops.retain(|op| matches!(op, KernelOp::AddRule { .. } | KernelOp::DeleteRule(_)));
        assert!(netlink.apply(&ops).iter().all(Result::is_ok));
        println!(
            "{what}: {} operations, planned in {:?}, done in {:?}",
            ops.len(),
            planned.saturating_duration_since(begun),
            clock::now().saturating_duration_since(planned),
        );
        ops.len()
    };
    change("1 000 VIPs of each family", vips(0..1000));
    assert!(change("one more", vips(0..1001)) <= 32);
    assert!(change("one less", vips(1..1001)) <= 32);
    assert_eq!(change("the same", vips(1..1001)), 0);
    change("5 left", vips(1..6));
    change("1 000 again", vips(1..1001));
    change("none", BTreeSet::new());
}

/// Sends and receives one packet after the other; how many, and how many were
/// lost.
struct Flow {
    to: IpAddr,
    sender: UdpSocket,
    receiver: UdpSocket,
}

impl Flow {
    fn one(&self) -> bool {
        let mut packet = [0; 8];
        let sent = self.sender.send_to(b"x", (self.to, 7000));
        sent.is_ok() && self.receiver.recv(&mut packet).is_ok()
    }
}

/// From a VIP in the target's pod to an address in the LB's, for each family.
fn flows((lb, target): (&Pod, &Pod), vip: [IpAddr; 2], outside: [IpAddr; 2]) -> [Flow; 2] {
    lb.inside(|| {
        for key in ["all", "nsm0"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{key}/rp_filter"), "0").unwrap();
        }
        ip("address add 198.51.100.1/32 dev lo");
        ip("address add 2001:db8::1/128 dev lo nodad");
    });
    target.inside(|| {
        for address in vip {
            ip(&format!("address add {address} dev lo nodad"));
        }
        ip("route add default via 172.16.0.1");
        ip("-6 route add default via fd00::1");
    });
    [0, 1].map(|n| Flow {
        to: outside[n],
        sender: target.socket(&vip[n].to_string()),
        receiver: lb.socket(&outside[n].to_string()),
    })
}

#[test]
fn packets_of_a_kept_vip_all_arrive_from_list_to_tree_and_back() {
    enter_netns();
    as_a_node();
    let daemon = Daemon::with_addresses();
    eventually("bridge0", || {
        let links = ip("link show");
        links.contains("bridge0").then_some(()).ok_or(())
    });
    let (lb, target) = (Pod::new(), Pod::new());
    lb.connect("nsm-lb", "02:00:00:00:00:07", Some(7));
    target.connect("nsm-t", "02:00:00:00:00:09", Some(9));
    daemon.lb("lb", "nsm-lb", 7);
    daemon.net.tell(Event::PortExpected {
        key: PortKey::Target(SegmentId::new("t")),
        ifname: name("nsm-t"),
        peers: addresses(["172.16.0.9", "fd00::9"]),
    });
    daemon.net.tell(Event::Vips(vips(0..3)));
    until_hops(&[7]);
    until_vips(3);
    let outside = [
        IpAddr::from([198, 51, 100, 1]),
        "2001:db8::1".parse().unwrap(),
    ];
    let vip = Family::ALL.map(|family| vip(family, 1));
    let flows = flows((&lb, &target), vip, outside);
    for flow in &flows {
        eventually("the first packet", || flow.one().then_some(()).ok_or(()));
    }
    let (report, reported) = crossbeam_channel::bounded(1);
    let mut thread = Threads::unsupervised()
        .spawn("flow", STACK_LARGE, move |stop| {
            let (mut sent, mut lost) = (0u32, 0u32);
            while !stop.is_set() {
                for flow in &flows {
                    sent += 1;
                    lost += u32::from(!flow.one());
                }
            }
            let _ = report.send((sent, lost));
        })
        .unwrap();
    for _ in 0..3 {
        for n in [9, 1000, 999, 40, 8, 5, 300, 4] {
            daemon.net.tell(Event::Vips(vips(0..n)));
            until_vips(usize::try_from(n).unwrap());
        }
    }
    thread.stop();
    let (sent, lost) = reported.recv_timeout(Duration::from_secs(5)).unwrap();
    println!("{sent} packets, {lost} lost");
    assert!(sent > 1000, "{sent}");
    assert_eq!(lost, 0, "of {sent}");
    daemon.stop();
}
