//! The NSP client: thread `vip-watch`.

use crate::kernel::NetHandle;
use crate::sync::thread::{ThreadHandle, Threads};
use crate::transport::client::Connector;

/// Starts `vip-watch`, which follows the VIPs of `trench`.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn start(
    _threads: &Threads,
    _connector: Connector,
    _net: NetHandle,
    _trench: &str,
) -> std::io::Result<ThreadHandle> {
    todo!()
}
