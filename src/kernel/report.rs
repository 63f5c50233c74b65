//! All links, addresses, rules, routes and neighbours, ours or not: what
//! `--debug` shows. Read only; the daemon's own work does not use it.

mod decode;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use self::decode::What;
use super::error::{KernelError, OpError};
use super::netlink::socket::{self, RequestSocket};
use crate::core::family::Family;

/// A link with its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address; empty where it has none, as loopback.
    pub mac: Vec<u8>,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpNetwork>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// The index of the bridge or other device that it belongs to; 0 for none.
    pub master: u32,
    /// Its counters, where the kernel tells them.
    pub statistics: Option<Statistics>,
}

/// Counters of a link since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Faulty packets received.
    pub rx_errors: u64,
    /// Packets that could not be sent.
    pub tx_errors: u64,
    /// Received packets that were dropped for want of room.
    pub rx_dropped: u64,
    /// Packets that were dropped before they were sent.
    pub tx_dropped: u64,
}

/// A routing rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The table it leads to; 0 for none.
    pub table: u32,
    /// Its priority.
    pub priority: u32,
    /// The packet mark it selects; 0 for any.
    pub mark: u32,
    /// The sources it selects; `None` for all.
    pub source: Option<IpNetwork>,
    /// The destinations it selects; `None` for all.
    pub destination: Option<IpNetwork>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The table it is in.
    pub table: u32,
    /// The index of the interface it uses; 0 where it uses none.
    pub interface: u32,
    /// Where it leads.
    pub destination: IpNetwork,
    /// The next hops of a multipath route, in order; empty for others.
    pub hops: Vec<Hop>,
    /// The gateway of a route that has one only.
    pub gateway: Option<IpAddr>,
    /// The source address that it suggests.
    pub source: Option<IpAddr>,
}

/// A next hop of a multipath route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// The index of the interface it is reached by.
    pub interface: u32,
    /// Its address; none where the interface says it all.
    pub gateway: Option<IpAddr>,
}

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address; empty while it is not known.
    pub mac: Vec<u8>,
    /// `NUD_*` of linux/neighbour.h.
    pub state: u16,
    /// The index of the interface it is reached by.
    pub interface: u32,
}

/// The tables, each or why it could not be read.
#[derive(Debug)]
pub struct Tables {
    /// All links.
    pub interfaces: Result<Vec<Interface>, KernelError>,
    /// The rules of both families, IPv4 first, in order of priority.
    pub rules: Result<Vec<Rule>, KernelError>,
    /// The routes of all tables and both families, IPv4 first.
    pub routes: Result<Vec<Route>, KernelError>,
    /// The neighbours of both families, IPv4 first, those of loopback too.
    pub neighbours: Result<Vec<Neighbour>, KernelError>,
}

/// Reads all tables of the network namespace, on a socket of its own. It needs
/// no capability, and waits for the kernel no longer than
/// [`socket::PATIENCE`] each time.
#[must_use]
pub fn tables() -> Tables {
    Tables {
        interfaces: interfaces(),
        rules: both(What::Rules, decode::rule),
        routes: both(What::Routes, decode::route),
        neighbours: both(What::Neighbours, |_, message| decode::neighbour(message)),
    }
}

fn interfaces() -> Result<Vec<Interface>, KernelError> {
    let mut links = dump(What::Links, 0, decode::link)?;
    for (index, address) in both(What::Addresses, decode::address)? {
        if let Some(link) = links.iter_mut().find(|link| link.index == index) {
            link.addresses.push(address);
        }
    }
    Ok(links)
}

/// Reads the tables of IPv4 and of IPv6.
fn both<T>(what: What, read: impl Fn(Family, &[u8]) -> Option<T>) -> Result<Vec<T>, KernelError> {
    let mut found = Vec::new();
    for family in Family::ALL {
        let number = decode::number(family);
        // A kernel without the family answers for all that it has.
        found.extend(dump(what, number, |message| {
            (message.first() == Some(&number))
                .then(|| read(family, message))
                .flatten()
        })?);
    }
    Ok(found)
}

/// Reads a table, again while it changes under our hands; in the end the last
/// answer is as good as the next.
fn dump<T>(
    what: What,
    family: u8,
    read: impl Fn(&[u8]) -> Option<T>,
) -> Result<Vec<T>, KernelError> {
    let mut socket = RequestSocket::open()?;
    let mut found = Vec::new();
    for _ in socket::dump_tries() {
        found.clear();
        let sequence = socket.sequences(1);
        let request = decode::request(what, family, sequence);
        let outcome = socket.dump(&request, sequence, |frame| {
            if frame.kind == what.answer() {
                found.extend(read(frame.payload));
            }
        });
        match outcome {
            Ok(true) => break,
            Ok(false) => {}
            // No such family in this kernel.
            Err(OpError::Refused { errno, .. })
                if [libc::EAFNOSUPPORT, libc::EOPNOTSUPP].contains(&errno) =>
            {
                return Ok(Vec::new());
            }
            Err(error) => return Err(KernelError(format!("dump of {what:?}: {error}"))),
        }
    }
    Ok(found)
}
