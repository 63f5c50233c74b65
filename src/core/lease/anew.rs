//! An IPAM that lost its table gives what the bridge and the connections of
//! this node have to whoever asks next. What is held is asked for anew when
//! IPAM was away, and when an answer shows that it has forgotten: the bridge
//! first, then the connections in the order of their addresses, so that an
//! empty table gives each what it had.

use std::fmt::Display;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::check::Misfit;
use super::connection::{Connection, Release};
use super::{AcquireError, Action, Addresses, LeaseBook};
use crate::core::ids::LeaseId;

/// From one connection to the next. IPAM works off the calls of all nodes one
/// after the other, and gives the lowest free address: this keeps the order,
/// and leaves room for those who wait.
pub(super) const PACE: Duration = Duration::from_millis(50);

/// How far the asking has come.
#[derive(Debug, Default)]
pub(super) struct Anew {
    is_bridge_first: bool,
    /// When the last connection's turn is over.
    until: Option<Instant>,
    /// It is not only supposed that IPAM has forgotten.
    is_certain: bool,
}

impl Anew {
    /// Whether no connection may ask yet.
    pub(super) fn is_bridge_first(&self) -> bool {
        self.is_bridge_first
    }

    /// Until when who holds nothing yet leaves it to the others to ask: an
    /// IPAM that has forgotten would give it what is theirs.
    pub(super) fn holders_first(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| self.is_certain && now < *until)
    }
}

impl<E: Clone + Display> LeaseBook<E> {
    /// There is a connection to IPAM again, after it was lost: another process
    /// may be at its end.
    pub fn reconnected(&mut self, now: Instant) -> Vec<Action<E>> {
        self.anew.is_certain = false;
        self.begin_anew(now);
        self.take()
    }

    /// An answer shows that IPAM has forgotten.
    pub(super) fn ask_anew(&mut self, now: Instant) {
        self.anew.is_certain = true;
        if !self.anew.is_bridge_first && self.anew.until.is_none_or(|until| until <= now) {
            self.begin_anew(now);
        }
    }

    fn begin_anew(&mut self, now: Instant) {
        // Who stops has no use for addresses.
        if self.is_flushing {
            return;
        }
        self.anew.is_bridge_first = true;
        for connection in self.connections.values_mut() {
            for slot in connection.slots.values_mut() {
                slot.is_fresh = false;
            }
        }
        self.bridge.renew_anew(now);
        self.drive_bridge(now);
    }

    /// The bridge's calls have ended, with success or not.
    pub(super) fn bridge_was_asked(&mut self, now: Instant) {
        if !std::mem::take(&mut self.anew.is_bridge_first) {
            return;
        }
        let mut holders: Vec<(IpAddr, LeaseId)> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.is_idle())
            .filter_map(|(id, connection)| Some((connection.lowest()?, id.clone())))
            .collect();
        holders.sort();
        let mut at = now;
        for (_, id) in holders {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.renew_at = Some(connection.renew_at.map_or(at, |due| due.min(at)));
                self.wake(id, now);
            }
            at += PACE;
        }
        self.anew.until = Some(at);
    }

    /// The addresses of `connection`, checked against the bridge's and the
    /// others'. What nobody waits for is told to nobody, so it may stay: the
    /// other learns its own address anew.
    pub(super) fn checked(
        &mut self,
        connection: &Connection,
        now: Instant,
    ) -> Option<Result<Addresses, Misfit>> {
        let addresses = connection.addresses(&self.bridge.addresses(), self.settings.families)?;
        let taken = addresses.is_ok().then(|| self.taken(connection)).flatten();
        match taken {
            Some(text) if !connection.waiters.is_empty() => Some(Err(Misfit::Taken(text))),
            Some(_) => {
                self.ask_anew(now);
                Some(addresses)
            }
            None => Some(addresses),
        }
    }

    /// Whether an address that the present round brought is another's.
    fn taken(&self, connection: &Connection) -> Option<String> {
        let brought: Vec<IpAddr> = connection
            .slots
            .values()
            .filter(|slot| slot.is_new)
            .filter_map(|slot| Some(slot.address()?.ip()))
            .collect();
        if brought.is_empty() {
            return None;
        }
        self.connections.iter().find_map(|(other, theirs)| {
            let mut held = theirs.slots.values().filter_map(|slot| slot.address());
            let address = held.find(|held| brought.contains(&held.ip()))?;
            Some(format!("address {address} is that of {other}"))
        })
    }

    /// Gives back what somebody else has; then IPAM is asked anew.
    pub(super) fn give_back(
        &mut self,
        id: &LeaseId,
        connection: &mut Connection,
        text: &str,
        now: Instant,
    ) {
        let text = format!("{text}, which IPAM has forgotten");
        self.note(
            true,
            format!("the addresses of {id} go back to IPAM, and all are asked for anew: {text}"),
        );
        let waiters = std::mem::take(&mut connection.waiters);
        self.answer(waiters, &Err(AcquireError::Unusable(text)));
        connection.is_allocating = false;
        connection.renew_at = None;
        connection.is_giving_back = true;
        let is_asked = connection.release.is_some_and(|release| release.is_asked);
        connection.release = Some(Release { at: now, is_asked });
    }
}
