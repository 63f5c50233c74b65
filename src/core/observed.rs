//! What was observed of the kernel: links, addresses, the default routes of
//! our table and the rules that lead to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::family::{Family, PerFamily};
use super::ids::{IfIndex, IfName};
use super::op::{BRIDGE, FALLBACK_METRIC, KernelOp, PROTOCOL, route_metric};

/// A network interface, as far as we look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index; the kernel may give it to another interface later.
    pub index: IfIndex,
    /// Its name.
    pub name: IfName,
    /// Its alias, where NSM's forwarder leaves the connection's id.
    pub alias: Option<String>,
    /// The bridge (or other device) that it is a port of.
    pub master: Option<IfIndex>,
    /// Administratively up.
    pub up: bool,
    /// Has a carrier that the kernel has acted on (`IFF_RUNNING`, RFC 2863): the
    /// lower layer's flag is up some time before, while a bridge does not yet
    /// forward over the port.
    pub carrier: bool,
    /// Is a bridge itself.
    pub is_bridge: bool,
}

/// A change of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkFact {
    /// The link is there, like this.
    Seen(Link),
    /// No link has this index any more.
    Gone(IfIndex),
    /// The link has left its bridge, and is still there.
    LeftBridge(IfIndex),
}

/// What a default route of our table does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteKind {
    /// Forwards to the hops, each with the interface's index, in the kernel's
    /// order.
    Via(Vec<(IpAddr, u32)>),
    /// Drops without an answer.
    Blackhole,
    /// Something that we never make.
    Other,
}

/// A rule that leads to our table, or carries our protocol id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Its priority; lower numbers are looked at first.
    pub priority: u32,
    /// The source prefix; host bits as the kernel keeps them.
    pub source: IpNetwork,
    /// The protocol id of who made it.
    pub protocol: u8,
    /// What it does.
    pub action: RuleAction,
}

/// What a rule does with a packet from its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleAction {
    /// `lookup 1`, and no other selector than the source.
    Lookup,
    /// Goes on at the rule of that priority, and no other selector.
    Goto(u32),
    /// Nothing, and no other selector.
    Nop,
    /// Something that we never make.
    Other,
}

impl Rule {
    /// Its family.
    #[must_use]
    pub fn family(&self) -> Family {
        self.source.into()
    }
}

/// The kernel's state as it was last seen, kept up to date with what we
/// changed and with what `link-monitor` told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    links: BTreeMap<IfIndex, Link>,
    names: BTreeMap<IfName, IfIndex>,
    /// All addresses of this network namespace.
    pub addresses: BTreeSet<(IfIndex, IpNetwork)>,
    /// Those of them that failed duplicate address detection: the kernel keeps
    /// them and does not use them (net/ipv6/addrconf.c, `addrconf_dad_stop`).
    pub duplicates: BTreeSet<(IfIndex, IpNetwork)>,
    /// The default routes of our table, by metric.
    pub routes: PerFamily<BTreeMap<u32, RouteKind>>,
    /// Neighbours on the bridge that do not answer, as of the last dump: no
    /// event tells of them.
    pub silent: BTreeSet<IpAddr>,
    /// Rules, in the order in which packets meet them; duplicates are counted.
    pub rules: BTreeMap<Rule, u32>,
}

impl Observed {
    /// Takes a link over, replacing what was known of its index and name.
    pub fn insert_link(&mut self, link: Link) {
        self.remove_link(link.index);
        if let Some(other) = self.names.insert(link.name.clone(), link.index) {
            // The name moved to another interface before its old owner's
            // removal was told.
            self.links.remove(&other);
        }
        self.links.insert(link.index, link);
    }

    fn remove_link(&mut self, index: IfIndex) {
        if let Some(link) = self.links.remove(&index) {
            self.names.remove(&link.name);
        }
    }

    /// Applies what was told of a link. True when state that is not a link's
    /// own may have gone with it, and only a new dump can tell: the kernel
    /// drops the routes of a bridge that goes down and says nothing about it
    /// (net/ipv4/fib_frontend.c, `fib_disable_ip`).
    #[must_use]
    pub fn link(&mut self, fact: LinkFact) -> bool {
        let before = self.bridge().map(|link| (link.index, link.up));
        match fact {
            LinkFact::Seen(link) => {
                if self.links.get(&link.index) == Some(&link) {
                    return false;
                }
                self.insert_link(link);
            }
            LinkFact::Gone(index) => {
                self.remove_link(index);
                self.addresses.retain(|(owner, _)| *owner != index);
                self.duplicates.retain(|(owner, _)| *owner != index);
            }
            LinkFact::LeftBridge(index) => {
                if let Some(link) = self.links.get_mut(&index) {
                    link.master = None;
                }
            }
        }
        before.is_some() && before != self.bridge().map(|link| (link.index, link.up))
    }

    /// The link of that name.
    #[must_use]
    pub fn named(&self, name: &IfName) -> Option<&Link> {
        self.names.get(name).and_then(|index| self.links.get(index))
    }

    /// All links, by index.
    pub fn links(&self) -> impl Iterator<Item = &Link> {
        self.links.values()
    }

    /// Our bridge, if a bridge of that name exists.
    #[must_use]
    pub fn bridge(&self) -> Option<&Link> {
        self.occupant().filter(|link| link.is_bridge)
    }

    /// Whatever has our bridge's name.
    #[must_use]
    pub fn occupant(&self) -> Option<&Link> {
        self.links
            .values()
            .find(|link| link.name.as_str() == BRIDGE)
    }

    /// The addresses of `link` in `family`.
    pub fn addresses_of(&self, link: IfIndex, family: Family) -> impl Iterator<Item = &IpNetwork> {
        self.addresses
            .iter()
            .filter(move |(owner, address)| *owner == link && Family::from(*address) == family)
            .map(|(_, address)| address)
    }

    /// Whether the link has the address and the kernel uses it.
    #[must_use]
    pub fn has_address(&self, link: IfIndex, address: IpNetwork) -> bool {
        let entry = (link, address);
        self.addresses.contains(&entry) && !self.duplicates.contains(&entry)
    }

    /// The addresses of the bridge and its ports that somebody else on their
    /// link has, too.
    pub fn shared_addresses(&self) -> impl Iterator<Item = (&IfName, IpNetwork)> {
        let bridge = self.bridge().map(|link| link.index);
        self.duplicates.iter().filter_map(move |(owner, address)| {
            let link = self.links.get(owner)?;
            let ours = [Some(link.index), link.master].contains(&Some(bridge?));
            ours.then_some((&link.name, *address))
        })
    }

    /// Whether any interface of this namespace has the address.
    #[must_use]
    pub fn is_local(&self, address: IpAddr) -> bool {
        self.addresses
            .iter()
            .any(|(_, local)| local.ip() == address)
    }

    /// Whether the blackhole route is there.
    #[must_use]
    pub fn has_fallback(&self, family: Family) -> bool {
        self.routes.get(family).get(&FALLBACK_METRIC) == Some(&RouteKind::Blackhole)
    }

    /// Takes over what a successful operation changed.
    pub fn apply(&mut self, op: &KernelOp) {
        match op {
            // The index of a new bridge comes with the next dump.
            KernelOp::CreateBridge { .. } => {}
            KernelOp::BridgeUp { bridge } => {
                if let Some(link) = self.links.get_mut(bridge) {
                    link.up = true;
                }
            }
            KernelOp::AddAddress { bridge, address } => {
                self.addresses.insert((*bridge, *address));
            }
            KernelOp::RemoveAddress { bridge, address } => {
                self.addresses.remove(&(*bridge, *address));
                self.duplicates.remove(&(*bridge, *address));
            }
            KernelOp::Attach { port, bridge } => self.set_master(port, Some(*bridge)),
            KernelOp::Detach { port } => self.set_master(port, None),
            KernelOp::NoOwnLinkLocal { .. }
            | KernelOp::ForgetNeighbour { .. }
            | KernelOp::AskNeighbour { .. } => {}
            KernelOp::Blackhole { family } => {
                self.routes
                    .get_mut(*family)
                    .insert(FALLBACK_METRIC, RouteKind::Blackhole);
            }
            KernelOp::ReplaceRoute {
                family,
                bridge,
                hops,
            } => {
                let hops = hops.iter().map(|hop| (*hop, bridge.get())).collect();
                self.routes
                    .get_mut(*family)
                    .insert(route_metric(*family), RouteKind::Via(hops));
            }
            KernelOp::DeleteRoute { family, metric } => {
                self.routes.get_mut(*family).remove(metric);
            }
            KernelOp::AddRule {
                source,
                priority,
                action,
            } => {
                let rule = Rule {
                    priority: *priority,
                    source: *source,
                    protocol: PROTOCOL,
                    action: *action,
                };
                *self.rules.entry(rule).or_default() += 1;
            }
            KernelOp::DeleteRule(rule) => {
                if let Some(count) = self.rules.get_mut(rule) {
                    *count = count.saturating_sub(1);
                    if *count == 0 {
                        self.rules.remove(rule);
                    }
                }
            }
        }
    }

    fn set_master(&mut self, port: &IfName, master: Option<IfIndex>) {
        if let Some(link) = self
            .names
            .get(port)
            .and_then(|index| self.links.get_mut(index))
        {
            link.master = master;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index: IfIndex::new(index).unwrap(),
            name: IfName::parse(name).unwrap(),
            alias: None,
            master: None,
            up: true,
            carrier: true,
            is_bridge: name == BRIDGE,
        }
    }

    fn name(text: &str) -> IfName {
        IfName::parse(text).unwrap()
    }

    #[test]
    fn names_and_indexes_may_move() {
        let mut observed = Observed::default();
        observed.insert_link(link(2, "a"));
        // Re-used index under another name.
        observed.insert_link(link(2, "b"));
        assert!(observed.named(&name("a")).is_none());
        // Re-made under the same name, the deletion not told.
        observed.insert_link(link(3, "b"));
        assert_eq!(observed.named(&name("b")).unwrap().index.get(), 3);
        assert_eq!(observed.links().count(), 1);
        // The late deletion of the first one changes nothing.
        assert!(!observed.link(LinkFact::Gone(IfIndex::new(2).unwrap())));
        assert_eq!(observed.named(&name("b")).unwrap().index.get(), 3);
    }

    #[test]
    fn a_bridge_that_went_down_needs_a_dump_and_an_echo_does_not() {
        let mut observed = Observed::default();
        observed.insert_link(link(2, BRIDGE));
        assert!(!observed.link(LinkFact::Seen(link(2, BRIDGE))));
        let mut down = link(2, BRIDGE);
        down.carrier = false;
        assert!(!observed.link(LinkFact::Seen(down.clone())));
        down.up = false;
        assert!(observed.link(LinkFact::Seen(down)));
        assert!(observed.link(LinkFact::Seen(link(2, BRIDGE))));
        assert!(observed.link(LinkFact::Gone(IfIndex::new(2).unwrap())));
        assert!(observed.bridge().is_none());
    }
}
