//! What the daemon asks of the network service manager (nsmgr): LBs are found
//! through its registry, connected through its Request, watched through its
//! monitor.
//!
//! Thread `lb-watch` (`lb_watch`) drives [`crate::core::mesh`] and starts a
//! thread `lb:N` (`lb_worker`) for each LB, which drives a
//! [`crate::core::lb_session`]. Thread `nsm-conn-log` (`conn_log`) only logs.

pub mod caller;
mod client;
mod conn_log;
mod convert;
pub mod error;
mod ifname;
mod lb_watch;
mod lb_worker;
mod netns;
mod path;
mod patience;
mod permits;
mod port;
#[cfg(test)]
mod tests;
pub mod trouble;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};

use crate::core::family::IpFamilies;
use crate::core::ids::IfName;
use crate::ipam::IpamHandle;
use crate::kernel::NetHandle;
use crate::sync::clock;
use crate::sync::stop::{Stopper, stop_pair};
use crate::sync::thread::{Joined, STACK_SMALL, ThreadHandle, Threads};
use caller::NsmCaller;
use client::{Leases, Nsmgr};
pub use conn_log::ConnectionLog;
use lb_watch::LbWatch;
use lb_worker::Shared;
use netns::Netns;
use permits::Permits;

/// What is kept of the time to stop, so that a Close that is given up still
/// has its lease released.
const STOP_MARGIN: Duration = Duration::from_millis(300);
/// Requests under way at once, but for those that take long.
const REQUESTS_MOST: usize = 8;

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

/// What tests stand in for.
#[derive(Clone, Copy)]
struct Surroundings {
    /// Whether an interface is a port of the bridge and belongs to the
    /// connection with this id.
    is_in_place: fn(&IfName, &str) -> bool,
    /// When the mesh began.
    begun: Instant,
}

/// The full mesh: thread `lb-watch` and a thread `lb:N` for each LB.
#[derive(Debug)]
pub struct LbMesh {
    // INVARIANT: dropped before `sessions`, into which it puts them.
    watch: ThreadHandle,
    sessions: Receiver<Vec<ThreadHandle>>,
    close_by: Arc<OnceLock<Instant>>,
    // INVARIANT: dropped last: without it nothing is closed in order.
    cut: Stopper,
}

impl LbMesh {
    /// Starts `lb-watch`. The connections end in the network namespace of the
    /// calling thread.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started, or the network namespace cannot be
    /// opened.
    pub fn start(
        threads: &Threads,
        caller: NsmCaller,
        ipam: IpamHandle,
        net: NetHandle,
        options: LbOptions,
    ) -> std::io::Result<Self> {
        let real = Surroundings {
            is_in_place: port::is_in_place,
            begun: clock::now(),
        };
        Self::start_with(threads, caller, ipam, net, options, real)
    }

    fn start_with<N: Nsmgr, L: Leases>(
        threads: &Threads,
        nsmgr: N,
        leases: L,
        net: NetHandle,
        options: LbOptions,
        surroundings: Surroundings,
    ) -> std::io::Result<Self> {
        let close_by = Arc::new(OnceLock::new());
        let (cut, is_cut) = stop_pair();
        let shared = Shared {
            nsmgr,
            leases,
            net,
            netns: Arc::new(Netns::own()?),
            permits: Permits::new(REQUESTS_MOST),
            request_timeout: options.request_timeout,
            close_by: Arc::clone(&close_by),
            cut: is_cut,
            is_in_place: surroundings.is_in_place,
        };
        let (tx, sessions) = bounded(1);
        let spawner = threads.clone();
        let watch = threads.spawn("lb-watch", STACK_SMALL, move |stop| {
            let left = LbWatch::new(spawner, shared, options, surroundings.begun).run(&stop);
            let _ = tx.send(left);
        })?;
        Ok(Self {
            watch,
            sessions,
            close_by,
            cut,
        })
    }

    /// Closes all connections in parallel and ends the threads. Returns the
    /// names of threads that did not end by `deadline`.
    #[must_use]
    pub fn stop(self, deadline: Instant) -> Vec<String> {
        let Self {
            watch,
            sessions,
            close_by,
            cut,
        } = self;
        let by = deadline.checked_sub(STOP_MARGIN).unwrap_or(deadline);
        // Set once: nobody else sets it, and `self` is used up.
        let _ = close_by.set(by);
        let mut overdue = Vec::new();
        join(watch, deadline, &mut overdue);
        // Empty only if `lb-watch` is overdue itself.
        let mut sessions = sessions.try_recv().unwrap_or_default();
        for session in &mut sessions {
            // Which are late is seen below.
            let _ = session.join_by(by);
        }
        // A Close that began before the stop has a later deadline of its own.
        cut.stop();
        for session in sessions {
            join(session, deadline, &mut overdue);
        }
        overdue
    }
}

/// Waits for a thread, and leaves it alone if it is late: the process ends.
fn join(mut thread: ThreadHandle, deadline: Instant, overdue: &mut Vec<String>) {
    if thread.join_by(deadline) == Joined::StillRunning {
        overdue.push(thread.name().to_owned());
        thread.abandon();
    }
}
