//! The end of a session, and of connections that cannot be used.

use std::time::{Duration, Instant};

use super::messages::{Closed, Plan, SessionAction, Stopping};
use super::{DRAIN, Event, LbSession, REQUEST_PAUSE, State, Up};

/// How often a Close is made that fails each time.
pub(super) const CLOSES: u32 = 3;
/// Pause before the second; before the third it is twice that.
pub(super) const CLOSE_PAUSE: Duration = Duration::from_millis(500);

/// What has to be closed.
#[derive(Debug)]
pub(super) struct Closing<C> {
    connection: C,
    at: Instant,
    tries: u32,
}

impl<C: Clone> Closing<C> {
    pub(super) fn new(connection: C, now: Instant) -> Self {
        Self {
            connection,
            at: now,
            tries: 0,
        }
    }

    pub(super) fn next(&self, now: Instant) -> SessionAction<C> {
        if self.at <= now {
            SessionAction::Close(self.connection.clone())
        } else {
            SessionAction::Wait(self.at)
        }
    }

    /// Whether a Close has failed.
    pub(super) fn is_tried(&self) -> bool {
        self.tries > 0
    }
}

impl<C: Clone> LbSession<C> {
    /// The outcome of [`SessionAction::Close`]; whether it will be made again.
    ///
    /// nsmgr forgets most connections whose Close fails, so that the next one is
    /// answered and does nothing (sdk
    /// pkg/networkservice/common/begin/server.go); but one that nsmgr was not
    /// reached with, or had no time for, it still holds.
    pub fn closed(&mut self, closed: Closed, now: Instant) -> bool {
        let state = std::mem::replace(&mut self.state, State::Ended);
        let (State::Discarding(ref closing) | State::Ending(ref closing)) = state else {
            debug_assert!(false, "no Close was under way");
            return false;
        };
        if closed == Closed::Failed && closing.tries + 1 < CLOSES {
            let tries = closing.tries + 1;
            let again = Closing {
                connection: closing.connection.clone(),
                at: now + self.jitter.spread(CLOSE_PAUSE * tries),
                tries,
            };
            self.state = match state {
                State::Discarding(_) => State::Discarding(again),
                _ => State::Ending(again),
            };
            return true;
        }
        if let State::Discarding(_) = state {
            self.state = match closed {
                Closed::Answered => State::Opening {
                    at: now + self.jitter.spread(REQUEST_PAUSE),
                    plan: Plan::First,
                },
                // What nsmgr still holds is not to be doubled.
                Closed::Failed | Closed::GivenUp => self.look_after_pause(now),
            };
        }
        false
    }

    /// Ends the session: what is connected, or may be, is closed. May be said
    /// again, to end at once after all.
    pub fn stop(&mut self, how: Stopping, now: Instant) {
        self.hurried |= how == Stopping::AtOnce;
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
            _ => self.end(now),
        }
    }

    /// Takes back what `net` was told, and ends.
    pub(super) fn end(&mut self, now: Instant) {
        self.release();
        let unclear = self.unclear;
        self.state = match std::mem::replace(&mut self.state, State::Ended) {
            State::Discarding(closing) | State::Ending(closing) => State::Ending(Closing {
                at: if self.hurried { now } else { closing.at },
                ..closing
            }),
            State::Up(Up { connection, .. })
            | State::Healing { connection, .. }
            | State::Draining { connection, .. }
            | State::Opening {
                plan:
                    Plan::Refresh(connection) | Plan::Adopt(connection) | Plan::Reselect(connection),
                ..
            } => State::Ending(Closing::new(connection, now)),
            State::EndingUnclear { at, tries } => State::EndingUnclear {
                at: if self.hurried { now } else { at },
                tries,
            },
            State::Looking { .. }
            | State::Opening {
                plan: Plan::First, ..
            } if unclear => State::EndingUnclear { at: now, tries: 0 },
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
