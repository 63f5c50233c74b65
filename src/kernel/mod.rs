//! The one owner of kernel state: thread `net`, told by everybody, and thread
//! `link-monitor`, which tells it of what others change in the kernel.

pub mod announce;
pub mod capability;
pub mod error;
#[cfg(test)]
mod fake;
mod monitor;
pub mod netlink;
pub mod packet;
#[cfg(test)]
mod properties;
pub mod report;
mod said;
pub mod sysctl;
mod worker;
#[cfg(test)]
mod worker_tests;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use log::{info, warn};

use self::announce::Mac;
use self::error::OpError;
use self::netlink::Netlink;
use self::netlink::socket::{EventSocket, PATIENCE, RequestSocket};
use self::packet::PacketSocket;
use self::worker::Net;
use crate::core::announce::Behind;
use crate::core::dataplane::Dataplane;
use crate::core::event::Event;
use crate::core::family::IpFamilies;
use crate::core::ids::{IfIndex, IfName};
use crate::core::observed::{Link, LinkFact, Observed};
use crate::core::op::KernelOp;
use crate::health::{HealthCell, SubService};
use crate::sync::clock;
use crate::sync::poll::WakeFd;
use crate::sync::stop::Stop;
use crate::sync::thread::{Joined, STACK_LARGE, STACK_SMALL, ThreadHandle, Threads};
pub use error::KernelError;

/// Facts that wait for `net`; when it is full the sender waits.
const QUEUE: usize = 1024;

/// The link of that name, asked of the kernel by the calling thread itself, for
/// those who cannot wait for `net`, which answers nobody.
///
/// # Errors
///
/// When no socket can be had, or the kernel does not answer.
pub fn link_named(name: &IfName) -> Result<Option<Link>, KernelError> {
    Netlink::new(RequestSocket::open()?).link(name)
}

/// What the `net` thread takes.
#[derive(Debug)]
pub enum NetMsg {
    /// A fact.
    Fact(Event),
    /// Apply all facts told so far, then answer by dropping the sender.
    Quiesce(Sender<std::convert::Infallible>),
    /// A link has changed. From `link-monitor`.
    Link(LinkFact),
    /// Somebody else has changed addresses, or rules or routes of ours. From
    /// `link-monitor`.
    Foreign,
    /// Changes were missed. From `link-monitor`.
    Overrun,
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

/// The kernel as `net` uses it: the real one, or the model of the tests.
pub trait Rtnl {
    /// Reads all state that we look at.
    ///
    /// # Errors
    ///
    /// When a part of it cannot be read.
    fn snapshot(&mut self) -> Result<Observed, KernelError>;

    /// Does the operations in order, each whether or not the one before was
    /// done; an outcome for each.
    fn apply(&mut self, ops: &[KernelOp]) -> Vec<Result<(), OpError>>;

    /// The hardware address that has an address on the bridge, if it is where
    /// `behind` says: who answers for an address from another port does not
    /// have its lease.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked.
    fn hardware_address(
        &mut self,
        bridge: IfIndex,
        address: IpAddr,
        behind: &Behind,
    ) -> Result<Option<Mac>, KernelError>;

    /// Sends a frame out of the bridge without waiting. False where that is
    /// not permitted.
    ///
    /// # Errors
    ///
    /// What the system says.
    fn send(&mut self, bridge: IfIndex, frame: &[u8]) -> io::Result<bool>;
}

/// Told whether an LB is connected, and why that is believed.
pub type EgressSink = Box<dyn FnMut(bool, &str) + Send>;

/// How the data plane is set up.
#[derive(Debug, Clone, Copy)]
pub struct KernelOptions {
    /// The families of the deployment.
    pub families: IpFamilies,
    /// The hardware address that a new bridge gets; an adopted one keeps its
    /// own.
    pub bridge_mac: [u8; 6],
}

/// The two threads of the kernel side. Dropping it stops both.
pub struct Kernel {
    sender: Sender<NetMsg>,
    wake: Arc<WakeFd>,
    // INVARIANT: stopped before `net`, which takes what it sends.
    monitor: ThreadHandle,
    net: ThreadHandle,
}

impl Kernel {
    /// Opens the sockets, joins the event groups, reads the kernel's state,
    /// and starts `link-monitor` and `net`.
    ///
    /// # Errors
    ///
    /// When a socket or thread cannot be had, or the first dump fails.
    pub fn start(
        threads: &Threads,
        options: KernelOptions,
        health: HealthCell,
    ) -> Result<Self, KernelError> {
        let egress = Box::new(move |serving: bool, reason: &str| {
            health.set(SubService::Egress, serving, reason);
        });
        Self::start_with(threads, options, egress)
    }

    /// [`Kernel::start`] with another receiver of the egress state.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn start_with(
        threads: &Threads,
        options: KernelOptions,
        egress: EgressSink,
    ) -> Result<Self, KernelError> {
        if let Some(missing) = sysctl::missing(options.families) {
            warn!("sysctls are not as the data plane needs them: {missing}");
        }
        let (sender, messages) = bounded(QUEUE);
        let (ready, started) = bounded(1);
        // The sockets are opened by `net`, in which alone the capability is
        // raised.
        let net = threads
            .spawn("net", STACK_LARGE, move |stop| {
                run_net(options, egress, &messages, &ready, &stop);
            })
            .map_err(|error| KernelError::io("thread net", &error))?;
        let started = started
            .recv_timeout(10 * PATIENCE)
            .map_err(|_| KernelError("thread net did not start".to_owned()))??;
        let wake = Arc::new(
            WakeFd::new().map_err(|error| KernelError::io("eventfd of link-monitor", &error))?,
        );
        let woken = Arc::clone(&wake);
        let to_net = sender.clone();
        let monitor = threads
            .spawn("link-monitor", STACK_SMALL, move |stop| {
                monitor::run(started.events, started.own_port, &woken, &to_net, &stop);
            })
            .map_err(|error| KernelError::io("thread link-monitor", &error))?;
        Ok(Self {
            sender,
            wake,
            monitor,
            net,
        })
    }

    /// Where facts are told.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        NetHandle::new(self.sender.clone())
    }

    /// Applies what was told so far and ends both threads; the kernel's state
    /// stays. Returns the names of threads that did not end by `deadline`.
    #[must_use]
    pub fn stop(mut self, deadline: Instant) -> Vec<String> {
        self.monitor.stop();
        self.wake.wake();
        let (ack, applied) = bounded(0);
        if self
            .sender
            .send_deadline(NetMsg::Quiesce(ack), deadline)
            .is_ok()
        {
            // Ready as soon as `net` has dropped the other end.
            let _ = applied.recv_deadline(deadline);
        }
        let mut late = Vec::new();
        for thread in [&mut self.monitor, &mut self.net] {
            if thread.join_by(deadline) == Joined::StillRunning {
                late.push(thread.name().to_owned());
            }
        }
        if !late.is_empty() {
            // Dropping the handles would wait for the threads.
            std::mem::forget(self);
        }
        late
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.monitor.stop();
        self.wake.wake();
    }
}

/// What `net` opened for `link-monitor`.
struct Started {
    events: EventSocket,
    own_port: u32,
}

fn run_net(
    options: KernelOptions,
    egress: EgressSink,
    messages: &Receiver<NetMsg>,
    ready: &Sender<Result<Started, KernelError>>,
    stop: &Stop,
) {
    let (net, started) = match open(options, egress) {
        Ok(opened) => opened,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    if ready.send(Ok(started)).is_ok() {
        worker::run(net, messages, stop);
    }
}

/// Joins the event groups first: a change between the dump and the joining
/// would never be told.
fn open(
    options: KernelOptions,
    egress: EgressSink,
) -> Result<(Net<Netlink>, Started), KernelError> {
    let permitted = capability::raise(capability::NET_ADMIN)
        .map_err(|error| KernelError::io("CAP_NET_ADMIN", &error))?;
    if !permitted {
        return Err(KernelError(
            "CAP_NET_ADMIN is not permitted to this process, so it cannot set up the bridge; \
             add NET_ADMIN to the container's capabilities"
                .to_owned(),
        ));
    }
    let events = EventSocket::open()?;
    let mut netlink = Netlink::new(RequestSocket::open()?).with_packets(packets());
    let own_port = netlink.port();
    let observed = netlink.snapshot()?;
    info!(
        links = observed.links().count(), rules = observed.rules.len(),
        bridge = observed.bridge().is_some();
        "kernel state read"
    );
    let dataplane = Dataplane::new(options.families, options.bridge_mac);
    let net = Net::new(netlink, dataplane, observed, egress, clock::now());
    Ok((net, Started { events, own_port }))
}

/// The socket for announcements. It takes a capability that the deployment may
/// not give, so its lack is no failure; nothing but this call needs it.
fn packets() -> Option<PacketSocket> {
    let opened = capability::raise(capability::NET_RAW).and_then(|_| PacketSocket::open());
    let _ = capability::drop(capability::NET_RAW);
    opened
        .inspect_err(|error| {
            info!(
                "addresses of targets are not announced on the bridge: {error}; where a target \
                 comes back with another hardware address, load balancers may lose packets to it \
                 for up to a minute; add NET_RAW to the container's capabilities"
            );
        })
        .ok()
}
