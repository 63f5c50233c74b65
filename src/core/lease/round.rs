//! A round of Allocates for one connection: begun by an acquire, or by a
//! renewal that is due, and ended by the last answer, a failure, or the
//! deadline of the last who waits.

use std::fmt::Display;
use std::time::{Duration, Instant};

use super::book::child;
use super::check::Misfit;
use super::connection::{Connection, Release};
use super::{AcquireError, Addresses, Failure, LeaseBook, Verb};
use crate::core::ids::LeaseId;

/// How long half a lease waits for its acquire to be repeated. NSM repeats the
/// Requests of a living connection within the lifetime of a token, ten minutes
/// in Meridio's deployments; what a predecessor of this process had allocated
/// must not be taken from a target that still uses it.
const ABANDONED_AFTER: Duration = Duration::from_secs(600);
/// When to allocate once more after a Release whose end was never learnt was
/// followed by an Allocate: IPAM may have executed them in either order.
const CONFIRM_AFTER: Duration = Duration::from_secs(10);

impl<E: Clone + Display> LeaseBook<E> {
    /// Answers those whose deadline has passed.
    pub(super) fn expire(&mut self, id: &LeaseId, connection: &mut Connection, now: Instant) {
        let waiters = std::mem::take(&mut connection.waiters);
        let (late, waiting): (Vec<_>, Vec<_>) = waiters
            .into_iter()
            .partition(|waiter| waiter.deadline <= now);
        connection.waiters = waiting;
        if late.is_empty() {
            return;
        }
        let why = self.waits_for(connection);
        let known = self.known(connection);
        let result = known.ok_or_else(|| AcquireError::Deadline(why.clone()));
        self.answer(late, &result);
        if connection.waiters.is_empty() {
            if known.is_some() {
                self.keep_known(id, connection, &why, now);
            } else {
                abandon(connection, now);
            }
        } else if known.is_none() && connection.waiters.iter().all(|w| w.is_released) {
            // The acquire that cancelled their release came to nothing.
            let release = self.release(now);
            connection.release.get_or_insert(release);
        }
    }

    /// What an acquire that is out of time was waiting for.
    fn waits_for(&self, connection: &Connection) -> String {
        if !self.bridge.is_complete() {
            let why = self.bridge.last_failure().unwrap_or("IPAM did not answer");
            return format!("the bridge has no address yet: {why}");
        }
        connection
            .last_failure
            .clone()
            .unwrap_or_else(|| "IPAM did not answer".to_owned())
    }

    /// The addresses that are in use, if they can stay so.
    fn known(&self, connection: &Connection) -> Option<Addresses> {
        connection
            .addresses(&self.bridge.addresses(), self.settings.families)?
            .ok()
    }

    /// Asks for each child that was not answered in this round; ends the round
    /// when all were.
    pub(super) fn drive_round(&mut self, id: &LeaseId, connection: &mut Connection, now: Instant) {
        if !self.bridge.is_complete() || self.anew.is_bridge_first() || connection.is_giving_back {
            return;
        }
        if let Some(until) = self.anew.holders_first(now)
            && connection.lowest().is_none()
        {
            self.timers.insert((until, Some(id.clone())));
            return;
        }
        for (key, slot) in &mut connection.slots {
            if !slot.is_fresh && slot.is_free(now) {
                let number = self.call(Verb::Allocate, child(id, key.1), key.0);
                slot.call = Some((number, Verb::Allocate));
            }
        }
        if connection.slots.values().all(|slot| slot.is_fresh) {
            self.conclude(id, connection, now);
        }
    }

    /// All children were answered.
    fn conclude(&mut self, id: &LeaseId, connection: &mut Connection, now: Instant) {
        match self.checked(connection, now) {
            Some(Ok(addresses)) => {
                let waiters = std::mem::take(&mut connection.waiters);
                self.answer(waiters, &Ok(addresses));
                if connection.is_failing {
                    self.note(false, format!("IPAM renewed the addresses of {id}"));
                }
                connection.end_round();
                if std::mem::take(&mut connection.has_lost_release) {
                    connection.renew_at = Some(now + CONFIRM_AFTER);
                }
            }
            Some(Err(Misfit::OtherSubnet(_))) if !connection.has_asked_bridge => {
                connection.has_asked_bridge = true;
                self.bridge.renew_now(now);
                self.drive_bridge(now);
            }
            Some(Err(Misfit::OtherSubnet(_))) if self.bridge.is_asking() => {}
            Some(Err(Misfit::Taken(text))) => self.give_back(id, connection, &text, now),
            Some(Err(Misfit::OtherSubnet(text) | Misfit::Wrong(text))) => {
                self.give_up(connection, &AcquireError::Unusable(text), now);
            }
            None => debug_assert!(false, "{id}: all children are fresh but not all are held"),
        }
    }

    /// A call of the round failed.
    pub(super) fn round_failed(
        &mut self,
        id: &LeaseId,
        connection: &mut Connection,
        failure: Failure<E>,
        now: Instant,
    ) {
        if let Some(addresses) = self.known(connection) {
            let waiters = std::mem::take(&mut connection.waiters);
            self.answer(waiters, &Ok(addresses));
            let why = connection.last_failure.clone().unwrap_or_default();
            self.keep_known(id, connection, &why, now);
            return;
        }
        match failure {
            // Tried again for as long as somebody waits.
            Failure::Unsent(_) | Failure::Lost(_) if !connection.waiters.is_empty() => {}
            Failure::Unsent(error) | Failure::Lost(error) | Failure::Refused(error) => {
                self.give_up(connection, &AcquireError::Refused(error), now);
            }
            Failure::Unusable(text) => {
                self.give_up(connection, &AcquireError::Unusable(text), now);
            }
        }
    }

    /// The addresses stay in use although IPAM did not renew them.
    fn keep_known(&mut self, id: &LeaseId, connection: &mut Connection, why: &str, now: Instant) {
        connection.postpone_round(now);
        if !std::mem::replace(&mut connection.is_failing, true) {
            self.note(
                true,
                format!(
                    "the addresses of {id} stay in use although IPAM did not renew them: {why}; \
                     it is tried again"
                ),
            );
        }
    }

    fn give_up(&mut self, connection: &mut Connection, error: &AcquireError<E>, now: Instant) {
        let waiters = std::mem::take(&mut connection.waiters);
        self.answer(waiters, &Err(error.clone()));
        abandon(connection, now);
    }
}

/// Ends a round that led to nothing; what was allocated is released unless
/// somebody comes back for it.
pub(super) fn abandon(connection: &mut Connection, now: Instant) {
    connection.is_allocating = false;
    connection.renew_at = None;
    if connection.release.is_none() {
        connection.release = Some(Release {
            at: now + ABANDONED_AFTER,
            is_asked: false,
        });
    }
}
