//! Requests and answers byte by byte, as the uapi headers have them.

use proptest::prelude::*;

use super::decode::{self, What};
use super::{Hop, Interface, Neighbour, Route, Rule, Statistics};
use crate::core::family::Family;

/// `struct nlattr` with its padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_ne_bytes())
}

/// `struct rtnexthop` with its attributes.
fn hop(interface: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
    let attributes = attributes.concat();
    let length = u16::try_from(8 + attributes.len()).unwrap();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(interface.to_ne_bytes());
    bytes.extend(attributes);
    bytes
}

const V4: [u8; 4] = [10, 0, 0, 1];
const PEER: [u8; 4] = [10, 0, 0, 2];
const V6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];

#[test]
fn requests_ask_for_everything_of_a_family() {
    let table = [
        (What::Links, 18u16, 32u32),
        (What::Addresses, 22, 24),
        (What::Routes, 26, 28),
        (What::Neighbours, 30, 28),
        (What::Rules, 34, 28),
    ];
    for (what, kind, length) in table {
        let mut expected = length.to_ne_bytes().to_vec();
        expected.extend(kind.to_ne_bytes());
        expected.extend(0x301u16.to_ne_bytes());
        expected.extend(9u32.to_ne_bytes());
        expected.extend([0, 0, 0, 0, 10]);
        expected.resize(length.try_into().unwrap(), 0);
        assert_eq!(decode::request(what, 10, 9), expected, "{what:?}");
        assert_eq!(what.answer(), kind - 2);
    }
}

#[test]
fn a_link_and_what_of_it_is_missing() {
    let mut header = vec![0; 16];
    header[4..8].copy_from_slice(&5u32.to_ne_bytes());
    header[8..12].copy_from_slice(&0x1043u32.to_ne_bytes());
    let counters: Vec<u8> = (1..=25u64).flat_map(u64::to_ne_bytes).collect();
    let message = [
        header.clone(),
        attribute(3, b"bridge0\0"),
        attribute(1, &[2, 0, 0, 0, 0, 1]),
        number(4, 1500),
        number(10, 7),
        attribute(23, &counters),
        attribute(999, b"later"),
    ]
    .concat();
    let whole = Interface {
        index: 5,
        name: "bridge0".to_owned(),
        mac: vec![2, 0, 0, 0, 0, 1],
        addresses: Vec::new(),
        mtu: 1500,
        up: true,
        master: 7,
        statistics: Some(Statistics {
            rx_packets: 1,
            tx_packets: 2,
            rx_bytes: 3,
            tx_bytes: 4,
            rx_errors: 5,
            tx_errors: 6,
            rx_dropped: 7,
            tx_dropped: 8,
        }),
    };
    assert_eq!(decode::link(&message), Some(whole));
    header[8] = 0;
    let poor = [
        header.clone(),
        attribute(1, &[0; 6]),
        attribute(23, &counters[..63]),
    ]
    .concat();
    let link = decode::link(&poor).unwrap();
    assert!(!link.up && link.mac.is_empty() && link.statistics.is_none());
    assert_eq!(decode::link(&header[..11]), None);
}

#[test]
fn an_address_with_a_peer_is_a_hosts() {
    let mut header = vec![2, 24, 0, 0];
    header.extend(5u32.to_ne_bytes());
    let check = |family, attributes: &[Vec<u8>], expected: Option<&str>| {
        let message = [header.clone(), attributes.concat()].concat();
        let found = decode::address(family, &message);
        let found = found.map(|(index, address)| format!("{index} {address}"));
        assert_eq!(found.as_deref(), expected);
    };
    let own = [attribute(1, &V4), attribute(2, &V4)];
    check(Family::V4, &own, Some("5 10.0.0.1/24"));
    let peer = [attribute(1, &PEER), attribute(2, &V4)];
    check(Family::V4, &peer, Some("5 10.0.0.1/32"));
    check(Family::V6, &[attribute(1, &V6)], Some("5 fd00::7/24"));
    check(Family::V4, &[attribute(1, &[1, 2, 3])], None);
}

#[test]
fn a_rule_with_all_selectors_and_one_with_none() {
    let plain = [2, 0, 0, 0, 255, 0, 0, 1, 0, 0, 0, 0];
    let mut rule = Rule {
        table: 255,
        priority: 0,
        mark: 0,
        source: None,
        destination: None,
    };
    assert_eq!(decode::rule(Family::V4, &plain), Some(rule.clone()));
    // The table does not fit into the header.
    let header = [2, 32, 8, 0, 252, 0, 0, 1, 0, 0, 0, 0];
    let message = [
        header.to_vec(),
        attribute(1, &PEER),
        attribute(2, &[10, 0, 0, 0]),
        number(6, 32765),
        number(10, 16),
        number(15, 1000),
    ]
    .concat();
    rule.table = 1000;
    rule.priority = 32765;
    rule.mark = 16;
    rule.source = Some("10.0.0.0/8".parse().unwrap());
    rule.destination = Some("10.0.0.2/32".parse().unwrap());
    assert_eq!(decode::rule(Family::V4, &message), Some(rule));
}

fn route(family: Family, length: u8, attributes: &[Vec<u8>]) -> Route {
    let header = vec![decode::number(family), length, 0, 0, 1, 3, 0, 1, 0, 0, 0, 0];
    decode::route(family, &[header, attributes.concat()].concat()).unwrap()
}

#[test]
fn a_multipath_route_has_the_interface_that_all_hops_share() {
    let gateway = |address: &[u8]| attribute(5, address);
    let hops = [hop(5, &[gateway(&V4)]), hop(5, &[gateway(&PEER)])].concat();
    let found = route(Family::V4, 0, &[attribute(9, &hops)]);
    let expected = Route {
        table: 1,
        interface: 5,
        destination: "0.0.0.0/0".parse().unwrap(),
        hops: [V4, PEER]
            .map(|address| Hop {
                interface: 5,
                gateway: Some(address.into()),
            })
            .into(),
        gateway: None,
        source: None,
    };
    assert_eq!(found, expected);
    // AF_INET6 and the address; a hop without an address; one cut short.
    let via = [10u16.to_ne_bytes().to_vec(), V6.to_vec()].concat();
    let mut hops = [hop(5, &[attribute(18, &via)]), hop(6, &[])].concat();
    hops.extend(&hop(7, &[gateway(&V4)])[..12]);
    let found = route(Family::V4, 0, &[attribute(9, &hops)]);
    assert_eq!(found.interface, 0);
    let gateways: Vec<_> = found.hops.iter().map(|hop| hop.gateway).collect();
    assert_eq!(gateways, [Some(V6.into()), None]);
}

#[test]
fn a_route_with_one_gateway() {
    let found = route(
        Family::V6,
        64,
        &[
            attribute(1, &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            number(4, 6),
            attribute(5, &V6),
            attribute(7, &V6),
            number(15, 4_000_000_000),
        ],
    );
    let expected = Route {
        table: 4_000_000_000,
        interface: 6,
        destination: "fd00::/64".parse().unwrap(),
        hops: Vec::new(),
        gateway: Some(V6.into()),
        source: Some(V6.into()),
    };
    assert_eq!(found, expected);
    assert_eq!(
        route(Family::V6, 0, &[]).destination,
        "::/0".parse().unwrap()
    );
}

#[test]
fn a_neighbour() {
    let mut header = vec![10, 0, 0, 0];
    header.extend(5u32.to_ne_bytes());
    header.extend(0x80u16.to_ne_bytes());
    header.extend([0, 1]);
    let message = [
        header.clone(),
        attribute(1, &V6),
        attribute(2, &[2, 0, 0, 0, 0, 1]),
    ]
    .concat();
    let expected = Neighbour {
        address: V6.into(),
        mac: vec![2, 0, 0, 0, 0, 1],
        state: 0x80,
        interface: 5,
    };
    assert_eq!(decode::neighbour(&message), Some(expected));
    assert_eq!(decode::neighbour(&header), None);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_harm(
        bytes in proptest::collection::vec(prop_oneof![Just(0u8), 0..32u8, any::<u8>()], 0..120),
    ) {
        let _ = decode::link(&bytes);
        let _ = decode::neighbour(&bytes);
        for family in Family::ALL {
            let _ = decode::address(family, &bytes);
            let _ = decode::rule(family, &bytes);
            let _ = decode::route(family, &bytes);
        }
    }
}
