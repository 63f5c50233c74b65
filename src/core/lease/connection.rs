//! What is known of one connection's children.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use super::check::{self, Misfit};
use super::{Addresses, End, Lease, Verb};
use crate::core::family::{Family, IpFamilies, PerFamily};

/// First pause before a renewal is tried again in the background; it doubles
/// up to [`RENEW_PAUSE_MAX`].
const RENEW_PAUSE_MIN: Duration = Duration::from_secs(2);
const RENEW_PAUSE_MAX: Duration = Duration::from_secs(30);

/// What IPAM holds for a child, as far as is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Nothing.
    No,
    /// This address.
    Yes(IpNetwork),
    /// Something or nothing: a call's outcome was never learnt, or the child
    /// is older than this process.
    Unclear,
}

/// One child.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) held: Held,
    /// Allocated, or renewed, in the present round.
    pub(super) is_fresh: bool,
    /// The present round brought another address than was held.
    pub(super) is_new: bool,
    /// The call in flight; never more than one.
    pub(super) call: Option<(u64, Verb)>,
    /// Not before this moment is the next call made.
    pub(super) retry_at: Option<Instant>,
}

impl Slot {
    fn new(held: Held) -> Self {
        Self {
            held,
            is_fresh: false,
            is_new: false,
            call: None,
            retry_at: None,
        }
    }

    /// The address that is held, and not on its way back to IPAM.
    pub(super) fn address(&self) -> Option<IpNetwork> {
        match (self.held, self.call) {
            (_, Some((_, Verb::Release))) => None,
            (Held::Yes(address), _) => Some(address),
            (Held::No | Held::Unclear, _) => None,
        }
    }

    /// Whether a call may start now.
    pub(super) fn is_free(&self, now: Instant) -> bool {
        self.call.is_none() && self.retry_at.is_none_or(|at| at <= now)
    }
}

/// Somebody who waits for the addresses.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) ticket: u64,
    pub(super) deadline: Instant,
    /// A release was asked for after this acquire.
    pub(super) is_released: bool,
}

/// A release that is to come, unless an acquire does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Release {
    pub(super) at: Instant,
    /// Asked for, in contrast to: nobody came back for half a lease.
    pub(super) is_asked: bool,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) slots: BTreeMap<(Family, End), Slot>,
    pub(super) waiters: Vec<Waiter>,
    /// A round of Allocates is going on.
    pub(super) is_allocating: bool,
    /// The number of the round's first call; those with lower ones are of an
    /// earlier round.
    pub(super) first_call: u64,
    /// When a round begins although nobody asks.
    pub(super) renew_at: Option<Instant>,
    renew_pause: Duration,
    pub(super) release: Option<Release>,
    /// What the last call met; cleared by a success.
    pub(super) last_failure: Option<String>,
    /// The bridge was renewed in this round since the answers did not fit it.
    pub(super) has_asked_bridge: bool,
    /// A note said that calls fail.
    pub(super) is_failing: bool,
    /// A Release ended without an answer: IPAM might execute it yet.
    pub(super) has_lost_release: bool,
    /// What it releases was given to it though somebody else has it.
    pub(super) is_giving_back: bool,
}

impl Connection {
    pub(super) fn new(families: IpFamilies, held: Held) -> Self {
        let slots = families
            .iter()
            .flat_map(|family| [(family, End::Src), (family, End::Dst)])
            .map(|key| (key, Slot::new(held)))
            .collect();
        Self {
            slots,
            waiters: Vec::new(),
            is_allocating: false,
            first_call: 0,
            renew_at: None,
            renew_pause: RENEW_PAUSE_MIN,
            release: None,
            last_failure: None,
            has_asked_bridge: false,
            is_failing: false,
            has_lost_release: false,
            is_giving_back: false,
        }
    }

    /// Begins a round with the call `next_call`, unless one is going on, which
    /// then serves as well.
    pub(super) fn begin_round(&mut self, next_call: u64) {
        self.renew_at = None;
        if self.is_allocating {
            return;
        }
        self.is_allocating = true;
        self.first_call = next_call;
        self.has_asked_bridge = false;
        for slot in self.slots.values_mut() {
            slot.is_new = false;
            slot.is_fresh = false;
            // A pause of an earlier round, or release, is not this round's.
            slot.retry_at = None;
        }
    }

    /// Ends a round that reached its aim.
    pub(super) fn end_round(&mut self) {
        self.is_allocating = false;
        self.renew_pause = RENEW_PAUSE_MIN;
        self.last_failure = None;
        self.is_failing = false;
    }

    /// Ends a round that failed, to try again later.
    pub(super) fn postpone_round(&mut self, now: Instant) {
        self.is_allocating = false;
        self.renew_at = Some(now + self.renew_pause);
        self.renew_pause = (self.renew_pause * 2).min(RENEW_PAUSE_MAX);
    }

    /// The addresses as they are held, checked against the bridge's. `None`
    /// while something is missing, or on its way back to IPAM.
    pub(super) fn addresses(
        &self,
        bridge: &PerFamily<Option<IpNetwork>>,
        families: IpFamilies,
    ) -> Option<Result<Addresses, Misfit>> {
        let mut leases = PerFamily::default();
        for family in families.iter() {
            let own = (*bridge.get(family))?;
            let lease = Lease {
                src: self.held(family, End::Src)?,
                dst: self.held(family, End::Dst)?,
            };
            if let Err(misfit) = check::lease(family, own, &lease) {
                return Some(Err(misfit));
            }
            *leases.get_mut(family) = Some(lease);
        }
        Some(Ok(Addresses {
            leases,
            bridge: *bridge,
        }))
    }

    fn held(&self, family: Family, end: End) -> Option<IpNetwork> {
        self.slots.get(&(family, end))?.address()
    }

    /// Whether all Releases of what somebody else has came to an end; true once.
    pub(super) fn is_given_back(&mut self) -> bool {
        let is_going_on = |slot: &Slot| matches!(slot.call, Some((_, Verb::Release)));
        !self.slots.values().any(is_going_on) && std::mem::take(&mut self.is_giving_back)
    }

    /// Whether IPAM holds, or may hold, anything for this connection.
    pub(super) fn holds_anything(&self) -> bool {
        self.slots
            .values()
            .any(|slot| slot.held != Held::No || slot.call.is_some())
    }

    /// Whether it holds its addresses for somebody, and no round is going on.
    pub(super) fn is_idle(&self) -> bool {
        !self.is_allocating && !self.release.is_some_and(|release| release.is_asked)
    }

    /// The lowest of its addresses.
    pub(super) fn lowest(&self) -> Option<IpAddr> {
        let held = self.slots.values().filter_map(Slot::address);
        held.map(|address| address.ip()).min()
    }

    /// Whether nothing is left to do or to remember.
    pub(super) fn is_over(&self) -> bool {
        self.waiters.is_empty() && !self.is_allocating && !self.holds_anything()
    }

    /// Whether Releases shall be made now: nobody waits for the addresses.
    pub(super) fn is_releasing(&self, now: Instant) -> bool {
        !self.is_allocating && self.release.is_some_and(|release| release.at <= now)
    }

    /// The next moment at which something is to be done.
    pub(super) fn wakes_at(&self, now: Instant) -> Option<Instant> {
        let retries = self
            .slots
            .values()
            .filter(|slot| slot.call.is_none())
            .filter_map(|slot| slot.retry_at);
        self.waiters
            .iter()
            .map(|waiter| waiter.deadline)
            .chain(retries)
            .chain(self.renew_at)
            .chain(self.release.map(|release| release.at))
            .filter(|at| *at > now)
            .min()
    }
}
