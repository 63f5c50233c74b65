//! The allocation rules of Meridio's IPAM (v1.2.8, pkg/ipam): trench →
//! conduit → node → child, each the lowest free prefix of its parent.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use meridio_proxy::core::family::{Family, PerFamily};
use meridio_proxy::proto::ipam::{Child, IPFamily};

/// Prefix lengths of conduits and nodes (operator defaults).
const CONDUIT_LENGTH: PerFamily<u8> = PerFamily { v4: 20, v6: 56 };
const NODE_LENGTH: PerFamily<u8> = PerFamily { v4: 24, v6: 64 };

/// Why a call is not answered with an address.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The conduit is not known (yet): the real one does not answer until it
    /// is.
    Wait,
    /// An error's text.
    Error(String),
}

/// A child in the table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub family: Family,
    pub conduit: String,
    pub node: String,
    pub child: String,
}

#[derive(Debug)]
pub(super) struct Store {
    trench: String,
    pools: PerFamily<IpNetwork>,
    conduits: BTreeMap<(Family, String), IpNetwork>,
    nodes: BTreeMap<(Family, String, String), IpNetwork>,
    children: BTreeMap<Key, IpNetwork>,
}

impl Store {
    pub(super) fn new(trench: &str, pools: PerFamily<IpNetwork>) -> Self {
        Self {
            trench: trench.to_owned(),
            pools,
            conduits: BTreeMap::new(),
            nodes: BTreeMap::new(),
            children: BTreeMap::new(),
        }
    }

    pub(super) fn add_conduit(&mut self, name: &str) {
        for family in Family::ALL {
            let taken = self.conduits.iter().filter(|((of, _), _)| *of == family);
            let taken = taken.map(|(_, network)| number(network.ip())).collect();
            let length = *CONDUIT_LENGTH.get(family);
            let network = first_free(*self.pools.get(family), length, &taken, false)
                .unwrap_or_else(|| panic!("no prefix left for conduit {name}"));
            self.conduits
                .entry((family, name.to_owned()))
                .or_insert(network);
        }
    }

    /// Loses all children, as an IPAM whose database was deleted.
    pub(super) fn forget(&mut self) {
        self.children.clear();
        self.nodes.clear();
    }

    pub(super) fn children(&self) -> &BTreeMap<Key, IpNetwork> {
        &self.children
    }

    /// Gives the child's address with the node's prefix length.
    pub(super) fn allocate(&mut self, child: &Child) -> Result<IpNetwork, Refusal> {
        let key = self.key(child)?;
        let node = self.node(&key)?;
        if let Some(known) = self.children.get(&key) {
            return Ok(*known);
        }
        let taken = self
            .children
            .range(
                Key {
                    child: String::new(),
                    ..key.clone()
                }..,
            )
            .take_while(|(other, _)| {
                (other.family, &other.conduit, &other.node) == (key.family, &key.conduit, &key.node)
            })
            .map(|(_, network)| number(network.ip()))
            .collect();
        let host = first_free(node, key.family.bits(), &taken, true)
            .ok_or_else(|| Refusal::Error("no more prefix available".to_owned()))?;
        let address = IpNetwork::new(host.ip(), node.prefix()).unwrap();
        self.children.insert(key, address);
        Ok(address)
    }

    /// Takes the child's address back; what is not known is no error.
    pub(super) fn release(&mut self, child: &Child) {
        if let Ok(key) = self.key(child) {
            let _ = self.node(&key);
            self.children.remove(&key);
        }
    }

    fn key(&self, child: &Child) -> Result<Key, Refusal> {
        let error = |text: &str| Refusal::Error(text.to_owned());
        let subnet = child.subnet.as_ref().ok_or_else(|| error("no subnet"))?;
        let family = match subnet.ipFamily.enum_value() {
            Ok(IPFamily::IPV4) => Family::V4,
            Ok(IPFamily::IPV6) => Family::V6,
            Err(other) => return Err(Refusal::Error(format!("unknown family {other}"))),
        };
        let conduit = subnet.conduit.as_ref().ok_or_else(|| error("no conduit"))?;
        let trench = conduit.trench.as_ref().ok_or_else(|| error("no trench"))?;
        if trench.name != self.trench {
            return Err(Refusal::Error(format!("unknown trench {}", trench.name)));
        }
        Ok(Key {
            family,
            conduit: conduit.name.clone(),
            node: subnet.node.clone(),
            child: child.name.clone(),
        })
    }

    /// The node's prefix, made on demand.
    fn node(&mut self, key: &Key) -> Result<IpNetwork, Refusal> {
        let conduit = self
            .conduits
            .get(&(key.family, key.conduit.clone()))
            .ok_or(Refusal::Wait)?;
        let name = (key.family, key.conduit.clone(), key.node.clone());
        if let Some(known) = self.nodes.get(&name) {
            return Ok(*known);
        }
        let siblings = self
            .nodes
            .iter()
            .filter(|((family, of, _), _)| *family == key.family && *of == key.conduit);
        let taken = siblings.map(|(_, network)| number(network.ip())).collect();
        let network = first_free(*conduit, *NODE_LENGTH.get(key.family), &taken, false)
            .ok_or_else(|| Refusal::Error("no more prefix available".to_owned()))?;
        self.nodes.insert(name, network);
        Ok(network)
    }
}

/// The lowest prefix of `length` in `parent` that is not taken; with
/// `is_blocked` neither the first nor the last one (node.go:89).
fn first_free(
    parent: IpNetwork,
    length: u8,
    taken: &BTreeSet<u128>,
    is_blocked: bool,
) -> Option<IpNetwork> {
    let family = Family::from(parent);
    let step = 1u128 << (family.bits() - length);
    let count = 1u128 << (length - parent.prefix());
    let edge = u128::from(is_blocked);
    let base = number(parent.network());
    (edge..count - edge)
        .map(|n| base + n * step)
        .find(|address| !taken.contains(address))
        .map(|address| IpNetwork::new(ip(family, address), length).unwrap())
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn ip(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(number as u32).into(),
        Family::V6 => Ipv6Addr::from(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use meridio_proxy::proto::ipam::Subnet;
    use meridio_proxy::proto::nsp::{Conduit, Trench};
    use protobuf::MessageField;

    fn child(node: &str, name: &str, family: IPFamily) -> Child {
        let trench = Trench {
            name: "t".to_owned(),
            ..Trench::default()
        };
        let conduit = Conduit {
            name: "c".to_owned(),
            trench: MessageField::some(trench),
            ..Conduit::default()
        };
        Child {
            name: name.to_owned(),
            subnet: MessageField::some(Subnet {
                conduit: MessageField::some(conduit),
                node: node.to_owned(),
                ipFamily: family.into(),
                ..Subnet::default()
            }),
            ..Child::default()
        }
    }

    fn store() -> Store {
        let pools = PerFamily {
            v4: "172.16.0.0/16".parse().unwrap(),
            v6: "fd00::/48".parse().unwrap(),
        };
        let mut store = Store::new("t", pools);
        store.add_conduit("c");
        store
    }

    fn given(store: &mut Store, node: &str, name: &str, family: IPFamily) -> String {
        let child = child(node, name, family);
        store.allocate(&child).unwrap().to_string()
    }

    #[test]
    fn first_fit_with_blocked_edges() {
        let mut store = store();
        let mut v4 = |node: &str, name: &str| given(&mut store, node, name, IPFamily::IPV4);
        assert_eq!(v4("n1", "bridge"), "172.16.0.1/24");
        assert_eq!(v4("n2", "bridge"), "172.16.1.1/24");
        assert_eq!(v4("n1", "a-src"), "172.16.0.2/24");
        assert_eq!(v4("n1", "a-dst"), "172.16.0.3/24");
        assert_eq!(v4("n1", "a-src"), "172.16.0.2/24");
        let v6 = given(&mut store, "n2", "bridge", IPFamily::IPV6);
        assert_eq!(v6, "fd00::1/64");
        let v6 = given(&mut store, "n1", "bridge", IPFamily::IPV6);
        assert_eq!(v6, "fd00:0:0:1::1/64");
        store.release(&child("n1", "a-src", IPFamily::IPV4));
        let reused = given(&mut store, "n1", "b-src", IPFamily::IPV4);
        assert_eq!(reused, "172.16.0.2/24");
    }

    #[test]
    fn a_node_is_full_at_254() {
        let mut store = store();
        for n in 0..254 {
            given(&mut store, "n1", &format!("x{n}"), IPFamily::IPV4);
        }
        let last = child("n1", "one-more", IPFamily::IPV4);
        assert_eq!(
            store.allocate(&last),
            Err(Refusal::Error("no more prefix available".to_owned()))
        );
        assert_eq!(store.children().len(), 254);
    }

    #[test]
    fn refusals() {
        let mut store = store();
        let mut other = child("n1", "a", IPFamily::IPV4);
        other
            .subnet
            .as_mut()
            .unwrap()
            .conduit
            .as_mut()
            .unwrap()
            .name = "later".to_owned();
        assert_eq!(store.allocate(&other), Err(Refusal::Wait));
        store.release(&other);
        store.add_conduit("later");
        assert_eq!(
            store.allocate(&other).unwrap().to_string(),
            "172.16.16.1/24"
        );
        for bad in [
            Child::default(),
            {
                let mut bad = child("n1", "a", IPFamily::IPV4);
                bad.subnet.as_mut().unwrap().conduit = MessageField::none();
                bad
            },
            {
                let mut bad = child("n1", "a", IPFamily::IPV4);
                bad.subnet.as_mut().unwrap().ipFamily = protobuf::EnumOrUnknown::from_i32(7);
                bad
            },
        ] {
            assert!(matches!(store.allocate(&bad), Err(Refusal::Error(_))));
            store.release(&bad);
        }
    }
}
