//! The NSP client: thread `vip-watch`, which follows the VIPs of the trench
//! and tells them to `net`. Of NSP's services the proxy uses no other.
//!
//! Which lists are taken over is decided by [`crate::core::vips::VipBook`].

mod vip_watch;

use crate::kernel::NetHandle;
use crate::sync::thread::{STACK_SMALL, ThreadHandle, Threads};
use crate::transport::client::Connector;
use vip_watch::VipWatch;

/// Starts `vip-watch`, which follows the VIPs of `trench`. Nothing is removed
/// while NSP is away.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn start(
    threads: &Threads,
    connector: Connector,
    net: NetHandle,
    trench: &str,
) -> std::io::Result<ThreadHandle> {
    let watch = VipWatch::new(connector, net, trench.to_owned());
    threads.spawn("vip-watch", STACK_SMALL, move |stop| watch.run(&stop))
}
