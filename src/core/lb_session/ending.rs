//! The end of a session, and of connections that cannot be used.

use std::time::Instant;

use super::messages::{Plan, Stopping};
use super::{DRAIN, Event, LbSession, REQUEST_PAUSE, State, Up};

impl<C: Clone> LbSession<C> {
    /// The outcome of [`SessionAction::Close`], which is not told: a Close
    /// that failed has no second effect, and one that succeeded proves
    /// nothing.
    ///
    /// [`SessionAction::Close`]: super::SessionAction::Close
    pub fn closed(&mut self, now: Instant) {
        self.state = match self.state {
            State::Discarding { .. } => State::Opening {
                at: now + self.jitter.spread(REQUEST_PAUSE),
                plan: Plan::First,
            },
            _ => State::Ended,
        };
    }

    /// Ends the session: what is connected, or may be, is closed. May be said
    /// again, to end at once after all.
    pub fn stop(&mut self, how: Stopping, now: Instant) {
        match (how, &self.state) {
            (Stopping::Drained, State::Up(up)) if !up.is_down(now) => {
                self.reports.push_back(Event::PeerDown {
                    key: self.key.clone(),
                });
                self.state = State::Draining {
                    connection: up.connection.clone(),
                    until: now + DRAIN,
                };
            }
            (Stopping::Drained, State::Draining { .. }) => {}
            _ => self.end(),
        }
    }

    /// Takes back what `net` was told, and ends.
    pub(super) fn end(&mut self) {
        self.release();
        let unclear = self.unclear;
        self.state = match std::mem::replace(&mut self.state, State::Ended) {
            State::Up(Up { connection, .. })
            | State::Healing { connection, .. }
            | State::Discarding { connection }
            | State::Draining { connection, .. }
            | State::Ending { connection }
            | State::Opening {
                plan:
                    Plan::Refresh(connection) | Plan::Adopt(connection) | Plan::Reselect(connection),
                ..
            } => State::Ending { connection },
            State::Looking { .. }
            | State::Opening {
                plan: Plan::First, ..
            } if unclear => State::EndingUnclear,
            State::EndingUnclear => State::EndingUnclear,
            State::Looking { .. }
            | State::Opening {
                plan: Plan::First, ..
            }
            | State::Ended => State::Ended,
        };
    }

    /// Takes back what `net` was told.
    pub(super) fn release(&mut self) {
        if std::mem::take(&mut self.told) {
            self.reports.push_back(Event::PortReleased {
                key: self.key.clone(),
            });
        }
    }
}
