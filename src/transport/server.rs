//! Connections that peers make to this process.

use std::collections::HashMap;
use std::net::TcpListener;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use grpcio::{Server, Service};
use log::{info, warn};
use parking_lot::Mutex;

use super::accept::Acceptor;
use super::error::ServerError;
use super::link::LinkHandle;
use super::listener::Listener;
use super::relay::{Relay, end_by};
use crate::rpc::env::Rpc;
use crate::rpc::server::shut_down;
use crate::spiffe::{Identity, PeerIdentity, SvidCell};
use crate::sync::clock;
use crate::sync::poll::WakeFd;
use crate::sync::thread::{STACK_LARGE, ThreadHandle, Threads};

/// How long threads may take to end after all calls have.
const THREAD_LIMIT: Duration = Duration::from_millis(500);

/// A verified connection that a peer made.
pub struct PeerConnection {
    /// Who the peer is.
    pub peer: PeerIdentity,
    /// The own identity presented to it, whose key signs tokens for it.
    pub identity: Arc<Identity>,
    link: Arc<LinkHandle>,
}

impl PeerConnection {
    pub(super) fn new(peer: PeerIdentity, identity: Arc<Identity>, link: Arc<LinkHandle>) -> Self {
        Self {
            peer,
            identity,
            link,
        }
    }

    /// Queues a descriptor; it leaves with the next bytes, hence before an
    /// answer completed after this. Dropped on TCP.
    pub fn attach(&self, fd: OwnedFd) {
        self.link.attach(fd);
    }
}

/// Finds the connection that a call came on. gRPC names a connection that was
/// given to it as a descriptor `fd:<number>`, and keeps the number in use as
/// long as a call of the connection lives.
#[derive(Clone, Default)]
pub struct PeerTable(Arc<Mutex<HashMap<RawFd, Arc<PeerConnection>>>>);

impl PeerTable {
    /// The connection of `RpcContext::peer()`; `None` when it has ended, and
    /// the call must then be refused. To be asked when the handler is entered.
    #[must_use]
    pub fn lookup(&self, rpc_peer: &str) -> Option<Arc<PeerConnection>> {
        let fd: RawFd = rpc_peer.strip_prefix("fd:")?.parse().ok()?;
        self.0.lock().get(&fd).cloned()
    }

    pub(super) fn len(&self) -> usize {
        self.0.lock().len()
    }

    pub(super) fn insert(&self, fd: RawFd, connection: Arc<PeerConnection>) {
        let old = self.0.lock().insert(fd, connection);
        drop(old);
    }

    /// Only if the entry is still this connection's: gRPC may have closed the
    /// descriptor, and the number may be in use again, before its relay noticed.
    pub(super) fn remove(&self, fd: RawFd, connection: &Arc<PeerConnection>) {
        let mut table = self.0.lock();
        if table
            .get(&fd)
            .is_some_and(|found| Arc::ptr_eq(found, connection))
        {
            table.remove(&fd);
        }
    }
}

/// A listening mTLS server, with the threads `tls-accept` and `relay-in`,
/// however many connections there are.
pub struct TlsServer {
    /// `None` when it was stopped.
    accept: Option<ThreadHandle>,
    wake: Arc<WakeFd>,
    server: Arc<Mutex<Option<Server>>>,
    relay: Arc<Relay>,
}

impl TlsServer {
    /// Listens on the unix socket `path` (made with its directory, mode 0777,
    /// a stale file removed) and serves `services`.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made, or a thread cannot be started.
    pub fn start(
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        path: PathBuf,
        peers: PeerTable,
        services: Vec<Service>,
    ) -> Result<Self, ServerError> {
        let place = path.display().to_string();
        let listener = Listener::bind_unix(path)?;
        info!("listening on unix:{place}");
        Self::start_on(threads, rpc, svid, listener, peers, services)
    }

    /// Serves on a listening TCP socket.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started.
    pub fn start_tcp(
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        listener: TcpListener,
        peers: PeerTable,
        services: Vec<Service>,
    ) -> Result<Self, ServerError> {
        let listener = Listener::tcp(listener)?;
        Self::start_on(threads, rpc, svid, listener, peers, services)
    }

    fn start_on(
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        listener: Listener,
        peers: PeerTable,
        services: Vec<Service>,
    ) -> Result<Self, ServerError> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            ServerError(format!("starting a TLS server: {what}: {error}"))
        };
        let relay = Relay::start(threads, "relay-in").map_err(|error| failed("relay", &error))?;
        let relay = Arc::new(relay);
        let wake = WakeFd::new().map_err(|error| failed("wake-up", &error))?;
        let wake = Arc::new(wake);
        let mut server = services
            .into_iter()
            .fold(rpc.server(), grpcio::ServerBuilder::register_service)
            .build()
            .map_err(|error| failed("gRPC", &error))?;
        server.start();
        let server = Arc::new(Mutex::new(Some(server)));
        let acceptor = Acceptor::new(
            listener,
            svid,
            peers,
            Arc::clone(&server),
            Arc::clone(&relay),
            Arc::clone(&wake),
        );
        let accept = threads
            .spawn("tls-accept", STACK_LARGE, move |stop| acceptor.run(&stop))
            .map_err(|error| failed("accepting", &error))?;
        Ok(Self {
            accept: Some(accept),
            wake,
            server,
            relay,
        })
    }

    /// Stops accepting, lets running calls end until `deadline`, then cancels
    /// them, ends all connections, and removes the socket. Returns the names of
    /// threads that did not end in time; they are left alone.
    pub fn stop(mut self, deadline: Instant) -> Vec<String> {
        self.end(deadline)
    }

    fn end(&mut self, deadline: Instant) -> Vec<String> {
        let Some(mut accept) = self.accept.take() else {
            return Vec::new();
        };
        accept.stop();
        self.wake.wake();
        let accept = end_by(accept, clock::now() + THREAD_LIMIT);
        let server = self.server.lock().take();
        if let Some(server) = server
            && !shut_down(server, deadline)
        {
            warn!("calls of peers were cancelled at the end of the server");
        }
        let relay = self.relay.stop_by(clock::now() + THREAD_LIMIT);
        accept.into_iter().chain(relay).collect()
    }
}

impl Drop for TlsServer {
    /// [`TlsServer::stop`] without time for running calls, if it was not called.
    fn drop(&mut self) {
        let late = self.end(clock::now());
        if !late.is_empty() {
            warn!("{} did not end within {THREAD_LIMIT:?}", late.join(", "));
        }
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::{Receiver, bounded};

    use super::*;

    /// A thread that does not end until `held` does, or the test has failed.
    fn deaf(name: &str, held: &Receiver<()>) -> ThreadHandle {
        let held = held.clone();
        Threads::unsupervised()
            .spawn(name, STACK_LARGE, move |_| {
                let _ = held.recv_timeout(Duration::from_secs(20));
            })
            .unwrap()
    }

    #[test]
    fn threads_that_do_not_end_are_named_and_not_waited_for() {
        for is_dropped in [false, true] {
            let (release, held) = bounded(0);
            let server = TlsServer {
                accept: Some(deaf("deaf-accept", &held)),
                wake: Arc::new(WakeFd::new().unwrap()),
                server: Arc::new(Mutex::new(None)),
                relay: Arc::new(Relay::of_thread(deaf("deaf-relay", &held))),
            };
            // The acceptor's share of it, which a deaf one keeps.
            let relay = Arc::clone(&server.relay);
            let begun = clock::now();
            if is_dropped {
                drop(server);
            } else {
                assert_eq!(server.stop(clock::now()), ["deaf-accept", "deaf-relay"]);
            }
            drop(relay);
            assert!(begun.elapsed() < Duration::from_secs(15));
            drop(release);
        }
    }
}
