//! Thread `svid-watch`: the Workload API stream.

use std::path::PathBuf;

use super::SvidCell;
use crate::rpc::env::Rpc;
use crate::sync::thread::{ThreadHandle, Threads};

/// Where the Workload API listens (`SPIFFE_ENDPOINT_SOCKET`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkloadAddress {
    /// `unix:///path`
    Unix(PathBuf),
    /// `tcp://ip:port`
    Tcp(std::net::SocketAddr),
}

/// Starts the thread; it fills `cell` and keeps it filled until stopped.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn start(
    _threads: &Threads,
    _rpc: &Rpc,
    _address: WorkloadAddress,
    _cell: SvidCell,
) -> std::io::Result<ThreadHandle> {
    todo!()
}
