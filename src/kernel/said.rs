//! Changes of the kernel's state in the words of Meridio's log (pkg/proxy,
//! pkg/kernel), which operators search for. The line with the `ip` command comes
//! besides.

use std::collections::BTreeSet;
use std::net::IpAddr;

use log::info;

use crate::core::observed::{Observed, RouteKind};
use crate::core::op::{KernelOp, TABLE, route_metric};

/// A line: its words, and what they are about.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    BridgeIp(String),
    Created(String),
    Deleted(String),
    AddedHop(IpAddr),
    RemovedHop(IpAddr),
}

/// Logs `op`, which is done; `before` is the state that it changed.
pub(super) fn done(op: &KernelOp, before: &Observed) {
    for line in lines(op, before) {
        match line {
            Line::BridgeIp(ip) => info!(ip; "Set bridge IP"),
            Line::Created(intf) => info!(intf; "InterfaceCreated"),
            Line::Deleted(intf) => info!(intf; "InterfaceDeleted"),
            Line::AddedHop(hop) => {
                info!(nexthop = hop.to_string(), tableID = TABLE; "Added nexthop");
            }
            Line::RemovedHop(hop) => {
                info!(nexthop = hop.to_string(), tableID = TABLE; "Removed nexthop");
            }
        }
    }
}

fn lines(op: &KernelOp, before: &Observed) -> Vec<Line> {
    let hops = |family, metric| -> BTreeSet<IpAddr> {
        match before.routes.get(family).get(&metric) {
            Some(RouteKind::Via(hops)) => hops.iter().map(|(hop, _)| *hop).collect(),
            _ => BTreeSet::new(),
        }
    };
    match op {
        KernelOp::AddAddress { address, .. } => vec![Line::BridgeIp(address.to_string())],
        KernelOp::Attach { port, .. } => vec![Line::Created(port.to_string())],
        KernelOp::Detach { port } => vec![Line::Deleted(port.to_string())],
        KernelOp::ReplaceRoute {
            family, hops: new, ..
        } => {
            let old = hops(*family, route_metric(*family));
            let new: BTreeSet<IpAddr> = new.iter().copied().collect();
            let added = new.difference(&old).copied().map(Line::AddedHop);
            let removed = old.difference(&new).copied().map(Line::RemovedHop);
            added.chain(removed).collect()
        }
        KernelOp::DeleteRoute { family, metric } => hops(*family, *metric)
            .into_iter()
            .map(Line::RemovedHop)
            .collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::family::Family;
    use crate::core::ids::{IfIndex, IfName};

    #[test]
    fn hops_that_come_and_go_are_named_one_by_one() {
        let bridge = IfIndex::new(3).unwrap();
        let hop = |n: u8| IpAddr::from([172, 16, 0, n]);
        let replace = |hops: &[u8]| KernelOp::ReplaceRoute {
            family: Family::V4,
            bridge,
            hops: hops.iter().map(|n| hop(*n)).collect(),
        };
        let mut state = Observed::default();
        let first = replace(&[2, 3]);
        let added = [Line::AddedHop(hop(2)), Line::AddedHop(hop(3))];
        assert_eq!(lines(&first, &state), added);
        state.apply(&first);
        assert_eq!(lines(&first, &state), []);
        let second = replace(&[3, 4]);
        let changed = [Line::AddedHop(hop(4)), Line::RemovedHop(hop(2))];
        assert_eq!(lines(&second, &state), changed);
        state.apply(&second);
        let delete = KernelOp::DeleteRoute {
            family: Family::V4,
            metric: 0,
        };
        let removed = [Line::RemovedHop(hop(3)), Line::RemovedHop(hop(4))];
        assert_eq!(lines(&delete, &state), removed);
    }

    #[test]
    fn ports_and_addresses_are_named() {
        let (bridge, state) = (IfIndex::new(3).unwrap(), Observed::default());
        let port = IfName::parse("nsm-1").unwrap();
        let attach = KernelOp::Attach {
            port: port.clone(),
            bridge,
        };
        assert_eq!(lines(&attach, &state), [Line::Created("nsm-1".to_owned())]);
        let detach = KernelOp::Detach { port };
        assert_eq!(lines(&detach, &state), [Line::Deleted("nsm-1".to_owned())]);
        let address = "172.16.0.1/24".parse().unwrap();
        let add = KernelOp::AddAddress { bridge, address };
        let said = Line::BridgeIp("172.16.0.1/24".to_owned());
        assert_eq!(lines(&add, &state), [said]);
    }
}
