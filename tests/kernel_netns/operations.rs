//! Every operation on the real kernel.

use std::net::IpAddr;

use meridio_proxy::core::family::Family;
use meridio_proxy::core::ids::IfIndex;
use meridio_proxy::core::observed::{RouteKind, RuleAction};
use meridio_proxy::core::op::{FALLBACK_METRIC, KernelOp, PROTOCOL};
use meridio_proxy::kernel::error::OpError;
use meridio_proxy::kernel::netlink::Netlink;
use meridio_proxy::kernel::netlink::socket::RequestSocket;
use meridio_proxy::kernel::{Rtnl, link_named};

use crate::harness::{
    MAC, bridge_addresses, enter_netns, ip, is_port, json, name, rules, table, veth,
};

fn netlink() -> Netlink {
    Netlink::new(RequestSocket::open().unwrap())
}

fn do_op(netlink: &mut Netlink, op: KernelOp) -> Result<(), OpError> {
    netlink.apply(&[op]).pop().unwrap()
}

fn refused(result: Result<(), OpError>) -> (i32, Option<String>) {
    match result {
        Err(OpError::Refused { errno, text }) => (errno, text),
        other => panic!("not refused: {other:?}"),
    }
}

/// A bridge with addresses of both families, made by our operations.
fn with_bridge(netlink: &mut Netlink) -> IfIndex {
    do_op(netlink, KernelOp::CreateBridge { mac: MAC }).unwrap();
    let bridge = netlink.snapshot().unwrap().bridge().unwrap().index;
    do_op(netlink, KernelOp::NoOwnLinkLocal { bridge }).unwrap();
    do_op(netlink, KernelOp::BridgeUp { bridge }).unwrap();
    for address in ["172.16.0.1/24", "fd00::1/64"] {
        let address = address.parse().unwrap();
        do_op(netlink, KernelOp::AddAddress { bridge, address }).unwrap();
    }
    bridge
}

#[test]
fn a_bridge_is_made_once_and_set_up_again() {
    enter_netns();
    let mut netlink = netlink();
    assert!(netlink.snapshot().unwrap().bridge().is_none());
    let create = KernelOp::CreateBridge { mac: MAC };
    do_op(&mut netlink, create.clone()).unwrap();
    do_op(&mut netlink, create).unwrap();
    let link = &json("-d link show dev bridge0")[0];
    assert_eq!(link["address"], "02:11:22:33:44:55");
    assert_eq!(link["linkinfo"]["info_kind"], "bridge");
    let observed = netlink.snapshot().unwrap();
    let bridge = observed.bridge().unwrap();
    assert!(!bridge.up);
    let bridge = bridge.index;
    do_op(&mut netlink, KernelOp::BridgeUp { bridge }).unwrap();
    assert!(netlink.snapshot().unwrap().bridge().unwrap().up);
}

#[test]
fn addresses_come_without_dad_and_go() {
    enter_netns();
    let mut netlink = netlink();
    let bridge = with_bridge(&mut netlink);
    assert_eq!(
        bridge_addresses(),
        ["172.16.0.1/24", "fd00::1/64"].map(str::to_owned).into()
    );
    let text = ip("address show dev bridge0");
    assert!(text.contains("brd 172.16.0.255"), "{text}");
    assert!(
        text.contains("nodad") && !text.contains("fd00::1/64 scope global tentative"),
        "{text}"
    );
    let observed = netlink.snapshot().unwrap();
    for address in ["172.16.0.1/24", "fd00::1/64"] {
        let address = address.parse().unwrap();
        assert!(observed.addresses.contains(&(bridge, address)));
        // There already, gone already: both are success.
        do_op(&mut netlink, KernelOp::AddAddress { bridge, address }).unwrap();
        do_op(&mut netlink, KernelOp::RemoveAddress { bridge, address }).unwrap();
        do_op(&mut netlink, KernelOp::RemoveAddress { bridge, address }).unwrap();
    }
    assert!(bridge_addresses().is_empty());
}

#[test]
fn ports_are_found_by_name() {
    enter_netns();
    let mut netlink = netlink();
    let bridge = with_bridge(&mut netlink);
    veth("nsm0");
    ip("link set nsm0 alias server-1");
    let attach = KernelOp::Attach {
        port: name("nsm0"),
        bridge,
    };
    do_op(&mut netlink, attach.clone()).unwrap();
    assert!(is_port("nsm0"));
    let observed = netlink.snapshot().unwrap();
    let link = observed.named(&name("nsm0")).unwrap();
    assert_eq!(link.master, Some(bridge));
    assert_eq!(link.alias.as_deref(), Some("server-1"));
    assert!(link.up && link.carrier && !link.is_bridge);
    do_op(&mut netlink, attach.clone()).unwrap();
    let detach = KernelOp::Detach { port: name("nsm0") };
    do_op(&mut netlink, detach.clone()).unwrap();
    assert!(!is_port("nsm0"));
    do_op(&mut netlink, detach.clone()).unwrap();
    ip("link del nsm0");
    do_op(&mut netlink, detach).unwrap();
    assert_eq!(refused(do_op(&mut netlink, attach)).0, libc::ENODEV);
}

#[test]
fn one_link_is_asked_for_by_its_name() {
    enter_netns();
    let mut netlink = netlink();
    let bridge = with_bridge(&mut netlink);
    veth("nsm0");
    ip("link set nsm0 master bridge0 alias server-1");
    ip("link property add dev nsm0 altname other0");
    let observed = netlink.snapshot().unwrap();
    for text in ["nsm0", "nsm0-p", "bridge0", "lo"] {
        let seen = link_named(&name(text)).unwrap();
        assert_eq!(seen.as_ref(), observed.named(&name(text)), "{text}");
        assert!(seen.is_some());
    }
    let port = link_named(&name("nsm0")).unwrap().unwrap();
    assert_eq!(port.master, Some(bridge));
    assert_eq!(port.alias.as_deref(), Some("server-1"));
    for text in ["absent0", "other0"] {
        assert_eq!(link_named(&name(text)).unwrap(), None, "{text}");
    }
}

#[test]
fn a_neighbour_is_forgotten() {
    enter_netns();
    let mut netlink = netlink();
    let bridge = with_bridge(&mut netlink);
    for (address, kind) in [("172.16.0.7", "-4"), ("fd00::7", "-6")] {
        ip(&format!(
            "neigh add {address} lladdr 02:00:00:00:00:01 nud stale dev bridge0"
        ));
        let op = KernelOp::ForgetNeighbour {
            bridge,
            address: address.parse().unwrap(),
        };
        do_op(&mut netlink, op.clone()).unwrap();
        let left = ip(&format!("{kind} neigh show dev bridge0"));
        assert!(!left.contains("02:00:00:00:00:01"), "{left}");
        do_op(&mut netlink, op).unwrap();
    }
}

/// Two hops and the fallback, as `ip` shows them.
const ROUTES: [(Family, &str, [&str; 2], &str); 2] = [
    (
        Family::V4,
        "-4",
        ["172.16.0.2", "172.16.0.3"],
        "default proto 77 nexthop via 172.16.0.2 dev bridge0 weight 1 nexthop via 172.16.0.3 \
             dev bridge0 weight 1 blackhole default proto 77 metric 4294967295",
    ),
    (
        Family::V6,
        "-6",
        ["fd00::2", "fd00::3"],
        "default proto 77 metric 1024 pref medium nexthop via fd00::2 dev bridge0 weight 1 \
             nexthop via fd00::3 dev bridge0 weight 1 blackhole default dev lo proto 77 metric \
             4294967295 pref medium",
    ),
];

#[test]
fn routes_are_replaced_in_place_and_the_fallback_survives_their_deletion() {
    enter_netns();
    let mut netlink = netlink();
    let bridge = with_bridge(&mut netlink);
    veth("nsm0");
    ip("link set nsm0 master bridge0");
    for (family, flag, hops, text) in ROUTES {
        let hops: Vec<IpAddr> = hops.iter().map(|hop| hop.parse().unwrap()).collect();
        let replace = |hops: &[IpAddr]| KernelOp::ReplaceRoute {
            family,
            bridge,
            hops: hops.to_vec(),
        };
        do_op(&mut netlink, KernelOp::Blackhole { family }).unwrap();
        do_op(&mut netlink, KernelOp::Blackhole { family }).unwrap();
        do_op(&mut netlink, replace(&hops[..1])).unwrap();
        do_op(&mut netlink, replace(&hops)).unwrap();
        assert_eq!(table(flag), text);
        let observed = netlink.snapshot().unwrap();
        let metric = if family == Family::V4 { 0 } else { 1024 };
        let expected: Vec<_> = hops.iter().map(|hop| (*hop, bridge.get())).collect();
        assert_eq!(
            observed.routes.get(family)[&metric],
            RouteKind::Via(expected)
        );
        assert!(observed.has_fallback(family));
        // A hop that the kernel refuses leaves the route as it was.
        let bad: IpAddr = if family == Family::V4 {
            "10.9.9.9"
        } else {
            "fd99::9"
        }
        .parse()
        .unwrap();
        let (errno, _) = refused(do_op(&mut netlink, replace(&[bad])));
        assert!(
            [libc::ENETUNREACH, libc::EHOSTUNREACH].contains(&errno),
            "{errno}"
        );
        assert_eq!(table(flag), text);
        let delete = KernelOp::DeleteRoute { family, metric };
        for _ in 0..3 {
            do_op(&mut netlink, delete.clone()).unwrap();
        }
        let observed = netlink.snapshot().unwrap();
        assert!(observed.has_fallback(family));
        assert_eq!(observed.routes.get(family).len(), 1);
        let worst = KernelOp::DeleteRoute {
            family,
            metric: FALLBACK_METRIC,
        };
        do_op(&mut netlink, worst).unwrap();
        assert!(netlink.snapshot().unwrap().routes.get(family).is_empty());
    }
}

#[test]
fn a_refusal_is_explained_and_does_not_stop_its_batch() {
    enter_netns();
    let mut netlink = netlink();
    let bridge = with_bridge(&mut netlink);
    let rule = |text: &str, priority| KernelOp::AddRule {
        source: text.parse().unwrap(),
        priority,
        action: RuleAction::Lookup,
    };
    let outcomes = netlink.apply(&[
        rule("20.0.0.1/32", 20_000),
        KernelOp::ReplaceRoute {
            family: Family::V4,
            bridge,
            hops: vec!["10.9.9.9".parse().unwrap()],
        },
        rule("20.0.0.2/32", 19_999),
    ]);
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok());
    let Err(OpError::Refused { errno, text }) = &outcomes[1] else {
        panic!("{outcomes:?}");
    };
    assert_eq!(*errno, libc::ENETUNREACH);
    assert!(
        text.as_ref().unwrap().contains("invalid gateway"),
        "{text:?}"
    );
    assert_eq!(rules("-4"), ["19999 20.0.0.2 77", "20000 20.0.0.1 77"]);
}

#[test]
fn a_thousand_rules_go_in_and_out_in_batches() {
    enter_netns();
    let mut netlink = netlink();
    let adds: Vec<KernelOp> = (0..1000u32)
        .map(|n| KernelOp::AddRule {
            source: format!("20.0.{}.{}/32", n / 256, n % 256).parse().unwrap(),
            priority: 20_000 - n,
            action: RuleAction::Lookup,
        })
        .collect();
    assert!(netlink.apply(&adds).iter().all(Result::is_ok));
    let observed = netlink.snapshot().unwrap();
    assert_eq!(observed.rules.len(), 1000);
    assert!(
        observed
            .rules
            .keys()
            .all(|rule| rule.action == RuleAction::Lookup && rule.protocol == PROTOCOL)
    );
    let deletes: Vec<KernelOp> = observed
        .rules
        .keys()
        .map(|rule| KernelOp::DeleteRule(*rule))
        .collect();
    assert!(netlink.apply(&deletes).iter().all(Result::is_ok));
    assert!(netlink.apply(&deletes).iter().all(Result::is_ok));
    assert!(netlink.snapshot().unwrap().rules.is_empty());
}

#[test]
fn only_rules_of_ours_are_seen() {
    enter_netns();
    ip("rule add from 20.0.0.1 lookup 1");
    ip("rule add from 20.0.0.2 iif lo lookup 1");
    ip("rule add from 20.0.0.3 lookup 2");
    ip("rule add from 20.0.0.4 lookup 2 protocol 77 priority 9");
    ip("rule add not from 20.0.0.5 lookup 1");
    ip("-6 rule add from fd20::/48 lookup 1");
    let mut netlink = netlink();
    let seen: Vec<_> = netlink
        .snapshot()
        .unwrap()
        .rules
        .keys()
        .map(|rule| (rule.source.to_string(), rule.action, rule.protocol))
        .collect();
    let expected = [
        ("20.0.0.4/32".to_owned(), RuleAction::Other, PROTOCOL),
        ("fd20::/48".to_owned(), RuleAction::Lookup, 3),
        ("20.0.0.1/32".to_owned(), RuleAction::Lookup, 3),
    ];
    assert_eq!(seen.len(), 3, "{seen:?}");
    for rule in &expected {
        assert!(
            seen.iter()
                .any(|(source, action, protocol)| *source == rule.0
                    && *action == rule.1
                    && (*protocol == rule.2 || *protocol == 0)),
            "{rule:?} in {seen:?}"
        );
    }
    for rule in netlink.snapshot().unwrap().rules.keys() {
        do_op(&mut netlink, KernelOp::DeleteRule(*rule)).unwrap();
    }
    assert!(netlink.snapshot().unwrap().rules.is_empty());
    let left = ip("rule show");
    assert!(
        left.contains("20.0.0.2 iif lo") && left.contains("20.0.0.3"),
        "{left}"
    );
    assert!(!left.contains("20.0.0.4"), "{left}");
}
