//! Messages of the kernel as what we look at. Pure. A message that is not
//! understood is `None` and is passed over: it is not ours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use netlink_packet_core::{NlasIterator, Parseable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteNextHop, RouteType,
};
use netlink_packet_route::rule::{RuleAction as Action, RuleAttribute, RuleFlags, RuleMessage};

use super::frame::{Frame, text, u32_at};
use crate::core::family::Family;
use crate::core::ids::{IfIndex, IfName};
use crate::core::observed::{Link, LinkFact, RouteKind, Rule, RuleAction};
use crate::core::op::{PROTOCOL, TABLE};
use crate::kernel::announce::Mac;

/// linux/rtnetlink.h.
pub const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
pub(super) const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
pub(super) const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
pub(super) const RTM_NEWNEIGH: u16 = 28;
pub(super) const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;

/// linux/if_link.h.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_INFO_KIND: u16 = 1;

/// linux/if.h.
const IFF_UP: u32 = 1;
const IFF_RUNNING: u32 = 1 << 6;

/// `struct ifinfomsg`.
const LINK_HEADER: usize = 16;

/// What an event says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A link changed.
    Link(LinkFact),
    /// An address, or a rule or route of ours, was changed.
    State,
    /// Not ours.
    Nothing,
}

/// Whether an event is about a link.
#[must_use]
pub fn is_link(frame: &Frame<'_>) -> bool {
    matches!(frame.kind, RTM_NEWLINK | RTM_DELLINK)
}

/// Reads an event. Only the fields that we need are read of a link: it is
/// eight times faster than the crate's full parse, and robust against
/// attributes of later kernels.
#[must_use]
pub fn notice(frame: &Frame<'_>) -> Notice {
    match frame.kind {
        RTM_NEWLINK | RTM_DELLINK => link_fact(frame).map_or(Notice::Nothing, Notice::Link),
        RTM_NEWADDR | RTM_DELADDR => Notice::State,
        RTM_NEWRULE | RTM_DELRULE => state_if(rule(frame.payload).is_some()),
        RTM_NEWROUTE | RTM_DELROUTE => state_if(route(frame.payload).is_some()),
        _ => Notice::Nothing,
    }
}

fn state_if(ours: bool) -> Notice {
    if ours { Notice::State } else { Notice::Nothing }
}

/// The groups carry two kinds of link messages. Those of AF_BRIDGE tell of
/// ports: a deletion there means that the link has left its bridge, and only
/// one of AF_UNSPEC that it is gone.
fn link_fact(frame: &Frame<'_>) -> Option<LinkFact> {
    let family = i32::from(*frame.payload.first()?);
    let index = IfIndex::new(u32_at(frame.payload, 4)?)?;
    match (frame.kind, family) {
        // A name that we do not take can be no port: whatever had this index
        // is not what it was.
        (RTM_NEWLINK, libc::AF_UNSPEC) => {
            Some(link(frame.payload).map_or(LinkFact::Gone(index), LinkFact::Seen))
        }
        (RTM_DELLINK, libc::AF_UNSPEC) => Some(LinkFact::Gone(index)),
        (RTM_DELLINK, libc::AF_BRIDGE) => Some(LinkFact::LeftBridge(index)),
        _ => None,
    }
}

/// Reads a link.
#[must_use]
pub fn link(payload: &[u8]) -> Option<Link> {
    let flags = u32_at(payload, 8)?;
    let mut name = None;
    let mut alias = None;
    let mut master = None;
    let mut is_bridge = false;
    for attribute in NlasIterator::new(payload.get(LINK_HEADER..)?) {
        let attribute = attribute.ok()?;
        let value = attribute.value();
        match attribute.kind() {
            IFLA_IFNAME => name = Some(text(value)),
            IFLA_IFALIAS => alias = Some(text(value)),
            IFLA_MASTER => master = u32_at(value, 0).and_then(IfIndex::new),
            IFLA_LINKINFO => {
                is_bridge = NlasIterator::new(value)
                    .map_while(Result::ok)
                    .any(|info| info.kind() == IFLA_INFO_KIND && text(info.value()) == "bridge");
            }
            _ => {}
        }
    }
    Some(Link {
        index: IfIndex::new(u32_at(payload, 4)?)?,
        name: IfName::parse(&name?).ok()?,
        alias,
        master,
        up: flags & IFF_UP != 0,
        carrier: flags & IFF_RUNNING != 0,
        is_bridge,
    })
}

/// An address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Whose it is.
    pub link: IfIndex,
    /// With its prefix length.
    pub prefix: IpNetwork,
    /// It failed duplicate address detection (`IFA_F_DADFAILED`).
    pub duplicate: bool,
}

/// Reads an address.
#[must_use]
pub fn address(payload: &[u8]) -> Option<Address> {
    let message = AddressMessage::parse(payload).ok()?;
    let mut local = None;
    let mut plain = None;
    let mut duplicate = false;
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(address),
            AddressAttribute::Address(address) => plain = Some(address),
            AddressAttribute::Flags(flags) => duplicate = flags.contains(AddressFlags::Dadfailed),
            _ => {}
        }
    }
    Some(Address {
        link: IfIndex::new(message.header.index)?,
        // IFA_ADDRESS is the peer's where both are given and differ.
        prefix: IpNetwork::new(local.or(plain)?, message.header.prefix_len).ok()?,
        duplicate,
    })
}

/// Reads a neighbour that does not answer: whose it is, and its address.
#[must_use]
pub fn silent_neighbour(payload: &[u8]) -> Option<(IfIndex, IpAddr)> {
    let message = NeighbourMessage::parse(payload).ok()?;
    let silent = [NeighbourState::Failed, NeighbourState::Incomplete];
    if !silent.contains(&message.header.state) {
        return None;
    }
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some((*v6).into()),
            _ => None,
        })?;
    Some((IfIndex::new(message.header.ifindex)?, address))
}

/// Reads the hardware address of a link.
#[must_use]
pub fn link_hardware_address(payload: &[u8]) -> Option<Mac> {
    NlasIterator::new(payload.get(LINK_HEADER..)?)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == IFLA_ADDRESS)
        .and_then(|attribute| attribute.value().try_into().ok())
}

/// Reads a neighbour's hardware address, if it is believed; of a bridge's
/// forwarding table also behind which port it is.
#[must_use]
pub fn neighbour(payload: &[u8]) -> Option<(Option<IfIndex>, Mac)> {
    let message = NeighbourMessage::parse(payload).ok()?;
    let unresolved = [
        NeighbourState::None,
        NeighbourState::Incomplete,
        NeighbourState::Failed,
    ];
    if unresolved.contains(&message.header.state) {
        return None;
    }
    let mac = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
            _ => None,
        })?;
    Some((IfIndex::new(message.header.ifindex), mac))
}

/// Reads a default route of our table: its family, metric and kind.
#[must_use]
pub fn route(payload: &[u8]) -> Option<(Family, u32, RouteKind)> {
    let message = RouteMessage::parse(payload).ok()?;
    let header = &message.header;
    let family = family(header.address_family)?;
    // RTA_TABLE holds what does not fit the header, where the field is then
    // RT_TABLE_COMPAT.
    if header.table != TABLE
        || header.destination_prefix_length != 0
        || header.source_prefix_length != 0
        || header.tos != 0
    {
        return None;
    }
    let mut metric = 0;
    let mut gateway = None;
    let mut oif = 0;
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(index) => oif = *index,
            RouteAttribute::MultiPath(list) => hops = list.iter().filter_map(hop).collect(),
            _ => {}
        }
    }
    if let Some(gateway) = gateway {
        hops.push((gateway, oif));
    }
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Via(hops),
        RouteType::BlackHole => RouteKind::Blackhole,
        _ => RouteKind::Other,
    };
    Some((family, metric, kind))
}

fn hop(hop: &RouteNextHop) -> Option<(IpAddr, u32)> {
    hop.attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Gateway(address) => ip(address),
            _ => None,
        })
        .map(|address| (address, hop.interface_index))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

fn family(family: AddressFamily) -> Option<Family> {
    match family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

/// Reads a rule of ours: to our table and without a selector but the source, or
/// with our protocol id.
#[must_use]
pub fn rule(payload: &[u8]) -> Option<Rule> {
    let message = RuleMessage::parse(payload).ok()?;
    let header = &message.header;
    let family = family(header.family)?;
    let mut priority = 0;
    let mut protocol = 0;
    let mut table = u32::from(header.table);
    let mut source = match family {
        Family::V4 => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    // A goto whose target is missing says so in a flag.
    let mut plain =
        header.dst_len == 0 && header.tos == 0 && (header.flags - RuleFlags::Unresolved).is_empty();
    let mut target = None;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Protocol(value) => protocol = u8::from(*value),
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Source(address) => source = *address,
            RuleAttribute::Goto(priority) => target = Some(*priority),
            // Always sent; all ones is "not set".
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => plain = false,
        }
    }
    let action = match (header.action, target) {
        _ if !plain => RuleAction::Other,
        (Action::ToTable, None) if table == u32::from(TABLE) => RuleAction::Lookup,
        (Action::Goto, Some(target)) => RuleAction::Goto(target),
        (Action::Nop, None) => RuleAction::Nop,
        _ => RuleAction::Other,
    };
    if action != RuleAction::Lookup && protocol != PROTOCOL {
        return None;
    }
    Some(Rule {
        priority,
        source: IpNetwork::new(source, header.src_len).ok()?,
        protocol,
        action,
    })
}
