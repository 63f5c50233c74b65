//! Operations that lead from observed to wanted kernel state.
//!
//! The order is the contract: bridge, addresses, ports, neighbours, fallback
//! and routes, rules; then what is taken away: routes, ports, addresses. An
//! LB's port is in the bridge before it becomes a next hop, and its next hop is
//! gone before its port. The list is empty exactly when all is as wanted.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::desired::{Desired, PortIntent, RouteIntent};
use super::family::Family;
use super::ids::IfIndex;
use super::observed::{Observed, RouteKind};
pub use super::op::KernelOp;
use super::op::{FALLBACK_METRIC, route_metric};
use super::rules;

/// The operations, in the order in which they must be done.
#[must_use]
pub fn diff(observed: &Observed, desired: &Desired) -> Vec<KernelOp> {
    let mut ops = Vec::new();
    let bridge = bridge(observed, desired, &mut ops);
    if let Some(bridge) = bridge {
        add_addresses(observed, desired, bridge, &mut ops);
        attach_ports(observed, desired, bridge, &mut ops);
    }
    for family in Family::ALL {
        if *desired.fallback.get(family) && !observed.has_fallback(family) {
            ops.push(KernelOp::Blackhole { family });
        }
        if let Some(bridge) = bridge {
            replace_route(observed, desired, family, bridge, &mut ops);
        }
    }
    if let Some(vips) = &desired.vips {
        rules::diff(observed, vips, &mut ops);
    }
    for family in Family::ALL {
        delete_routes(observed, desired, family, &mut ops);
    }
    detach_ports(observed, desired, &mut ops);
    if let Some(bridge) = bridge {
        remove_addresses(observed, desired, bridge, &mut ops);
    }
    ops
}

/// Makes the bridge or sets it up. Its index, once it is there.
fn bridge(observed: &Observed, desired: &Desired, ops: &mut Vec<KernelOp>) -> Option<IfIndex> {
    match (observed.bridge(), observed.occupant()) {
        (Some(link), _) => {
            if missing_link_local(observed, desired, link.index).is_some() {
                ops.push(KernelOp::NoOwnLinkLocal { bridge: link.index });
            }
            if !link.up {
                ops.push(KernelOp::BridgeUp { bridge: link.index });
            }
            Some(link.index)
        }
        (None, Some(_)) => None,
        (None, None) => {
            ops.push(KernelOp::CreateBridge {
                mac: desired.bridge_mac,
            });
            None
        }
    }
}

/// The kernel's own link-local address is tentative for a second or two once
/// the bridge has a port, and until then no neighbour is asked for (net/ipv6/
/// ndisc.c, `ndisc_send_ns`): what is forwarded to it is lost. So a bridge
/// without one gets it from us, as all its addresses without detection.
fn missing_link_local(
    observed: &Observed,
    desired: &Desired,
    bridge: IfIndex,
) -> Option<IpNetwork> {
    let mut there = observed.addresses_of(bridge, Family::V6);
    desired.link_local.filter(|_| {
        !there.any(|there| is_link_local(there.ip()) && observed.has_address(bridge, *there))
    })
}

fn add_addresses(observed: &Observed, desired: &Desired, bridge: IfIndex, ops: &mut Vec<KernelOp>) {
    if let Some(address) = missing_link_local(observed, desired, bridge) {
        // All that are there are duplicates.
        let there = observed.addresses_of(bridge, Family::V6).copied();
        ops.extend(
            there
                .filter(|there| is_link_local(there.ip()))
                .map(|address| KernelOp::RemoveAddress { bridge, address }),
        );
        ops.push(KernelOp::AddAddress { bridge, address });
    }
    for address in desired.addresses.values().copied() {
        if observed.has_address(bridge, address) {
            continue;
        }
        // An interface has an IPv6 address once, whatever the prefix length
        // (net/ipv6/addrconf.c, ipv6_add_addr), so the old one goes first. So
        // does one that is a duplicate: its state changes in no other way.
        let family = Family::from(address);
        for other in observed.addresses_of(bridge, family) {
            if family == Family::V6 && other.ip() == address.ip() {
                ops.push(KernelOp::RemoveAddress {
                    bridge,
                    address: *other,
                });
            }
        }
        ops.push(KernelOp::AddAddress { bridge, address });
    }
}

/// Removes what the bridge has besides the wanted address of a family whose
/// address was told; link-local ones stay, whoever gave them.
fn remove_addresses(
    observed: &Observed,
    desired: &Desired,
    bridge: IfIndex,
    ops: &mut Vec<KernelOp>,
) {
    for wanted in desired.addresses.values() {
        for address in observed.addresses_of(bridge, (*wanted).into()) {
            let gone_already = wanted.is_ipv6() && address.ip() == wanted.ip();
            if address != wanted && !gone_already && !is_link_local(address.ip()) {
                ops.push(KernelOp::RemoveAddress {
                    bridge,
                    address: *address,
                });
            }
        }
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn attach_ports(observed: &Observed, desired: &Desired, bridge: IfIndex, ops: &mut Vec<KernelOp>) {
    let mut forget = desired.forget.clone();
    for (name, intent) in &desired.ports {
        let PortIntent::Attach { peers } = intent else {
            continue;
        };
        let Some(link) = observed.named(name) else {
            continue;
        };
        if link.master != Some(bridge) {
            ops.push(KernelOp::Attach {
                port: name.clone(),
                bridge,
            });
            forget.extend(peers);
        }
    }
    ops.extend(
        forget
            .into_iter()
            .map(|address| KernelOp::ForgetNeighbour { bridge, address }),
    );
}

fn detach_ports(observed: &Observed, desired: &Desired, ops: &mut Vec<KernelOp>) {
    let ports = desired
        .ports
        .iter()
        .filter(|(name, intent)| {
            **intent == PortIntent::Detach
                && observed
                    .named(name)
                    .is_some_and(|link| link.master.is_some())
        })
        .map(|(name, _)| KernelOp::Detach { port: name.clone() });
    ops.extend(ports);
}

fn replace_route(
    observed: &Observed,
    desired: &Desired,
    family: Family,
    bridge: IfIndex,
    ops: &mut Vec<KernelOp>,
) {
    let RouteIntent::Via(hops) = desired.routes.get(family) else {
        return;
    };
    let there = match observed.routes.get(family).get(&route_metric(family)) {
        // The same members in another order are left as they are: sorting
        // them would move all flows.
        Some(RouteKind::Via(seen)) => {
            let mut seen = seen.clone();
            seen.sort_unstable();
            seen.into_iter()
                .eq(hops.iter().map(|hop| (*hop, bridge.get())))
        }
        _ => false,
    };
    if !there {
        ops.push(KernelOp::ReplaceRoute {
            family,
            bridge,
            hops: hops.iter().copied().collect(),
        });
    }
}

/// Deletes the route to the LBs where none takes traffic, and default routes
/// of other metrics, which only a stranger can have made in our table.
fn delete_routes(observed: &Observed, desired: &Desired, family: Family, ops: &mut Vec<KernelOp>) {
    let keep_ours = match desired.routes.get(family) {
        RouteIntent::LeaveAlone => return,
        RouteIntent::Absent => false,
        RouteIntent::Via(_) => true,
    };
    for (metric, kind) in observed.routes.get(family) {
        let ours = *metric == route_metric(family);
        // IPv4's metric 0 is a wild card in a deletion; only with the type
        // unicast it cannot hit the fallback, so other types stay.
        let deletable = *metric != 0 || matches!(kind, RouteKind::Via(_));
        if *metric != FALLBACK_METRIC && !(ours && keep_ours) && deletable {
            ops.push(KernelOp::DeleteRoute {
                family,
                metric: *metric,
            });
        }
    }
}
