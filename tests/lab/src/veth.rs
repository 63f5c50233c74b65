//! The forwarder's data plane: veth pairs, made and kept as the kernel
//! forwarder of NSM does it (sdk-kernel `connectioncontextkernel`, forwarder-vpp
//! `kernelvethpair`): the pair appears under temporary names and is renamed; an
//! interface that has the wanted name already is deleted first; each end gets
//! its alias, the MTU, its addresses, host routes to the other end's addresses
//! outside of its subnets and, on the client's side, the policy routes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ipnetwork::IpNetwork;
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::proto::connectioncontext::{IPContext, Route as RouteText};
use netlink_packet_route::link::LinkAttribute;
use parking_lot::Mutex;

use crate::datapath::{Datapath, End};
use crate::link::{Route, Rtnl, Rule, any, host};
use crate::netns::Netns;

/// Priority of the first policy rule; they look up the tables of equal number.
const FIRST_POLICY: u32 = 1000;

/// The data plane of one node's forwarder.
#[derive(Default)]
pub struct VethDatapath {
    pairs: Mutex<BTreeMap<String, Pair>>,
    made: AtomicU64,
}

struct Pair {
    client: Side,
    endpoint: Side,
    policies: BTreeMap<IpNetwork, Policy>,
}

struct Side {
    rtnl: Rtnl,
    inode: (u64, u64),
    ifname: String,
    index: u32,
    routes: Vec<Route>,
}

struct Policy {
    table: u32,
    routes: Vec<Route>,
}

impl VethDatapath {
    /// A data plane without connections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many pairs were ever made: a refresh makes none.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.made.load(Ordering::SeqCst)
    }

    /// The connections that have a pair.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        self.pairs.lock().keys().cloned().collect()
    }

    /// The interface's name on the client's and on the endpoint's side.
    #[must_use]
    pub fn names(&self, id: &str) -> Option<(String, String)> {
        let pairs = self.pairs.lock();
        let pair = pairs.get(id)?;
        Some((pair.client.ifname.clone(), pair.endpoint.ifname.clone()))
    }

    fn make(&self, client: &End, endpoint: &End) -> io::Result<Pair> {
        let number = self.made.fetch_add(1, Ordering::SeqCst);
        let mut near = Side::open(client)?;
        let mut far = Side::open(endpoint)?;
        for side in [&near, &far] {
            if let Some(stale) = side.rtnl.find(&side.ifname)? {
                side.rtnl.delete_link(stale.index)?;
            }
        }
        let (near_name, far_name) = (format!("nsmtmp{number}c"), format!("nsmtmp{number}e"));
        let far_netns = netns_of(endpoint)?;
        near.rtnl.add_veth(&near_name, &far_name, &far_netns)?;
        near.index = near.rtnl.link(&near_name)?.index;
        far.index = far.rtnl.link(&far_name)?.index;
        let pair = Pair {
            client: near,
            endpoint: far,
            policies: BTreeMap::new(),
        };
        let named = (pair.endpoint.christen(&endpoint.alias))
            .and_then(|()| pair.client.christen(&client.alias));
        match named {
            Ok(()) => Ok(pair),
            // Under a name of its own nobody would find it any more.
            Err(error) => {
                pair.delete();
                Err(error)
            }
        }
    }
}

impl Datapath for VethDatapath {
    fn connect(
        &self,
        id: &str,
        client: &End,
        endpoint: &End,
        connection: &Connection,
    ) -> Result<(), String> {
        let known = self.pairs.lock().remove(id);
        let done = (|| {
            let pair = match known {
                Some(pair) if pair.is(client, endpoint)? => pair,
                Some(stale) => {
                    stale.delete();
                    self.make(client, endpoint)?
                }
                None => self.make(client, endpoint)?,
            };
            // A pair that is only half set up is kept: the next refresh, or
            // the disconnect that the forwarder sends after an error, finds it.
            let mut pairs = self.pairs.lock();
            let pair = pairs.entry(id.to_owned()).or_insert(pair);
            pair.update(connection)
        })();
        done.map_err(|error: io::Error| format!("connection {id}: {error}"))
    }

    fn disconnect(&self, id: &str) {
        let pair = self.pairs.lock().remove(id);
        if let Some(pair) = pair {
            pair.delete();
        }
    }
}

impl Pair {
    /// Whether the pair still is what these ends ask for.
    fn is(&self, client: &End, endpoint: &End) -> io::Result<bool> {
        Ok(self.client.is(client)? && self.endpoint.is(endpoint)?)
    }

    fn update(&mut self, connection: &Connection) -> io::Result<()> {
        let context = &connection.context;
        let ip = context.ip_context.clone().unwrap_or_default();
        let src = networks(&ip.src_ip_addrs)?;
        let dst = networks(&ip.dst_ip_addrs)?;
        let mtu = context.MTU;
        self.endpoint.update(mtu, &dst, &src, &ip.dst_routes)?;
        self.client.update(mtu, &src, &dst, &ip.src_routes)?;
        self.update_policies(&ip)
    }

    fn update_policies(&mut self, ip: &IPContext) -> io::Result<()> {
        let mut wanted: BTreeMap<IpNetwork, Vec<Route>> = BTreeMap::new();
        for policy in &ip.policies {
            let routes = routes(&policy.routes, self.client.index)?;
            wanted.insert(network(&policy.from)?, routes);
        }
        let gone: Vec<IpNetwork> = (self.policies.keys())
            .filter(|from| !wanted.contains_key(from))
            .copied()
            .collect();
        for from in gone {
            if let Some(policy) = self.policies.remove(&from) {
                self.client.unroute(&policy.routes);
                self.client
                    .rtnl
                    .delete_rule(&policy.rule(from), from.ip())?;
            }
        }
        for (from, routes) in wanted {
            let used: BTreeSet<u32> = self.policies.values().map(|p| p.table).collect();
            let free = (FIRST_POLICY..).find(|table| !used.contains(table));
            let policy = self.policies.entry(from).or_insert_with(|| Policy {
                table: free.unwrap_or(FIRST_POLICY),
                routes: Vec::new(),
            });
            let table = policy.table;
            let routes: Vec<_> = routes.into_iter().map(|r| r.in_table(table)).collect();
            for route in &routes {
                self.client.rtnl.replace_route(route)?;
            }
            let stale: Vec<_> = (policy.routes.drain(..))
                .filter(|old| !routes.iter().any(|new| new.destination == old.destination))
                .collect();
            self.client.unroute(&stale);
            policy.routes = routes;
            self.client.rtnl.add_rule(&policy.rule(from), from.ip())?;
        }
        Ok(())
    }

    fn delete(self) {
        for (from, policy) in &self.policies {
            let done = self.client.rtnl.delete_rule(&policy.rule(*from), from.ip());
            warn_if_failed(done);
        }
        // One of the two is enough while the pair is whole.
        warn_if_failed(self.client.rtnl.delete_link(self.client.index));
        warn_if_failed(self.endpoint.rtnl.delete_link(self.endpoint.index));
    }
}

impl Policy {
    fn rule(&self, from: IpNetwork) -> Rule {
        Rule {
            from: Some(from),
            priority: self.table,
            table: self.table,
            ..Rule::default()
        }
    }
}

impl Side {
    fn open(end: &End) -> io::Result<Self> {
        let netns = netns_of(end)?;
        Ok(Self {
            rtnl: Rtnl::open(&netns)?,
            inode: inode(&netns)?,
            ifname: end.ifname.clone(),
            index: 0,
            routes: Vec::new(),
        })
    }

    fn is(&self, end: &End) -> io::Result<bool> {
        Ok(self.ifname == end.ifname
            && self.inode == inode(&netns_of(end)?)?
            && (self.rtnl.find(&self.ifname)?).is_some_and(|link| link.index == self.index))
    }

    fn christen(&self, alias: &str) -> io::Result<()> {
        let name = LinkAttribute::IfName(self.ifname.clone());
        self.rtnl.set_link(self.index, vec![name])?;
        let alias = LinkAttribute::IfAlias(alias.to_owned());
        self.rtnl.set_link(self.index, vec![alias])
    }

    fn update(
        &mut self,
        mtu: u32,
        own: &[IpNetwork],
        other: &[IpNetwork],
        extra: &[RouteText],
    ) -> io::Result<()> {
        let link = self.rtnl.link(&self.ifname)?;
        if mtu != 0 && link.mtu != mtu {
            let mtu = LinkAttribute::Mtu(mtu);
            self.rtnl.set_link(self.index, vec![mtu])?;
        }
        if !link.up {
            self.rtnl.set_up(self.index, true)?;
        }
        for address in own {
            self.rtnl.add_address(self.index, *address)?;
        }
        for old in self.rtnl.addresses()? {
            if old.index == self.index && old.global && !own.contains(&old.network) {
                self.rtnl.delete_address(self.index, old.network)?;
            }
        }
        let mut wanted = routes(extra, self.index)?;
        wanted.extend(
            (other.iter().map(|to| to.ip()))
                .filter(|to| !own.iter().any(|network| network.contains(*to)))
                .map(|to| Route::direct(host(to), self.index)),
        );
        for route in &wanted {
            self.rtnl.replace_route(route)?;
        }
        let stale: Vec<_> = (self.routes.drain(..))
            .filter(|old| !wanted.contains(old))
            .collect();
        self.unroute(&stale);
        self.routes = wanted;
        Ok(())
    }

    fn unroute(&self, routes: &[Route]) {
        for route in routes {
            warn_if_failed(self.rtnl.delete_route(route));
        }
    }
}

fn warn_if_failed(done: io::Result<()>) {
    if let Err(error) = done {
        log::warn!("forwarder: {error}");
    }
}

/// Descriptors that came from peers may be of the kind that only names a file.
fn netns_of(end: &End) -> io::Result<Netns> {
    let label = format!("the namespace of {}", end.alias);
    let raw = end.netns.as_raw_fd();
    // SAFETY: F_GETFL takes no further argument.
    let flags = unsafe { libc::fcntl(raw, libc::F_GETFL) };
    if flags & libc::O_PATH == 0 {
        return Ok(Netns::from_fd(Arc::clone(&end.netns), &label));
    }
    let opened = std::fs::File::open(format!("/proc/self/fd/{raw}"))?;
    Ok(Netns::from_fd(Arc::new(opened.into()), &label))
}

fn inode(netns: &Netns) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(format!("/proc/self/fd/{}", netns.raw()))?;
    Ok((file.dev(), file.ino()))
}

fn network(text: &str) -> io::Result<IpNetwork> {
    text.parse()
        .map_err(|error| io::Error::other(format!("address {text:?}: {error}")))
}

fn networks(texts: &[String]) -> io::Result<Vec<IpNetwork>> {
    texts.iter().map(|text| network(text)).collect()
}

fn routes(texts: &[RouteText], index: u32) -> io::Result<Vec<Route>> {
    let mut found = Vec::new();
    for text in texts {
        let to = network(&text.prefix)?;
        if text.nextHop.is_empty() {
            found.push(Route::direct(to, index));
            continue;
        }
        let via: IpAddr = (text.nextHop.parse())
            .map_err(|error| io::Error::other(format!("next hop {:?}: {error}", text.nextHop)))?;
        let to = if to.prefix() == 0 { any(via) } else { to };
        found.push(Route::via(to, via, index));
    }
    Ok(found)
}
