//! What the session says to its driver, and what it is told.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::core::event::Event;
use crate::core::ids::IfName;

/// How a connection is requested. `C` is the connection as nsmgr last gave it,
/// which this machine only carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan<C> {
    /// There was none.
    First,
    /// As it is: its interface stays.
    Refresh(C),
    /// A predecessor's, as it is, since its port still carries traffic.
    Adopt(C),
    /// With its path, but built anew.
    Reselect(C),
}

/// What the driver does next.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum SessionAction<C> {
    /// Ask nsmgr for a connection of ours, then [`looked`](super::LbSession::looked).
    Look,
    /// Request, then [`answered`](super::LbSession::answered). The monitor stream of all plans
    /// but a refresh is dropped first: its events would be about our own act.
    Request(Plan<C>),
    /// Drop the monitor stream and Close, so that the reselect that follows finds
    /// nothing that nsmgr has to close itself; wait for it briefly, then
    /// [`cleared`](super::LbSession::cleared).
    Clear(C),
    /// Open a monitor stream, then [`watching`](super::LbSession::watching).
    Watch,
    /// Drop the monitor stream, Close, then [`closed`](super::LbSession::closed).
    Close(C),
    /// Tell `net`.
    Report(Event),
    /// Wait for a monitor event, the order to stop, or this moment.
    Wait(Instant),
    /// The session is over.
    Done,
}

/// How a session is told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopping {
    /// The LB leaves, and others take its traffic: first it gets no new
    /// packets, and a moment later it is closed.
    Drained,
    /// All end: there is nobody else to send to, and no time to lose.
    AtOnce,
}

/// How a Close ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// nsmgr holds nothing of the connection any more.
    Answered,
    /// With an error, or without an answer: nsmgr may still hold it.
    Failed,
    /// It was given up, and shall not be made again: there is no time, or the
    /// endpoint is back, whose next session looks for what is left.
    GivenUp,
}

/// What nsmgr knew of our connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Looked<C> {
    /// It knows it.
    Found {
        /// The connection.
        connection: C,
        /// It is up, and its interface is in place in this network namespace.
        intact: bool,
    },
    /// It does not know it, or will not tell.
    Absent,
    /// It could not be asked.
    Unreachable,
}

/// A good answer to a Request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Established<C> {
    /// The connection.
    pub connection: C,
    /// The interface in this network namespace.
    pub ifname: IfName,
    /// The peer's addresses.
    pub peers: BTreeSet<IpAddr>,
    /// The time left to each path segment; `None` where it is not told, zero
    /// where it is past.
    pub lives: Vec<Option<Duration>>,
}

/// How a Request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure<C> {
    /// It was not sent: no addresses, or no connection to nsmgr.
    NotSent,
    /// nsmgr answered with an error.
    Refused,
    /// Nothing is known of its outcome: nsmgr may have a connection now.
    Unclear,
    /// It succeeded, but the answer cannot be used; the connection, if it can
    /// be closed.
    Unusable(Option<Box<C>>),
}

/// What the monitor stream says of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitored {
    /// It is up.
    Up,
    /// A part of it failed.
    Down,
    /// nsmgr ended it.
    Deleted,
    /// The peer asks for a refresh.
    RefreshRequested,
    /// The list that starts a stream does not have it.
    Absent,
}
