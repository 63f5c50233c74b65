//! Our view of links, addresses, routes and rules from and to messages.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteNextHop, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Address, Hop, Link, Route, Rule};

/// Reads one datagram of an answer; true when the answer is complete.
pub(super) fn collect(
    mut bytes: &[u8],
    sequence: u32,
    found: &mut Vec<RouteNetlinkMessage>,
) -> io::Result<bool> {
    while bytes.len() >= 16 {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let message = bytes
            .get(..length)
            .ok_or_else(|| io::Error::other("truncated netlink answer"))?;
        bytes = bytes.get(length.div_ceil(4) * 4..).unwrap_or_default();
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message)
            .map_err(|error| io::Error::other(format!("netlink answer: {error}")))?;
        if message.header.sequence_number != sequence {
            continue;
        }
        match message.payload {
            NetlinkPayload::InnerMessage(inner) => found.push(inner),
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) if error.code.is_none() => return Ok(true),
            NetlinkPayload::Error(error) => {
                return Err(io::Error::from_raw_os_error(-error.raw_code()));
            }
            _ => {}
        }
    }
    Ok(false)
}

pub(super) fn family(like: IpAddr) -> AddressFamily {
    match like {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(super) fn address_message(index: u32, network: IpNetwork) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(network.ip());
    message.header.prefix_len = network.prefix();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(network.ip()),
        AddressAttribute::Address(network.ip()),
    ];
    message
}

pub(super) fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination.ip());
    header.destination_prefix_length = route.destination.prefix();
    header.table = u8::try_from(route.table).unwrap_or_default();
    header.protocol = RouteProtocol::Boot;
    header.scope = match route.hops.first() {
        Some(Hop { gateway: None, .. }) => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    header.kind = if route.hops.is_empty() {
        RouteType::Unreachable
    } else {
        RouteType::Unicast
    };
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    if route.destination.prefix() > 0 {
        let network = route.destination.network();
        attributes.push(RouteAttribute::Destination(RouteAddress::from(network)));
    }
    if let Some(metric) = route.metric {
        attributes.push(RouteAttribute::Priority(metric));
    }
    match route.hops.as_slice() {
        [] => {}
        [hop] => {
            if let Some(gateway) = hop.gateway {
                attributes.push(RouteAttribute::Gateway(gateway.into()));
            }
            attributes.push(RouteAttribute::Oif(hop.index));
        }
        hops => attributes.push(RouteAttribute::MultiPath(
            hops.iter().map(next_hop).collect(),
        )),
    }
    message
}

pub(super) fn next_hop(hop: &Hop) -> RouteNextHop {
    let mut message = RouteNextHop::default();
    message.interface_index = hop.index;
    if let Some(gateway) = hop.gateway {
        message.attributes = vec![RouteAttribute::Gateway(gateway.into())];
    }
    message
}

pub(super) fn rule_message(rule: &Rule, like: IpAddr) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(like);
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or_default();
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Table(rule.table));
    attributes.push(RuleAttribute::Priority(rule.priority));
    if let Some(from) = rule.from {
        message.header.src_len = from.prefix();
        attributes.push(RuleAttribute::Source(from.network()));
    }
    if let Some(mark) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
    }
    message
}

pub(super) fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        running: message.header.flags.contains(LinkFlags::Running),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(master) => link.master = Some(*master),
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            _ => {}
        }
    }
    link
}

pub(super) fn read_address(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut tentative = false;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => local = local.or(Some(*ip)),
            AddressAttribute::Flags(flags) => tentative = flags.contains(AddressFlags::Tentative),
            _ => {}
        }
    }
    Some(Address {
        index: message.header.index,
        network: IpNetwork::new(local?, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
        tentative,
    })
}

pub(super) fn read_route(message: &RouteMessage) -> Option<Route> {
    let mut destination = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut table = u32::from(message.header.table);
    let (mut metric, mut gateway, mut index, mut hops) = (None, None, None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => destination = ip(to)?,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => metric = Some(*number),
            RouteAttribute::Gateway(via) => gateway = ip(via),
            RouteAttribute::Oif(number) => index = Some(*number),
            RouteAttribute::MultiPath(list) => hops.extend(list.iter().map(read_hop)),
            _ => {}
        }
    }
    if message.header.kind == RouteType::Unicast
        && let Some(index) = index
    {
        hops.push(Hop { gateway, index });
    }
    Some(Route {
        destination: IpNetwork::new(destination, message.header.destination_prefix_length).ok()?,
        table,
        hops,
        metric,
    })
}

pub(super) fn read_hop(hop: &RouteNextHop) -> Hop {
    Hop {
        gateway: hop.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Gateway(via) => ip(via),
            _ => None,
        }),
        index: hop.interface_index,
    }
}

pub(super) fn read_rule(message: &RuleMessage) -> Rule {
    let mut rule = Rule {
        table: u32::from(message.header.table),
        ..Rule::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(from) => {
                rule.from = IpNetwork::new(*from, message.header.src_len).ok();
            }
            RuleAttribute::FwMark(mark) => rule.mark = Some(*mark),
            RuleAttribute::Priority(number) => rule.priority = *number,
            RuleAttribute::Table(number) => rule.table = *number,
            RuleAttribute::Protocol(protocol) => rule.protocol = (*protocol).into(),
            _ => {}
        }
    }
    rule
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
