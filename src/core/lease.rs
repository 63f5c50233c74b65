//! The life of IPAM leases: which calls are made to IPAM, when, and what those
//! who asked for addresses are told. Owned by the `ipam` thread.
//!
//! For each connection IPAM keeps two children a family, `<id>-src` and
//! `<id>-dst`; the node itself has one, `bridge` (Meridio v1.2.8,
//! pkg/proxy/proxy.go:217-228 and 731-754).
//!
//! Two rules shape the machine. A child has at most one call in flight, so an
//! Allocate that follows a Release starts when that has ended and cannot be
//! overtaken by it. And every call of a lease is begun at once: what is slow
//! for one connection delays no other.

mod anew;
#[cfg(test)]
mod anew_tests;
mod book;
mod bridge;
mod check;
mod connection;
#[cfg(test)]
mod model_tests;
mod round;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use ipnetwork::IpNetwork;

use super::family::{Family, IpFamilies, PerFamily};
use super::ids::LeaseId;
pub use book::LeaseBook;

/// The two addresses of a connection in one family, each with the node's
/// prefix length. The remote peer owns `src`, the proxy's port `dst`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Child `<id>-src`.
    pub src: IpNetwork,
    /// Child `<id>-dst`.
    pub dst: IpNetwork,
}

/// What a connection gets: its leases, and the bridge's addresses, which are
/// the gateways of targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The leases of each configured family.
    pub leases: PerFamily<Option<Lease>>,
    /// The bridge's address of each configured family.
    pub bridge: PerFamily<Option<IpNetwork>>,
}

/// Which end of a connection an address is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum End {
    Src,
    Dst,
}

/// A child of the node's subnet in IPAM; prints as its name there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpamChild {
    /// The bridge's own address.
    Bridge,
    /// The remote peer's address.
    Src(LeaseId),
    /// The address of the proxy's port.
    Dst(LeaseId),
}

impl fmt::Display for IpamChild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge => f.write_str("bridge"),
            Self::Src(id) => write!(f, "{id}-src"),
            Self::Dst(id) => write!(f, "{id}-dst"),
        }
    }
}

/// What IPAM is asked to do with a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Give, or renew, its address.
    Allocate,
    /// Take its address back.
    Release,
}

/// A call that the worker shall make; it answers with
/// [`LeaseBook::allocated`] or [`LeaseBook::released`], exactly once.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a call that is not made never ends"]
pub struct IpamCall {
    /// Unique in the life of the book.
    pub number: u64,
    /// What to do.
    pub verb: Verb,
    /// With whom.
    pub child: IpamChild,
    /// In which subnet.
    pub family: Family,
}

impl fmt::Display for IpamCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            verb,
            child,
            family,
            ..
        } = self;
        write!(f, "{verb:?} {child} ({family})")
    }
}

/// Why a call brought nothing; `E` is the transport's own error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure<E> {
    /// It never left this process; worth another try.
    Unsent(E),
    /// The connection, or the time for the call, ended: IPAM may or may not
    /// have executed it. Worth another try.
    Lost(E),
    /// IPAM said no.
    Refused(E),
    /// IPAM answered with what is no address of the family: the text names
    /// the answer.
    Unusable(String),
}

impl<E: fmt::Display> fmt::Display for Failure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsent(error) | Self::Lost(error) | Self::Refused(error) => error.fmt(f),
            Self::Unusable(text) => f.write_str(text),
        }
    }
}

/// Why an acquire ended without addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AcquireError<E> {
    /// Its deadline passed; what was waited for, or what the last try met.
    Deadline(String),
    /// IPAM said no.
    Refused(E),
    /// IPAM's answer cannot be used.
    Unusable(String),
}

/// A line for the log: a change of state, never a single retry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// A warning, not an information.
    pub is_problem: bool,
    /// The text.
    pub text: String,
}

/// What the worker shall do, in this order.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Action<E> {
    /// Make a call.
    Call(IpamCall),
    /// Answer the acquire with this ticket; comes exactly once for each.
    Answer {
        /// The ticket that [`LeaseBook::acquire`] was given.
        ticket: u64,
        /// The outcome.
        result: Result<Addresses, AcquireError<E>>,
    },
    /// Tell `net` the bridge's addresses: all families are there, and they
    /// differ from what was told before.
    Bridge(PerFamily<Option<IpNetwork>>),
    /// Write a log line.
    Log(Note),
}

/// What the machine is set up with.
#[derive(Debug, Clone, Copy)]
pub struct LeaseSettings {
    /// The families of the deployment.
    pub families: IpFamilies,
    /// From a release's request to its execution (`NSM_IP_RELEASE_DELAY`).
    pub release_delay: Duration,
    /// Between renewals of the bridge's addresses
    /// (`NSM_BRIDGE_IP_RENEW_INTERVAL`).
    pub renew_interval: Duration,
}
