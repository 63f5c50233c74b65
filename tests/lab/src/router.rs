//! The outside: a client, and the router in front of the load balancers, which
//! spreads the client's flows over them (in a cluster: ECMP by BGP).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use parking_lot::Mutex;

use crate::link::{Hop, Route, Rtnl, any, wait_ready};
use crate::netns::Netns;
use crate::spread::{Member, Passed, Spread};

const SEED: u32 = 0x5eed_0001;

/// The namespaces of client and router.
pub struct Router {
    netns: Netns,
    client: Netns,
    rtnl: Rtnl,
    state: Mutex<State>,
}

struct State {
    spread: Spread,
    links: BTreeMap<String, Member>,
}

impl Router {
    /// Makes both namespaces and the link between them.
    pub fn new() -> io::Result<Self> {
        let netns = Netns::new("router")?;
        netns.route_packets()?;
        let client = Netns::new("client")?;
        let rtnl = Rtnl::open(&netns)?;
        rtnl.add_veth("client", "eth0", &client)?;
        let index = rtnl.link("client")?.index;
        let outside = Rtnl::open(&client)?;
        let eth0 = outside.link("eth0")?.index;
        for (ours, theirs) in [
            ("10.99.0.1/24", "10.99.0.2/24"),
            ("fd99::1/64", "fd99::2/64"),
        ] {
            rtnl.add_address(index, parse(ours))?;
            outside.add_address(eth0, parse(theirs))?;
        }
        rtnl.set_up(index, true)?;
        outside.set_up(eth0, true)?;
        wait_ready(&netns, &rtnl, "client")?;
        wait_ready(&client, &outside, "eth0")?;
        for gateway in ["10.99.0.1", "fd99::1"].map(address) {
            outside.replace_route(&Route::via(any(gateway), gateway, eth0))?;
        }
        let spread = Spread::new(&netns, "client", SEED, None)?;
        Ok(Self {
            netns,
            client,
            rtnl,
            state: Mutex::new(State {
                spread,
                links: BTreeMap::new(),
            }),
        })
    }

    /// Where the client's sockets are made.
    #[must_use]
    pub fn client(&self) -> &Netns {
        &self.client
    }

    /// Connects a load balancer's namespace, by its interface `up`, which gets
    /// the default routes; it gets no flows yet.
    pub fn attach(&self, name: &str, number: u8, lb: &Netns) -> io::Result<()> {
        let ifname = format!("lb{number}");
        self.rtnl.add_veth(&ifname, "up", lb)?;
        let index = self.rtnl.link(&ifname)?.index;
        let inside = Rtnl::open(lb)?;
        let up = inside.link("up")?.index;
        let mut hops = Vec::new();
        let prefixes = [format!("10.98.{number}."), format!("fd98:0:0:{number:x}::")];
        for (prefix, length) in prefixes.iter().zip([24, 64]) {
            self.rtnl
                .add_address(index, parse(&format!("{prefix}1/{length}")))?;
            inside.add_address(up, parse(&format!("{prefix}2/{length}")))?;
            hops.push(Hop {
                gateway: Some(address(&format!("{prefix}2"))),
                index,
            });
        }
        self.rtnl.set_up(index, true)?;
        inside.set_up(up, true)?;
        wait_ready(&self.netns, &self.rtnl, &ifname)?;
        wait_ready(lb, &inside, "up")?;
        for prefix in &prefixes {
            let gateway = address(&format!("{prefix}1"));
            inside.replace_route(&Route::via(any(gateway), gateway, up))?;
        }
        self.state.lock().links.insert(
            name.to_owned(),
            Member {
                name: name.to_owned(),
                hops,
            },
        );
        Ok(())
    }

    /// Says which of the attached load balancers get flows.
    pub fn spread_over(&self, names: &[String]) -> io::Result<()> {
        let mut state = self.state.lock();
        let members: Vec<Member> = names
            .iter()
            .map(|name| {
                let known = state.links.get(name).cloned();
                known.ok_or_else(|| io::Error::other(format!("router: no load balancer {name}")))
            })
            .collect::<io::Result<_>>()?;
        state.spread.set(&members)
    }

    /// Forgets a load balancer that gets no flows any more.
    pub fn detach(&self, name: &str) -> io::Result<()> {
        let member = self.state.lock().links.remove(name);
        match member.and_then(|member| member.hops.first().copied()) {
            Some(hop) => self.rtnl.delete_link(hop.index),
            None => Ok(()),
        }
    }

    /// The packets of flows to the load balancers and back.
    pub fn passed(&self) -> io::Result<Passed> {
        self.state.lock().spread.passed()
    }

    /// The router's own namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }
}

fn parse(text: &str) -> ipnetwork::IpNetwork {
    text.parse().expect("an address of the lab's own")
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address of the lab's own")
}
