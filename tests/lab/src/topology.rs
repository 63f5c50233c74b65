//! Everything together: one node with the daemon, its nsmgr and targets; the
//! services that it needs; load balancers, and a client behind a router. All
//! of it ends with the value.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use meridio_proxy::core::family::Family;
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::thread::Threads;

use crate::agent::Agent;
use crate::datapath::LocalEndpoint;
use crate::echo::PORT;
use crate::infra::{IPAM_PORT, Infra, NSP_PORT};
use crate::ipam::{Ipam, IpamOptions};
use crate::lb::{Lb, Targets};
use crate::link::{Rtnl, host};
use crate::netns::Netns;
use crate::nft;
use crate::nsmgr::{Nsmgr, NsmgrOptions, TargetRequest};
use crate::nsp::Nsp;
use crate::pki::Pki;
use crate::process::{self, Daemon, DaemonOptions};
use crate::router::Router;
use crate::target::{Mesh, Target, Wish};
use crate::traffic::{Flows, Pace};
use crate::veth::VethDatapath;
use crate::workdir::WorkDir;

mod options;
mod peers;
mod waits;

pub use options::TopologyOptions;
pub use peers::Peer;

/// How long one change may take until it is seen in the kernel.
pub const LIMIT: Duration = Duration::from_secs(20);
/// The daemon's routing table.
pub const TABLE: u32 = 1;

/// The lab. Fields end in this order: the daemon first, then its peers.
pub struct Topology {
    daemon: Option<Daemon>,
    pub targets: BTreeMap<String, Arc<Target>>,
    pub lbs: BTreeMap<String, Lb>,
    pub router: Router,
    pub nsmgr: Nsmgr,
    pub nsp: Nsp,
    pub ipam: Ipam,
    pub agent: Agent,
    pub datapath: Arc<VethDatapath>,
    pub infra: Infra,
    pub pod: Netns,
    pub rtnl: Rtnl,
    pki: Pki,
    options: TopologyOptions,
    vips: Vec<IpAddr>,
    registered: Targets,
    /// The load balancer that left last.
    left: Option<Lb>,
    next_lb: u8,
    next_target: usize,
    dir: WorkDir,
}

/// The targets' way to nsmgr.
struct NsmMesh(Nsmgr);

impl Mesh for NsmMesh {
    fn connect(&self, wish: Wish) -> Result<Connection, String> {
        self.0.connect_target(TargetRequest {
            id: wish.id,
            name: wish.name,
            service: wish.service,
            netns: wish.netns,
            ifname: wish.ifname,
            labels: wish.labels.into_iter().collect(),
            ip_context: wish.ip_context,
        })
    }

    fn close(&self, id: &str) -> Result<(), String> {
        self.0.close_target(id)
    }
}

impl Topology {
    /// Starts all peers and the daemon, waits until it is ready, then connects
    /// the targets and gives the load balancers their flows.
    pub fn start(options: TopologyOptions) -> Result<Self, String> {
        let mut topology = Self::peers(options)?;
        topology.start_daemon()?;
        for _ in 0..topology.options.lbs {
            topology.add_lb()?;
        }
        topology.wait_ready()?;
        for _ in 0..topology.options.targets {
            topology.add_target()?;
        }
        Ok(topology)
    }

    /// The peers, without the daemon, load balancers and targets.
    pub fn peers(options: TopologyOptions) -> Result<Self, String> {
        let dir = WorkDir::new().map_err(text)?;
        let pki = Pki::new("example.org");
        let ttl = options.svid_lifetime;
        let agent_socket = dir.path().join("agent.sock");
        let agent = Agent::start(&agent_socket, &pki, &pki.id("ns/red/sa/proxy"), ttl);
        let (infra, pod) = Infra::new().map_err(text)?;
        let datapath = Arc::new(VethDatapath::new());
        let nsmgr = Nsmgr::start(NsmgrOptions {
            socket: dir.path().join("nsm.io.sock"),
            trust: Arc::new(pki.clone()),
            node: options.node.clone(),
            datapath: datapath.clone(),
            token_lifetime: options.token_lifetime,
        })?;
        let ipam_options = IpamOptions::new(&options.trench, &options.conduit);
        let ipam = Ipam::new(&Threads::unsupervised(), &ipam_options)?;
        let nsp = Nsp::new(&options.trench);
        let used = |vip: &&IpAddr| options.families.has(Family::from(**vip));
        let vips = options.vips.iter().filter(used).copied().collect();
        let topology = Self {
            daemon: None,
            targets: BTreeMap::new(),
            lbs: BTreeMap::new(),
            router: Router::new().map_err(text)?,
            nsmgr,
            nsp,
            ipam,
            agent,
            datapath,
            infra,
            rtnl: Rtnl::open(&pod).map_err(text)?,
            pod,
            pki,
            options,
            vips,
            registered: Targets::new(),
            left: None,
            next_lb: 1,
            next_target: 1,
            dir,
        };
        topology.start_ipam()?;
        topology.start_nsp()?;
        topology.tell_vips();
        Ok(topology)
    }

    /// IPAM serves (again), with the table that it has.
    pub fn start_ipam(&self) -> Result<(), String> {
        let listener = self.infra.listen(IPAM_PORT).map_err(text)?;
        let svid = self.identity("ipam");
        (self.ipam).serve(&Threads::unsupervised(), &Rpc::new(), svid, listener)
    }

    /// NSP serves (again), with the VIPs that it has.
    pub fn start_nsp(&self) -> Result<(), String> {
        let listener = self.infra.listen(NSP_PORT).map_err(text)?;
        let svid = self.identity("nsp");
        (self.nsp).serve(&Threads::unsupervised(), &Rpc::new(), svid, listener)
    }

    fn identity(&self, account: &str) -> SvidCell {
        let id = self.pki.id(&format!("ns/red/sa/{account}"));
        self.pki.cell(&id, self.options.svid_lifetime)
    }

    /// The network service that targets ask for.
    #[must_use]
    pub fn proxy_service(&self) -> String {
        format!("proxy.{}", self.lb_service())
    }

    /// The network service that load balancers offer.
    #[must_use]
    pub fn lb_service(&self) -> String {
        let options = &self.options;
        format!(
            "{}.{}.{}",
            options.conduit, options.trench, options.namespace
        )
    }

    /// The running daemon.
    pub fn daemon(&self) -> Result<&Daemon, String> {
        (self.daemon.as_ref()).ok_or_else(|| "the daemon is not running".to_owned())
    }

    /// The authority that everyone's certificate is of.
    #[must_use]
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// The socket that the daemon's endpoint listens on.
    pub fn endpoint_socket(&self) -> Result<PathBuf, String> {
        let tmp = self.dir.path().join("tmp");
        let entries = std::fs::read_dir(&tmp).map_err(text)?.flatten();
        let mut sockets = entries.map(|entry| entry.path().join("listen.on"));
        (sockets.find(|path| path.exists()))
            .ok_or_else(|| format!("no socket of an endpoint below {}", tmp.display()))
    }

    /// The VIPs now.
    #[must_use]
    pub fn vips(&self) -> &[IpAddr] {
        &self.vips
    }

    /// Starts the daemon; does not wait for anything.
    pub fn start_daemon(&mut self) -> Result<(), String> {
        let service = self.infra.address();
        let options = &self.options;
        let nsp_name = format!("nsp-service-{}.{}", options.trench, options.namespace);
        let (binary, args) = match &options.program {
            Some(program) => program.clone(),
            None => (process::binary().map_err(text)?, Vec::new()),
        };
        let started = Daemon::start(&DaemonOptions {
            binary,
            args,
            env: self.environment(),
            netns: self.pod.clone(),
            hosts: vec![(service, nsp_name), (service, "ipam-service".to_owned())],
            log: process::log_file(),
            descriptors: options.descriptors,
            dir: self.dir.path().to_owned(),
        });
        self.daemon = Some(started.map_err(text)?);
        Ok(())
    }

    /// Waits until the readiness probe succeeds.
    pub fn wait_ready(&self) -> Result<(), String> {
        let daemon = self.daemon()?;
        daemon.wait_health("Readiness", LIMIT).map_err(|error| {
            format!(
                "the daemon does not get ready: {error}\n{}\nrefusals: {:?}",
                daemon.tail(30),
                self.nsmgr.refusals()
            )
        })
    }

    /// Kills the daemon without any warning.
    pub fn kill_daemon(&mut self) -> Result<(), String> {
        let daemon = self.daemon.take();
        daemon.map_or(Ok(()), |daemon| daemon.kill().map_err(text))
    }

    /// Stops the daemon as Kubernetes does; returns what it ended with.
    pub fn stop_daemon(&mut self, limit: Duration) -> Result<Daemon, String> {
        let daemon = self.daemon.take().ok_or("the daemon is not running")?;
        match daemon.terminate(limit) {
            Some(_) => Ok(daemon),
            None => Err(format!("no end within {limit:?}:\n{}", daemon.tail(30))),
        }
    }

    /// Adds a load balancer and waits until it is a next hop; then the router
    /// gives it flows. Returns its name.
    pub fn add_lb(&mut self) -> Result<String, String> {
        let name = self.make_lb()?;
        self.wait_hops()?;
        self.spread(|_| true)?;
        Ok(name)
    }

    /// Adds and registers a load balancer; does not wait for anything.
    pub fn make_lb(&mut self) -> Result<String, String> {
        let number = self.next_lb;
        self.next_lb += 1;
        let lb = Lb::new(&format!("lb-{number}"), number).map_err(text)?;
        let name = lb.name().to_owned();
        (self.router.attach(&name, number, lb.namespace())).map_err(text)?;
        lb.set_targets(&self.registered).map_err(text)?;
        let endpoint: Arc<dyn LocalEndpoint> = Arc::new(lb.clone());
        self.nsmgr.add_endpoint(&self.lb_service(), endpoint);
        self.lbs.insert(name.clone(), lb);
        Ok(name)
    }

    /// Removes a load balancer in good order: the router first, then the
    /// registry; it stays until the daemon has closed the connection.
    pub fn remove_lb(&mut self, name: &str) -> Result<(), String> {
        self.spread(|lb| lb != name)?;
        self.nsmgr.unregister_endpoint(name);
        let gone = self.lbs.remove(name);
        self.wait_hops()?;
        let end = format!("-{name}");
        self.wait("end of the connection", || {
            let links = self.rtnl.links()?;
            let port = |alias: &str| alias.starts_with("server-") && alias.ends_with(&end);
            Ok(!links.iter().any(|link| port(&link.alias)))
        })?;
        self.nsmgr.remove_endpoint(name);
        // What it has in its queues still goes out; it ends with the next one
        // that leaves, or with the lab.
        let left = std::mem::replace(&mut self.left, gone);
        let name = left.as_ref().map(|lb| lb.name().to_owned());
        name.map_or(Ok(()), |name| self.router.detach(&name))
            .map_err(text)
    }

    /// Adds and connects a target; its addresses become known to the load
    /// balancers. Returns its name.
    pub fn add_target(&mut self) -> Result<String, String> {
        let name = self.make_target()?;
        self.start_target(&name)?;
        Ok(name)
    }

    /// Adds a target that is not connected yet.
    pub fn make_target(&mut self) -> Result<String, String> {
        let name = format!("target-{}", self.next_target);
        self.next_target += 1;
        let mesh: Arc<dyn Mesh> = Arc::new(NsmMesh(self.nsmgr.clone()));
        let target = Target::new(&name, &self.proxy_service(), &self.options.node, mesh);
        let target = target.map_err(text)?;
        target.set_vips(&self.vips)?;
        self.targets.insert(name.clone(), Arc::new(target));
        Ok(name)
    }

    /// Connects a target (again) and registers it.
    pub fn start_target(&mut self, name: &str) -> Result<(), String> {
        let target = self.target(name)?;
        target.connect()?;
        self.wait_port(&target.connection_id())?;
        self.register(name)
    }

    /// The load balancers send to this target, at the addresses that it has
    /// now.
    pub fn register(&mut self, name: &str) -> Result<(), String> {
        let addresses = self.target(name)?.addresses();
        self.registered.insert(name.to_owned(), addresses);
        self.tell_lbs()
    }

    /// The load balancers send nothing more to this target.
    pub fn unregister(&mut self, name: &str) -> Result<(), String> {
        self.registered.remove(name);
        self.tell_lbs()
    }

    /// Unregisters a target and closes its connection.
    pub fn stop_target(&mut self, name: &str) -> Result<(), String> {
        self.unregister(name)?;
        self.target(name)?.disconnect()
    }

    /// Adds a VIP everywhere and waits until the daemon routes it.
    pub fn add_vip(&mut self, vip: IpAddr) -> Result<(), String> {
        self.vips.push(vip);
        for target in self.targets.values() {
            target.set_vips(&self.vips)?;
        }
        self.tell_vips();
        self.wait_vip(vip, true)
    }

    /// Removes a VIP everywhere and waits until the daemon has done so, too.
    pub fn remove_vip(&mut self, vip: IpAddr) -> Result<(), String> {
        self.vips.retain(|known| *known != vip);
        self.tell_vips();
        self.wait_vip(vip, false)?;
        for target in self.targets.values() {
            target.set_vips(&self.vips)?;
        }
        Ok(())
    }

    /// Packets of VIPs that came to the pod's kernel, and for which it had no IPv6
    /// route: a multipath route is replaced hop by hop, and a packet that comes in
    /// between may find none (net/ipv6/route.c, `ip6_route_multipath_add`). What
    /// the fallback route drops, no counter of the kernel tells.
    pub fn without_ipv6_route(&self) -> Result<u64, String> {
        let counters = nft::counters(&self.pod).map_err(text)?;
        let count = |name: &str| {
            (counters.get(name).copied()).ok_or_else(|| format!("no counter {name} in the pod"))
        };
        // The two are not read in the same moment.
        Ok(count("vip6_in")?.saturating_sub(count("vip6_routed")?))
    }

    /// Starts steady traffic: so many flows to each VIP, all answered once.
    pub fn steady(&self, pace: &Pace, flows: usize) -> Result<Flows, String> {
        let traffic = Flows::start(self.router.client(), pace).map_err(text)?;
        for vip in &self.vips {
            traffic.add(destination(*vip), flows).map_err(text)?;
        }
        if traffic.all_answered_since(traffic.mark(), LIMIT) {
            return Ok(traffic);
        }
        let step = traffic.step(traffic.mark());
        Err(format!("not every flow is answered at first: {step}"))
    }

    fn target(&self, name: &str) -> Result<Arc<Target>, String> {
        let known = self.targets.get(name).map(Arc::clone);
        known.ok_or_else(|| format!("no target {name}"))
    }

    fn spread(&self, chosen: impl Fn(&str) -> bool) -> Result<(), String> {
        let names: Vec<String> = (self.lbs.keys())
            .filter(|name| chosen(name))
            .cloned()
            .collect();
        self.router.spread_over(&names).map_err(text)
    }

    fn tell_lbs(&self) -> Result<(), String> {
        (self.lbs.values())
            .try_for_each(|lb| lb.set_targets(&self.registered))
            .map_err(text)
    }

    fn tell_vips(&self) {
        let texts: Vec<String> = self.vips.iter().map(|vip| host(*vip).to_string()).collect();
        self.nsp.set_vips(texts.iter().map(String::as_str));
    }
}

/// Where a VIP's servers answer.
#[must_use]
pub fn destination(vip: IpAddr) -> SocketAddr {
    SocketAddr::new(vip, PORT)
}

fn text(error: io::Error) -> String {
    error.to_string()
}
