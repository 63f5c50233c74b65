//! Connections that this process dials.

use std::convert::Infallible;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, select};
use grpcio::Channel;
use log::warn;
use parking_lot::Mutex;

use super::dial;
pub use super::dial::Resolve;
use super::dialer::Dialer;
use super::error::ConnectError;
use super::link::LinkHandle;
use super::relay::end_by;
use crate::rpc::env::Rpc;
use crate::spiffe::{Identity, PeerIdentity, SvidCell};
use crate::sync::clock;
use crate::sync::poll::WakeFd;
use crate::sync::stop::{Stop, Stopper, stop_pair};
use crate::sync::thread::{STACK_LARGE, ThreadHandle, Threads};
use crate::sync::watch::Watch;

/// Where a peer listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket; descriptors can be passed.
    Unix(PathBuf),
    /// A host name or IP address and a port; resolved at each dial, all
    /// addresses tried in order.
    Tcp {
        /// Name or literal address.
        host: String,
        /// Port.
        port: u16,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// How a [`Connector`] behaves.
#[derive(Debug, Clone)]
pub struct ConnectorOptions {
    /// Names the peer in log lines and threads (`conn-<name>`): at most 10
    /// bytes, e.g. `nsmgr`.
    pub name: &'static str,
    /// Where the peer listens.
    pub address: Address,
    /// The `:authority` of its calls: `localhost` for unix sockets, host:port
    /// for TCP, as grpc-go does.
    pub authority: String,
    /// Bound of one attempt, once the name is resolved: connect, handshake and
    /// the peer's SETTINGS.
    pub dial_timeout: Duration,
    /// Cap of the pause between attempts (`NSM_GRPC_MAX_BACKOFF`).
    pub backoff_max: Duration,
}

/// Whether a [`Connector`] has a usable connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectorState {
    /// None at present; why the last attempt failed, if one did.
    Connecting {
        /// The failure.
        last_error: Option<String>,
    },
    /// The peer's first SETTINGS arrived.
    Ready,
}

/// Keeps one connection to a peer: dials, re-dials with back-off, and replaces
/// it when the SVID was rotated. Clones share the connection; dropping the last
/// one ends it.
#[derive(Clone)]
pub struct Connector {
    state: Watch<ConnectorState>,
    shared: Arc<Shared>,
}

struct Shared {
    current: Watch<Option<Arc<Connection>>>,
    /// Ends the waits of `acquire`.
    ended: Stop,
    running: Mutex<Option<Running>>,
}

struct Running {
    /// INVARIANT: dropped, or stopped, before `wake` is given.
    thread: ThreadHandle,
    ended: Option<Stopper>,
    wake: Arc<WakeFd>,
}

impl Connector {
    /// Starts the dialer thread `conn-<name>`, with the relay `tls-<name>`; it
    /// dials at once, or as soon as there is an identity.
    ///
    /// # Errors
    ///
    /// When the threads cannot be started.
    pub fn start(
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        options: ConnectorOptions,
    ) -> std::io::Result<Self> {
        Self::start_with(threads, rpc, svid, options, Arc::new(dial::resolve))
    }

    /// [`Connector::start`] with a stand-in for the system's resolver.
    ///
    /// # Errors
    ///
    /// When the threads cannot be started.
    pub fn start_with(
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        options: ConnectorOptions,
        resolve: Arc<Resolve>,
    ) -> std::io::Result<Self> {
        let state = Watch::new(ConnectorState::Connecting { last_error: None });
        let current = Watch::new(None);
        let (stopper, ended) = stop_pair();
        let name = format!("conn-{}", options.name);
        let dialer = Dialer::new(
            threads,
            rpc.clone(),
            svid,
            options,
            resolve,
            state.clone(),
            current.clone(),
        )?;
        let wake = Arc::clone(dialer.wake());
        // Large, since the C library resolves names on it.
        let thread = threads.spawn(&name, STACK_LARGE, move |stop| dialer.run(&stop))?;
        let running = Mutex::new(Some(Running {
            thread,
            ended: Some(stopper),
            wake,
        }));
        Ok(Self {
            state,
            shared: Arc::new(Shared {
                current,
                ended,
                running,
            }),
        })
    }

    /// The present connection, or the next one, waiting for it until
    /// `deadline` or `stop`.
    ///
    /// Hold the returned reference for as long as a call runs on the
    /// connection: when the SVID is rotated, the old connection ends as soon as
    /// nobody holds it (at the latest [`DRAIN_LIMIT`] after the rotation).
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub fn acquire(&self, deadline: Instant, stop: &Stop) -> Result<Arc<Connection>, ConnectError> {
        let shared = &self.shared;
        let mut changed = None;
        loop {
            if stop.is_set() || shared.ended.is_set() {
                return Err(ConnectError::Stopped);
            }
            if let Some(connection) = shared.current.get()
                && connection.is_usable()
            {
                return Ok(connection);
            }
            let changed = changed.get_or_insert_with(|| shared.current.subscribe());
            let left = deadline.saturating_duration_since(clock::now());
            select! {
                recv(changed) -> _ => {}
                recv(stop.receiver()) -> _ => {}
                recv(shared.ended.receiver()) -> _ => {}
                default(left) => return Err(ConnectError::Deadline(self.obstacle())),
            }
        }
    }

    /// The present connection, for a thread that must not wait.
    ///
    /// # Errors
    ///
    /// `Deadline` with the present obstacle when there is none; `Stopped`.
    pub fn current(&self) -> Result<Arc<Connection>, ConnectError> {
        if self.shared.ended.is_set() {
            return Err(ConnectError::Stopped);
        }
        let connection = self.shared.current.get();
        connection
            .filter(|connection| connection.is_usable())
            .ok_or_else(|| ConnectError::Deadline(self.obstacle()))
    }

    /// What stands in the way of a connection at present.
    fn obstacle(&self) -> String {
        match self.state.get() {
            ConnectorState::Connecting {
                last_error: Some(error),
            } => error,
            ConnectorState::Connecting { last_error: None } => "no connection yet".to_owned(),
            ConnectorState::Ready => "the connection is ending".to_owned(),
        }
    }

    /// The state, for health and status.
    #[must_use]
    pub fn state(&self) -> &Watch<ConnectorState> {
        &self.state
    }

    /// Ends the connection and the dialer thread; later calls of `acquire`
    /// fail with `Stopped`. The thread's name when it did not end by `deadline`;
    /// it is left alone then.
    pub fn close(&self, deadline: Instant) -> Option<String> {
        self.stop();
        let running = self.shared.running.lock().take()?;
        let late = end_by(running.thread, deadline);
        if let Some(thread) = &late {
            // Resolving a name is the one thing that cannot be broken off.
            warn!(thread = thread.as_str(); "connection dialer did not end in time");
        }
        late
    }

    /// Tells the dialer thread to stop, without waiting.
    fn stop(&self) {
        if let Some(running) = self.shared.running.lock().as_mut() {
            running.ended = None;
            running.thread.stop();
            running.wake.wake();
        }
    }
}

/// Closes all of them at the same time. Returns the names of the threads that
/// did not end by `deadline`.
pub fn close_all(connectors: &[Connector], deadline: Instant) -> Vec<String> {
    connectors.iter().for_each(Connector::stop);
    let late = connectors.iter().map(|one| one.close(deadline));
    late.flatten().collect()
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(mut running) = self.running.lock().take() {
            running.thread.stop();
            running.wake.wake();
        }
    }
}

/// How long an old connection may outlive its replacement.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// One mTLS connection with the identities that belong to it.
pub struct Connection {
    channel: Channel,
    peer: PeerIdentity,
    identity: Arc<Identity>,
    link: Arc<LinkHandle>,
}

impl Connection {
    pub(super) fn new(
        channel: Channel,
        peer: PeerIdentity,
        identity: Arc<Identity>,
        link: Arc<LinkHandle>,
    ) -> Self {
        Self {
            channel,
            peer,
            identity,
            link,
        }
    }

    /// The channel for calls. Never ask it for its connectivity state: gRPC
    /// aborts the process for a channel made from a descriptor.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Who the peer is.
    #[must_use]
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// The own identity that was presented in this session, whose key signs
    /// the tokens that travel on it.
    #[must_use]
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Queues a descriptor; it leaves with the next bytes, hence before a call
    /// started after this. Dropped on TCP.
    pub fn attach(&self, fd: OwnedFd) {
        self.link.attach(fd);
    }

    /// Becomes ready (disconnected) when the connection has ended.
    #[must_use]
    pub fn closed(&self) -> &Receiver<Infallible> {
        self.link.closed()
    }

    /// Whether new calls may be started: neither ended nor draining.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.link.is_open()
    }

    /// Whether the connection ceases to be usable within `limit`: right after a
    /// call failed, what ends the connection may still be on its way.
    #[must_use]
    pub fn ends_within(&self, limit: Duration) -> bool {
        let changed = self.link.state().subscribe();
        let deadline = clock::now() + limit;
        while self.is_usable() {
            if changed.recv_deadline(deadline).is_err() {
                return !self.is_usable();
            }
        }
        true
    }

    pub(super) fn link(&self) -> &Arc<LinkHandle> {
        &self.link
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.link.request_close();
    }
}
