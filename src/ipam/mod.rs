//! The IPAM client: thread `ipam`, an event loop with its calls pipelined.
//!
//! What is asked, and when, is decided by [`crate::core::lease::LeaseBook`];
//! `worker` drives it, `client` makes its calls, `convert` knows the messages.

mod client;
mod convert;
pub mod error;
mod worker;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, select};

use crate::core::family::IpFamilies;
use crate::core::ids::LeaseId;
use crate::core::lease::Addresses;
use crate::kernel::NetHandle;
use crate::sync::clock;
use crate::sync::stop::{Stop, stop_pair};
use crate::sync::thread::{Joined, STACK_SMALL, ThreadHandle, Threads};
use crate::transport::client::Connector;
pub use error::IpamError;
use worker::{Command, Pending, Worker};

/// Acquires that may be in the queue: as many as the endpoint takes Requests,
/// since all targets of a node come at once after a restart.
const REQUESTS_MAX: usize = 1024;
/// Releases that may be in the queue.
const RELEASES_MAX: usize = 512;
/// How long after its deadline an acquire's answer is still waited for.
const ANSWER_GRACE: Duration = Duration::from_secs(1);
/// What a stop keeps of its time for the end of the thread after the flush.
const STOP_RESERVE: Duration = Duration::from_millis(100);

/// Runs once, on the `ipam` thread, with the outcome; must not block. When the
/// request could not be queued it runs on the caller's thread.
pub type Answer = Box<dyn FnOnce(Result<Addresses, IpamError>) + Send>;

/// What the other threads ask of `ipam`.
#[derive(Clone)]
pub struct IpamHandle {
    // One queue for all commands: a release and an acquire of the same
    // connection must not overtake each other.
    commands: Sender<Command>,
    queued: Arc<AtomicUsize>,
    addressed: Stop,
    ended: Stop,
    // A queue drops what is in it when its last sender is gone, not when its
    // reader is: what comes after the end of the thread is taken out here.
    queue: Receiver<Command>,
}

impl IpamHandle {
    /// Allocates (or renews) the addresses of `id` in every configured family,
    /// and cancels a pending release of it. Waits for the bridge's addresses
    /// first. When IPAM fails but the lease is known, answers with the known
    /// addresses and renews in the background. Never blocks: a full queue
    /// answers [`IpamError::Busy`] at once.
    pub fn acquire(&self, id: LeaseId, deadline: Instant, answer: Answer) {
        let answer = Pending::new(answer);
        if self.queued.fetch_add(1, Ordering::Relaxed) >= REQUESTS_MAX {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            answer.answer(Err(IpamError::Busy));
            return;
        }
        let command = Command::Acquire {
            id,
            deadline,
            answer,
        };
        if let Err(refused) = self.commands.try_send(command) {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            if let Command::Acquire { answer, .. } = refused.into_inner() {
                answer.answer(Err(IpamError::Busy));
            }
        }
        self.drain_after_end();
    }

    /// Set once the bridge has its address in every configured family, or the
    /// thread has ended.
    #[must_use]
    pub fn addressed(&self) -> Stop {
        self.addressed.clone()
    }

    /// [`IpamHandle::acquire`] for a thread that has nothing else to do.
    ///
    /// # Errors
    ///
    /// [`IpamError`].
    pub fn acquire_wait(
        &self,
        id: LeaseId,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Addresses, IpamError> {
        let (tx, rx) = bounded(1);
        self.acquire(
            id,
            deadline,
            Box::new(move |result| {
                let _ = tx.try_send(result);
            }),
        );
        select! {
            recv(rx) -> result => result.unwrap_or(Err(IpamError::Stopped)),
            recv(stop.receiver()) -> _ => Err(IpamError::Stopped),
            // `ipam` answers by the deadline unless it is held up itself.
            recv(at(deadline + ANSWER_GRACE)) -> _ => {
                Err(IpamError::Deadline("thread ipam did not answer".to_owned()))
            }
        }
    }

    /// Releases the addresses of `id` after the configured delay, unless an
    /// `acquire` comes first. Never lost: waits while the queue is full, which
    /// is safe because `ipam` waits for no caller.
    pub fn release_later(&self, id: LeaseId) {
        self.send(Command::ReleaseLater(id));
    }

    /// Addresses of `id` that an `acquire` brought were not put to use, though
    /// a predecessor of this process may have told them to their target: they
    /// are released after ten minutes unless an `acquire` comes first. Never
    /// lost, as [`IpamHandle::release_later`].
    pub fn abandon(&self, id: LeaseId) {
        self.send(Command::Abandon(id));
    }

    fn send(&self, command: Command) {
        select! {
            send(self.commands, command) -> _ => {}
            // IPAM's own expiry is what is left.
            recv(self.ended.receiver()) -> _ => {}
        }
        self.drain_after_end();
    }

    /// Releases what is pending now; ready (disconnected) when done or after
    /// `deadline`.
    #[must_use]
    pub fn flush(&self, deadline: Instant) -> Receiver<Infallible> {
        let (done, receiver) = bounded(0);
        let left = deadline.saturating_duration_since(clock::now());
        // A command that is not sent is dropped, and so is `done`.
        select! {
            send(self.commands, Command::Flush { deadline, done }) -> _ => {}
            recv(self.ended.receiver()) -> _ => {}
            default(left) => {}
        }
        self.drain_after_end();
        receiver
    }

    /// Either the ending thread sees what was sent, or this does see its end.
    fn drain_after_end(&self) {
        if self.ended.is_set() {
            drain(&self.queue);
        }
    }
}

/// Drops all commands, which answers those that are owed an answer.
fn drain(queue: &Receiver<Command>) {
    while queue.try_recv().is_ok() {}
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
pub struct Ipam {
    // INVARIANT: dropped before `handle`, so the thread always has a sender.
    thread: ThreadHandle,
    handle: IpamHandle,
}

impl Ipam {
    /// Starts the thread; it asks for the bridge's addresses at once, tells
    /// them to `net`, and renews them.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start(
        threads: &Threads,
        connector: Connector,
        net: NetHandle,
        options: IpamOptions,
    ) -> std::io::Result<Self> {
        let (commands, receiver) = bounded(REQUESTS_MAX + RELEASES_MAX);
        let queued = Arc::new(AtomicUsize::new(0));
        let (first_addresses, addressed) = stop_pair();
        let (end, ended) = stop_pair();
        let handle = IpamHandle {
            commands,
            queued: Arc::clone(&queued),
            addressed,
            ended,
            queue: receiver.clone(),
        };
        let thread = threads.spawn("ipam", STACK_SMALL, move |stop| {
            let queue = (receiver.clone(), queued);
            Worker::new(connector, net, options, queue, first_addresses).run(&stop);
            end.stop();
            drain(&receiver);
        })?;
        Ok(Self { thread, handle })
    }

    /// For the other threads.
    #[must_use]
    pub fn handle(&self) -> IpamHandle {
        self.handle.clone()
    }

    /// Releases what is pending and ends the thread. Returns its name if it
    /// did not end by `deadline`.
    #[must_use]
    pub fn stop(mut self, deadline: Instant) -> Vec<String> {
        let flushed_by = deadline
            .checked_sub(STOP_RESERVE)
            .unwrap_or_else(clock::now);
        let flushed = self.handle.flush(flushed_by);
        let _ = flushed.recv_deadline(flushed_by);
        match self.thread.join_by(deadline) {
            Joined::Yes => Vec::new(),
            Joined::StillRunning => {
                let name = self.thread.name().to_owned();
                self.thread.abandon();
                vec![name]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::stop::Stopper;

    /// A handle without its thread, and what ends that.
    fn handle() -> (IpamHandle, Stopper) {
        let (commands, queue) = bounded(REQUESTS_MAX + RELEASES_MAX);
        let (end, ended) = stop_pair();
        let handle = IpamHandle {
            commands,
            queued: Arc::new(AtomicUsize::new(0)),
            addressed: stop_pair().1,
            ended,
            queue,
        };
        (handle, end)
    }

    #[test]
    fn a_full_queue_is_busy_and_every_acquire_is_answered_once() {
        let (handle, end) = handle();
        let (tx, answers) = bounded(2 * REQUESTS_MAX);
        let ask = || {
            let tx = tx.clone();
            let answer = Box::new(move |result| tx.send(result).unwrap());
            handle.acquire(LeaseId::new("a"), clock::now(), answer);
        };
        for _ in 0..REQUESTS_MAX {
            ask();
        }
        assert!(answers.is_empty());
        ask();
        assert_eq!(answers.recv().unwrap(), Err(IpamError::Busy));
        // Releases still have room.
        handle.release_later(LeaseId::new("a"));
        end.stop();
        handle.release_later(LeaseId::new("a"));
        for _ in 0..REQUESTS_MAX {
            assert_eq!(answers.try_recv().unwrap(), Err(IpamError::Stopped));
        }
        assert!(answers.is_empty());
        ask();
        assert!(answers.try_recv().unwrap().is_err());
        assert!(answers.is_empty());
    }

    #[test]
    fn after_the_end_of_the_thread_nobody_waits() {
        let (handle, end) = handle();
        end.stop();
        let (_stopper, stop) = stop_pair();
        let begun = clock::now();
        let deadline = begun + Duration::from_secs(60);
        let id = || LeaseId::new("a");
        assert_eq!(
            handle.acquire_wait(id(), deadline, &stop),
            Err(IpamError::Stopped)
        );
        for _ in 0..2 * RELEASES_MAX {
            handle.release_later(id());
        }
        assert!(handle.flush(deadline).recv().is_err());
        assert!(clock::now() < begun + Duration::from_secs(10));
    }
}
