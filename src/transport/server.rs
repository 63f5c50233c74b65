//! Connections that peers make to this process.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use grpcio::Service;

use super::error::ServerError;
use crate::rpc::env::Rpc;
use crate::spiffe::{Identity, PeerIdentity, SvidCell};
use crate::sync::thread::Threads;

/// A verified connection that a peer made.
pub struct PeerConnection {
    /// Who the peer is.
    pub peer: PeerIdentity,
    /// The own identity presented to it, whose key signs tokens for it.
    pub identity: Arc<Identity>,
}

impl PeerConnection {
    /// Queues a descriptor; it leaves with the next bytes, hence before an
    /// answer completed after this.
    pub fn attach(&self, _fd: OwnedFd) {
        todo!()
    }
}

/// Finds the connection that a call came on.
#[derive(Clone, Default)]
pub struct PeerTable {}

impl PeerTable {
    /// The connection of `RpcContext::peer()`; `None` when it has ended, and
    /// the call must then be refused.
    #[must_use]
    pub fn lookup(&self, _rpc_peer: &str) -> Option<Arc<PeerConnection>> {
        todo!()
    }
}

/// A listening mTLS server.
pub struct TlsServer {}

impl TlsServer {
    /// Listens on the unix socket `path` (made with its directory, mode 0777,
    /// a stale file removed) and serves `services`.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made, or a thread cannot be started.
    pub fn start(
        _threads: &Threads,
        _rpc: &Rpc,
        _svid: SvidCell,
        _path: PathBuf,
        _peers: PeerTable,
        _services: Vec<Service>,
    ) -> Result<Self, ServerError> {
        todo!()
    }

    /// Stops accepting, lets running calls end until `deadline`, then cancels
    /// them, ends all connections, and removes the socket.
    pub fn stop(self, _deadline: Instant) {
        todo!()
    }
}
