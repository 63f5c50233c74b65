//! The lab's own side of SPIFFE mTLS with descriptor passing: a server that
//! receives descriptors beneath TLS as grpcfd does (a table for each
//! connection, with waiters), and a dialler. It is written apart from the
//! daemon's transport, so that a mistake there is not mirrored here; only the
//! rules of verification (`meridio_proxy::spiffe`) are shared.
//!
//! Threads: `lab-accept` for each listener, `lab-tls` for each connection.

mod dial;
mod relay;
mod server;
mod session;
mod socket;

pub use dial::{Dialed, Dialer};
pub use server::{Peer, Peers, TlsListener};
pub use session::Alpn;
pub use socket::{FdQueue, FdTable, FileId, file_id, inode_url, parse_inode_url};
