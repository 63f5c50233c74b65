//! The network service endpoint that targets connect to.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::core::family::IpFamilies;
use crate::ipam::IpamHandle;
use crate::kernel::NetHandle;
use crate::nsm::caller::NsmCaller;
use crate::rpc::env::Rpc;
use crate::spiffe::SvidCell;
use crate::sync::thread::Threads;
use crate::transport::error::ServerError;

/// What the endpoint is made of.
#[derive(Debug, Clone)]
pub struct EndpointOptions {
    /// `NSM_NAME`: the endpoint's name in the registry.
    pub name: String,
    /// `NSM_SERVICE_NAME`: the network service that it serves.
    pub service_name: String,
    /// `NSM_HOST`: the node; empty leaves the label out.
    pub node: String,
    /// `NSM_MTU`.
    pub mtu: u32,
    /// `NSM_MAX_TOKEN_LIFETIME`.
    pub token_lifetime: Duration,
    /// The families of the deployment.
    pub families: IpFamilies,
    /// Where the socket is made: `<directory>/<name><random>/listen.on`.
    pub directory: PathBuf,
}

/// The endpoint: threads `nse` and `nse-register`, and its server.
pub struct Endpoint {}

impl Endpoint {
    /// Listens, then registers the network service and the endpoint.
    ///
    /// # Errors
    ///
    /// When the socket or a thread cannot be made.
    #[expect(clippy::too_many_arguments, reason = "every edge that it joins")]
    pub fn start(
        _threads: &Threads,
        _rpc: &Rpc,
        _svid: SvidCell,
        _caller: NsmCaller,
        _ipam: IpamHandle,
        _net: NetHandle,
        _options: EndpointOptions,
    ) -> Result<Self, ServerError> {
        todo!()
    }

    /// The socket that targets' forwarders dial, for the self probe.
    #[must_use]
    pub fn socket(&self) -> &Path {
        todo!()
    }

    /// Leaves the registry. Returns the names of threads that did not end by
    /// `deadline`.
    #[must_use]
    pub fn unregister(&mut self, _deadline: Instant) -> Vec<String> {
        todo!()
    }

    /// Answers open requests UNAVAILABLE and ends the server. Connections,
    /// ports and leases of targets stay.
    #[must_use]
    pub fn stop(self, _deadline: Instant) -> Vec<String> {
        todo!()
    }
}
