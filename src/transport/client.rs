//! Connections that this process dials.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use grpcio::Channel;

use super::error::ConnectError;
use crate::rpc::env::Rpc;
use crate::spiffe::{Identity, PeerIdentity, SvidCell};
use crate::sync::stop::Stop;
use crate::sync::thread::Threads;
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
    /// Bound of one attempt: connect, handshake and the peer's SETTINGS.
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
/// it when the SVID was rotated. Clones share the connection.
#[derive(Clone)]
pub struct Connector {
    state: Watch<ConnectorState>,
}

impl Connector {
    /// Starts the manager thread; it dials at once.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start(
        _threads: &Threads,
        _rpc: &Rpc,
        _svid: SvidCell,
        _options: ConnectorOptions,
    ) -> std::io::Result<Self> {
        todo!()
    }

    /// The present connection, or the next one, waiting for it until
    /// `deadline` or `stop`.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub fn acquire(
        &self,
        _deadline: Instant,
        _stop: &Stop,
    ) -> Result<Arc<Connection>, ConnectError> {
        todo!()
    }

    /// The state, for health and status.
    #[must_use]
    pub fn state(&self) -> &Watch<ConnectorState> {
        &self.state
    }

    /// Ends the connection and the manager thread; later calls of `acquire`
    /// fail with `Stopped`.
    pub fn close(&self, _deadline: Instant) {
        todo!()
    }
}

/// One mTLS connection with the identities that belong to it.
pub struct Connection {
    channel: Channel,
    peer: PeerIdentity,
    identity: Arc<Identity>,
    closed: Receiver<Infallible>,
}

impl Connection {
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
    pub fn attach(&self, _fd: OwnedFd) {
        todo!()
    }

    /// Becomes ready (disconnected) when the connection has ended.
    #[must_use]
    pub fn closed(&self) -> &Receiver<Infallible> {
        &self.closed
    }

    /// Whether new calls may be started: neither ended nor draining.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        todo!()
    }
}
