//! Everything that the daemon is made of: the only file that knows all edges.
//!
//! Each part is started when what it needs is there, and stopped in the stage
//! of [`Stage`] that it belongs to. A start that fails half-way, or is
//! interrupted, is stopped by the same stages: what was not started is skipped.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use log::info;

use super::bridge_mac::bridge_mac;
use super::shutdown::Stage;
use super::{Cause, Control};
use crate::config::Config;
use crate::endpoint::{Endpoint, EndpointOptions};
use crate::health::HealthCell;
use crate::health::probe::{self, ProbeOptions};
use crate::health::server::HealthServer;
use crate::ipam::{Ipam, IpamHandle, IpamOptions};
use crate::kernel::{Kernel, KernelOptions, NetHandle};
use crate::nsm::caller::NsmCaller;
use crate::nsm::{ConnectionLog, LbMesh, LbOptions};
use crate::nsp;
use crate::rpc::env::Rpc;
use crate::spiffe::SvidCell;
use crate::spiffe::workload::{self, WorkloadAddress};
use crate::sync::thread::{Joined, ThreadHandle, Threads};
use crate::transport::client::{self, Connector, ConnectorOptions};

/// Where the exec probes of the deployment ask (Meridio pkg/health/const.go).
const HEALTH_SOCKET: &str = "/tmp/health.sock";
/// The one writable directory of the container.
const SOCKET_DIRECTORY: &str = "/tmp";
/// Longest pause between attempts to connect to nsmgr. It is on this node, and
/// until it is back and told again, no target of this node finds the endpoint.
const NSMGR_BACKOFF_MAX: Duration = Duration::from_secs(1);

/// All parts; `None` is not started, or stopped.
pub(super) struct Parts {
    rpc: Rpc,
    svid: SvidCell,
    health: HealthCell,
    health_server: Option<HealthServer>,
    svid_watch: Option<ThreadHandle>,
    connectors: Vec<Connector>,
    kernel: Option<Kernel>,
    ipam: Option<Ipam>,
    vip_watch: Option<ThreadHandle>,
    connection_log: Option<ThreadHandle>,
    lb_mesh: Option<LbMesh>,
    endpoint: Option<Endpoint>,
    probe: Option<ThreadHandle>,
}

/// The cause of a failed start of `what`.
fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Cause {
    move |error| Cause::Start(what, error.to_string())
}

impl Parts {
    /// Nothing is started but gRPC's poll threads.
    pub(super) fn new() -> Self {
        Self {
            rpc: Rpc::new(),
            svid: SvidCell::new(None),
            health: HealthCell::new(),
            health_server: None,
            svid_watch: None,
            connectors: Vec::new(),
            kernel: None,
            ipam: None,
            vip_watch: None,
            connection_log: None,
            lb_mesh: None,
            endpoint: None,
            probe: None,
        }
    }

    /// Starts everything. Waits for the first SVID alone: without an identity
    /// there is no peer to talk to. All else that takes time, such as the
    /// bridge's addresses, is waited for by the threads that need it.
    pub(super) fn start(
        &mut self,
        config: &Config,
        threads: &Threads,
        control: &Control,
    ) -> Result<(), Cause> {
        self.health_server = Some(
            HealthServer::start(&self.rpc, Path::new(HEALTH_SOCKET), &self.health)
                .map_err(failed("the health server"))?,
        );
        info!(socket = HEALTH_SOCKET; "Health server listens");
        // Before the identity, which may take long: what a predecessor left is
        // kept right meanwhile, and a missing capability is told at once.
        let net = self.start_kernel(config, threads)?;
        self.identify(config, threads, control)?;

        let ipam_service = config.ipam_service.clone();
        let nsp_service = config.nsp_service();
        let connect = |name, address, authority| ConnectorOptions {
            name,
            address,
            authority,
            dial_timeout: config.dial_timeout,
            backoff_max: config.grpc_max_backoff,
        };
        let (ipam_at, nsp_at) = (ipam_service.to_string(), nsp_service.to_string());
        let ipam = self.connect(threads, connect("ipam", ipam_service.into(), ipam_at))?;
        let nsp = self.connect(threads, connect("nsp", nsp_service.into(), nsp_at))?;
        let nsmgr = connect("nsmgr", config.connect_to.clone(), config.nsmgr_authority());
        let nsmgr = ConnectorOptions {
            backoff_max: nsmgr.backoff_max.min(NSMGR_BACKOFF_MAX),
            ..nsmgr
        };
        let nsmgr = self.connect(threads, nsmgr)?;

        let leases = self.start_ipam(config, threads, ipam.clone(), net.clone())?;
        self.vip_watch = Some(
            nsp::start(threads, nsp.clone(), net.clone(), &config.trench)
                .map_err(failed("the VIP watch"))?,
        );
        let caller = NsmCaller::new(nsmgr, config.max_token_lifetime);
        self.connection_log = Some(
            ConnectionLog::start(threads, caller.clone(), config.name.clone())
                .map_err(failed("the connection log"))?,
        );
        self.start_mesh(config, threads, caller.clone(), leases.clone(), net.clone())?;
        self.start_endpoint(config, threads, caller, leases, net)?;
        self.start_probe(config, threads, ipam, nsp)
    }

    /// Waits for the first SVID, however long SPIRE takes.
    fn identify(
        &mut self,
        config: &Config,
        threads: &Threads,
        control: &Control,
    ) -> Result<(), Cause> {
        let address = config.spiffe_endpoint_socket.clone();
        let shown = match &address {
            WorkloadAddress::Unix(path) => format!("unix://{}", path.display()),
            WorkloadAddress::Tcp(socket) => format!("tcp://{socket}"),
        };
        info!(address = shown; "Waiting for the first SVID");
        let watch = workload::start(threads, &self.rpc, address, self.svid.clone())
            .map_err(failed("the SVID watch"))?;
        self.svid_watch = Some(watch);
        let changes = self.svid.subscribe();
        match control.wait_for(&changes, || self.svid.get().is_some()) {
            Some(cause) => Err(cause),
            None => Ok(()),
        }
    }

    fn connect(
        &mut self,
        threads: &Threads,
        options: ConnectorOptions,
    ) -> Result<Connector, Cause> {
        let (name, address) = (options.name, options.address.to_string());
        let connector = Connector::start(threads, &self.rpc, self.svid.clone(), options)
            .map_err(failed("a connection"))?;
        info!(service = name, address; "Connecting");
        self.connectors.push(connector.clone());
        Ok(connector)
    }

    fn start_kernel(&mut self, config: &Config, threads: &Threads) -> Result<NetHandle, Cause> {
        let bridge_mac = bridge_mac(
            &config.namespace,
            &config.trench,
            &config.conduit,
            &config.host,
        );
        let options = KernelOptions {
            families: config.ip_family,
            bridge_mac,
        };
        let kernel = Kernel::start(threads, options, self.health.clone())
            .map_err(|error| Cause::Start("the data plane", error.0))?;
        info!("Data plane started");
        Ok(self.kernel.insert(kernel).handle())
    }

    fn start_ipam(
        &mut self,
        config: &Config,
        threads: &Threads,
        connector: Connector,
        net: NetHandle,
    ) -> Result<IpamHandle, Cause> {
        let options = IpamOptions {
            trench: config.trench.clone(),
            conduit: config.conduit.clone(),
            node: config.host.clone(),
            families: config.ip_family,
            release_delay: config.ip_release_delay,
            renew_interval: config.bridge_ip_renew_interval,
        };
        let ipam =
            Ipam::start(threads, connector, net, options).map_err(failed("the IPAM client"))?;
        info!("IPAM client started");
        Ok(self.ipam.insert(ipam).handle())
    }

    fn start_mesh(
        &mut self,
        config: &Config,
        threads: &Threads,
        caller: NsmCaller,
        ipam: IpamHandle,
        net: NetHandle,
    ) -> Result<(), Cause> {
        let options = LbOptions {
            name: config.name.clone(),
            network_service: config.network_service_name.clone(),
            request_timeout: config.request_timeout,
            mtu: config.mtu,
            families: config.ip_family,
        };
        let mesh = LbMesh::start(threads, caller, ipam, net, options)
            .map_err(failed("the discovery of load balancers"))?;
        self.lb_mesh = Some(mesh);
        info!(service = config.network_service_name.as_str(); "Looking for load balancers");
        Ok(())
    }

    fn start_endpoint(
        &mut self,
        config: &Config,
        threads: &Threads,
        caller: NsmCaller,
        ipam: IpamHandle,
        net: NetHandle,
    ) -> Result<(), Cause> {
        let options = EndpointOptions {
            name: config.name.clone(),
            service_name: config.service_name.clone(),
            node: config.host.clone(),
            mtu: config.mtu,
            token_lifetime: config.max_token_lifetime,
            families: config.ip_family,
            directory: SOCKET_DIRECTORY.into(),
        };
        let svid = self.svid.clone();
        let endpoint = Endpoint::start(threads, &self.rpc, svid, caller, ipam, net, options)
            .map_err(|error| Cause::Start("the endpoint", error.0))?;
        let endpoint = self.endpoint.insert(endpoint);
        let socket = endpoint.socket().display().to_string();
        info!(service = config.service_name.as_str(), socket; "Endpoint listens");
        Ok(())
    }

    fn start_probe(
        &mut self,
        config: &Config,
        threads: &Threads,
        ipam: Connector,
        nsp: Connector,
    ) -> Result<(), Cause> {
        let socket = self.endpoint.as_ref().map(Endpoint::socket);
        let options = ProbeOptions {
            ipam,
            nsp,
            keepalive: config.grpc_keepalive_time,
            endpoint: socket.unwrap_or(Path::new("")).to_owned(),
            endpoint_timeout: config.grpc_probe_rpc_timeout,
        };
        let (svid, cell) = (self.svid.clone(), self.health.clone());
        let probe = probe::start(threads, &self.rpc, svid, cell, options)
            .map_err(failed("the health probe"))?;
        self.probe = Some(probe);
        Ok(())
    }

    /// Does a stage of the stop; returns the names of what was not done by
    /// `deadline`.
    pub(super) fn stop(&mut self, stage: Stage, deadline: Instant) -> Vec<String> {
        match stage {
            Stage::Quiet => {
                self.health.stopping();
                let watchers = [
                    self.vip_watch.take(),
                    self.probe.take(),
                    self.connection_log.take(),
                ];
                join(watchers, deadline)
            }
            Stage::Unregister => self
                .endpoint
                .as_mut()
                .map_or_else(Vec::new, |endpoint| endpoint.unregister(deadline)),
            Stage::Endpoint => stopped(self.endpoint.take(), |part| part.stop(deadline)),
            Stage::LoadBalancers => stopped(self.lb_mesh.take(), |part| part.stop(deadline)),
            Stage::Kernel => stopped(self.kernel.take(), |part| part.stop(deadline)),
            Stage::Ipam => stopped(self.ipam.take(), |part| part.stop(deadline)),
            Stage::Transport => self.stop_transport(deadline),
        }
    }

    fn stop_transport(&mut self, deadline: Instant) -> Vec<String> {
        if let Some(watch) = &mut self.svid_watch {
            watch.stop();
        }
        let mut late = client::close_all(&self.connectors, deadline);
        self.connectors.clear();
        if let Some(server) = self.health_server.take() {
            server.stop();
        }
        late.extend(join([self.svid_watch.take()], deadline));
        late
    }
}

fn stopped<T>(part: Option<T>, stop: impl FnOnce(T) -> Vec<String>) -> Vec<String> {
    part.map_or_else(Vec::new, stop)
}

/// Stops all threads, then waits for each; returns those still running, which
/// are left alone.
fn join<const N: usize>(threads: [Option<ThreadHandle>; N], deadline: Instant) -> Vec<String> {
    let mut threads: Vec<_> = threads.into_iter().flatten().collect();
    threads.iter_mut().for_each(ThreadHandle::stop);
    let mut late = Vec::new();
    for mut thread in threads {
        if thread.join_by(deadline) == Joined::StillRunning {
            late.push(thread.name().to_owned());
            thread.abandon();
        }
    }
    late
}
