//! Every fact that the `net` thread can be told. Closed and plain data: what
//! the daemon knows of the outside world arrives here or not at all.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::family::PerFamily;
use super::ids::{IfName, PortKey};

/// A fact for the data plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The bridge's own addresses, with the node's prefix length, as IPAM gave
    /// them; replaces what was said before. From `ipam`.
    BridgePrefixes(PerFamily<Option<IpNetwork>>),
    /// A connection is up (or refreshed) and its interface is, or will be, a
    /// port of the bridge. For an LB the peers are its next hops; for a target
    /// they are told for the log and the neighbour cache. Replaces what was
    /// said about `key` before. From `lb:N` and `nse`.
    PortExpected {
        /// Whose port.
        key: PortKey,
        /// The interface's name in this network namespace.
        ifname: IfName,
        /// The peer's addresses (no prefix lengths).
        peers: BTreeSet<IpAddr>,
    },
    /// The LB's connection is known to be down while its control plane is
    /// alive: no packet shall be sent to it while another LB is up, but its
    /// port stays. Undone by the next `PortExpected`. From `lb:N`.
    PeerDown {
        /// Whose port.
        key: PortKey,
    },
    /// The connection was closed: its next hops and its port go. From `lb:N`
    /// and `nse`.
    PortReleased {
        /// Whose port.
        key: PortKey,
    },
    /// All VIPs of the trench, masked; replaces the earlier list. From
    /// `vip-watch`.
    Vips(BTreeSet<IpNetwork>),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BridgePrefixes(prefixes) => {
                write!(f, "bridge prefixes {}", list(prefixes.values()))
            }
            Self::PortExpected { key, ifname, peers } => {
                write!(f, "{key} is up on {ifname}, peers {}", list(peers))
            }
            Self::PeerDown { key } => write!(f, "{key} is down"),
            Self::PortReleased { key } => write!(f, "{key} is closed"),
            Self::Vips(vips) => write!(f, "VIPs {}", list(vips)),
        }
    }
}

fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if texts.is_empty() {
        "none".to_owned()
    } else {
        texts.join(", ")
    }
}
