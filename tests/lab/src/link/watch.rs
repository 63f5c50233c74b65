//! What changes in a namespace, with the time at which it was seen.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::poll::{self, Interest, WakeFd};
use meridio_proxy::sync::stop::Stop;
use meridio_proxy::sync::thread::{STACK_LARGE, ThreadHandle, Threads};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use super::changes::GROUPS;
use super::codec::{read_link, read_route, read_rule};
use super::{Link, Route, Rule};
use crate::netns::Netns;

/// Changes that may wait for a reader; more are dropped.
const BOUND: usize = 65_536;

/// A change that the kernel told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Link(Link),
    Route(Route),
    RouteGone(Route),
    Rule(Rule),
    RuleGone(Rule),
}

/// A watch of one namespace; it ends when dropped.
pub struct KernelWatch {
    changes: Receiver<(Instant, Change)>,
    wake: Arc<WakeFd>,
    thread: ThreadHandle,
}

impl KernelWatch {
    /// Sees what changes from now on.
    pub fn start(netns: &Netns) -> io::Result<Self> {
        let mut socket = netns.try_run(|| Socket::new(NETLINK_ROUTE))?;
        socket.bind_auto()?;
        socket.set_rx_buf_sz(8 << 20)?;
        socket.set_non_blocking(true)?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        let (sender, changes) = bounded(BOUND);
        let wake = Arc::new(WakeFd::new()?);
        let woken = Arc::clone(&wake);
        let thread = Threads::unsupervised().spawn("kernel-watch", STACK_LARGE, move |stop| {
            if let Err(error) = watch(&socket, &woken, &stop, &sender) {
                log::error!("kernel-watch: {error}");
            }
        })?;
        Ok(Self {
            changes,
            wake,
            thread,
        })
    }

    /// The changes, in order.
    #[must_use]
    pub fn changes(&self) -> &Receiver<(Instant, Change)> {
        &self.changes
    }

    /// Passes over what was seen so far.
    pub fn skip(&self) {
        while self.changes.try_recv().is_ok() {}
    }

    /// When the first change came that `wanted` accepts.
    pub fn wait(
        &self,
        deadline: Instant,
        mut wanted: impl FnMut(&Change) -> bool,
    ) -> Option<Instant> {
        loop {
            let (at, change) = self.changes.recv_deadline(deadline).ok()?;
            if wanted(&change) {
                return Some(at);
            }
        }
    }
}

impl Drop for KernelWatch {
    fn drop(&mut self) {
        self.thread.stop();
        self.wake.wake();
    }
}

fn watch(
    socket: &Socket,
    wake: &WakeFd,
    stop: &Stop,
    sender: &Sender<(Instant, Change)>,
) -> io::Result<()> {
    let readable = Interest {
        fd: socket.as_raw_fd(),
        read: true,
        write: false,
    };
    while !stop.is_set() {
        poll::wait(&[readable, wake.interest()], None)?;
        let now = clock::now();
        loop {
            match socket.recv_from_full() {
                Ok((bytes, _)) => read(&bytes, now, sender),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn read(mut bytes: &[u8], now: Instant, sender: &Sender<(Instant, Change)>) {
    while bytes.len() >= 16 {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let Some(message) = bytes.get(..length) else {
            return;
        };
        bytes = bytes.get(length.div_ceil(4) * 4..).unwrap_or_default();
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) else {
            continue;
        };
        let NetlinkPayload::InnerMessage(message) = message.payload else {
            continue;
        };
        let change = match &message {
            RouteNetlinkMessage::NewLink(link) => Some(Change::Link(read_link(link))),
            RouteNetlinkMessage::NewRoute(route) => read_route(route).map(Change::Route),
            RouteNetlinkMessage::DelRoute(route) => read_route(route).map(Change::RouteGone),
            RouteNetlinkMessage::NewRule(rule) => Some(Change::Rule(read_rule(rule))),
            RouteNetlinkMessage::DelRule(rule) => Some(Change::RuleGone(read_rule(rule))),
            _ => None,
        };
        if let Some(change) = change {
            let _ = sender.try_send((now, change));
        }
    }
}
