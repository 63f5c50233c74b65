//! The report's requests, and the kernel's answers as its rows. Pure. Only the
//! attributes that are shown are looked at, so that one of a later kernel
//! hides no row.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::{Hop, Interface, Neighbour, Route, Rule, Statistics};
use crate::core::family::Family;
use crate::kernel::netlink::frame::{HEADER, text, u32_at};

/// linux/netlink.h: `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
/// linux/netlink.h: `NLA_TYPE_MASK`.
const TYPE_MASK: u16 = 0x3fff;
/// linux/if.h.
const IFF_UP: u32 = 1;

/// linux/if_link.h.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_STATS64: u16 = 23;

/// linux/if_addr.h.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// linux/fib_rules.h.
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;

/// linux/rtnetlink.h.
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;

/// linux/neighbour.h.
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// `struct ifinfomsg`, `ifaddrmsg`, `fib_rule_hdr`, `rtmsg`, `ndmsg`, and
/// `rtnexthop`.
const LINK: usize = 16;
const ADDRESS: usize = 8;
const RULE: usize = 12;
const ROUTE: usize = 12;
const NEIGHBOUR: usize = 12;
const HOP: usize = 8;

/// A table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Links, with their counters.
    Links,
    /// Addresses.
    Addresses,
    /// Rules.
    Rules,
    /// Routes of all tables.
    Routes,
    /// Neighbours.
    Neighbours,
}

impl What {
    /// The type of the answers; that of the request is two more.
    #[must_use]
    pub fn answer(self) -> u16 {
        match self {
            Self::Links => 16,
            Self::Addresses => 20,
            Self::Routes => 24,
            Self::Neighbours => 28,
            Self::Rules => 32,
        }
    }

    fn header(self) -> usize {
        match self {
            Self::Links => LINK,
            Self::Addresses => ADDRESS,
            Self::Rules => RULE,
            Self::Routes => ROUTE,
            Self::Neighbours => NEIGHBOUR,
        }
    }
}

/// The family's number in messages.
#[must_use]
pub fn number(family: Family) -> u8 {
    // AF_INET and AF_INET6.
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// The request for a table of a family; 0 stands for any.
#[must_use]
pub fn request(what: What, family: u8, sequence: u32) -> Vec<u8> {
    let length = HEADER + what.header();
    let mut message = u32::try_from(length)
        .unwrap_or_default()
        .to_ne_bytes()
        .to_vec();
    message.extend((what.answer() + 2).to_ne_bytes());
    message.extend(DUMP.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    // All headers begin with the family and may else be zero.
    message.push(family);
    message.resize(length, 0);
    message
}

/// The attributes (`struct nlattr`) behind a header, up to the first that does
/// not fit.
fn attributes(message: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = message.get(header..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(<[u8; 4]>::try_from(bytes).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(bytes).ok()?.into()),
        _ => None,
    }
}

/// `struct rtvia`: a gateway of the other family.
fn via(bytes: &[u8]) -> Option<IpAddr> {
    ip(bytes.get(2..)?)
}

/// Reads a link, yet without addresses.
#[must_use]
pub fn link(message: &[u8]) -> Option<Interface> {
    let mut link = Interface {
        index: u32_at(message, 4)?,
        name: String::new(),
        mac: Vec::new(),
        addresses: Vec::new(),
        mtu: 0,
        up: u32_at(message, 8)? & IFF_UP != 0,
        master: 0,
        statistics: None,
    };
    for (kind, value) in attributes(message, LINK) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            // Loopback's is all zero, which is none.
            IFLA_ADDRESS if value.iter().any(|byte| *byte != 0) => link.mac = value.to_vec(),
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            IFLA_MASTER => link.master = u32_at(value, 0)?,
            IFLA_STATS64 => link.statistics = statistics(value),
            _ => {}
        }
    }
    Some(link)
}

/// `struct rtnl_link_stats64` begins with what we show.
fn statistics(value: &[u8]) -> Option<Statistics> {
    let (counters, _) = value.as_chunks::<8>();
    let mut counters = counters.iter().map(|bytes| u64::from_ne_bytes(*bytes));
    Some(Statistics {
        rx_packets: counters.next()?,
        tx_packets: counters.next()?,
        rx_bytes: counters.next()?,
        tx_bytes: counters.next()?,
        rx_errors: counters.next()?,
        tx_errors: counters.next()?,
        rx_dropped: counters.next()?,
        tx_dropped: counters.next()?,
    })
}

/// Reads an address: the index of its link, and itself. With a peer, the
/// length is that of the peer's network, and ours is a host's.
#[must_use]
pub fn address(family: Family, message: &[u8]) -> Option<(u32, IpNetwork)> {
    let mut local = None;
    let mut plain = None;
    for (kind, value) in attributes(message, ADDRESS) {
        match kind {
            IFA_LOCAL => local = ip(value),
            IFA_ADDRESS => plain = ip(value),
            _ => {}
        }
    }
    let address = local.or(plain)?;
    let length = if plain.is_none_or(|plain| plain == address) {
        *message.get(1)?
    } else {
        family.bits()
    };
    Some((u32_at(message, 4)?, IpNetwork::new(address, length).ok()?))
}

/// Reads a rule.
#[must_use]
pub fn rule(family: Family, message: &[u8]) -> Option<Rule> {
    let mut rule = Rule {
        table: u32::from(*message.get(4)?),
        priority: 0,
        mark: 0,
        source: None,
        destination: None,
    };
    let (to, from) = (*message.get(1)?, *message.get(2)?);
    for (kind, value) in attributes(message, RULE) {
        match kind {
            FRA_TABLE => rule.table = u32_at(value, 0)?,
            FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
            FRA_FWMARK => rule.mark = u32_at(value, 0)?,
            FRA_SRC => rule.source = network(family, ip(value), from),
            FRA_DST => rule.destination = network(family, ip(value), to),
            _ => {}
        }
    }
    Some(rule)
}

/// Without an address it is all of the family.
fn network(family: Family, address: Option<IpAddr>, length: u8) -> Option<IpNetwork> {
    let address = address.unwrap_or(match family {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    });
    IpNetwork::new(address, length).ok()
}

/// Reads a route of any table.
#[must_use]
pub fn route(family: Family, message: &[u8]) -> Option<Route> {
    let length = *message.get(1)?;
    let mut table = u32::from(*message.get(4)?);
    let mut destination = None;
    let mut interface = 0;
    let mut gateway = None;
    let mut source = None;
    let mut hops = Vec::new();
    for (kind, value) in attributes(message, ROUTE) {
        match kind {
            RTA_TABLE => table = u32_at(value, 0)?,
            RTA_DST => destination = ip(value),
            RTA_OIF => interface = u32_at(value, 0)?,
            RTA_GATEWAY => gateway = ip(value),
            RTA_VIA => gateway = via(value),
            RTA_PREFSRC => source = ip(value),
            RTA_MULTIPATH => hops = self::hops(value),
            _ => {}
        }
    }
    // A multipath route has no interface of its own, but its hops mostly
    // share one.
    if let Some(first) = hops.first()
        && hops.iter().all(|hop| hop.interface == first.interface)
    {
        interface = first.interface;
    }
    Some(Route {
        table,
        interface,
        destination: network(family, destination, length)?,
        hops,
        gateway,
        source,
    })
}

/// A row of `struct rtnexthop`, each with its attributes, up to the first that
/// does not fit.
fn hops(mut rest: &[u8]) -> Vec<Hop> {
    let mut found = Vec::new();
    while let (Some(length), Some(interface)) = (u16_at(rest, 0), u32_at(rest, 4)) {
        let length = usize::from(length);
        let Some(hop) = rest.get(..length).filter(|hop| hop.len() >= HOP) else {
            break;
        };
        let gateway = attributes(hop, HOP).find_map(|(kind, value)| match kind {
            RTA_GATEWAY => ip(value),
            RTA_VIA => via(value),
            _ => None,
        });
        found.push(Hop { interface, gateway });
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Reads a neighbour.
#[must_use]
pub fn neighbour(message: &[u8]) -> Option<Neighbour> {
    let state = u16_at(message, 8)?;
    let mut address = None;
    let mut mac = Vec::new();
    for (kind, value) in attributes(message, NEIGHBOUR) {
        match kind {
            NDA_DST => address = ip(value),
            NDA_LLADDR => mac = value.to_vec(),
            _ => {}
        }
    }
    Some(Neighbour {
        address: address?,
        mac,
        state,
        interface: u32_at(message, 4)?,
    })
}
