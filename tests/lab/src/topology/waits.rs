//! Waiting for what the daemon does in the pod's kernel.

use std::io;
use std::net::IpAddr;

use meridio_proxy::core::family::Family;

use super::{LIMIT, TABLE, Topology, text};
use crate::link::{host, wait_until};

impl Topology {
    /// Waits until the next hops are the load balancers, in both families.
    pub fn wait_hops(&self) -> Result<(), String> {
        let wanted = self.lbs.len();
        self.wait("next hops", || {
            let routes = self.rtnl.routes(TABLE)?;
            let hops = |v4: bool| {
                let mut all = routes.iter().filter(|route| {
                    route.destination.is_ipv4() == v4 && route.metric != Some(u32::MAX)
                });
                all.next().map_or(0, |route| route.hops.len())
            };
            // Every load balancer, and nothing beside them.
            let families = self.options.families.iter();
            Ok(families.map(|f| hops(f == Family::V4)).all(|n| n == wanted))
        })
    }

    /// Waits until the pod's end of a target's connection is a port of the
    /// bridge.
    pub fn wait_port(&self, id: &str) -> Result<(), String> {
        let alias = format!("client-{id}");
        self.wait("port", || {
            let links = self.rtnl.links()?;
            let bridge = links.iter().find(|link| link.name == "bridge0");
            let port = links.iter().find(|link| link.alias == alias);
            Ok(bridge
                .zip(port)
                .is_some_and(|(bridge, port)| port.running && port.master == Some(bridge.index)))
        })
    }

    /// Waits until the VIP has a rule in the pod, or has none.
    pub fn wait_vip(&self, vip: IpAddr, present: bool) -> Result<(), String> {
        self.wait("rule", || {
            let rules = self.rtnl.rules(vip)?;
            let found =
                (rules.iter()).any(|rule| rule.from == Some(host(vip)) && rule.table == TABLE);
            Ok(found == present)
        })
    }

    /// Waits until something is so in the pod's kernel state.
    pub fn wait(&self, what: &str, is_so: impl FnMut() -> io::Result<bool>) -> Result<(), String> {
        if wait_until(&self.pod, LIMIT, is_so).map_err(text)? {
            return Ok(());
        }
        let log = self.daemon.as_ref().map(|daemon| daemon.tail(30));
        Err(format!(
            "{what}: not as expected after {LIMIT:?}\n{}\nrefusals: {:?}",
            log.unwrap_or_default(),
            self.nsmgr.refusals()
        ))
    }
}
