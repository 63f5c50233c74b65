//! Which LBs are next hops.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use ipnetwork::IpNetwork;

use super::{Dataplane, Port};
use crate::core::desired::{HopRefusal, RouteIntent, Warning};
use crate::core::family::{Family, PerFamily};
use crate::core::ids::{IfName, PortKey};
use crate::core::observed::{Observed, RouteKind};
use crate::core::op::route_metric;

/// Most next hops of a route: what a netlink attribute's 16-bit length holds
/// many times over, and more LBs than a trench has.
pub const MAX_HOPS: usize = 256;

type Hops = PerFamily<BTreeSet<IpAddr>>;

/// Who has what, where several connections name the same.
#[derive(Default)]
struct Claims<'a> {
    ports: BTreeMap<&'a IfName, &'a PortKey>,
    addresses: BTreeMap<IpAddr, &'a PortKey>,
}

impl Dataplane {
    /// The routes to the LBs.
    pub(super) fn route_intents(
        &mut self,
        observed: &Observed,
        warnings: &mut BTreeSet<Warning>,
        now: Instant,
    ) -> PerFamily<RouteIntent> {
        let (mut hops, mut down) = self.hops(observed, warnings);
        PerFamily::from_fn(|family| {
            let mut hops = std::mem::take(hops.get_mut(family));
            let there = self.predecessors_hops(observed, family);
            let adopted = self.adopted.get_mut(family);
            if *self.told.get(family) || !hops.is_empty() {
                adopted.begin(&there, now);
            }
            let untold = adopted.hops(&there, now);
            if hops.is_empty() {
                // Where every LB is said to be down, what says so may be wrong,
                // and no packet is better off without them. Those that nobody
                // told of may be up; what is in the route beside them stays.
                hops = std::mem::take(down.get_mut(family));
                hops.retain(|hop| untold.is_empty() || there.contains(hop));
            }
            hops.extend(untold);
            if hops.len() > MAX_HOPS {
                warnings.insert(Warning::TooManyHops {
                    family,
                    wanted: hops.len(),
                    planned: MAX_HOPS,
                });
                hops = hops.into_iter().take(MAX_HOPS).collect();
            }
            match (self.adopted.get(family).is_whole(), hops.is_empty()) {
                (true, _) => RouteIntent::LeaveAlone,
                (false, true) => RouteIntent::Absent,
                (false, false) => RouteIntent::Via(hops),
            }
        })
    }

    /// The addresses that can be next hops: of LBs that are up, and of those that
    /// are down.
    fn hops(&self, observed: &Observed, warnings: &mut BTreeSet<Warning>) -> (Hops, Hops) {
        let mut hops: Hops = PerFamily::default();
        let mut down = hops.clone();
        let bridge = observed.bridge().map(|link| link.index);
        let claims = self.claims();
        for (key, port) in self.lbs() {
            if claims.ports[&port.ifname] != key {
                // Warned of with the ports.
                continue;
            }
            let refused = self.not_attached.contains(&port.ifname);
            let carries = !port.ifname.is_the_pods()
                && observed.named(&port.ifname).is_some_and(|link| {
                    link.up && link.carrier && (!refused || link.master == bridge)
                });
            let into = if port.down { &mut down } else { &mut hops };
            for address in &port.peers {
                let owner = claims.addresses[address];
                let hop = match owner == key {
                    true => self.hop(*address, observed),
                    false => Err(HopRefusal::Taken(owner.clone())),
                };
                match hop {
                    Ok(true) if carries => {
                        into.get_mut((*address).into()).insert(*address);
                    }
                    Ok(_) => {}
                    Err(why) => {
                        warnings.insert(Warning::HopRefused {
                            key: key.clone(),
                            address: *address,
                            why,
                        });
                    }
                }
            }
        }
        (hops, down)
    }

    /// The hops of the observed route that may be LBs of which we were not
    /// told yet: alive as far as is known, and behind a port that nobody has
    /// told.
    fn predecessors_hops(&self, observed: &Observed, family: Family) -> BTreeSet<IpAddr> {
        let bridge = observed.bridge().map(|link| link.index);
        let told: BTreeSet<&IfName> = self.ports.values().map(|port| &port.ifname).collect();
        let somewhere = observed.links().any(|link| {
            link.master.is_some()
                && link.master == bridge
                && link.up
                && link.carrier
                && !told.contains(&link.name)
        });
        match observed.routes.get(family).get(&route_metric(family)) {
            Some(RouteKind::Via(hops)) if somewhere => hops
                .iter()
                .map(|(address, _)| *address)
                .filter(|address| !observed.silent.contains(address))
                .filter(|address| self.hop(*address, observed) == Ok(true))
                .collect(),
            _ => BTreeSet::new(),
        }
    }

    /// Whether the address can be a next hop; false while the bridge's own is
    /// not told yet.
    pub(super) fn hop(&self, address: IpAddr, observed: &Observed) -> Result<bool, HopRefusal> {
        let family = address.into();
        if !self.families.has(family) {
            return Err(HopRefusal::FamilyUnused);
        }
        let Some(prefix) = *self.prefixes.get(family) else {
            return Ok(false);
        };
        if !prefix.contains(address) {
            return Err(HopRefusal::OutsideSubnet(prefix));
        }
        if prefix.ip() == address || observed.is_local(address) {
            return Err(HopRefusal::Own);
        }
        // Judged by the subnets that the bridge still has, too: while its
        // address changes it has two.
        let seen = observed
            .bridge()
            .into_iter()
            .flat_map(|bridge| observed.addresses_of(bridge.index, family));
        match seen
            .chain([&prefix])
            .find(|prefix| is_no_host(address, **prefix))
        {
            Some(prefix) => Err(HopRefusal::NoHost(*prefix)),
            None => Ok(true),
        }
    }

    /// Who was told first with each interface that connections name, and with
    /// each address of an LB: one that names another's gets no traffic by it, and
    /// takes none away. Targets name what addresses they like, so theirs do not
    /// count.
    fn claims(&self) -> Claims<'_> {
        let mut told: Vec<(&PortKey, &Port)> = self.ports.iter().collect();
        told.sort_by_key(|(_, port)| port.since);
        let mut claims = Claims::default();
        for (key, port) in told {
            claims.ports.entry(&port.ifname).or_insert(key);
            let is_lb = matches!(key, PortKey::Lb(_));
            for address in port.peers.iter().filter(|_| is_lb) {
                claims.addresses.entry(*address).or_insert(key);
            }
        }
        claims
    }
}

/// Whether the address stands for the subnet and not for a host in it.
fn is_no_host(address: IpAddr, prefix: IpNetwork) -> bool {
    match prefix {
        IpNetwork::V4(_) => {
            prefix.prefix() <= 30 && (address == prefix.network() || address == prefix.broadcast())
        }
        // RFC 4291 2.6.1: the subnet-router anycast address, which is local to
        // every forwarding node, this one included.
        IpNetwork::V6(_) => prefix.prefix() < 127 && address == prefix.network(),
    }
}
