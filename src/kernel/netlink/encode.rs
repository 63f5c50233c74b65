//! Operations and dump requests as netlink messages. Pure.
//!
//! Every buffer is zeroed before the crates write into it: some of their
//! attributes count a byte that they do not write.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteNextHop, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction as Action, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::core::family::Family;
use crate::core::ids::{IfIndex, IfName};
use crate::core::observed::{Rule, RuleAction};
use crate::core::op::{BRIDGE, FALLBACK_METRIC, KernelOp, PROTOCOL, TABLE, route_metric};
use crate::kernel::announce::Mac;

/// linux/netlink.h.
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

/// Where a header's flags are.
const FLAGS_AT: std::ops::Range<usize> = 6..8;

/// A part of the kernel's state that is read whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dump {
    /// All links, without their counters.
    Links,
    /// All addresses of a family.
    Addresses(Family),
    /// The routes of our table.
    Routes(Family),
    /// All rules of a family.
    Rules(Family),
    /// All neighbours of a family.
    Neighbours(Family),
}

/// The message for `op`, without a wish for an acknowledgement: a refusal is
/// always answered.
#[must_use]
pub fn operation(op: &KernelOp, sequence: u32) -> Vec<u8> {
    let (message, flags) = match op {
        KernelOp::CreateBridge { mac } => (create_bridge(*mac), NLM_F_CREATE | NLM_F_EXCL),
        KernelOp::BridgeUp { bridge } => {
            let mut message = LinkMessage::default();
            message.header.index = bridge.get();
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
            (RouteNetlinkMessage::SetLink(message), 0)
        }
        KernelOp::NoOwnLinkLocal { bridge } => (no_own_link_local(*bridge), 0),
        KernelOp::AddAddress {
            bridge,
            address: prefix,
        } => (
            RouteNetlinkMessage::NewAddress(address(*bridge, *prefix, true)),
            NLM_F_CREATE | NLM_F_EXCL,
        ),
        KernelOp::RemoveAddress {
            bridge,
            address: prefix,
        } => (
            RouteNetlinkMessage::DelAddress(address(*bridge, *prefix, false)),
            0,
        ),
        KernelOp::Attach { port, bridge } => (set_master(port.as_str(), bridge.get()), 0),
        KernelOp::Detach { port } => (set_master(port.as_str(), 0), 0),
        KernelOp::ForgetNeighbour { bridge, address } => (
            RouteNetlinkMessage::DelNeighbour(neighbour(*bridge, *address)),
            0,
        ),
        KernelOp::AskNeighbour { bridge, address } => {
            let mut message = neighbour(*bridge, *address);
            message.header.flags = NeighbourFlags::Use;
            let message = RouteNetlinkMessage::NewNeighbour(message);
            (message, NLM_F_CREATE | NLM_F_REPLACE)
        }
        KernelOp::Blackhole { family } => {
            let mut message = route(*family, RouteType::BlackHole);
            message
                .attributes
                .push(RouteAttribute::Priority(FALLBACK_METRIC));
            (
                RouteNetlinkMessage::NewRoute(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
        }
        KernelOp::ReplaceRoute {
            family,
            bridge,
            hops,
        } => (
            multipath(*family, *bridge, hops),
            NLM_F_CREATE | NLM_F_REPLACE,
        ),
        KernelOp::DeleteRoute { family, metric } => (delete_route(*family, *metric), 0),
        KernelOp::AddRule {
            source,
            priority,
            action,
        } => {
            let message = rule(*source, *priority, PROTOCOL, *action);
            (RouteNetlinkMessage::NewRule(message), NLM_F_CREATE)
        }
        KernelOp::DeleteRule(old) => (delete_rule(old), 0),
    };
    serialise(message, NLM_F_REQUEST | flags, sequence)
}

/// The request for a dump.
#[must_use]
pub fn dump(what: Dump, sequence: u32) -> Vec<u8> {
    let message = match what {
        Dump::Links => {
            let mut message = LinkMessage::default();
            message
                .attributes
                .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
            RouteNetlinkMessage::GetLink(message)
        }
        Dump::Addresses(family) => {
            let mut message = AddressMessage::default();
            message.header.family = address_family(family);
            RouteNetlinkMessage::GetAddress(message)
        }
        Dump::Routes(family) => {
            let mut message = RouteMessage::default();
            message.header.address_family = address_family(family);
            message
                .attributes
                .push(RouteAttribute::Table(u32::from(TABLE)));
            RouteNetlinkMessage::GetRoute(message)
        }
        Dump::Rules(family) => {
            let mut message = RuleMessage::default();
            message.header.family = address_family(family);
            RouteNetlinkMessage::GetRule(message)
        }
        Dump::Neighbours(family) => {
            let mut message = NeighbourMessage::default();
            message.header.family = address_family(family);
            RouteNetlinkMessage::GetNeighbour(message)
        }
    };
    serialise(message, NLM_F_REQUEST | NLM_F_DUMP, sequence)
}

/// The request for the one link of that name, which the acknowledgement
/// follows.
#[must_use]
pub fn get_link(name: &IfName, sequence: u32) -> Vec<u8> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.as_str().to_owned()),
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    serialise(
        RouteNetlinkMessage::GetLink(message),
        NLM_F_REQUEST | NLM_F_ACK,
        sequence,
    )
}

/// The request for a link, which the acknowledgement follows.
#[must_use]
pub fn get_link_at(index: IfIndex, sequence: u32) -> Vec<u8> {
    let mut message = LinkMessage::default();
    message.header.index = index.get();
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    serialise(
        RouteNetlinkMessage::GetLink(message),
        NLM_F_REQUEST | NLM_F_ACK,
        sequence,
    )
}

/// The request for one neighbour, which the acknowledgement follows.
#[must_use]
pub fn get_neighbour(bridge: IfIndex, address: IpAddr, sequence: u32) -> Vec<u8> {
    serialise(
        RouteNetlinkMessage::GetNeighbour(neighbour(bridge, address)),
        NLM_F_REQUEST | NLM_F_ACK,
        sequence,
    )
}

/// The request for a hardware address in the bridge's forwarding table, which
/// the acknowledgement follows.
#[must_use]
pub fn get_forwarding(bridge: IfIndex, mac: Mac, sequence: u32) -> Vec<u8> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        NeighbourAttribute::Controller(bridge.get()),
    ];
    serialise(
        RouteNetlinkMessage::GetNeighbour(message),
        NLM_F_REQUEST | NLM_F_ACK,
        sequence,
    )
}

/// Adds the wish for an acknowledgement to a message.
pub fn want_ack(message: &mut [u8]) {
    if let Some(flags) = message.get_mut(FLAGS_AT)
        && let Ok(old) = <[u8; 2]>::try_from(&*flags)
    {
        flags.copy_from_slice(&(u16::from_ne_bytes(old) | NLM_F_ACK).to_ne_bytes());
    }
}

fn serialise(message: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// Name and hardware address, as Meridio's pkg/kernel/bridge.go sends; all
/// else is the kernel's default. `vlan_filtering` must not be sent even as 0:
/// kernels built without it refuse the whole message.
fn create_bridge(mac: [u8; 6]) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(BRIDGE.to_owned()),
        LinkAttribute::Address(mac.to_vec()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
    ];
    RouteNetlinkMessage::NewLink(message)
}

/// Not possible in the message that makes the bridge: there is no IPv6 state to
/// set yet, so the kernel refuses it (net/ipv6/addrconf.c,
/// `inet6_validate_link_af`).
fn no_own_link_local(bridge: IfIndex) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = bridge.get();
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
        vec![mode],
    )])];
    RouteNetlinkMessage::SetLink(message)
}

fn set_master(port: &str, master: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(port.to_owned()),
        LinkAttribute::Controller(master),
    ];
    RouteNetlinkMessage::SetLink(message)
}

fn address(bridge: IfIndex, prefix: IpNetwork, new: bool) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = address_family(prefix.into());
    message.header.prefix_len = prefix.prefix();
    message.header.index = bridge.get();
    message.attributes = vec![
        AddressAttribute::Local(prefix.ip()),
        AddressAttribute::Address(prefix.ip()),
    ];
    if new {
        match prefix {
            IpNetwork::V4(v4) if v4.prefix() <= 30 => message
                .attributes
                .push(AddressAttribute::Broadcast(v4.broadcast())),
            IpNetwork::V4(_) => {}
            IpNetwork::V6(_) => message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad)),
        }
    }
    message
}

fn neighbour(bridge: IfIndex, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = address_family(address.into());
    message.header.ifindex = bridge.get();
    let destination = match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes = vec![NeighbourAttribute::Destination(destination)];
    message
}

fn route(family: Family, kind: RouteType) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message.header.table = TABLE;
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.scope = RouteScope::Universe;
    message.header.kind = kind;
    message
}

/// Every hop with the bridge's index: without it the kernel may resolve a hop
/// to a port that has an address of the same subnet.
fn multipath(family: Family, bridge: IfIndex, hops: &[IpAddr]) -> RouteNetlinkMessage {
    let mut message = route(family, RouteType::Unicast);
    // IPv4's 0 is what no attribute says.
    if route_metric(family) != 0 {
        message
            .attributes
            .push(RouteAttribute::Priority(route_metric(family)));
    }
    let hops = hops
        .iter()
        .map(|address| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = bridge.get();
            hop.attributes = vec![RouteAttribute::Gateway((*address).into())];
            hop
        })
        .collect();
    message.attributes.push(RouteAttribute::MultiPath(hops));
    RouteNetlinkMessage::NewRoute(message)
}

/// One message takes all hops of a route, in both families.
fn delete_route(family: Family, metric: u32) -> RouteNetlinkMessage {
    // A metric of 0 is a wild card to IPv4: the type keeps it from the
    // fallback (net/ipv4/fib_trie.c, fib_table_delete).
    let kind = if metric == 0 {
        RouteType::Unicast
    } else {
        RouteType::Unspec
    };
    let mut message = route(family, kind);
    // Whoever made it.
    message.header.protocol = RouteProtocol::Unspec;
    if family == Family::V4 {
        message.header.scope = RouteScope::NoWhere;
    }
    if metric != 0 {
        message.attributes.push(RouteAttribute::Priority(metric));
    }
    RouteNetlinkMessage::DelRoute(message)
}

fn delete_rule(old: &Rule) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelRule(rule(old.source, old.priority, old.protocol, old.action))
}

fn rule(source: IpNetwork, priority: u32, protocol: u8, action: RuleAction) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(source.into());
    message.header.src_len = source.prefix();
    message.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Protocol(RouteProtocol::from(protocol)),
    ];
    if source.prefix() != 0 {
        message.attributes.push(RuleAttribute::Source(source.ip()));
    }
    match action {
        RuleAction::Lookup => {
            message.header.table = TABLE;
            message.header.action = Action::ToTable;
        }
        RuleAction::Goto(priority) => {
            message.header.action = Action::Goto;
            message.attributes.push(RuleAttribute::Goto(priority));
        }
        RuleAction::Nop => message.header.action = Action::Nop,
        // Only what we know of it is named; what is left out is a wild card in
        // a deletion.
        RuleAction::Other => {}
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn a_dirty_byte_behind_a_name_is_impossible() {
        // The crates count a NUL behind a rule's interface name and do not
        // write it; a fresh zeroed buffer is what keeps it right.
        let mut message = RuleMessage::default();
        message.attributes = vec![RuleAttribute::Iifname("abc".to_owned())];
        let bytes = serialise(RouteNetlinkMessage::NewRule(message), 0, 0);
        assert!(hex(&bytes).ends_with("0800030061626300"));
    }

    #[test]
    fn the_wish_for_an_acknowledgement_is_one_bit() {
        let mut bytes = operation(&KernelOp::Blackhole { family: Family::V4 }, 1);
        assert_eq!(bytes[6..8], [0x01, 0x05]);
        want_ack(&mut bytes);
        assert_eq!(bytes[6..8], [0x05, 0x05]);
        want_ack(&mut []);
    }
}
