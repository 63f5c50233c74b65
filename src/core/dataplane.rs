//! Facts about the outside world, and the kernel state that follows from them.
//!
//! Driven by the thread `net`, which also holds the observation that names and
//! addresses are looked up in.

mod hops;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Instant;

use ipnetwork::IpNetwork;

use super::adoption::Adoption;
use super::announce::Behind;
use super::desired::{Desired, PortIntent, Warning};
use super::event::Event;
use super::family::{Family, IpFamilies, PerFamily};
use super::ids::{IfIndex, IfName, PortKey};
use super::observed::Observed;
use super::op::KernelOp;

/// A connection's port, as last told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Port {
    ifname: IfName,
    peers: BTreeSet<IpAddr>,
    down: bool,
    /// Which connection was told first, if several claim the same.
    since: u64,
}

/// All facts, and which wishes they have made certain.
#[derive(Debug)]
pub struct Dataplane {
    families: IpFamilies,
    bridge_mac: [u8; 6],
    prefixes: PerFamily<Option<IpNetwork>>,
    ports: BTreeMap<PortKey, Port>,
    next_since: u64,
    /// Interfaces of closed connections that may still be in the bridge, with
    /// the index they were seen under: a later interface of that name is
    /// somebody else's.
    released: BTreeMap<IfName, Option<IfIndex>>,
    /// Interfaces that the kernel did not take as ports.
    not_attached: BTreeSet<IfName>,
    /// Peers that a known connection has got since, whose neighbour entries may
    /// be of who had the address before.
    stale: BTreeSet<IpAddr>,
    /// Families in which an LB that we had a connection to is gone: what the
    /// route shall be is no longer a predecessor's business alone.
    told: PerFamily<bool>,
    /// What a predecessor's next hops are to us.
    adopted: PerFamily<Adoption>,
    vips: Option<BTreeSet<IpNetwork>>,
}

impl Dataplane {
    /// Nothing is told yet.
    #[must_use]
    pub fn new(families: IpFamilies, bridge_mac: [u8; 6]) -> Self {
        Self {
            families,
            bridge_mac,
            prefixes: PerFamily::default(),
            ports: BTreeMap::new(),
            next_since: 0,
            released: BTreeMap::new(),
            not_attached: BTreeSet::new(),
            stale: BTreeSet::new(),
            told: PerFamily::default(),
            adopted: PerFamily::default(),
            vips: None,
        }
    }

    /// Takes a fact over.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::BridgePrefixes(prefixes) => {
                for family in Family::ALL {
                    // What was told once is not untold: IPAM says nothing of
                    // a family that it has no answer for yet.
                    if let Some(prefix) = prefixes.get(family) {
                        *self.prefixes.get_mut(family) = Some(*prefix);
                    }
                }
            }
            Event::PortExpected { key, ifname, peers } => self.expect(key, ifname, peers),
            Event::PeerDown { key } => {
                let Some(port) = self.ports.get_mut(&key) else {
                    return;
                };
                port.down = true;
                let peers = port.peers.clone();
                self.hops_are_known(&key, &peers);
            }
            Event::PortReleased { key } => {
                if let Some(port) = self.ports.remove(&key) {
                    self.hops_are_known(&key, &port.peers);
                    self.release(port);
                }
            }
            Event::Vips(vips) => self.vips = Some(vips),
        }
    }

    fn expect(&mut self, key: PortKey, ifname: IfName, peers: BTreeSet<IpAddr>) {
        let since = self
            .ports
            .get(&key)
            .map_or(self.next_since, |old| old.since);
        self.next_since += 1;
        let port = Port {
            ifname,
            peers,
            down: false,
            since,
        };
        self.released.remove(&port.ifname);
        if matches!(key, PortKey::Lb(_)) {
            for peer in &port.peers {
                self.adopted.get_mut((*peer).into()).told(*peer);
            }
        }
        let old = self.ports.insert(key, port.clone());
        // Peers of a new port are forgotten when it is attached; one that is
        // attached already was a predecessor's, and so are its neighbours.
        if let Some(old) = &old {
            self.stale.extend(port.peers.difference(&old.peers));
        }
        match old {
            Some(old) if old.ifname != port.ifname => self.release(old),
            _ => self.forget_strangers(),
        }
    }

    /// Keeps the list of stale neighbours to peers that somebody has.
    fn forget_strangers(&mut self) {
        let in_use: BTreeSet<&IpAddr> = self.ports.values().flat_map(|port| &port.peers).collect();
        self.stale.retain(|peer| in_use.contains(peer));
    }

    /// Forgets a port that no connection holds any more.
    fn release(&mut self, port: Port) {
        self.forget_strangers();
        if !self.ports.values().any(|other| other.ifname == port.ifname) {
            self.not_attached.remove(&port.ifname);
            self.released.insert(port.ifname, None);
        }
    }

    /// An LB that we had a connection to is gone.
    fn hops_are_known(&mut self, key: &PortKey, peers: &BTreeSet<IpAddr>) {
        if matches!(key, PortKey::Lb(_)) {
            for peer in peers {
                *self.told.get_mut((*peer).into()) = true;
            }
        }
    }

    /// Takes over that an operation was done.
    pub fn succeeded(&mut self, op: &KernelOp) {
        match op {
            KernelOp::Attach { port, .. } => {
                self.not_attached.remove(port);
            }
            KernelOp::ForgetNeighbour { address, .. } => {
                self.stale.remove(address);
            }
            _ => {}
        }
    }

    /// Takes over that the kernel refused an operation.
    pub fn failed(&mut self, op: &KernelOp) {
        if let KernelOp::Attach { port, .. } = op {
            self.not_attached.insert(port.clone());
        }
    }

    /// How many LBs are connected: told to be up, and neither down nor closed.
    #[must_use]
    pub fn connected_lbs(&self) -> usize {
        self.lbs().filter(|(_, port)| !port.down).count()
    }

    fn lbs(&self) -> impl Iterator<Item = (&PortKey, &Port)> {
        self.ports
            .iter()
            .filter(|(key, _)| matches!(key, PortKey::Lb(_)))
    }

    /// When another state may be wanted without any new fact.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        Family::ALL
            .into_iter()
            .filter_map(|family| self.adopted.get(family).deadline())
            .min()
    }

    /// The kernel state that follows from all facts, given what was observed.
    pub fn desired(&mut self, observed: &Observed, now: Instant) -> Desired {
        let mut warnings = BTreeSet::new();
        let ports = self.port_intents(observed, &mut warnings);
        let routes = self.route_intents(observed, &mut warnings, now);
        let vips = self.rule_sources(observed, &mut warnings);
        if observed.occupant().is_some_and(|link| !link.is_bridge) {
            warnings.insert(Warning::BridgeIsNone);
        }
        warnings.extend(observed.shared_addresses().map(|(link, address)| {
            let link = link.clone();
            Warning::DuplicateAddress { link, address }
        }));
        let families = self.families;
        Desired {
            bridge_mac: self.bridge_mac,
            addresses: PerFamily::from_fn(|family| {
                self.prefixes.get(family).filter(|_| families.has(family))
            }),
            link_local: families
                .has(Family::V6)
                .then(|| link_local(self.bridge_mac))
                .flatten(),
            forget: self.neighbours_to_forget(observed),
            ports,
            routes,
            fallback: PerFamily::from_fn(|family| families.has(family)),
            vips,
            warnings,
        }
    }

    fn port_intents(
        &mut self,
        observed: &Observed,
        warnings: &mut BTreeSet<Warning>,
    ) -> BTreeMap<IfName, PortIntent> {
        let mut intents = BTreeMap::new();
        let bridge = observed.bridge().map(|link| link.index);
        self.released.retain(|name, seen| {
            let attached = observed
                .named(name)
                .filter(|link| link.master.is_some() && link.master == bridge);
            let keep = attached.is_some_and(|link| *seen.get_or_insert(link.index) == link.index);
            if keep {
                intents.insert(name.clone(), PortIntent::Detach);
            }
            keep
        });
        let mut holders: BTreeMap<&IfName, Vec<&PortKey>> = BTreeMap::new();
        for (key, port) in &self.ports {
            if port.ifname.is_the_pods() {
                warnings.insert(Warning::PortRefused {
                    key: key.clone(),
                    port: port.ifname.clone(),
                });
                continue;
            }
            holders.entry(&port.ifname).or_default().push(key);
            match intents
                .entry(port.ifname.clone())
                .or_insert_with(|| PortIntent::Attach {
                    peers: BTreeSet::new(),
                }) {
                PortIntent::Attach { peers } => peers.extend(self.neighbours(port)),
                PortIntent::Detach => {}
            }
        }
        for (port, keys) in holders.into_iter().filter(|(_, keys)| keys.len() > 1) {
            warnings.insert(Warning::SharedPort {
                port: port.clone(),
                keys: keys.into_iter().cloned().collect(),
            });
        }
        intents
    }

    /// Where the addresses on the bridge are that others may know under
    /// another hardware address: its own, and those leased to targets behind
    /// ports that carry. One that an LB has as well is in doubt and left out.
    #[must_use]
    pub fn announced(&self, observed: &Observed) -> BTreeMap<IpAddr, Behind> {
        let Some(bridge) = observed.bridge().map(|link| link.index) else {
            return BTreeMap::new();
        };
        let of_lbs: BTreeSet<&IpAddr> = self.lbs().flat_map(|(_, port)| &port.peers).collect();
        let mut leased: BTreeMap<IpAddr, BTreeSet<IfIndex>> = BTreeMap::new();
        for (key, port) in &self.ports {
            let link = observed
                .named(&port.ifname)
                .filter(|link| link.master == Some(bridge) && link.up && link.carrier);
            let (PortKey::Target(_), Some(link)) = (key, link) else {
                continue;
            };
            for peer in port.peers.iter().filter(|peer| !of_lbs.contains(peer)) {
                if self.hop(*peer, observed) == Ok(true) {
                    leased.entry(*peer).or_default().insert(link.index);
                }
            }
        }
        let own = self.prefixes.values().filter(|prefix| {
            self.families.has((**prefix).into()) && observed.addresses.contains(&(bridge, **prefix))
        });
        let targets = leased
            .into_iter()
            .map(|(peer, at)| (peer, Behind::Ports(at)));
        let own = own.map(|prefix| (prefix.ip(), Behind::Bridge));
        targets.chain(own).collect()
    }

    fn rule_sources(
        &self,
        observed: &Observed,
        warnings: &mut BTreeSet<Warning>,
    ) -> Option<BTreeSet<IpNetwork>> {
        let vips = self.vips.as_ref()?;
        let told = self.prefixes.values().map(IpNetwork::ip);
        let seen = observed.addresses.iter().map(|(_, address)| address.ip());
        let own: BTreeSet<IpAddr> = told.chain(seen).collect();
        let mut sources = BTreeSet::new();
        for vip in vips {
            let vip = *vip;
            if !self.families.has(vip.into()) {
                warnings.insert(Warning::VipFamilyUnused { vip });
            } else if vip.prefix() == 0 || vip.network() != vip.ip() {
                warnings.insert(Warning::VipMalformed { vip });
            } else if let Some(own) = first_within(&own, vip) {
                warnings.insert(Warning::VipCoversOwn { vip, own });
            } else {
                sources.insert(vip);
            }
        }
        Some(sources)
    }

    /// The peers of a port that can be neighbours on the bridge. A target's
    /// may have VIPs among them.
    fn neighbours<'a>(&'a self, port: &'a Port) -> impl Iterator<Item = IpAddr> + 'a {
        port.peers.iter().copied().filter(|peer| {
            self.prefixes
                .get((*peer).into())
                .is_some_and(|prefix| prefix.contains(*peer))
        })
    }

    fn neighbours_to_forget(&self, observed: &Observed) -> BTreeSet<IpAddr> {
        self.ports
            .values()
            .filter(|port| !port.ifname.is_the_pods() && observed.named(&port.ifname).is_some())
            .flat_map(|port| self.neighbours(port))
            .filter(|peer| self.stale.contains(peer))
            .collect()
    }
}

/// RFC 4291 appendix A: the link-local address of a hardware address.
fn link_local(mac: [u8; 6]) -> Option<IpNetwork> {
    let [a, b, c, d, e, f] = mac;
    let host = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    let bits = u128::from(u64::from_be_bytes(host)) | 0xfe80 << 112;
    IpNetwork::new(Ipv6Addr::from(bits).into(), 64).ok()
}

/// The first of `own` that `vip` (masked) covers.
fn first_within(own: &BTreeSet<IpAddr>, vip: IpNetwork) -> Option<IpAddr> {
    own.range(vip.network()..=vip.broadcast()).next().copied()
}
