//! What the other threads ask of `nse`.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::feed::Publisher;
use super::monitor::Told;
use super::path::PeerToken;
use super::reply::Reply;
use super::session::Session;
use crate::core::ids::SegmentId;
use crate::core::lease::Addresses;
use crate::ipam::IpamError;
use crate::proto::connection::{Connection, MonitorScopeSelector};
use crate::proto::health::HealthCheckResponse;
use crate::proto::networkservice::NetworkServiceRequest;

/// One thing to do.
pub enum Job {
    /// A peer asks for a connection, or refreshes it.
    Request(NetworkServiceRequest, Call, Reply<Connection>),
    /// A peer closes a connection.
    Close(Connection, Call, Reply<()>),
    /// A peer monitors connections.
    Monitor(MonitorScopeSelector, Publisher<Told>),
    /// A peer follows the endpoint's health; it was told, and is kept until
    /// the endpoint ends.
    Health(Publisher<HealthCheckResponse>),
    /// IPAM's answer for the running Request of a connection.
    Addresses(SegmentId, Result<Addresses, IpamError>),
}

/// What is known of the call that brings a job.
#[derive(Clone)]
pub struct Call {
    /// The session that it came on.
    pub session: Arc<dyn Session>,
    /// The token in its headers, if it is there once and can be read.
    pub token: Option<PeerToken>,
    /// Whether the caller's deadline has passed: nobody hears the answer.
    pub is_over: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// The queue of `nse`, in order of arrival.
///
/// A Close must neither be refused nor overtake the Request before it, so the
/// queue itself has no bound; all that enters it has one: Requests have
/// [`Permits`](super::reply::Permits), with at most one answer of IPAM each,
/// and all calls together the streams and the memory that `rpc::env` grants to
/// a server's connections.
#[derive(Debug)]
pub struct JobQueue {
    jobs: Mutex<Option<VecDeque<Job>>>,
    wake: Sender<()>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Request(..) => "Request",
            Self::Close(..) => "Close",
            Self::Monitor(..) => "Monitor",
            Self::Health(_) => "Health",
            Self::Addresses(..) => "Addresses",
        })
    }
}

impl JobQueue {
    /// An empty queue, and the channel that carries a token after one or more
    /// jobs arrived.
    #[must_use]
    pub fn new() -> (Arc<Self>, Receiver<()>) {
        let (wake, woken) = bounded(1);
        let queue = Self {
            jobs: Mutex::new(Some(VecDeque::new())),
            wake,
        };
        (Arc::new(queue), woken)
    }

    /// Never blocks. After [`JobQueue::close`] the job is dropped, which
    /// answers its call UNAVAILABLE.
    pub fn push(&self, job: Job) {
        let refused = match self.jobs.lock().as_mut() {
            Some(jobs) => {
                jobs.push_back(job);
                None
            }
            None => Some(job),
        };
        drop(refused);
        // A full channel already holds the token.
        let _ = self.wake.try_send(());
    }

    /// The next job.
    #[must_use]
    pub fn pop(&self) -> Option<Job> {
        self.jobs.lock().as_mut()?.pop_front()
    }

    /// Takes no more jobs and drops those that wait.
    pub fn close(&self) {
        let jobs = self.jobs.lock().take();
        drop(jobs);
    }
}
