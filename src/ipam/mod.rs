//! The IPAM client: thread `ipam`, an event loop with its calls pipelined.

pub mod error;

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use crate::core::family::IpFamilies;
use crate::core::ids::LeaseId;
use crate::core::lease::Addresses;
use crate::kernel::NetHandle;
use crate::sync::stop::Stop;
use crate::sync::thread::Threads;
use crate::transport::client::Connector;
pub use error::IpamError;

/// Runs once, on the `ipam` thread, with the outcome; must not block.
pub type Answer = Box<dyn FnOnce(Result<Addresses, IpamError>) + Send>;

/// What the other threads ask of `ipam`.
#[derive(Clone)]
pub struct IpamHandle {
    #[expect(dead_code)]
    commands: Sender<()>,
}

impl IpamHandle {
    /// Allocates (or renews) the addresses of `id` in every configured family,
    /// and cancels a pending release of it. Waits for the bridge's addresses
    /// first. When IPAM fails but the lease is known, answers with the known
    /// addresses and renews in the background. Never blocks: a full queue
    /// answers [`IpamError::Busy`] at once.
    pub fn acquire(&self, _id: LeaseId, _deadline: Instant, _answer: Answer) {
        todo!()
    }

    /// [`IpamHandle::acquire`] for a thread that has nothing else to do.
    ///
    /// # Errors
    ///
    /// [`IpamError`].
    pub fn acquire_wait(
        &self,
        _id: LeaseId,
        _deadline: Instant,
        _stop: &Stop,
    ) -> Result<Addresses, IpamError> {
        todo!()
    }

    /// Releases the addresses of `id` after the configured delay, unless an
    /// `acquire` comes first. Never lost.
    pub fn release_later(&self, _id: LeaseId) {
        todo!()
    }

    /// Releases what is pending now; ready (disconnected) when done or after
    /// `deadline`.
    #[must_use]
    pub fn flush(&self, _deadline: Instant) -> Receiver<std::convert::Infallible> {
        todo!()
    }
}

/// What the IPAM client is made of.
#[derive(Debug, Clone)]
pub struct IpamOptions {
    /// `NSM_TRENCH`.
    pub trench: String,
    /// `NSM_CONDUIT`.
    pub conduit: String,
    /// `NSM_HOST`: the node whose subnet is used.
    pub node: String,
    /// The families of the deployment.
    pub families: IpFamilies,
    /// `NSM_IP_RELEASE_DELAY`.
    pub release_delay: Duration,
    /// `NSM_BRIDGE_IP_RENEW_INTERVAL`.
    pub renew_interval: Duration,
}

/// Thread `ipam`.
pub struct Ipam {}

impl Ipam {
    /// Starts the thread; it asks for the bridge's addresses at once, tells
    /// them to `net`, and renews them.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start(
        _threads: &Threads,
        _connector: Connector,
        _net: NetHandle,
        _options: IpamOptions,
    ) -> std::io::Result<Self> {
        todo!()
    }

    /// For the other threads.
    #[must_use]
    pub fn handle(&self) -> IpamHandle {
        todo!()
    }

    /// Releases what is pending and ends the thread. Returns its name if it
    /// did not end by `deadline`.
    #[must_use]
    pub fn stop(self, _deadline: Instant) -> Vec<String> {
        todo!()
    }
}
