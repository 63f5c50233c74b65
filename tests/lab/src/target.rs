//! A target, behaving as Meridio's TAPA: one interface to the proxy of its
//! node, VIPs that it tells the mesh as source addresses together with a
//! policy route each, and a server that answers on them.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ipnetwork::IpNetwork;
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::proto::connectioncontext::{IPContext, PolicyRoute, Route};
use parking_lot::Mutex;

use crate::echo::Echo;
use crate::link::{Rtnl, any, host, wait_ready};
use crate::netns::Netns;

/// The interface of its connection.
const IFNAME: &str = "nsm-0";

/// The mesh as a target sees it: nsmgr, or something simpler in the lab's own
/// tests.
pub trait Mesh: Send + Sync {
    /// Makes a connection or brings it up to date.
    fn connect(&self, request: Wish) -> Result<Connection, String>;
    /// Closes a connection.
    fn close(&self, id: &str) -> Result<(), String>;
}

/// What a target asks of the mesh.
#[derive(Clone)]
pub struct Wish {
    pub id: String,
    pub name: String,
    pub service: String,
    pub netns: Arc<OwnedFd>,
    pub ifname: String,
    pub labels: BTreeMap<String, String>,
    pub ip_context: IPContext,
}

/// A target.
pub struct Target {
    name: String,
    service: String,
    node: String,
    netns: Netns,
    echo: Echo,
    mesh: Arc<dyn Mesh>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    vips: Vec<IpAddr>,
    context: IPContext,
    connected: bool,
}

impl Target {
    /// Makes the namespace and the server; not connected yet. `service` is
    /// `proxy.<conduit>.<trench>.<namespace>`.
    pub fn new(name: &str, service: &str, node: &str, mesh: Arc<dyn Mesh>) -> io::Result<Self> {
        let netns = Netns::new(name)?;
        let echo = Echo::start(&netns, name)?;
        Ok(Self {
            name: name.to_owned(),
            service: service.to_owned(),
            node: node.to_owned(),
            netns,
            echo,
            mesh,
            state: Mutex::new(State::default()),
        })
    }

    /// Its name, which its server says, too.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Netns {
        &self.netns
    }

    /// The connection's id, as TAPA forms it.
    #[must_use]
    pub fn connection_id(&self) -> String {
        format!("{}-{}-0", self.name, self.service)
    }

    /// Connects, with the context of an earlier connection if there was one
    /// (which is what healing does), then tells the VIPs.
    pub fn connect(&self) -> Result<(), String> {
        let mut state = self.state.lock();
        self.request(&mut state)?;
        self.tell_vips(&mut state)?;
        self.ready()
            .map_err(|error| format!("target {}: {error}", self.name))
    }

    /// Load balancers send as soon as the target is registered.
    fn ready(&self) -> io::Result<()> {
        wait_ready(&self.netns, &Rtnl::open(&self.netns)?, IFNAME)
    }

    /// Replaces the VIPs.
    pub fn set_vips(&self, vips: &[IpAddr]) -> Result<(), String> {
        let mut state = self.state.lock();
        vips.clone_into(&mut state.vips);
        let done = self.echo.set_vips(&self.netns, vips);
        done.map_err(|error| format!("target {}: {error}", self.name))?;
        if state.connected {
            self.tell_vips(&mut state)
        } else {
            Ok(())
        }
    }

    /// Closes the connection; what the mesh told is forgotten.
    pub fn disconnect(&self) -> Result<(), String> {
        let mut state = self.state.lock();
        state.connected = false;
        state.context = IPContext::default();
        self.mesh.close(&self.connection_id())
    }

    /// Forgets what the mesh told, as a new process does.
    pub fn forget(&self) {
        self.state.lock().context = IPContext::default();
    }

    /// Its own addresses, which load balancers send to.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let state = self.state.lock();
        local(&state.context).iter().map(|net| net.ip()).collect()
    }

    /// The context that the mesh answered last.
    #[must_use]
    pub fn context(&self) -> IPContext {
        self.state.lock().context.clone()
    }

    /// Datagrams and connections that its server answered.
    #[must_use]
    pub fn answered(&self) -> (u64, u64) {
        self.echo.answered()
    }

    fn tell_vips(&self, state: &mut State) -> Result<(), String> {
        let own = local(&state.context);
        let gateways = networks(&state.context.extra_prefixes);
        let vips = state.vips.iter().map(|vip| host(*vip));
        let context = &mut state.context;
        context.src_ip_addrs = (own.iter().copied().chain(vips))
            .map(|net| net.to_string())
            .collect();
        context.policies = (state.vips.iter())
            .filter_map(|vip| policy(*vip, &gateways))
            .collect();
        self.request(state)
    }

    fn request(&self, state: &mut State) -> Result<(), String> {
        let answer = self.mesh.connect(Wish {
            id: self.connection_id(),
            name: self.name.clone(),
            service: self.service.clone(),
            netns: self.netns.fd(),
            ifname: IFNAME.to_owned(),
            labels: BTreeMap::from([("nodeName".to_owned(), self.node.clone())]),
            ip_context: state.context.clone(),
        })?;
        let context = answer.context.ip_context.clone().unwrap_or_default();
        if local(&context).is_empty() {
            return Err(format!(
                "target {}: no address of its own in {context}",
                self.name
            ));
        }
        state.context = context;
        state.connected = true;
        Ok(())
    }
}

/// The source addresses inside a gateway's subnet: TAPA tells its own
/// addresses from VIPs in this way.
fn local(context: &IPContext) -> Vec<IpNetwork> {
    let gateways = networks(&context.extra_prefixes);
    let inside = |net: &IpNetwork| gateways.iter().any(|gateway| gateway.contains(net.ip()));
    networks(&context.src_ip_addrs)
        .into_iter()
        .filter(inside)
        .collect()
}

fn networks(texts: &[String]) -> Vec<IpNetwork> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

fn policy(vip: IpAddr, gateways: &[IpNetwork]) -> Option<PolicyRoute> {
    let same = |net: &&IpNetwork| net.is_ipv4() == vip.is_ipv4();
    let gateway = gateways.iter().find(same)?;
    Some(PolicyRoute {
        from: host(vip).to_string(),
        routes: vec![Route {
            prefix: any(vip).to_string(),
            nextHop: gateway.ip().to_string(),
            ..Default::default()
        }],
        ..Default::default()
    })
}
