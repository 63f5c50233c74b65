//! Wanted kernel state. Each wish has three values: wanted, unwanted, and not
//! told yet, which leaves alone what a predecessor left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::family::{Family, PerFamily};
use super::ids::{IfName, PortKey};
use super::op::{BRIDGE, TABLE};

/// What shall be of the default route to the LBs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum RouteIntent {
    /// No LB is known yet: a predecessor's route goes on carrying traffic.
    #[default]
    LeaveAlone,
    /// No LB takes traffic.
    Absent,
    /// These take it.
    Via(BTreeSet<IpAddr>),
}

/// What shall be of a port. An interface without an intent is left alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortIntent {
    /// In the bridge, as soon as the interface exists.
    Attach {
        /// The addresses behind it, whose neighbour entries are stale when it
        /// is attached.
        peers: BTreeSet<IpAddr>,
    },
    /// Out of the bridge.
    Detach,
}

/// The whole wish.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// The hardware address that a bridge gets when it has to be made.
    pub bridge_mac: [u8; 6],
    /// The bridge's addresses; `None` is not told yet.
    pub addresses: PerFamily<Option<IpNetwork>>,
    /// The link-local address of a bridge that has none.
    pub link_local: Option<IpNetwork>,
    /// By interface name.
    pub ports: BTreeMap<IfName, PortIntent>,
    /// Neighbours behind attached ports whose entries may be stale.
    pub forget: BTreeSet<IpAddr>,
    /// The routes to the LBs.
    pub routes: PerFamily<RouteIntent>,
    /// Whether the family has the blackhole route behind them.
    pub fallback: PerFamily<bool>,
    /// Sources whose packets go to the LBs; `None` is not told yet.
    pub vips: Option<BTreeSet<IpNetwork>>,
    /// What was told and is not planned, or planned with a doubt.
    pub warnings: BTreeSet<Warning>,
}

/// Why a peer's address is no next hop.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum HopRefusal {
    /// The deployment does not use its family.
    FamilyUnused,
    /// It is not within the bridge's subnet, so the kernel would refuse the
    /// whole route.
    OutsideSubnet(IpNetwork),
    /// It is the subnet's network or broadcast address.
    NoHost(IpNetwork),
    /// It is an address of this pod.
    Own,
    /// It is that of an LB that was connected before.
    Taken(PortKey),
}

/// Something told that cannot be done as told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Warning {
    /// The VIP covers an address of the pod itself.
    VipCoversOwn {
        /// The VIP.
        vip: IpNetwork,
        /// The address.
        own: IpAddr,
    },
    /// The deployment does not use the VIP's family.
    VipFamilyUnused {
        /// The VIP.
        vip: IpNetwork,
    },
    /// A VIP of prefix length 0, or with host bits.
    VipMalformed {
        /// The VIP.
        vip: IpNetwork,
    },
    /// A peer's address is no next hop.
    HopRefused {
        /// Whose.
        key: PortKey,
        /// The address.
        address: IpAddr,
        /// Why.
        why: HopRefusal,
    },
    /// More LBs than the kernel's message holds.
    TooManyHops {
        /// The family.
        family: Family,
        /// How many there are.
        wanted: usize,
        /// How many are planned.
        planned: usize,
    },
    /// Several connections name one interface.
    SharedPort {
        /// The interface.
        port: IfName,
        /// The connections.
        keys: Vec<PortKey>,
    },
    /// A connection names an interface that can be no port.
    PortRefused {
        /// Whose.
        key: PortKey,
        /// The interface.
        port: IfName,
    },
    /// An address of the bridge or of a port failed duplicate address detection.
    DuplicateAddress {
        /// Whose.
        link: IfName,
        /// The address.
        address: IpNetwork,
    },
    /// Something that is no bridge has the bridge's name.
    BridgeIsNone,
}

impl fmt::Display for HopRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FamilyUnused => f.write_str("the deployment does not use its family"),
            Self::OutsideSubnet(prefix) => {
                write!(f, "it is outside the bridge's subnet {prefix}")
            }
            Self::NoHost(prefix) => {
                write!(f, "it is the network or broadcast address of {prefix}")
            }
            Self::Own => f.write_str("it is an address of this pod"),
            Self::Taken(key) => write!(f, "it is that of {key}"),
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VipCoversOwn { vip, own } => write!(
                f,
                "VIP {vip} covers {own}, an address of this pod: no rule is made for it"
            ),
            Self::VipFamilyUnused { vip } => write!(
                f,
                "VIP {vip} is of a family that the deployment does not use: no rule is made for it"
            ),
            Self::VipMalformed { vip } => {
                write!(
                    f,
                    "VIP {vip} is no masked prefix of at least one bit: no rule is made for it"
                )
            }
            Self::HopRefused { key, address, why } => {
                write!(f, "address {address} of {key} is no next hop: {why}")
            }
            Self::TooManyHops {
                family,
                wanted,
                planned,
            } => write!(
                f,
                "{wanted} {family} next hops are too many for table {TABLE}: the first {planned} are used"
            ),
            Self::SharedPort { port, keys } => {
                write!(f, "several connections name the interface {port}:")?;
                for (n, key) in keys.iter().enumerate() {
                    write!(f, "{} {key}", if n == 0 { "" } else { "," })?;
                }
                f.write_str("; it stays a port until the last of them is closed, and the first has its traffic")
            }
            Self::PortRefused { key, port } => {
                write!(
                    f,
                    "{key} names the interface {port}, which can be no port of {BRIDGE}"
                )
            }
            Self::DuplicateAddress { link, address } => write!(
                f,
                "address {address} of {link} failed duplicate address detection: somebody else on its link has it"
            ),
            Self::BridgeIsNone => write!(
                f,
                "the interface {BRIDGE} is no bridge: ports, addresses and routes wait until it is gone"
            ),
        }
    }
}
