//! The one owner of kernel state: thread `net`.

pub mod capability;
pub mod error;

use std::time::Instant;

use crossbeam_channel::Sender;

use crate::core::event::Event;
use crate::core::family::IpFamilies;
use crate::health::HealthCell;
use crate::sync::thread::Threads;
pub use error::KernelError;

/// What the `net` thread takes.
#[derive(Debug)]
pub enum NetMsg {
    /// A fact.
    Fact(Event),
    /// Apply all facts told so far, then answer by dropping the sender.
    Quiesce(Sender<std::convert::Infallible>),
}

/// Tells facts to `net`.
#[derive(Debug, Clone)]
pub struct NetHandle(Sender<NetMsg>);

impl NetHandle {
    /// For the owner of the receiving end, and tests that stand in for it.
    #[must_use]
    pub fn new(sender: Sender<NetMsg>) -> Self {
        Self(sender)
    }

    /// Tells a fact; waits while the queue is full, which is safe because
    /// `net` waits for no other thread of ours.
    pub fn tell(&self, event: Event) {
        // After the end of `net` nobody is left to be told.
        let _ = self.0.send(NetMsg::Fact(event));
    }
}

/// How the data plane is set up.
#[derive(Debug, Clone)]
pub struct KernelOptions {
    /// The families of the deployment.
    pub families: IpFamilies,
    /// The hardware address that a new bridge gets; an adopted one keeps its
    /// own.
    pub bridge_mac: [u8; 6],
}

/// The two threads of the kernel side.
pub struct Kernel {}

impl Kernel {
    /// Opens the sockets, joins the event groups, reads the kernel's state,
    /// and starts `link-monitor` and `net`.
    ///
    /// # Errors
    ///
    /// When a socket or thread cannot be had, or the first dump fails.
    pub fn start(
        _threads: &Threads,
        _options: KernelOptions,
        _health: HealthCell,
    ) -> Result<Self, KernelError> {
        todo!()
    }

    /// Where facts are told.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        todo!()
    }

    /// Applies what was told so far and ends both threads; the kernel's state
    /// stays. Returns the names of threads that did not end by `deadline`.
    #[must_use]
    pub fn stop(self, _deadline: Instant) -> Vec<String> {
        todo!()
    }
}
