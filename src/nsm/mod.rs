//! What the daemon asks of the network service manager (nsmgr): LBs are found
//! through its registry, connected through its Request, watched through its
//! monitor.

pub mod caller;

use std::time::{Duration, Instant};

use crate::core::family::IpFamilies;
use crate::ipam::IpamHandle;
use crate::kernel::NetHandle;
use crate::sync::thread::Threads;
use caller::NsmCaller;

/// What the connections to LBs are made of.
#[derive(Debug, Clone)]
pub struct LbOptions {
    /// `NSM_NAME`: the client's name, and the prefix of connection ids.
    pub name: String,
    /// `NSM_NETWORK_SERVICE_NAME`: the service whose endpoints are the LBs.
    pub network_service: String,
    /// `NSM_REQUEST_TIMEOUT`: bound of one Request or Close.
    pub request_timeout: Duration,
    /// `NSM_MTU`.
    pub mtu: u32,
    /// The families of the deployment.
    pub families: IpFamilies,
}

/// The full mesh: thread `lb-watch` and a thread `lb:N` for each LB.
pub struct LbMesh {}

impl LbMesh {
    /// Starts `lb-watch`.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start(
        _threads: &Threads,
        _caller: NsmCaller,
        _ipam: IpamHandle,
        _net: NetHandle,
        _options: LbOptions,
    ) -> std::io::Result<Self> {
        todo!()
    }

    /// Closes all connections in parallel and ends the threads. Returns the
    /// names of threads that did not end by `deadline`.
    #[must_use]
    pub fn stop(self, _deadline: Instant) -> Vec<String> {
        todo!()
    }
}
