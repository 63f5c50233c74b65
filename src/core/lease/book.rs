//! The machine: who asked for what, and which call comes next.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use super::anew::Anew;
use super::bridge::{Bridge, Change};
use super::connection::{Connection, Held, Release, Waiter};
use super::round;
use super::{
    AcquireError, Action, Addresses, End, Failure, IpamCall, IpamChild, LeaseSettings, Note, Verb,
};
use crate::core::family::{Family, PerFamily};
use crate::core::ids::LeaseId;

/// Pause before an Allocate that somebody waits for is tried again, and before
/// a Release is while the daemon stops (Meridio v1.2.8,
/// pkg/proxy/proxy.go:659).
const SHORT_PAUSE: Duration = Duration::from_millis(200);
/// Pause before a failed Release is tried again (pkg/proxy/proxy.go:447-512).
const RELEASE_PAUSE: Duration = Duration::from_secs(2);

/// All leases of the node. `E` is the error of the worker's calls.
#[derive(Debug)]
pub struct LeaseBook<E> {
    pub(super) settings: LeaseSettings,
    pub(super) bridge: Bridge,
    pub(super) anew: Anew,
    told: PerFamily<Option<IpNetwork>>,
    // INVARIANT: who has waiters is allocating.
    pub(super) connections: BTreeMap<LeaseId, Connection>,
    // `None` stands for the bridge. An entry may be out of date: what it wakes
    // looks for itself what is to be done.
    pub(super) timers: BTreeSet<(Instant, Option<LeaseId>)>,
    next_call: u64,
    pub(super) is_flushing: bool,
    out: Vec<Action<E>>,
}

impl<E: Clone + Display> LeaseBook<E> {
    /// A book without leases; the first [`LeaseBook::tick`] asks for the
    /// bridge's addresses.
    #[must_use]
    pub fn new(settings: LeaseSettings, now: Instant) -> Self {
        Self {
            bridge: Bridge::new(settings.families, settings.renew_interval, now),
            settings,
            anew: Anew::default(),
            told: PerFamily::default(),
            connections: BTreeMap::new(),
            timers: BTreeSet::from([(now, None)]),
            next_call: 0,
            is_flushing: false,
            out: Vec::new(),
        }
    }

    /// Somebody wants the addresses of `id`, new or renewed, and is told so
    /// under `ticket` by `deadline`. Cancels a release that has not begun; one
    /// that has is waited for.
    pub fn acquire(
        &mut self,
        ticket: u64,
        id: LeaseId,
        deadline: Instant,
        now: Instant,
    ) -> Vec<Action<E>> {
        let mut connection = self
            .connections
            .remove(&id)
            .unwrap_or_else(|| Connection::new(self.settings.families, Held::No));
        connection.release = None;
        connection.waiters.push(Waiter {
            ticket,
            deadline,
            is_released: false,
        });
        connection.begin_round(self.next_call);
        self.settle(id, connection, now);
        self.take()
    }

    /// The connection `id` was closed: its addresses are released after the
    /// configured delay, also if they are older than this process.
    pub fn release_later(&mut self, id: LeaseId, now: Instant) -> Vec<Action<E>> {
        let mut connection = self
            .connections
            .remove(&id)
            .unwrap_or_else(|| Connection::new(self.settings.families, Held::Unclear));
        connection.renew_at = None;
        connection.is_allocating = !connection.waiters.is_empty();
        for waiter in &mut connection.waiters {
            waiter.is_released = true;
        }
        if !connection.release.is_some_and(|release| release.is_asked) {
            connection.release = Some(self.release(now));
        }
        self.settle(id, connection, now);
        self.take()
    }

    /// Addresses that an acquire brought were not put to use: they are released
    /// unless somebody comes back for them (see `round::abandon`).
    pub fn abandon(&mut self, id: LeaseId, now: Instant) -> Vec<Action<E>> {
        if let Some(mut connection) = self.connections.remove(&id) {
            if connection.waiters.is_empty() {
                round::abandon(&mut connection, now);
            }
            self.settle(id, connection, now);
        }
        self.take()
    }

    /// Begins all releases that were asked for; those of later do not wait
    /// either. [`LeaseBook::pending_releases`] tells when they are done.
    pub fn flush(&mut self, now: Instant) -> Vec<Action<E>> {
        self.is_flushing = true;
        let asked = self.ids(|connection| connection.release.is_some_and(|r| r.is_asked));
        for id in asked {
            if let Some(mut connection) = self.connections.remove(&id) {
                connection.release = Some(Release {
                    at: now,
                    is_asked: true,
                });
                for slot in connection.slots.values_mut() {
                    slot.retry_at = None;
                }
                self.settle(id, connection, now);
            }
        }
        self.take()
    }

    /// How many connections wait for a release that was asked for.
    #[must_use]
    pub fn pending_releases(&self) -> usize {
        self.connections
            .values()
            .filter(|connection| connection.release.is_some_and(|release| release.is_asked))
            .count()
    }

    /// An Allocate ended.
    pub fn allocated(
        &mut self,
        call: &IpamCall,
        result: Result<IpNetwork, Failure<E>>,
        now: Instant,
    ) -> Vec<Action<E>> {
        match of_connection(&call.child) {
            None => self.bridge_answered(call, result, now),
            Some((id, end)) => self.slot_allocated(call, id, end, result, now),
        }
        self.take()
    }

    /// A Release ended.
    pub fn released(
        &mut self,
        call: &IpamCall,
        result: Result<(), Failure<E>>,
        now: Instant,
    ) -> Vec<Action<E>> {
        if let Some((id, end)) = of_connection(&call.child) {
            self.slot_released(call, id, end, result, now);
        }
        self.take()
    }

    /// Does what is due; to be called at [`LeaseBook::next_deadline`].
    pub fn tick(&mut self, now: Instant) -> Vec<Action<E>> {
        while let Some((at, _)) = self.timers.first() {
            if *at > now {
                break;
            }
            match self.timers.pop_first() {
                Some((_, None)) => self.drive_bridge(now),
                Some((_, Some(id))) => self.wake(id, now),
                None => break,
            }
        }
        self.take()
    }

    /// When [`LeaseBook::tick`] is to be called.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn bridge_answered(
        &mut self,
        call: &IpamCall,
        result: Result<IpNetwork, Failure<E>>,
        now: Instant,
    ) {
        let family = call.family;
        let result = result.map_err(|failure| failure.to_string());
        match self.bridge.answered(family, call.number, result, now) {
            Change::None => {}
            Change::Address => {
                let addresses = self.bridge.addresses();
                if self.bridge.is_complete() && addresses != self.told {
                    self.told = addresses;
                    self.out.push(Action::Bridge(addresses));
                }
            }
            Change::Failing => {
                let why = self.bridge.last_failure().unwrap_or_default().to_owned();
                self.note(true, format!("no bridge address of IPAM ({family}): {why}"));
            }
            Change::Recovered => {
                self.note(false, format!("IPAM renewed the bridge address ({family})"));
            }
        }
        self.drive_bridge(now);
        if !self.bridge.is_asking() {
            self.bridge_was_asked(now);
        }
        for id in self.ids(|connection| connection.is_allocating) {
            self.wake(id, now);
        }
    }

    pub(super) fn drive_bridge(&mut self, now: Instant) {
        for family in self.bridge.due(now) {
            let number = self.call(Verb::Allocate, IpamChild::Bridge, family);
            self.bridge.asked(family, number);
        }
        if let Some(at) = self.bridge.wakes_at(now) {
            self.timers.insert((at, None));
        }
    }

    fn slot_allocated(
        &mut self,
        call: &IpamCall,
        id: LeaseId,
        end: End,
        result: Result<IpNetwork, Failure<E>>,
        now: Instant,
    ) {
        let Some(mut connection) = self.end_call(call, &id, end) else {
            return;
        };
        let Some(slot) = connection.slots.get_mut(&(call.family, end)) else {
            return;
        };
        match result {
            Ok(address) => {
                let before = std::mem::replace(&mut slot.held, Held::Yes(address));
                slot.is_fresh = true;
                slot.is_new |= before != Held::Yes(address);
                slot.retry_at = None;
                if let Held::Yes(before) = before
                    && before != address
                {
                    let child = &call.child;
                    self.note(
                        true,
                        format!("IPAM gave {child} {address} in place of {before}"),
                    );
                }
            }
            Err(failure) => {
                if slot.held == Held::No && !matches!(failure, Failure::Unsent(_)) {
                    slot.held = Held::Unclear;
                }
                slot.retry_at = Some(now + SHORT_PAUSE);
                connection.last_failure = Some(format!("{call}: {failure}"));
                if connection.is_allocating && call.number < connection.first_call {
                    // Those who wait now asked after this call was made.
                    slot.retry_at = None;
                } else if connection.is_allocating {
                    self.round_failed(&id, &mut connection, failure, now);
                }
            }
        }
        self.settle(id, connection, now);
    }

    fn slot_released(
        &mut self,
        call: &IpamCall,
        id: LeaseId,
        end: End,
        result: Result<(), Failure<E>>,
        now: Instant,
    ) {
        let Some(mut connection) = self.end_call(call, &id, end) else {
            return;
        };
        let Some(slot) = connection.slots.get_mut(&(call.family, end)) else {
            return;
        };
        match result {
            Ok(()) => {
                slot.held = Held::No;
                slot.retry_at = None;
            }
            Err(failure) => {
                let pause = if self.is_flushing {
                    SHORT_PAUSE
                } else {
                    RELEASE_PAUSE
                };
                // Who waits for the address need not wait for the release's pause.
                slot.retry_at = (!connection.is_allocating).then_some(now + pause);
                if !matches!(failure, Failure::Unsent(_)) {
                    slot.held = Held::Unclear;
                }
                connection.has_lost_release |= matches!(failure, Failure::Lost(_));
                if !std::mem::replace(&mut connection.is_failing, true) {
                    self.note(true, format!("{call}: {failure}; it is tried again"));
                }
            }
        }
        let is_given_back = connection.is_given_back();
        if !connection.holds_anything() {
            self.note(
                false,
                format!("release IP: the addresses of {id} are released"),
            );
        }
        if is_given_back {
            self.ask_anew(now);
        }
        self.settle(id, connection, now);
    }

    /// Takes the connection out, its slot's call ended; `None`, and nothing
    /// taken, when the call is not the one in flight.
    fn end_call(&mut self, call: &IpamCall, id: &LeaseId, end: End) -> Option<Connection> {
        let slot = self
            .connections
            .get_mut(id)?
            .slots
            .get_mut(&(call.family, end))?;
        if slot.call != Some((call.number, call.verb)) {
            return None;
        }
        slot.call = None;
        self.connections.remove(id)
    }

    pub(super) fn wake(&mut self, id: LeaseId, now: Instant) {
        if let Some(connection) = self.connections.remove(&id) {
            self.settle(id, connection, now);
        }
    }

    /// Does all that `connection` needs now, and puts it back if it goes on.
    fn settle(&mut self, id: LeaseId, mut connection: Connection, now: Instant) {
        self.expire(&id, &mut connection, now);
        if connection.renew_at.is_some_and(|at| at <= now) {
            connection.begin_round(self.next_call);
        }
        if connection.is_allocating {
            self.drive_round(&id, &mut connection, now);
        }
        if connection.is_releasing(now) {
            self.drive_release(&id, &mut connection, now);
        }
        debug_assert!(connection.waiters.is_empty() || connection.is_allocating);
        if connection.is_over() {
            return;
        }
        if let Some(at) = connection.wakes_at(now) {
            self.timers.insert((at, Some(id.clone())));
        }
        self.connections.insert(id, connection);
    }

    fn drive_release(&mut self, id: &LeaseId, connection: &mut Connection, now: Instant) {
        for (key, slot) in &mut connection.slots {
            if slot.held != Held::No && slot.is_free(now) {
                let number = self.call(Verb::Release, child(id, key.1), key.0);
                slot.call = Some((number, Verb::Release));
            }
        }
    }

    pub(super) fn call(&mut self, verb: Verb, child: IpamChild, family: Family) -> u64 {
        let number = self.next_call;
        self.next_call += 1;
        self.out.push(Action::Call(IpamCall {
            number,
            verb,
            child,
            family,
        }));
        number
    }

    pub(super) fn answer(
        &mut self,
        waiters: Vec<Waiter>,
        result: &Result<Addresses, AcquireError<E>>,
    ) {
        self.out
            .extend(waiters.into_iter().map(|waiter| Action::Answer {
                ticket: waiter.ticket,
                result: result.clone(),
            }));
    }

    pub(super) fn note(&mut self, is_problem: bool, text: String) {
        self.out.push(Action::Log(Note { is_problem, text }));
    }

    /// A release that is asked for now.
    pub(super) fn release(&self, now: Instant) -> Release {
        let delay = if self.is_flushing {
            Duration::ZERO
        } else {
            self.settings.release_delay
        };
        Release {
            at: now + delay,
            is_asked: true,
        }
    }

    fn ids(&self, which: impl Fn(&Connection) -> bool) -> Vec<LeaseId> {
        self.connections
            .iter()
            .filter(|(_, connection)| which(connection))
            .map(|(id, _)| id.clone())
            .collect()
    }

    pub(super) fn take(&mut self) -> Vec<Action<E>> {
        std::mem::take(&mut self.out)
    }
}

pub(super) fn child(id: &LeaseId, end: End) -> IpamChild {
    match end {
        End::Src => IpamChild::Src(id.clone()),
        End::Dst => IpamChild::Dst(id.clone()),
    }
}

/// Whose child it is; `None` for the bridge.
fn of_connection(child: &IpamChild) -> Option<(LeaseId, End)> {
    match child {
        IpamChild::Bridge => None,
        IpamChild::Src(id) => Some((id.clone(), End::Src)),
        IpamChild::Dst(id) => Some((id.clone(), End::Dst)),
    }
}
