//! A load balancer, as far as packets go: Meridio's stateless-lb-frontend
//! sends the packets of a flow to one of the registered targets without
//! touching them, by a routing table per target, over the interface that the
//! proxy's connection brought; what comes back it sends on to the router.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::sync::clock;
use parking_lot::Mutex;

use crate::datapath::LocalEndpoint;
use crate::fault::Trouble;
use crate::link::{Hop, Rtnl, wait_ready};
use crate::netns::Netns;
use crate::spread::{Member, Passed, Spread};

/// A call of the forwarder takes no longer, whatever is wrong.
const CALL_LIMIT: Duration = Duration::from_secs(10);
const SEED: u32 = 0x5eed_0002;

/// The targets that receive flows: their names and their own addresses.
pub type Targets = BTreeMap<String, Vec<IpAddr>>;

/// A load balancer; clones refer to the same one.
#[derive(Clone)]
pub struct Lb(Arc<Inner>);

struct Inner {
    name: String,
    number: u8,
    netns: Netns,
    rtnl: Rtnl,
    trouble: Trouble,
    state: Mutex<State>,
}

struct State {
    /// Interface of each connection, by its id.
    connections: BTreeMap<String, String>,
    named: u32,
    targets: Targets,
    spread: Spread,
}

impl Lb {
    /// Makes the namespace. `number` (1..=62) stamps the packets and chooses
    /// the subnet towards the router, which the caller attaches.
    pub fn new(name: &str, number: u8) -> io::Result<Self> {
        let netns = Netns::new(name)?;
        netns.route_packets()?;
        let spread = Spread::new(&netns, "up", SEED, Some(number))?;
        Ok(Self(Arc::new(Inner {
            name: name.to_owned(),
            number,
            rtnl: Rtnl::open(&netns)?,
            netns,
            trouble: Trouble::default(),
            state: Mutex::new(State {
                connections: BTreeMap::new(),
                named: 0,
                targets: BTreeMap::new(),
                spread,
            }),
        })))
    }

    /// The endpoint's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What packets are stamped with.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.0.number
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Netns {
        &self.0.netns
    }

    /// Replaces the targets that receive flows.
    pub fn set_targets(&self, targets: &Targets) -> io::Result<()> {
        let mut state = self.0.state.lock();
        for (name, addresses) in targets {
            if !state.targets.contains_key(name) {
                self.0.forget(addresses)?;
            }
        }
        state.targets.clone_from(targets);
        self.0.refresh(&mut state)
    }

    /// The interfaces of the proxies' connections.
    #[must_use]
    pub fn interfaces(&self) -> Vec<String> {
        self.0.state.lock().connections.values().cloned().collect()
    }

    /// What Requests meet.
    #[must_use]
    pub fn trouble(&self) -> &Trouble {
        &self.0.trouble
    }

    /// Knows no connection any more; the kernel goes on as it is.
    pub fn forget(&self) {
        self.0.state.lock().connections.clear();
    }

    /// Packets to targets and back.
    pub fn passed(&self) -> io::Result<Passed> {
        self.0.state.lock().spread.passed()
    }
}

impl Inner {
    /// A target is reached over the connection whose subnet it is in.
    fn refresh(&self, state: &mut State) -> io::Result<()> {
        let subnets = self.subnets(state)?;
        let members: Vec<Member> = (state.targets.iter())
            .map(|(name, addresses)| Member {
                name: name.clone(),
                hops: hops(addresses, &subnets),
            })
            .filter(|member| !member.hops.is_empty())
            .collect();
        state.spread.set(&members)
    }

    fn subnets(&self, state: &State) -> io::Result<Vec<(IpNetwork, u32)>> {
        let mut found = Vec::new();
        let addresses = self.rtnl.addresses()?;
        for link in self.rtnl.links()? {
            if state.connections.values().any(|name| *name == link.name) {
                let own = addresses.iter().filter(|a| a.index == link.index);
                found.extend(own.map(|address| (address.network, link.index)));
            }
        }
        Ok(found)
    }

    /// A target that registers may have a new interface with a new hardware
    /// address; Meridio's load balancer cleans its neighbour table, too.
    fn forget(&self, addresses: &[IpAddr]) -> io::Result<()> {
        for link in self.rtnl.links()? {
            for address in addresses {
                self.rtnl.forget_neighbour(link.index, *address)?;
            }
        }
        Ok(())
    }
}

fn hops(addresses: &[IpAddr], subnets: &[(IpNetwork, u32)]) -> Vec<Hop> {
    (addresses.iter())
        .filter_map(|address| {
            let (_, index) = subnets.iter().find(|(net, _)| net.contains(*address))?;
            Some(Hop {
                gateway: Some(*address),
                index: *index,
            })
        })
        .collect()
}

impl LocalEndpoint for Lb {
    fn name(&self) -> String {
        self.0.name.clone()
    }

    fn netns(&self) -> Arc<OwnedFd> {
        self.0.netns.fd()
    }

    fn request(&self, mut connection: Connection) -> Result<Connection, String> {
        let admitted = self.0.trouble.admit(clock::now() + CALL_LIMIT);
        admitted.map_err(|error| error.to_string())?;
        let mut state = self.0.state.lock();
        let known = state.connections.get(&connection.id).cloned();
        let ifname = known.unwrap_or_else(|| {
            state.named += 1;
            format!("nse-{}", state.named)
        });
        state
            .connections
            .insert(connection.id.clone(), ifname.clone());
        let mechanism = connection.mechanism.mut_or_insert_default();
        mechanism.parameters.insert("name".to_owned(), ifname);
        Ok(connection)
    }

    fn connected(&self, connection: &Connection) {
        let ifname = self.0.state.lock().connections.get(&connection.id).cloned();
        // The proxy sends as soon as it is told of the connection.
        let ready = ifname.map_or(Ok(()), |ifname| {
            wait_ready(&self.0.netns, &self.0.rtnl, &ifname)
        });
        let mut state = self.0.state.lock();
        if let Err(error) = ready.and_then(|()| self.0.refresh(&mut state)) {
            log::warn!("load balancer {}: {error}", self.0.name);
        }
    }

    fn close(&self, connection: &Connection) {
        let mut state = self.0.state.lock();
        state.connections.remove(&connection.id);
        if let Err(error) = self.0.refresh(&mut state) {
            log::warn!("load balancer {}: {error}", self.0.name);
        }
    }
}
