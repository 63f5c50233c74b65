//! The operations on the kernel. Each prints as the `ip` command that does
//! the same, so that a log line can be tried by hand.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::family::Family;
use super::ids::{IfIndex, IfName};
use super::observed::{Rule, RuleAction};

/// The bridge's name (Meridio pkg/proxy/proxy.go).
pub const BRIDGE: &str = "bridge0";
/// The routing table of VIP traffic.
pub const TABLE: u8 = 1;
/// Our id in FRA_PROTOCOL and RTA `rtm_protocol`; none of the named ones of
/// linux/rtnetlink.h, where 4 is the last that the kernel itself cares for.
pub const PROTOCOL: u8 = 77;
/// Metric of the blackhole route: the worst there is.
pub const FALLBACK_METRIC: u32 = u32::MAX;

/// Metric of the route to the LBs: what the kernel takes where none is given,
/// so that a predecessor's route is replaced and not doubled.
#[must_use]
pub fn route_metric(family: Family) -> u32 {
    match family {
        Family::V4 => 0,
        // linux/ipv6_route.h: IP6_RT_PRIO_USER.
        Family::V6 => 1024,
    }
}

/// One change of the kernel's state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelOp {
    /// Makes the bridge, down: the kernel gives one that goes up an IPv6
    /// link-local address unless it was told not to.
    CreateBridge {
        /// Its hardware address.
        mac: [u8; 6],
    },
    /// Sets an existing bridge up.
    BridgeUp {
        /// The bridge.
        bridge: IfIndex,
    },
    /// Keeps the kernel from giving the bridge a link-local address by itself.
    NoOwnLinkLocal {
        /// The bridge.
        bridge: IfIndex,
    },
    /// Gives the bridge an address; IPv6 without duplicate address detection.
    AddAddress {
        /// The bridge.
        bridge: IfIndex,
        /// With the node's prefix length.
        address: IpNetwork,
    },
    /// Takes an address from the bridge.
    RemoveAddress {
        /// The bridge.
        bridge: IfIndex,
        /// As it was observed.
        address: IpNetwork,
    },
    /// Makes an interface a port of the bridge. By name: the kernel resolves
    /// it under its own lock, so a re-used index cannot be hit.
    Attach {
        /// The interface.
        port: IfName,
        /// The bridge.
        bridge: IfIndex,
    },
    /// Takes an interface out of the bridge.
    Detach {
        /// The interface.
        port: IfName,
    },
    /// Drops a neighbour entry: its hardware address may be a predecessor's.
    ForgetNeighbour {
        /// The bridge.
        bridge: IfIndex,
        /// The neighbour.
        address: IpAddr,
    },
    /// Makes the kernel ask who has an address, as if there were a packet for
    /// it (`NTF_USE`): the answer teaches the bridge, too.
    AskNeighbour {
        /// The bridge.
        bridge: IfIndex,
        /// The neighbour.
        address: IpAddr,
    },
    /// The blackhole default route of the worst metric. An unreachable one would
    /// answer VIP traffic with ICMP errors, which leave the pod by its primary
    /// interface, since their destination, the VIP, is not looked up in our table;
    /// the target, that sent the packet, gets none.
    Blackhole {
        /// Its family.
        family: Family,
    },
    /// Sets the default route to the LBs.
    ReplaceRoute {
        /// Its family.
        family: Family,
        /// The interface of every hop.
        bridge: IfIndex,
        /// The hops, sorted; never empty.
        hops: Vec<IpAddr>,
    },
    /// Deletes a default route.
    DeleteRoute {
        /// Its family.
        family: Family,
        /// Its metric: a deletion without one would take the fallback.
        metric: u32,
    },
    /// Sends what comes from a VIP to our table, or leads there.
    AddRule {
        /// The VIP, or a prefix of several, masked.
        source: IpNetwork,
        /// Where in the list.
        priority: u32,
        /// What it does.
        action: RuleAction,
    },
    /// Deletes a rule.
    DeleteRule(Rule),
}

impl KernelOp {
    /// Whether the kernel changes more than the operation says, so that only
    /// a new dump tells the outcome: a new bridge's index; the secondary
    /// addresses and routes that go with a primary one; which of several
    /// rules of one priority went when the source was a wild card.
    #[must_use]
    pub fn has_side_effects(&self) -> bool {
        match self {
            Self::CreateBridge { .. } | Self::BridgeUp { .. } | Self::RemoveAddress { .. } => true,
            Self::DeleteRule(rule) => match rule.action {
                RuleAction::Lookup => rule.source.prefix() == 0,
                // Beside ours of that priority there are none.
                RuleAction::Goto(_) | RuleAction::Nop => false,
                RuleAction::Other => true,
            },
            _ => false,
        }
    }
}

/// `ip` or `ip -6`.
fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

fn of(address: IpAddr) -> &'static str {
    ip(address.into())
}

impl fmt::Display for KernelOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateBridge { mac } => {
                let [a, b, c, d, e, g] = mac;
                write!(
                    f,
                    "ip link add {BRIDGE} address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x} type bridge"
                )
            }
            Self::BridgeUp { .. } => write!(f, "ip link set {BRIDGE} up"),
            Self::NoOwnLinkLocal { .. } => write!(f, "ip link set {BRIDGE} addrgenmode none"),
            Self::AddAddress { address, .. } => {
                let nodad = if address.is_ipv6() { " nodad" } else { "" };
                write!(f, "ip address add {address} dev {BRIDGE}{nodad}")
            }
            Self::RemoveAddress { address, .. } => {
                write!(f, "ip address del {address} dev {BRIDGE}")
            }
            Self::Attach { port, .. } => write!(f, "ip link set {port} master {BRIDGE}"),
            Self::Detach { port } => write!(f, "ip link set {port} nomaster"),
            Self::ForgetNeighbour { address, .. } => {
                write!(f, "{} neigh del {address} dev {BRIDGE}", of(*address))
            }
            Self::AskNeighbour { address, .. } => {
                write!(
                    f,
                    "{} neigh replace {address} dev {BRIDGE} use",
                    of(*address)
                )
            }
            Self::Blackhole { family } => write!(
                f,
                "{} route replace blackhole default table {TABLE} metric {FALLBACK_METRIC} proto {PROTOCOL}",
                ip(*family)
            ),
            Self::ReplaceRoute { family, hops, .. } => {
                write!(
                    f,
                    "{} route replace default table {TABLE} proto {PROTOCOL}",
                    ip(*family)
                )?;
                for hop in hops {
                    write!(f, " nexthop via {hop} dev {BRIDGE}")?;
                }
                Ok(())
            }
            Self::DeleteRoute { family, metric: 0 } => {
                write!(f, "{} route del unicast default table {TABLE}", ip(*family))
            }
            Self::DeleteRoute { family, metric } => write!(
                f,
                "{} route del default table {TABLE} metric {metric}",
                ip(*family)
            ),
            Self::AddRule {
                source,
                priority,
                action,
            } => write!(
                f,
                "{} rule add from {source} priority {priority}{action} protocol {PROTOCOL}",
                of(source.ip())
            ),
            Self::DeleteRule(rule) => delete_rule(rule, f),
        }
    }
}

fn delete_rule(rule: &Rule, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(
        f,
        "{} rule del from {} priority {} protocol {}{}",
        ip(rule.family()),
        rule.source,
        rule.priority,
        rule.protocol,
        rule.action
    )
}

impl fmt::Display for RuleAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lookup => write!(f, " lookup {TABLE}"),
            Self::Goto(priority) => write!(f, " goto {priority}"),
            Self::Nop => f.write_str(" nop"),
            Self::Other => Ok(()),
        }
    }
}
