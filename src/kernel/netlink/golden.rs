//! Our messages against those of iproute2 6.1, captured with strace, and
//! decoding of what a kernel (6.18) sent.

use std::collections::BTreeSet;

use netlink_packet_core::NlasIterator;
use proptest::prelude::*;

use super::decode::{self, Notice, notice};
use super::encode;
use super::frame::{Frame, frames};
use crate::core::family::Family;
use crate::core::ids::{IfIndex, IfName};
use crate::core::observed::{LinkFact, RouteKind, Rule, RuleAction};
use crate::core::op::KernelOp;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Type, flags without the acknowledgement, fixed header, and the attributes
/// in any order; trailing zeros of values are padding or a text's end.
type Content = (u16, u16, Vec<u8>, BTreeSet<(u16, Vec<u8>)>);

fn content(message: &[u8], header: usize) -> Content {
    let frame = frames(message).next().unwrap();
    let attributes = NlasIterator::new(&frame.payload[header..])
        .map(|attribute| attribute.unwrap())
        .map(|attribute| {
            let mut value = attribute.value().to_vec();
            while value.last() == Some(&0) {
                value.pop();
            }
            (attribute.kind(), value)
        })
        .collect();
    let fixed = frame.payload[..header].to_vec();
    (frame.kind, frame.flags & !4, fixed, attributes)
}

fn bridge() -> IfIndex {
    IfIndex::new(2).unwrap()
}

fn rule() -> Rule {
    Rule {
        priority: 20_000,
        source: "20.0.0.0/24".parse().unwrap(),
        protocol: 77,
        action: RuleAction::Lookup,
    }
}

/// The operation, the length of the fixed header, and iproute2's message.
fn captured() -> [(KernelOp, usize, &'static str); 8] {
    let route = |family, hops: [&str; 2]| KernelOp::ReplaceRoute {
        family,
        bridge: bridge(),
        hops: hops.map(|hop| hop.parse().unwrap()).to_vec(),
    };
    [
        (
            KernelOp::AddAddress {
                bridge: bridge(),
                address: "172.16.0.1/24".parse().unwrap(),
            },
            8,
            "30000000 1400 0506 762a066b 00000000 02180000 02000000
             08000200 ac100001 08000400 ac1000ff 08000100 ac100001",
        ),
        (
            KernelOp::RemoveAddress {
                bridge: bridge(),
                address: "172.16.0.1/24".parse().unwrap(),
            },
            8,
            "28000000 1500 0500 772a066b 00000000 02180000 02000000
             08000200 ac100001 08000100 ac100001",
        ),
        (
            route(Family::V4, ["172.16.0.5", "172.16.0.7"]),
            12,
            "40000000 1800 0505 762a066b 00000000 02000000 014d0001 00000000
             24000900 10000000 02000000 08000500 ac100005
             10000000 02000000 08000500 ac100007",
        ),
        (
            route(Family::V6, ["fd00::5", "fd00::7"]),
            12,
            // Less its RTA_DST of ::/0, which says nothing.
            "60000000 1800 0505 762a066b 00000000 0a000000 014d0001 00000000
             08000600 00040000
             3c000900 1c000000 02000000 14000500 fd000000 00000000 00000000 00000005
             1c000000 02000000 14000500 fd000000 00000000 00000000 00000007",
        ),
        (
            KernelOp::Blackhole { family: Family::V4 },
            12,
            "24000000 1800 0505 772a066b 00000000 02000000 014d0006 00000000 08000600 ffffffff",
        ),
        (
            KernelOp::DeleteRoute {
                family: Family::V4,
                metric: 0,
            },
            12,
            "1c000000 1900 0500 772a066b 00000000 02000000 0100ff01 00000000",
        ),
        (
            KernelOp::DeleteRoute {
                family: Family::V6,
                metric: 1024,
            },
            12,
            "24000000 1900 0500 772a066b 00000000 0a000000 01000000 00000000 08000600 00040000",
        ),
        (
            KernelOp::DeleteRule(rule()),
            12,
            "34000000 2100 0500 772a066b 00000000 02001800 01000001 00000000
             08000200 14000000 08000600 204e0000 05001500 4d000000",
        ),
    ]
}

#[test]
fn operations_are_what_iproute2_sends() {
    for (op, header, golden) in captured() {
        let ours = encode::operation(&op, 1);
        assert_eq!(
            content(&ours, header),
            content(&bytes(golden), header),
            "{op}: {}",
            hex(&ours)
        );
    }
}

/// Where iproute2 says the same in another way: EXCL on rules, whose walk
/// makes many of them slow; `nodad` in the header's eight bits; a kind without
/// the NUL at its end.
#[test]
fn operations_that_differ_from_iproute2_on_purpose() {
    let port = || IfName::parse("nsm-a").unwrap();
    let table = [
        (
            KernelOp::CreateBridge {
                mac: [2, 0, 0, 0, 0, 1],
            },
            "48000000 1000 0106 01000000 00000000 00000000 00000000 00000000 00000000
             0c000300 62726964 67653000 0a000100 02000000 00010000
             10001200 0b000100 62726964 67650000",
        ),
        (
            KernelOp::AddRule {
                source: rule().source,
                priority: rule().priority,
                action: RuleAction::Lookup,
            },
            "34000000 2000 0104 01000000 00000000 02001800 01000001 00000000
             08000600 204e0000 05001500 4d000000 08000200 14000000",
        ),
        (
            KernelOp::AddAddress {
                bridge: bridge(),
                address: "fd00::1/64".parse().unwrap(),
            },
            "48000000 1400 0106 01000000 00000000 0a400000 02000000
             14000200 fd000000 00000000 00000000 00000001
             14000100 fd000000 00000000 00000000 00000001 08000800 02000000",
        ),
        (
            KernelOp::Attach {
                port: port(),
                bridge: bridge(),
            },
            "34000000 1300 0100 01000000 00000000 00000000 00000000 00000000 00000000
             0a000300 6e736d2d 61000000 08000a00 02000000",
        ),
        (
            KernelOp::Detach { port: port() },
            "34000000 1300 0100 01000000 00000000 00000000 00000000 00000000 00000000
             0a000300 6e736d2d 61000000 08000a00 00000000",
        ),
        (
            KernelOp::BridgeUp { bridge: bridge() },
            "20000000 1300 0100 01000000 00000000 00000000 02000000 01000000 01000000",
        ),
        (
            KernelOp::NoOwnLinkLocal { bridge: bridge() },
            "30000000 1300 0100 01000000 00000000 00000000 02000000 00000000 00000000
             10001a00 0c000a00 05000800 01000000",
        ),
        (
            KernelOp::ForgetNeighbour {
                bridge: bridge(),
                address: "172.16.0.7".parse().unwrap(),
            },
            "24000000 1d00 0100 01000000 00000000 02000000 02000000 00000000
             08000100 ac100007",
        ),
    ];
    for (op, golden) in table {
        assert_eq!(hex(&encode::operation(&op, 1)), hex(&bytes(golden)), "{op}");
    }
}

fn frame(kind: u16, payload: &[u8]) -> Frame<'_> {
    Frame {
        kind,
        flags: 0,
        sequence: 0,
        port: 0,
        payload,
    }
}

/// A port of bridge 9: up, with a carrier, and an alias.
const LINK: &str = "00000100 03000000 43100100 00000000
     0a000300 6e736d2d 61000000 08000a00 09000000 0d001400 73657276 65722d31 00000000
     14001200 09000100 76657468 00000000 04000200";

#[test]
fn links_and_what_becomes_of_them() {
    let payload = bytes(LINK);
    let link = decode::link(&payload).unwrap();
    assert_eq!(
        (link.index.get(), link.name.as_str(), link.alias.as_deref()),
        (3, "nsm-a", Some("server-1"))
    );
    assert_eq!(link.master, IfIndex::new(9));
    assert!(link.up && link.carrier && !link.is_bridge);
    let index = link.index;
    let said = |kind, family: u8| {
        let mut payload = payload.clone();
        payload[0] = family;
        notice(&frame(kind, &payload))
    };
    assert_eq!(said(16, 0), Notice::Link(LinkFact::Seen(link)));
    assert_eq!(said(17, 0), Notice::Link(LinkFact::Gone(index)));
    // AF_BRIDGE: the link lives, it only left its bridge.
    assert_eq!(said(17, 7), Notice::Link(LinkFact::LeftBridge(index)));
    assert_eq!(said(16, 7), Notice::Nothing);
    // A name that can be no port's: whatever had the index is gone.
    let mut odd = payload.clone();
    odd[20] = b'%';
    assert_eq!(
        notice(&frame(16, &odd)),
        Notice::Link(LinkFact::Gone(index))
    );
}

#[test]
fn an_address_tells_whether_its_detection_failed() {
    // fd00::1/64 of link 2, permanent; IFA_FLAGS is the word at the end.
    let with = |flags: &str| {
        decode::address(&bytes(&format!(
            "0a408000 02000000 14000100 fd000000 00000000 00000000 00000001 08000800 {flags}"
        )))
        .unwrap()
    };
    let seen = with("80000000");
    assert_eq!(
        (seen.link.get(), seen.prefix),
        (2, "fd00::1/64".parse().unwrap())
    );
    assert!(!seen.duplicate);
    // Tentative only: the detection is not over.
    assert!(!with("c0000000").duplicate);
    assert!(with("c8000000").duplicate);
}

#[test]
fn routes_with_one_hop_and_with_two_look_alike() {
    let one = bytes(
        "0a000000 014d0001 00000000 08000f00 01000000 08000600 00040000
         14000500 fd000000 00000000 00000000 00000005 08000400 02000000",
    );
    let two = bytes(
        "02000000 014d0001 00000000 08000f00 01000000
         24000900 10000000 02000000 08000500 ac100005
         10000000 02000000 08000500 ac100007",
    );
    let hop = |text: &str| (text.parse().unwrap(), 2);
    assert_eq!(
        decode::route(&one),
        Some((Family::V6, 1024, RouteKind::Via(vec![hop("fd00::5")])))
    );
    assert_eq!(
        decode::route(&two),
        Some((
            Family::V4,
            0,
            RouteKind::Via(vec![hop("172.16.0.5"), hop("172.16.0.7")])
        ))
    );
    // Not our table, not the default, not without a type of service.
    for (at, value) in [(4, 254), (1, 24), (3, 4)] {
        let mut other = two.clone();
        other[at] = value;
        assert_eq!(decode::route(&other), None);
        assert_eq!(notice(&frame(24, &other)), Notice::Nothing);
    }
    assert_eq!(notice(&frame(25, &two)), Notice::State);
}

#[test]
fn rules_are_ours_by_what_they_do_or_by_their_id() {
    let plain = bytes(
        "02001800 01000001 00000000 08000f00 01000000 08000e00 ffffffff
         08000200 14000000 08000600 204e0000 05001500 4d000000",
    );
    assert_eq!(decode::rule(&plain), Some(rule()));
    let inverted = |protocol| {
        let mut bytes = plain.clone();
        bytes[8] = 2;
        let at = bytes.len() - 4;
        bytes[at] = protocol;
        bytes
    };
    assert_eq!(decode::rule(&inverted(3)), None);
    assert_eq!(
        decode::rule(&inverted(77)).unwrap().action,
        RuleAction::Other
    );
}

proptest! {
    /// Whatever comes, no panic: a fuzzer in small.
    #[test]
    fn any_message_is_read_without_harm(
        kind in 14..40u16,
        payload in proptest::collection::vec(any::<u8>(), 0..120),
    ) {
        let _ = notice(&frame(kind, &payload));
        let _ = decode::link(&payload);
        let _ = decode::address(&payload);
        let _ = decode::route(&payload);
        let _ = decode::rule(&payload);
    }

    /// One byte of a good message changed.
    #[test]
    fn a_damaged_message_is_read_without_harm(at in any::<prop::sample::Index>(), byte: u8) {
        for golden in [
            LINK,
            "02000000 014d0001 00000000 24000900 10000000 02000000 08000500 ac100005
             10000000 02000000 08000500 ac100007",
            "02001800 01000001 00000000 08000200 14000000 08000600 204e0000",
            "02180000 02000000 08000200 ac100001 08000100 ac100001",
        ] {
            let mut payload = bytes(golden);
            let at = at.index(payload.len());
            payload[at] = byte;
            let _ = decode::link(&payload);
            let _ = decode::address(&payload);
            let _ = decode::route(&payload);
            let _ = decode::rule(&payload);
        }
    }
}
