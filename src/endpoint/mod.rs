//! The network service endpoint that targets connect to.
//!
//! ```text
//! forwarder --> TlsServer --> service (gRPC's poll thread) --> JobQueue
//!                                                                 |
//!      net <-- PortExpected / PortReleased --- nse: worker -> desk
//!     ipam <-- acquire / release later -------  |   ^ answers as jobs
//! forwarder <-- answer, events, netns --------- +---+
//!
//! nsmgr registry <-- nse-register (socket's descriptor with each attempt)
//! ```
//!
//! `desk` reads from top to bottom as what happens to one Request or Close;
//! the decisions are in `core::{targets, ip_context, registration}`.

mod authorize;
mod convert;
mod descriptor;
mod desk;
mod error;
mod feed;
mod jobs;
mod mechanism;
mod monitor;
mod path;
mod random;
mod register;
mod reply;
mod said;
mod service;
mod session;
mod worker;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use log::warn;

use crate::core::family::IpFamilies;
use crate::ipam::IpamHandle;
use crate::kernel::NetHandle;
use crate::nsm::caller::NsmCaller;
use crate::rpc::env::Rpc;
use crate::spiffe::SvidCell;
use crate::sync::stop::{Stopper, stop_pair};
use crate::sync::thread::{Joined, STACK_LARGE, STACK_SMALL, ThreadHandle, Threads};
use crate::transport::error::ServerError;
use crate::transport::server::{PeerTable, TlsServer};
pub use desk::Leases;
use desk::{Desk, DeskParts};
use jobs::JobQueue;
use random::{Random, SystemRandom};
use register::{Entry, LEAVE_GRACE, Leaving, Registrar};
use reply::Permits;
use service::Handlers;

/// What the endpoint is made of.
#[derive(Debug, Clone)]
pub struct EndpointOptions {
    /// `NSM_NAME`: the endpoint's name in the registry.
    pub name: String,
    /// `NSM_SERVICE_NAME`: the network service that it serves.
    pub service_name: String,
    /// `NSM_HOST`: the node; empty leaves the label out.
    pub node: String,
    /// `NSM_MTU`.
    pub mtu: u32,
    /// `NSM_MAX_TOKEN_LIFETIME`.
    pub token_lifetime: Duration,
    /// The families of the deployment.
    pub families: IpFamilies,
    /// Where the socket is made: `<directory>/<name><random>/listen.on`.
    pub directory: PathBuf,
}

/// The endpoint: threads `nse` and `nse-register`, and its server.
pub struct Endpoint {
    socket: PathBuf,
    server: TlsServer,
    nse: ThreadHandle,
    /// Dropped to end what `nse-register` does, with `leave_by` given before
    /// to make it unregister.
    // INVARIANT: dropped before `register` is waited for.
    leave: Option<Stopper>,
    leave_by: Sender<Instant>,
    register: ThreadHandle,
    left: Receiver<Infallible>,
}

impl Endpoint {
    /// Listens, then registers the network service and the endpoint as soon as
    /// the bridge has its addresses: a target that came before could not be
    /// answered (Meridio registers after `NewProxy`, cmd/proxy/main.go).
    ///
    /// # Errors
    ///
    /// When the socket or a thread cannot be made.
    pub fn start(
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        caller: NsmCaller,
        ipam: IpamHandle,
        net: NetHandle,
        options: EndpointOptions,
    ) -> Result<Self, ServerError> {
        Self::start_with(threads, rpc, svid, caller, Box::new(ipam), net, options)
    }

    /// [`Endpoint::start`] with a stand-in for IPAM.
    ///
    /// # Errors
    ///
    /// When the socket or a thread cannot be made.
    pub fn start_with(
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        caller: NsmCaller,
        leases: Box<dyn Leases>,
        net: NetHandle,
        options: EndpointOptions,
    ) -> Result<Self, ServerError> {
        let socket = socket_path(&options, &mut random()?)?;
        let peers = PeerTable::default();
        let (queue, woken) = JobQueue::new();
        let addressed = leases.addressed();
        let services = service::services(&Handlers {
            queue: Arc::clone(&queue),
            peers: peers.clone(),
            token_lifetime: options.token_lifetime,
            permits: Permits::default(),
        });
        let desk = Desk::new(DeskParts {
            name: options.name.clone(),
            mtu: options.mtu,
            families: options.families,
            leases,
            net,
            random: Box::new(random()?),
            queue: Arc::clone(&queue),
            netns: PathBuf::from(descriptor::NETNS),
        });
        // Before the server: a call that arrives at once finds its worker.
        let nse = threads
            .spawn("nse", STACK_LARGE, move |stop| {
                worker::run(desk, &queue, &woken, &stop);
            })
            .map_err(|error| failed("starting thread nse", &error))?;
        let server = TlsServer::start(threads, rpc, svid, socket.clone(), peers, services)?;

        let registrar = registrar(caller, options, &socket);
        let (leave, leave_rx) = stop_pair();
        let (leave_by, by) = bounded(1);
        let (left_tx, left) = bounded(0);
        let leaving = Leaving {
            leave: leave_rx,
            by,
            left: left_tx,
        };
        let register = registrar.and_then(|registrar| {
            threads
                .spawn("nse-register", STACK_SMALL, move |stop| {
                    registrar.run(&addressed, leaving, &stop);
                })
                .map_err(|error| failed("starting thread nse-register", &error))
        });
        match register {
            Ok(register) => Ok(Self {
                socket,
                server,
                nse,
                register,
                leave: Some(leave),
                leave_by,
                left,
            }),
            Err(error) => {
                stop_server(server, &socket, crate::sync::clock::now());
                Err(error)
            }
        }
    }

    /// The socket that targets' forwarders dial, for the self probe.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Leaves the registry. Returns the names of threads that did not end by
    /// `deadline`.
    #[must_use]
    pub fn unregister(&mut self, deadline: Instant) -> Vec<String> {
        if let Some(leave) = self.leave.take() {
            let _ = self.leave_by.try_send(deadline);
            leave.stop();
            // Disconnected when it is done; in time or not, the thread is
            // stopped now.
            let _ = self.left.recv_deadline(deadline);
        }
        late(&mut self.register, deadline + LEAVE_GRACE)
    }

    /// Answers open requests UNAVAILABLE and ends the server. Connections,
    /// ports and leases of targets stay.
    #[must_use]
    pub fn stop(mut self, deadline: Instant) -> Vec<String> {
        self.nse.stop();
        self.leave = None;
        self.register.stop();
        // `nse` first: it gives the answers and ends the streams that the
        // server would otherwise wait for.
        let mut names = late(&mut self.nse, deadline);
        let of_server = stop_server(self.server, &self.socket, deadline);
        names.extend(late(&mut self.register, deadline + LEAVE_GRACE));
        for handle in [self.nse, self.register] {
            if names.iter().any(|name| name == handle.name()) {
                handle.abandon();
            }
        }
        names.extend(of_server);
        names
    }
}

/// The thread's name, if it did not end in time.
fn late(handle: &mut ThreadHandle, deadline: Instant) -> Vec<String> {
    match handle.join_by(deadline) {
        Joined::Yes => Vec::new(),
        Joined::StillRunning => vec![handle.name().to_owned()],
    }
}

fn stop_server(server: TlsServer, socket: &Path, deadline: Instant) -> Vec<String> {
    let late = server.stop(deadline);
    if let Some(directory) = socket.parent()
        && let Err(error) = std::fs::remove_dir(directory)
    {
        warn!(
            "the directory {} of the endpoint's socket stays: {error}",
            directory.display()
        );
    }
    late
}

fn registrar(
    caller: NsmCaller,
    options: EndpointOptions,
    socket: &Path,
) -> Result<Registrar, ServerError> {
    let named = descriptor::open(socket)
        .map_err(|error| failed("passing on the endpoint's socket", &error))?;
    let entry = Entry {
        name: options.name,
        service_name: options.service_name,
        node: options.node,
        socket: named.fd,
        url: named.url,
    };
    Ok(Registrar::new(caller, entry, Box::new(random()?)))
}

fn random() -> Result<SystemRandom, ServerError> {
    SystemRandom::open().map_err(|error| failed("opening /dev/urandom", &error))
}

/// A directory of its own for each start: one that is still in use, or was
/// left behind, is in nobody's way.
fn socket_path(options: &EndpointOptions, random: &mut dyn Random) -> Result<PathBuf, ServerError> {
    let name = &options.name;
    if name.is_empty() || name.contains(['/', '\0']) {
        return Err(ServerError(format!(
            "{name:?} cannot be the name of a directory"
        )));
    }
    let mut bytes = [0u8; 4];
    random
        .fill(&mut bytes)
        .map_err(|error| failed("reading /dev/urandom", &error))?;
    let directory = format!("{name}{}", random::hex(&bytes));
    Ok(options.directory.join(directory).join("listen.on"))
}

fn failed(what: &str, error: &std::io::Error) -> ServerError {
    ServerError(format!("{what}: {error}"))
}
