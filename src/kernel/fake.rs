//! A model kernel for tests, which refuses what Linux refuses and, like it,
//! takes things away that nobody asked for.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::rc::Rc;

use ipnetwork::IpNetwork;

use super::Rtnl;
use super::announce::Mac;
use super::error::{KernelError, OpError};
use crate::core::announce::Behind;
use crate::core::family::{Family, PerFamily};
use crate::core::ids::{IfIndex, IfName};
use crate::core::observed::{Link, LinkFact, Observed, RouteKind, Rule, RuleAction};
use crate::core::op::{BRIDGE, FALLBACK_METRIC, KernelOp, PROTOCOL, route_metric};

/// The state, shared by the worker under test and the test.
#[derive(Debug, Clone, Default)]
pub struct Fake(Rc<RefCell<State>>);

/// Which operations are refused, and with which error number.
pub type Fault = (fn(&KernelOp) -> bool, i32);

/// What the model holds.
#[derive(Debug, Default)]
pub struct State {
    /// All links.
    pub links: BTreeMap<IfIndex, Link>,
    /// All addresses, in the order in which they were added: the first of an
    /// IPv4 subnet is its primary one.
    pub addresses: Vec<(IfIndex, IpNetwork)>,
    /// Those that failed duplicate address detection.
    pub duplicates: BTreeSet<(IfIndex, IpNetwork)>,
    /// The default routes of table 1.
    pub routes: PerFamily<BTreeMap<u32, RouteKind>>,
    /// The rules.
    pub rules: BTreeMap<Rule, u32>,
    /// Neighbours that do not answer.
    pub silent: BTreeSet<IpAddr>,
    /// All operations done, in order.
    pub done: Vec<KernelOp>,
    /// All that were refused, fulfilled ones not counted.
    pub refused: Vec<(KernelOp, i32)>,
    /// How often everything was read.
    pub snapshots: usize,
    /// Refuses what it says with that error number.
    pub fault: Option<Fault>,
    /// Cannot be read.
    pub blind: bool,
    /// Who answers for an address, and behind which port.
    pub answers: BTreeMap<IpAddr, (IfIndex, Mac)>,
    /// All frames sent.
    pub sent: Vec<Vec<u8>>,
}

impl Fake {
    /// Looks at or changes the state.
    pub fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.borrow_mut())
    }
}

impl Rtnl for Fake {
    fn snapshot(&mut self) -> Result<Observed, KernelError> {
        self.with(|state| {
            state.snapshots += 1;
            if state.blind {
                return Err(KernelError("blind".to_owned()));
            }
            let mut observed = Observed::default();
            for link in state.links.values() {
                observed.insert_link(link.clone());
            }
            observed.addresses = state.addresses.iter().copied().collect();
            observed.duplicates = &state.duplicates & &observed.addresses;
            observed.routes = state.routes.clone();
            observed.rules = state.rules.clone();
            observed.silent = state.silent.clone();
            Ok(observed)
        })
    }

    fn apply(&mut self, ops: &[KernelOp]) -> Vec<Result<(), OpError>> {
        let order: Vec<_> = ops.iter().filter_map(place).collect();
        assert!(order.is_sorted(), "order of {ops:?}");
        self.with(|state| ops.iter().map(|op| state.execute(op)).collect())
    }

    fn hardware_address(
        &mut self,
        _bridge: IfIndex,
        address: IpAddr,
        behind: &Behind,
    ) -> Result<Option<Mac>, KernelError> {
        self.with(|state| {
            Ok(match behind {
                Behind::Bridge => Some([2, 0, 0, 0, 0, 1]),
                Behind::Ports(ports) => state
                    .answers
                    .get(&address)
                    .filter(|(port, _)| ports.contains(port))
                    .map(|(_, mac)| *mac),
            })
        })
    }

    fn send(&mut self, _bridge: IfIndex, frame: &[u8]) -> io::Result<bool> {
        self.with(|state| state.sent.push(frame.to_vec()));
        Ok(true)
    }
}

/// Where an operation belongs in a list: ARCHITECTURE.md, "How the kernel is
/// kept right". An IPv6 address may also go first, where only its prefix
/// length changes.
fn place(op: &KernelOp) -> Option<(u32, i64)> {
    Some(match op {
        KernelOp::CreateBridge { .. }
        | KernelOp::BridgeUp { .. }
        | KernelOp::NoOwnLinkLocal { .. } => (0, 0),
        KernelOp::AddAddress { .. } => (1, 0),
        KernelOp::Attach { .. } => (2, 0),
        KernelOp::ForgetNeighbour { .. } | KernelOp::AskNeighbour { .. } => (3, 0),
        KernelOp::Blackhole { .. } | KernelOp::ReplaceRoute { .. } => (4, 0),
        KernelOp::AddRule {
            source, priority, ..
        } => {
            let list = if source.is_ipv4() { 0 } else { 100_000 };
            (5, list - i64::from(*priority))
        }
        KernelOp::DeleteRule(rule) => (6, i64::from(rule.priority)),
        KernelOp::DeleteRoute { .. } => (7, 0),
        KernelOp::Detach { .. } => (8, 0),
        KernelOp::RemoveAddress { address, .. } if address.is_ipv6() => return None,
        KernelOp::RemoveAddress { .. } => (9, 0),
    })
}

impl State {
    fn execute(&mut self, op: &KernelOp) -> Result<(), OpError> {
        let outcome = self
            .try_execute(op)
            .or_else(|errno| OpError::Refused { errno, text: None }.unless_fulfilled(op));
        match &outcome {
            Ok(()) => self.done.push(op.clone()),
            Err(OpError::Refused { errno, .. }) => self.refused.push((op.clone(), *errno)),
            Err(OpError::Unknown(_)) => {}
        }
        outcome
    }

    fn try_execute(&mut self, op: &KernelOp) -> Result<(), i32> {
        if let Some((hits, errno)) = self.fault
            && hits(op)
        {
            return Err(errno);
        }
        match op {
            KernelOp::CreateBridge { .. } => {
                if self.named(BRIDGE).is_some() {
                    return Err(libc::EEXIST);
                }
                self.add_link(BRIDGE);
                let _ = self.change_link(BRIDGE, |link| link.up = false);
            }
            KernelOp::BridgeUp { bridge } => {
                self.links.get_mut(bridge).ok_or(libc::ENODEV)?.up = true;
            }
            KernelOp::NoOwnLinkLocal { bridge } => {
                self.links.get(bridge).ok_or(libc::ENODEV)?;
            }
            KernelOp::AddAddress { bridge, address } => self.add_address(*bridge, *address)?,
            KernelOp::RemoveAddress { bridge, address } => {
                self.remove_address(*bridge, *address)?;
            }
            KernelOp::Attach { port, bridge } => {
                let is_bridge = self.links.get(bridge).is_some_and(|link| link.is_bridge);
                let link = self.named_mut(port.as_str()).ok_or(libc::ENODEV)?;
                if !is_bridge || link.index == *bridge || link.name.as_str() == "lo" {
                    return Err(libc::EINVAL);
                }
                link.master = Some(*bridge);
            }
            KernelOp::Detach { port } => {
                self.named_mut(port.as_str()).ok_or(libc::ENODEV)?.master = None;
            }
            KernelOp::ForgetNeighbour { .. } => return Err(libc::ENOENT),
            KernelOp::AskNeighbour { bridge, .. } => {
                self.links.get(bridge).ok_or(libc::ENODEV)?;
            }
            KernelOp::Blackhole { family } => {
                self.routes
                    .get_mut(*family)
                    .insert(FALLBACK_METRIC, RouteKind::Blackhole);
            }
            KernelOp::ReplaceRoute {
                family,
                bridge,
                hops,
            } => self.replace_route(*family, *bridge, hops)?,
            KernelOp::DeleteRoute { family, metric } => {
                self.routes
                    .get_mut(*family)
                    .remove(metric)
                    .ok_or(libc::ESRCH)?;
            }
            KernelOp::AddRule {
                source,
                priority,
                action,
            } => self.add_rule(*source, *priority, *action)?,
            KernelOp::DeleteRule(rule) => self.delete_rule(rule)?,
        }
        Ok(())
    }

    fn add_address(&mut self, link: IfIndex, address: IpNetwork) -> Result<(), i32> {
        if !self.links.contains_key(&link) {
            return Err(libc::ENODEV);
        }
        let there = self.addresses.iter().any(|(owner, other)| {
            *owner == link
                && other.ip() == address.ip()
                && (address.is_ipv6() || other.prefix() == address.prefix())
        });
        if there {
            return Err(libc::EEXIST);
        }
        self.addresses.push((link, address));
        self.duplicates.remove(&(link, address));
        Ok(())
    }

    /// Takes an IPv4 subnet's secondary addresses with its primary one, and
    /// IPv4 routes with the last IPv4 address.
    fn remove_address(&mut self, link: IfIndex, address: IpNetwork) -> Result<(), i32> {
        let at = self
            .addresses
            .iter()
            .position(|entry| *entry == (link, address))
            .ok_or(libc::EADDRNOTAVAIL)?;
        let same_subnet = |other: &IpNetwork| {
            other.is_ipv4()
                && other.prefix() == address.prefix()
                && other.network() == address.network()
        };
        let primary = address.is_ipv4()
            && !self.addresses[..at]
                .iter()
                .any(|(owner, other)| *owner == link && same_subnet(other));
        self.addresses.remove(at);
        if primary {
            self.addresses
                .retain(|(owner, other)| *owner != link || !same_subnet(other));
        }
        let has_v4 = self
            .addresses
            .iter()
            .any(|(owner, other)| *owner == link && other.is_ipv4());
        if address.is_ipv4() && !has_v4 {
            self.drop_routes(Family::V4, link);
        }
        Ok(())
    }

    fn replace_route(
        &mut self,
        family: Family,
        bridge: IfIndex,
        hops: &[IpAddr],
    ) -> Result<(), i32> {
        if hops.is_empty() {
            return Err(libc::ERANGE);
        }
        if !self.links.get(&bridge).is_some_and(|link| link.up) {
            return Err(libc::ENETDOWN);
        }
        for (n, hop) in hops.iter().enumerate() {
            let subnet = self
                .addresses
                .iter()
                .find(|(owner, prefix)| *owner == bridge && prefix.contains(*hop))
                .ok_or(match family {
                    Family::V4 => libc::ENETUNREACH,
                    Family::V6 => libc::EHOSTUNREACH,
                })?
                .1;
            let own = self.addresses.iter().any(|(_, own)| own.ip() == *hop);
            let no_host =
                family == Family::V4 && (*hop == subnet.network() || *hop == subnet.broadcast());
            if own || no_host || hops[..n].contains(hop) {
                return Err(libc::EINVAL);
            }
        }
        let hops = hops.iter().map(|hop| (*hop, bridge.get())).collect();
        self.routes
            .get_mut(family)
            .insert(route_metric(family), RouteKind::Via(hops));
        Ok(())
    }

    /// Stricter than Linux, which takes host bits and duplicates, and a goto
    /// before its target.
    fn add_rule(
        &mut self,
        source: IpNetwork,
        priority: u32,
        action: RuleAction,
    ) -> Result<(), i32> {
        let rule = Rule {
            priority,
            source,
            protocol: PROTOCOL,
            action,
        };
        let bad = match action {
            RuleAction::Lookup => source.prefix() == 0,
            RuleAction::Goto(target) => {
                let there =
                    |rule: &Rule| rule.priority == target && rule.family() == Family::from(source);
                target <= priority || !self.rules.keys().any(there)
            }
            RuleAction::Nop => false,
            RuleAction::Other => true,
        };
        if bad || self.rules.contains_key(&rule) || source.network() != source.ip() {
            return Err(libc::EINVAL);
        }
        *self.rules.entry(rule).or_default() += 1;
        Ok(())
    }

    fn delete_rule(&mut self, rule: &Rule) -> Result<(), i32> {
        let count = self.rules.get_mut(rule).ok_or(libc::ENOENT)?;
        *count -= 1;
        if *count == 0 {
            self.rules.remove(rule);
        }
        Ok(())
    }

    /// The link of that name.
    pub fn named(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name.as_str() == name)
    }

    fn named_mut(&mut self, name: &str) -> Option<&mut Link> {
        self.links
            .values_mut()
            .find(|link| link.name.as_str() == name)
    }

    /// Somebody makes a link, up and with a carrier, at the first free index:
    /// Linux gives one anew only to who asks for it, or after all the others.
    pub fn add_link(&mut self, name: &str) -> LinkFact {
        let index = (1..)
            .filter_map(IfIndex::new)
            .find(|index| !self.links.contains_key(index))
            .unwrap();
        let link = Link {
            index,
            name: IfName::parse(name).unwrap(),
            alias: None,
            master: None,
            up: true,
            carrier: true,
            is_bridge: name == BRIDGE,
        };
        self.links.insert(index, link.clone());
        LinkFact::Seen(link)
    }

    /// Somebody changes a link.
    pub fn change_link(&mut self, name: &str, change: impl FnOnce(&mut Link)) -> Option<LinkFact> {
        let link = self.named_mut(name)?;
        change(link);
        Some(LinkFact::Seen(link.clone()))
    }

    /// A link goes, and with it its addresses, routes and ports.
    pub fn delete_link(&mut self, name: &str) -> Option<LinkFact> {
        let index = self.named(name)?.index;
        self.links.remove(&index);
        self.addresses.retain(|(owner, _)| *owner != index);
        for family in Family::ALL {
            self.drop_routes(family, index);
        }
        for link in self.links.values_mut() {
            if link.master == Some(index) {
                link.master = None;
            }
        }
        Some(LinkFact::Gone(index))
    }

    /// The bridge goes down: its routes and IPv6 addresses go.
    pub fn bridge_down(&mut self) -> Option<LinkFact> {
        let index = self.named(BRIDGE)?.index;
        self.addresses
            .retain(|(owner, address)| *owner != index || address.is_ipv4());
        for family in Family::ALL {
            self.drop_routes(family, index);
        }
        self.change_link(BRIDGE, |link| link.up = false)
    }

    fn drop_routes(&mut self, family: Family, link: IfIndex) {
        self.routes.get_mut(family).retain(|_, kind| match kind {
            RouteKind::Via(hops) => hops.iter().all(|(_, index)| *index != link.get()),
            _ => true,
        });
    }
}
