//! A listening server: accepts, verifies, and hands gRPC one end of a pair.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use grpcio::{Server, Service};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::server::shut_down;
use meridio_proxy::spiffe::{Identity, PeerIdentity, SvidCell};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::poll::{self, Interest, WakeFd};
use meridio_proxy::sync::thread::{STACK_SMALL, ThreadHandle, Threads};
use parking_lot::Mutex;

use super::relay;
use super::session::{self, Alpn, Role};
use super::socket::{FdQueue, FdSocket, FdTable};
use crate::nsmgr::parts::Gate;
use crate::policy::Notes;

const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long open calls may hold up the end of a server.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A verified connection that a client made.
pub struct Peer {
    /// Who the client is, with the leaf that tokens are verified with.
    pub identity: PeerIdentity,
    /// What was presented to it.
    pub own: Arc<Identity>,
    /// Descriptors that it sent.
    pub files: Arc<FdTable>,
    queue: FdQueue,
    socket: UnixStream,
}

impl Peer {
    /// Sends a descriptor with, or before, the next bytes.
    pub fn attach(&self, fd: &OwnedFd) {
        if let Ok(fd) = fd.try_clone() {
            self.queue.attach(fd);
        }
    }

    fn cut(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Finds the connection that a call came on, by `RpcContext::peer()`.
#[derive(Clone, Default)]
pub struct Peers(Arc<Mutex<HashMap<String, Arc<Peer>>>>, Arc<Gate>);

impl Peers {
    pub fn lookup(&self, rpc_peer: &str) -> Option<Arc<Peer>> {
        self.0.lock().get(rpc_peer).cloned()
    }

    /// Accepts connections, and moves no byte of any, until `false`.
    pub fn hold(&self, held: bool) {
        self.1.set_shut(held);
    }

    /// Cuts all connections; their calls end with UNAVAILABLE.
    pub fn cut_all(&self) {
        for peer in self.0.lock().values() {
            peer.cut();
        }
    }

    pub fn count(&self) -> usize {
        self.0.lock().len()
    }

    fn remove(&self, key: &str, peer: &Arc<Peer>) {
        let mut peers = self.0.lock();
        if peers.get(key).is_some_and(|held| Arc::ptr_eq(held, peer)) {
            peers.remove(key);
        }
    }
}

/// What the threads of a listener share.
struct Shared {
    svid: SvidCell,
    peers: Peers,
    notes: Notes,
    server: Mutex<Option<Server>>,
}

/// A running listener.
pub struct TlsListener {
    shared: Arc<Shared>,
    path: PathBuf,
    wake: Arc<WakeFd>,
    accept: Option<ThreadHandle>,
}

impl TlsListener {
    /// Listens on `path` (a stale file is removed, mode 0777). Refused
    /// handshakes are written to `notes`.
    pub fn start(
        rpc: &Rpc,
        svid: SvidCell,
        path: &Path,
        peers: Peers,
        notes: Notes,
        services: Vec<Service>,
    ) -> Result<Self, String> {
        let text = |what: &str, error: &dyn std::fmt::Display| {
            format!("{what} {}: {error}", path.display())
        };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(|e| text("directory of", &e))?;
        }
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path).map_err(|e| text("bind", &e))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o777))
            .map_err(|e| text("chmod", &e))?;
        listener
            .set_nonblocking(true)
            .map_err(|e| text("non-blocking", &e))?;
        let mut builder = rpc.server();
        for service in services {
            builder = builder.register_service(service);
        }
        let mut server = builder.build().map_err(|e| text("gRPC server for", &e))?;
        server.start();
        let shared = Arc::new(Shared {
            svid,
            peers,
            notes,
            server: Mutex::new(Some(server)),
        });
        let wake = Arc::new(WakeFd::new().map_err(|e| text("eventfd for", &e))?);
        let (for_thread, woken) = (Arc::clone(&shared), Arc::clone(&wake));
        let accept = Threads::unsupervised()
            .spawn("lab-accept", STACK_SMALL, move |stop| {
                while !stop.is_set() {
                    accept_all(&listener, &for_thread);
                    let waiting = Interest {
                        fd: listener.as_raw_fd(),
                        read: true,
                        write: false,
                    };
                    if poll::wait(&[waiting, woken.interest()], None).is_err() {
                        return;
                    }
                }
            })
            .map_err(|e| text("thread for", &e))?;
        Ok(Self {
            shared,
            path: path.to_owned(),
            wake,
            accept: Some(accept),
        })
    }
}

impl Drop for TlsListener {
    /// Stops accepting, cuts all connections, cancels all calls, removes the
    /// socket.
    fn drop(&mut self) {
        if let Some(mut accept) = self.accept.take() {
            accept.stop();
            self.wake.wake();
            let _ = accept.join_within(STOP_LIMIT);
        }
        let _ = fs::remove_file(&self.path);
        self.shared.peers.cut_all();
        self.shared.peers.hold(false);
        let Some(server) = self.shared.server.lock().take() else {
            return;
        };
        shut_down(server, clock::now() + STOP_LIMIT);
    }
}

fn accept_all(listener: &UnixListener, shared: &Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept() {
        let shared = Arc::clone(shared);
        let thread = Threads::unsupervised().spawn("lab-tls", STACK_SMALL, move |_| {
            if let Err(reason) = serve(stream, &shared)
                && !is_departure(&reason)
            {
                shared.notes.refuse("handshake", &reason);
            }
        });
        if let Ok(thread) = thread {
            thread.abandon();
        }
    }
}

/// A client that went away, killed or cut, was not refused.
fn is_departure(reason: &str) -> bool {
    let texts = ["unexpected eof", "Connection reset", "Broken pipe", "EOF"];
    texts.iter().any(|text| reason.contains(text))
}

fn serve(stream: UnixStream, shared: &Shared) -> Result<(), String> {
    shared.peers.1.open();
    let own = session::current(&shared.svid)?;
    let io = |error: std::io::Error| format!("socket: {error}");
    let (files, queue) = (Arc::new(FdTable::default()), FdQueue::default());
    let control = stream.try_clone().map_err(io)?;
    let socket = FdSocket::new(stream, queue.clone(), Arc::clone(&files)).map_err(io)?;
    let deadline = clock::now() + HANDSHAKE_LIMIT;
    let (tls, identity) = session::handshake(socket, Role::Server, Alpn::H2, &own, deadline)?;
    if files.count() > 0 {
        let who = identity.id.as_str();
        let reason = "sent descriptors before the handshake had verified us";
        shared.notes.violation(who, reason);
    }
    let (local, for_grpc) = UnixStream::pair().map_err(io)?;
    local.set_nonblocking(true).map_err(io)?;
    for_grpc.set_nonblocking(true).map_err(io)?;
    let peer = Arc::new(Peer {
        identity,
        own,
        files: Arc::clone(&files),
        queue,
        socket: control,
    });
    let key = format!("fd:{}", for_grpc.as_raw_fd());
    {
        let mut server = shared.server.lock();
        let Some(server) = server.as_mut() else {
            return Ok(());
        };
        // Before gRPC can see a call of it.
        shared.peers.0.lock().insert(key.clone(), Arc::clone(&peer));
        // SAFETY: the descriptor is a connected stream socket, given away
        // here; nobody else uses or closes it.
        unsafe { server.add_channel_from_fd(for_grpc.into_raw_fd()) };
    }
    relay::run(tls, local, &shared.peers.1);
    shared.peers.remove(&key, &peer);
    files.close();
    Ok(())
}
