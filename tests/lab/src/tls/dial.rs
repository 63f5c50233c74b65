//! Connections that a lab peer dials.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use grpcio::Channel;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::spiffe::{Identity, PeerIdentity, SvidCell};
use meridio_proxy::sync::thread::{STACK_SMALL, Threads};

use super::relay;
use super::session::{self, Alpn, Role};
use super::socket::{FdQueue, FdSocket, FdTable};
use crate::nsmgr::parts::Gate;

/// Dials with an identity; a new connection each time, as NSM's SDK does.
#[derive(Clone)]
pub struct Dialer {
    pub rpc: Rpc,
    pub svid: SvidCell,
    pub alpn: Alpn,
}

/// A verified connection to a server. Dropping it cuts it.
pub struct Dialed {
    /// For calls; never ask it for its connectivity, gRPC would abort.
    pub channel: Channel,
    /// Who the server is.
    pub peer: PeerIdentity,
    /// What was presented to it: this key signs the tokens of its calls.
    pub own: Arc<Identity>,
    /// Descriptors that the server sent.
    pub files: Arc<FdTable>,
    queue: FdQueue,
    socket: UnixStream,
}

impl Dialer {
    /// Connects to a unix socket by `deadline`.
    pub fn dial(&self, path: &Path, deadline: Instant) -> Result<Dialed, String> {
        let own = session::current(&self.svid)?;
        let io = |error: std::io::Error| format!("dial {}: {error}", path.display());
        let stream = UnixStream::connect(path).map_err(io)?;
        let (files, queue) = (Arc::new(FdTable::default()), FdQueue::default());
        let control = stream.try_clone().map_err(io)?;
        let socket = FdSocket::new(stream, queue.clone(), Arc::clone(&files)).map_err(io)?;
        let (tls, peer) = session::handshake(socket, Role::Client, self.alpn, &own, deadline)
            .map_err(|reason| format!("dial {}: {reason}", path.display()))?;
        let (local, for_grpc) = UnixStream::pair().map_err(io)?;
        local.set_nonblocking(true).map_err(io)?;
        for_grpc.set_nonblocking(true).map_err(io)?;
        let table = Arc::clone(&files);
        Threads::unsupervised()
            .spawn("lab-tls", STACK_SMALL, move |_| {
                relay::run(tls, local, &Gate::default());
                table.close();
            })
            .map_err(io)?
            .abandon();
        let builder = self
            .rpc
            .channel(std::time::Duration::from_secs(1))
            .default_authority("localhost");
        // SAFETY: the descriptor is a connected stream socket, given away
        // here; nobody else uses or closes it.
        let channel = unsafe { builder.connect_from_fd("lab", for_grpc.into_raw_fd()) };
        Ok(Dialed {
            channel,
            peer,
            own,
            files,
            queue,
            socket: control,
        })
    }

    /// Connects to the socket behind an `O_PATH` descriptor of its file, as
    /// the forwarder reaches an endpoint.
    pub fn dial_file(&self, socket: &OwnedFd, deadline: Instant) -> Result<Dialed, String> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        self.dial(&path, deadline)
    }
}

impl Dialed {
    /// Sends a descriptor with, or before, the next bytes.
    pub fn attach(&self, fd: &OwnedFd) {
        if let Ok(fd) = fd.try_clone() {
            self.queue.attach(fd);
        }
    }
}

impl Drop for Dialed {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}
