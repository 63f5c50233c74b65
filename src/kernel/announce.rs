//! The frames that say who has an address, and when they are sent.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use log::{debug, warn};

use super::Rtnl;
use crate::core::announce::{Announcements, Behind, Step};
use crate::core::ids::IfIndex;
use crate::core::op::KernelOp;

/// A hardware address.
pub type Mac = [u8; 6];

/// linux/if_ether.h.
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// RFC 4443: next header.
const ICMPV6: u8 = 58;
/// RFC 4861 4.4: type, and flags router and override.
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ROUTER: u8 = 0x80;
const OVERRIDE: u8 = 0x20;
/// Bytes of the advertisement with its option.
const ADVERTISEMENT: u8 = 32;
/// RFC 4291 2.7.1: all nodes of the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The frame that tells all on the link that `mac` has `address`. `router`:
/// whoever has it forwards packets.
#[must_use]
pub fn frame(address: IpAddr, mac: Mac, router: bool) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => arp_announcement(v4, mac),
        IpAddr::V6(v6) => neighbour_advertisement(v6, mac, router),
    }
}

/// RFC 5227 section 3: a request in which sender and target address are the
/// same.
fn arp_announcement(address: Ipv4Addr, mac: Mac) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend(ETHERTYPE_ARP);
    // Ethernet, IPv4, the lengths of their addresses, request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame
}

/// RFC 4861 7.2.6: unsolicited, with the override flag, so that it replaces
/// what a cache holds.
fn neighbour_advertisement(address: Ipv6Addr, mac: Mac, router: bool) -> Vec<u8> {
    let flags = OVERRIDE | if router { ROUTER } else { 0 };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(address.octets());
    // Option: target link-layer address, in units of 8 bytes.
    message.extend([2, 1]);
    message.extend(mac);
    let checksum = checksum(address, &message);
    message[2..4].copy_from_slice(&checksum);

    let mut frame = Vec::with_capacity(86);
    frame.extend([0x33, 0x33, 0, 0, 0, 1]);
    frame.extend(mac);
    frame.extend(ETHERTYPE_IPV6);
    // Version 6; payload length; next header; hop limit, which proves that
    // nobody has forwarded it.
    frame.extend([0x60, 0, 0, 0, 0, ADVERTISEMENT, ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

/// RFC 4443 2.3, over pseudo-header and message.
fn checksum(source: Ipv6Addr, message: &[u8]) -> [u8; 2] {
    let pseudo = [0, 0, 0, ADVERTISEMENT, 0, 0, 0, ICMPV6];
    let sum: u32 = source
        .octets()
        .chunks(2)
        .chain(ALL_NODES.octets().chunks(2))
        .chain(pseudo.chunks(2))
        .chain(message.chunks(2))
        .map(|pair| match pair {
            [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
            _ => 0,
        })
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    (!u16::try_from(folded).unwrap_or_default()).to_be_bytes()
}

/// Asks for and announces addresses that have appeared. Used by `net`.
#[derive(Debug, Default)]
pub struct Announcer {
    announcements: Announcements,
    /// The last failure, as logged.
    failure: Option<String>,
}

impl Announcer {
    /// When [`Announcer::turn`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.announcements.next_deadline()
    }

    /// Takes over where the addresses on the bridge are and does what is due.
    /// What fails is repeated with the next announcement, and holds up
    /// nothing.
    pub fn turn(
        &mut self,
        kernel: &mut impl Rtnl,
        bridge: IfIndex,
        found: BTreeMap<IpAddr, Behind>,
        now: Instant,
    ) {
        self.announcements.observe(found, now);
        let mut ops = Vec::new();
        for step in self.announcements.due(now) {
            let ask = match step {
                Step::Ask(address) => Some(address),
                Step::Announce(address, behind) => self
                    .announce(kernel, bridge, address, &behind, now)
                    .then_some(address),
            };
            // An entry that waits for its answer, or has one, does not ask
            // again.
            ops.extend(ask.into_iter().flat_map(|address| {
                [
                    KernelOp::ForgetNeighbour { bridge, address },
                    KernelOp::AskNeighbour { bridge, address },
                ]
            }));
        }
        if ops.is_empty() {
            return;
        }
        for (op, outcome) in ops.iter().zip(kernel.apply(&ops)) {
            match outcome {
                Ok(()) => debug!("done: {op}"),
                Err(error) => debug!("failed: {op}: {error}"),
            }
        }
    }

    /// Whether to ask for the address once more.
    fn announce(
        &mut self,
        kernel: &mut impl Rtnl,
        bridge: IfIndex,
        address: IpAddr,
        behind: &Behind,
        now: Instant,
    ) -> bool {
        let failure = match kernel.hardware_address(bridge, address, behind) {
            Ok(None) => return self.announcements.unanswered(address, now),
            Ok(Some(mac)) => {
                let frame = frame(address, mac, *behind == Behind::Bridge);
                match kernel.send(bridge, &frame) {
                    Ok(true) => {
                        debug!("announced that {address} is at {}", text(mac));
                        None
                    }
                    Ok(false) => None,
                    Err(error) => Some(error.to_string()),
                }
            }
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = &failure
            && self.failure != failure
        {
            warn!("{address} was not announced on the bridge, to be repeated: {error}");
        }
        self.failure = failure;
        self.announcements.told(address, now);
        false
    }
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0x11, 0x22, 0x33, 0x44, 0x55];

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn frames_are_as_the_rfcs_say() {
        let arp = frame("172.16.0.9".parse().unwrap(), MAC, false);
        let expected = [
            "ffffffffffff",
            "021122334455",
            "0806",
            "0001",
            "0800",
            "06",
            "04",
            "0001",
            "021122334455",
            "ac100009",
            "000000000000",
            "ac100009",
        ];
        assert_eq!(hex(&arp), expected.concat());
        for (router, flags) in [(false, 0x20), (true, 0xa0)] {
            let na = frame("fd00::9".parse().unwrap(), MAC, router);
            assert_eq!(na.len(), 86);
            assert_eq!(hex(&na[..14]), "33330000000102112233445586dd");
            assert_eq!(hex(&na[14..22]), "6000000000203aff");
            assert_eq!(na[54..56], [136, 0]);
            assert_eq!(na[58], flags);
            assert_eq!(hex(&na[78..]), "0201021122334455");
            // A receiver's check: the sum over all comes out as all ones.
            assert_eq!(checksum("fd00::9".parse().unwrap(), &na[54..]), [0, 0]);
        }
    }
}
