//! The life of one connection to a load balancer: found again after a restart,
//! requested, refreshed, watched, healed, closed.
//!
//! One caller drives it, one call at a time: it asks [`LbSession::next`] what
//! to do, does it, and tells the outcome. So there is never more than one
//! Request or Close under way for a connection.
//!
//! A connection that nsmgr or the peer reports as down is made anew with
//! *reselect*: nsmgr then closes what it knows and builds all afresh. Losing
//! nsmgr, or its stream, is no such report: traffic goes on, the stream is
//! opened again, and only if nsmgr has forgotten the connection is it told
//! again, as a refresh, which leaves the interface alone; reselect follows if
//! that fails for some seconds.
//!
//! Before a reselect of what nsmgr may still hold, the session closes it, with
//! a short deadline. nsmgr would do so itself within the Request, but towards a
//! peer that is dead it waits there as long as the last good Request was allowed
//! to take, and cannot be interrupted (sdk
//! pkg/networkservice/common/begin/server.go).

mod ending;
mod messages;
mod refresh;
#[cfg(test)]
mod tests;
mod up;
#[cfg(test)]
mod walk;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::event::Event;
use super::ids::{EndpointName, PortKey};
use super::retry::{Backoff, Jitter};
use ending::Closing;
pub use messages::{
    Closed, Established, Failure, Looked, Monitored, Plan, SessionAction, Stopping,
};
use refresh::{LEAST, refresh_after, shortest};
use up::{Monitor, Trouble, Up};

/// Pause before a first Request is made again.
pub const REQUEST_PAUSE: Duration = Duration::from_secs(10);
/// Pauses between the attempts of a reselect: an LB that is refused for long is
/// asked seldom, until the registry has news of it.
const HEAL_FIRST: Duration = Duration::from_millis(200);
const HEAL_MOST: Duration = Duration::from_secs(15);
/// A registry whose news does not end makes the pauses start over once in this
/// time.
const NEWS_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause between the attempts of a refresh that fails: what carries
/// traffic is not left to expire.
const REFRESH_MOST: Duration = Duration::from_secs(2);
/// How long what nsmgr has forgotten is told again as it is. A restarted nsmgr
/// refuses until the forwarder has registered anew, and meanwhile the connection
/// carries traffic, which a reselect would interrupt.
const RETELL: Duration = Duration::from_secs(5);
/// Pauses before a monitor stream is opened again.
const WATCH_FIRST: Duration = Duration::from_millis(500);
const WATCH_MOST: Duration = Duration::from_secs(30);
/// From taking the hop of an LB that leaves out of the route to taking its
/// interface away: `net` does the first within milliseconds, and what was queued
/// towards the LB by then passes the bridge and the LB in far less than this.
const DRAIN: Duration = Duration::from_millis(200);
/// How often nsmgr is asked for a connection of ours before it is taken that
/// there is none.
const LOOKS: u32 = 3;
const LOOK_PAUSE: Duration = Duration::from_secs(2);
/// How often it is asked at the end, if there is time: what was given up may
/// still be connected just then.
const LAST_LOOKS: u32 = 2;

#[derive(Debug)]
enum State<C> {
    /// nsmgr is asked for a connection at `at`.
    Looking { at: Instant, tries: u32 },
    /// A Request is made at `at`; nothing of ours carries traffic.
    Opening { at: Instant, plan: Plan<C> },
    /// Connected.
    Up(Up<C>),
    /// Nothing of it carries traffic; a reselect is made at `at`, and before it
    /// a Close if nsmgr may still hold the connection (`held`).
    Healing {
        connection: C,
        at: Instant,
        held: bool,
    },
    /// The answer was unusable: closed before the next Request.
    Discarding(Closing<C>),
    /// Stopping; an outcome is unclear, so nsmgr is asked first, at `at`.
    EndingUnclear { at: Instant, tries: u32 },
    /// Stopping; nothing new goes to the LB, and at `until` it is closed.
    Draining { connection: C, until: Instant },
    /// Stopping; the Close is due.
    Ending(Closing<C>),
    /// Over.
    Ended,
}

/// The machine; owned by one `lb:N` thread.
#[derive(Debug)]
pub struct LbSession<C> {
    key: PortKey,
    state: State<C>,
    reports: VecDeque<Event>,
    /// `net` was told of a port.
    told: bool,
    /// An earlier Request may have left a connection in nsmgr.
    unclear: bool,
    /// Told to stop at once.
    hurried: bool,
    heal: Backoff,
    refresh: Backoff,
    watch: Backoff,
    jitter: Jitter,
    /// When the last Request began.
    asked_at: Option<Instant>,
    /// Until then news does not make the pauses of a reselect start over.
    deaf_until: Instant,
}

impl<C: Clone> LbSession<C> {
    /// A session for `endpoint` that first looks for a connection which a
    /// predecessor left.
    #[must_use]
    pub fn new(endpoint: EndpointName, jitter: Jitter, now: Instant) -> Self {
        Self {
            key: PortKey::Lb(endpoint),
            state: State::Looking { at: now, tries: 0 },
            reports: VecDeque::new(),
            told: false,
            unclear: false,
            hurried: false,
            heal: Backoff::new(HEAL_FIRST, HEAL_MOST),
            refresh: Backoff::new(HEAL_FIRST, REFRESH_MOST),
            watch: Backoff::new(WATCH_FIRST, WATCH_MOST),
            jitter,
            asked_at: None,
            deaf_until: now,
        }
    }

    /// What to do now.
    pub fn next(&mut self, now: Instant) -> SessionAction<C> {
        let action = self.due(now);
        if matches!(action, SessionAction::Request(_)) {
            self.asked_at = Some(now);
        }
        action
    }

    fn due(&mut self, now: Instant) -> SessionAction<C> {
        if let Some(event) = self.reports.pop_front() {
            return SessionAction::Report(event);
        }
        match &mut self.state {
            State::Draining { until, .. } if *until > now => SessionAction::Wait(*until),
            State::Draining { .. } => {
                self.end(now);
                self.due(now)
            }
            State::Looking { at, .. } if *at <= now => SessionAction::Look,
            State::Opening { at, plan } if *at <= now => SessionAction::Request(plan.clone()),
            State::Healing {
                at,
                connection,
                held,
            } if *at <= now => {
                if *held {
                    SessionAction::Clear(connection.clone())
                } else {
                    SessionAction::Request(Plan::Reselect(connection.clone()))
                }
            }
            State::Looking { at, .. } | State::Opening { at, .. } | State::Healing { at, .. } => {
                SessionAction::Wait(*at)
            }
            State::Up(up) => match up.trouble.take() {
                Some(trouble) => {
                    self.act_on(trouble, now);
                    self.due(now)
                }
                // nsmgr and all behind it have ended it by themselves.
                None if up.refresh_at <= now && up.is_dead(now) => {
                    let connection = up.connection.clone();
                    self.start_healing(connection, now, false);
                    self.due(now)
                }
                None => up.next(now),
            },
            State::Discarding(closing) | State::Ending(closing) => closing.next(now),
            State::EndingUnclear { at, .. } if *at > now => SessionAction::Wait(*at),
            State::EndingUnclear { .. } => SessionAction::Look,
            State::Ended => SessionAction::Done,
        }
    }

    /// Acts on what the monitor said last.
    fn act_on(&mut self, trouble: Trouble, now: Instant) {
        let State::Up(up) = &mut self.state else {
            return;
        };
        match trouble {
            Trouble::Down | Trouble::Gone => {
                // A peer that fails right after each success is no reason to
                // run in a circle.
                let at = up.soonest(now);
                let connection = up.connection.clone();
                if !up.told_down {
                    self.reports.push_back(Event::PeerDown {
                        key: self.key.clone(),
                    });
                }
                self.start_healing(connection, at, trouble == Trouble::Down);
            }
            Trouble::Lost => {
                up.lost = up.lost.or(Some(now));
                up.refresh_at = up.refresh_at.min(up.soonest(now));
            }
        }
    }

    fn start_healing(&mut self, connection: C, at: Instant, held: bool) {
        self.heal.reset();
        self.state = State::Healing {
            connection,
            at,
            held,
        };
    }

    /// The outcome of [`SessionAction::Look`].
    pub fn looked(&mut self, looked: Looked<C>, now: Instant) {
        let unreachable = matches!(looked, Looked::Unreachable);
        let soonest = self.soonest(now);
        match &self.state {
            State::Looking { tries, .. } => {
                let tries = *tries + 1;
                self.unclear &= unreachable;
                self.state = match looked {
                    Looked::Found {
                        connection,
                        intact: true,
                    } => State::Opening {
                        at: now,
                        plan: Plan::Adopt(connection),
                    },
                    Looked::Found { connection, .. } => State::Healing {
                        connection,
                        at: soonest,
                        held: true,
                    },
                    Looked::Unreachable if tries < LOOKS => State::Looking {
                        at: now + self.jitter.spread(LOOK_PAUSE),
                        tries,
                    },
                    Looked::Absent | Looked::Unreachable => State::Opening {
                        at: soonest,
                        plan: Plan::First,
                    },
                };
            }
            State::EndingUnclear { tries, .. } => {
                let tries = *tries + 1;
                self.state = match looked {
                    Looked::Found { connection, .. } => {
                        State::Ending(Closing::new(connection, now))
                    }
                    // nsmgr may have been about to connect.
                    _ if tries < LAST_LOOKS && !self.hurried => State::EndingUnclear {
                        at: now + self.jitter.spread(LOOK_PAUSE),
                        tries,
                    },
                    Looked::Absent | Looked::Unreachable => State::Ended,
                };
            }
            _ => debug_assert!(false, "nobody asked nsmgr"),
        }
    }

    /// The outcome of [`SessionAction::Request`].
    pub fn answered(&mut self, outcome: Result<Established<C>, Failure<C>>, now: Instant) {
        match outcome {
            Ok(established) => self.established(established, now),
            Err(failure) => self.failed(failure, now),
        }
    }

    fn established(&mut self, established: Established<C>, now: Instant) {
        let Established {
            connection,
            ifname,
            peers,
            lives,
        } = established;
        // A stream that lived through a refresh goes on.
        let (monitor, trouble, told_down) = match std::mem::replace(&mut self.state, State::Ended) {
            // It fell while it was refreshed, and has not been up since.
            State::Up(up) if up.told_down => {
                let trouble = up.fallen();
                (up.monitor, trouble, trouble.is_some())
            }
            State::Up(up) => (up.monitor, None, false),
            _ => (Monitor::Closed { reopen_at: now }, None, false),
        };
        self.state = State::Up(Up {
            connection,
            refresh_at: now + self.jitter.spread(refresh_after(&lives)),
            dead_at: shortest(&lives).and_then(|life| now.checked_add(life)),
            monitor,
            trouble,
            lost: None,
            requested_at: now,
            told_down,
        });
        self.heal.reset();
        self.refresh.reset();
        self.unclear = false;
        self.told = true;
        if trouble.is_none() {
            self.reports.push_back(Event::PortExpected {
                key: self.key.clone(),
                ifname,
                peers,
            });
        }
    }

    fn failed(&mut self, failure: Failure<C>, now: Instant) {
        let sent = !matches!(failure, Failure::NotSent);
        let unclear = matches!(failure, Failure::Unclear);
        if let Failure::Unusable(connection) = failure {
            self.discard(connection.map(|connection| *connection), now);
            return;
        }
        match &mut self.state {
            // The path of an answer that was lost is lost with it, so it has
            // to be found first.
            State::Opening {
                plan: Plan::First, ..
            } if unclear => self.state = self.look_after_pause(now),
            // What is no longer as it was is built anew.
            State::Opening {
                plan: Plan::Adopt(connection),
                ..
            } if sent => {
                let connection = connection.clone();
                self.start_healing(connection, now + HEAL_FIRST, true);
            }
            State::Opening { at, .. } => *at = now + self.jitter.spread(REQUEST_PAUSE),
            State::Healing { at, .. } => {
                *at = now + self.jitter.spread(self.heal.after_failure());
            }
            State::Up(up) if up.told_down => {
                let trouble = up.fallen().unwrap_or(Trouble::Down);
                self.act_on(trouble, now);
            }
            State::Up(up) if sent && up.lost.is_some_and(|since| since + RETELL <= now) => {
                let connection = up.connection.clone();
                self.start_healing(connection, now + HEAL_FIRST, false);
            }
            State::Up(up) => {
                up.requested_at = now;
                up.refresh_at = now + self.jitter.spread(self.refresh.after_failure());
            }
            _ => debug_assert!(false, "no Request was under way"),
        }
    }

    /// Gives up what nsmgr connected, since it cannot be used.
    fn discard(&mut self, connection: Option<C>, now: Instant) {
        self.release();
        let before = match std::mem::replace(&mut self.state, State::Ended) {
            State::Up(Up { connection, .. })
            | State::Healing { connection, .. }
            | State::Opening {
                plan: Plan::Adopt(connection),
                ..
            } => Some(connection),
            _ => None,
        };
        self.state = match connection.or(before) {
            Some(connection) => State::Discarding(Closing::new(connection, now)),
            None => self.look_after_pause(now),
        };
    }

    fn look_after_pause(&mut self, now: Instant) -> State<C> {
        self.unclear = true;
        State::Looking {
            at: now + self.jitter.spread(REQUEST_PAUSE),
            tries: 0,
        }
    }

    /// [`SessionAction::Clear`] is over. Its outcome is not told: it is the same
    /// as with a Close, and the reselect follows in any case.
    pub fn cleared(&mut self) {
        if let State::Healing { held, .. } = &mut self.state {
            *held = false;
        }
    }

    /// The registry shows another process under the endpoint's name, so what was
    /// refused, or waited for in vain, is tried again at once, though no
    /// Request begins within a second of the one before it. What stands is left
    /// alone: of its end the monitor tells.
    pub fn replaced(&mut self, now: Instant) {
        if self.deaf_until <= now {
            self.heal.reset();
            self.deaf_until = now + NEWS_PAUSE;
        }
        let soonest = self.soonest(now);
        match &mut self.state {
            State::Looking { at, .. } => *at = now.min(*at),
            State::Opening { at, .. } | State::Healing { at, .. } => *at = soonest.min(*at),
            // The next session for the endpoint looks for what is left, and
            // takes it over.
            State::EndingUnclear { tries, .. } if *tries > 0 => self.state = State::Ended,
            State::Ending(closing) if closing.is_tried() => self.state = State::Ended,
            _ => {}
        }
    }

    /// When the next Request may begin at the earliest.
    fn soonest(&self, now: Instant) -> Instant {
        self.asked_at.map_or(now, |asked| now.max(asked + LEAST))
    }

    /// A monitor stream was opened, or could not be.
    pub fn watching(&mut self, open: bool, now: Instant) {
        if open {
            if let State::Up(up) = &mut self.state {
                up.monitor = Monitor::Open;
            }
        } else {
            self.watch_ended(now);
        }
    }

    /// The monitor stream ended, for whatever reason: that says nothing of the
    /// connection.
    pub fn watch_ended(&mut self, now: Instant) {
        if let State::Up(up) = &mut self.state {
            up.monitor = Monitor::Closed {
                reopen_at: now + self.jitter.spread(self.watch.after_failure()),
            };
        }
    }

    /// An event of the monitor stream while a refresh is under way: what `net` is
    /// told at once, and no refresh is waited for.
    pub fn overheard(&mut self, event: Monitored, now: Instant) -> Option<Event> {
        self.monitored(event, now);
        let State::Up(up) = &mut self.state else {
            return None;
        };
        if up.fallen().is_none() || std::mem::replace(&mut up.told_down, true) {
            return None;
        }
        Some(Event::PeerDown {
            key: self.key.clone(),
        })
    }

    /// An event of the monitor stream; only the last one told before
    /// [`LbSession::next`] counts.
    pub fn monitored(&mut self, event: Monitored, now: Instant) {
        let State::Up(up) = &mut self.state else {
            return;
        };
        self.watch.reset();
        match event {
            Monitored::Up => up.trouble = None,
            Monitored::Down => up.trouble = Some(Trouble::Down),
            Monitored::Deleted => up.trouble = Some(Trouble::Gone),
            Monitored::Absent => up.trouble = Some(Trouble::Lost),
            Monitored::RefreshRequested => {
                up.trouble = None;
                up.refresh_at = up.refresh_at.min(up.soonest(now));
            }
        }
    }
}
