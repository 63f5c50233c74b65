//! A connection that stands.

use std::time::Instant;

use super::messages::{Plan, SessionAction};
use super::refresh::LEAST;

#[derive(Debug)]
pub(super) enum Monitor {
    Open,
    Closed { reopen_at: Instant },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// A part of it failed; nsmgr still holds it.
    Down,
    /// nsmgr has ended it.
    Gone,
    /// nsmgr does not know it.
    Lost,
}

#[derive(Debug)]
pub(super) struct Up<C> {
    pub(super) connection: C,
    pub(super) refresh_at: Instant,
    /// When the shortest life on the path ends, if it is known.
    pub(super) dead_at: Option<Instant>,
    pub(super) monitor: Monitor,
    /// The latest unanswered report of the monitor.
    pub(super) trouble: Option<Trouble>,
    /// Since when nsmgr is known to have forgotten the connection; refreshes
    /// tell it again.
    pub(super) lost: Option<Instant>,
    pub(super) requested_at: Instant,
    /// `net` was told during the refresh that it is down.
    pub(super) told_down: bool,
}

impl<C: Clone> Up<C> {
    pub(super) fn next(&self, now: Instant) -> SessionAction<C> {
        if self.refresh_at <= now {
            return SessionAction::Request(Plan::Refresh(self.connection.clone()));
        }
        match self.monitor {
            Monitor::Closed { reopen_at } if reopen_at <= now => SessionAction::Watch,
            Monitor::Closed { reopen_at } => SessionAction::Wait(self.refresh_at.min(reopen_at)),
            Monitor::Open => SessionAction::Wait(self.refresh_at),
        }
    }

    /// What the monitor reports to have ended, and nothing has answered.
    pub(super) fn fallen(&self) -> Option<Trouble> {
        self.trouble
            .filter(|trouble| matches!(trouble, Trouble::Down | Trouble::Gone))
    }

    /// Whether nothing goes over it any more, as far as is known.
    pub(super) fn is_down(&self, now: Instant) -> bool {
        self.told_down || self.fallen().is_some() || self.is_dead(now)
    }

    pub(super) fn is_dead(&self, now: Instant) -> bool {
        self.dead_at.is_some_and(|at| at <= now)
    }

    /// When the next Request may be made at the earliest.
    pub(super) fn soonest(&self, now: Instant) -> Instant {
        now.max(self.requested_at + LEAST)
    }
}
