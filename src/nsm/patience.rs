//! How long an answer of nsmgr is waited for.
//!
//! nsmgr works on a Close with the deadline and the cancellation of the call
//! that brought it, and forgets the connection whether or not it got through to
//! the forwarder (sdk pkg/networkservice/common/begin/server.go). So a Close
//! that is given up too early leaves the forwarder with a pair of interfaces
//! which nobody can close any more, until its token expires.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, never, select};

use super::permits::Permit;
use crate::proto::connection::ConnectionEvent;
use crate::rpc::pump::Item;
use crate::sync::clock;
use crate::sync::stop::Stop;

/// An answer that is still to come so long after there is a reason to give it up
/// is not waited for: a good one takes less than this.
const GRACE: Duration = Duration::from_millis(300);
/// The same for a Request whose LB has left: nothing else waits, and what nsmgr
/// gives up half-way the forwarder may keep.
const LEISURE: Duration = Duration::from_secs(3);
/// A Close has reached the forwarder so long after it was sent, though the node
/// be busy. What it then waits for is the peer. A reselect that follows takes over
/// what it may have missed.
pub(super) const PASSAGE: Duration = Duration::from_secs(1);
/// The same for a Close that no Request with the same path follows.
pub(super) const LAST_PASSAGE: Duration = Duration::from_secs(3);
/// An answer that takes longer keeps no others waiting: the peer is stuck, or
/// slow without our doing.
const HOLD: Duration = Duration::from_secs(1);

/// What one call is waited with.
pub(super) struct Patience<'a> {
    /// Ends the wait at once.
    cut: &'a Stop,
    /// Is a reason to give it up: nobody needs the answer.
    stop: Option<&'a Stop>,
    /// Filled when the daemon stops; else it is only the LB that leaves.
    hurry: Option<&'a OnceLock<Instant>>,
    /// Says that another process has the endpoint's name now, which is a reason,
    /// too.
    news: Option<&'a Receiver<()>>,
    /// It is a Close, which no reason gives up before.
    earliest: Option<Instant>,
    permit: Option<(Permit, Instant)>,
    heard: bool,
    watch: Option<Watch<'a>>,
}

/// The connection's stream of events, and who reads it during the call: what it
/// says is a reason to give the call up.
type Watch<'a> = (
    &'a Receiver<Item<ConnectionEvent>>,
    &'a mut (dyn FnMut(Option<Item<ConnectionEvent>>) -> Said + Send),
);

/// What an item of the stream means for the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    /// Nothing.
    Nothing,
    /// The connection has fallen.
    Fallen,
    /// There is nothing more to read.
    Ended,
}

impl<'a> Patience<'a> {
    /// Only `cut` ends the wait.
    pub(super) fn until(cut: &'a Stop) -> Self {
        Self {
            cut,
            stop: None,
            hurry: None,
            news: None,
            earliest: None,
            permit: None,
            heard: false,
            watch: None,
        }
    }

    /// `stop` ends it, too, after a short moment; with `hurry` only if the daemon
    /// stops, by it. Then a Close is not ended by the departure of its LB alone.
    pub(super) fn or_stop(self, stop: &'a Stop, hurry: Option<&'a OnceLock<Instant>>) -> Self {
        Self {
            stop: Some(stop),
            hurry,
            ..self
        }
    }

    /// `news` ends it, too, after a moment.
    pub(super) fn or_news(self, news: &'a Receiver<()>) -> Self {
        Self {
            news: Some(news),
            ..self
        }
    }

    /// The fall of the connection ends it, too, after a moment; `read` is called
    /// with what `items` brings.
    pub(super) fn or_fall(
        self,
        items: &'a Receiver<Item<ConnectionEvent>>,
        read: &'a mut (dyn FnMut(Option<Item<ConnectionEvent>>) -> Said + Send),
    ) -> Self {
        Self {
            watch: Some((items, read)),
            ..self
        }
    }

    /// A Close, begun now, which is given `passage` to reach the forwarder.
    pub(super) fn of_close(self, passage: Duration) -> Self {
        Self {
            earliest: Some(clock::now() + passage),
            ..self
        }
    }

    /// Gives `permit` back at the end of the call, or when it takes long.
    pub(super) fn with(self, permit: Option<Permit>) -> Self {
        Self {
            permit: permit.map(|permit| (permit, clock::now() + HOLD)),
            ..self
        }
    }

    /// What stops the wait for a connection to nsmgr: nothing is sent yet.
    pub(super) fn stop(&self) -> &Stop {
        self.stop.unwrap_or(self.cut)
    }

    /// Whether there was news during the call.
    pub(super) fn has_heard(&self) -> bool {
        self.heard
    }

    /// Waits for the answer; `None` when it is given up. Without an answer and
    /// without a reason to give up it ends when `answer` does: calls have
    /// deadlines.
    pub(super) fn wait<T>(&mut self, answer: &Receiver<T>) -> Option<T> {
        let (quiet, running, unwatched) = (never(), never(), never());
        let mut news = self.news.unwrap_or(&quiet);
        let mut stop = self.stop.map_or(&running, Stop::receiver);
        let mut ends: Option<Instant> = None;
        loop {
            let items = self.watch.as_ref().map_or(&unwatched, |watch| watch.0);
            let given_up = ends.map_or_else(never, at);
            let overdue = match &self.permit {
                Some((_, until)) => at(*until),
                None => never(),
            };
            select! {
                recv(answer) -> answer => return answer.ok(),
                recv(self.cut.receiver()) -> _ => return None,
                recv(stop) -> _ => {
                    stop = &running;
                    ends = earlier(ends, self.end_by_stop());
                },
                recv(news) -> said => {
                    news = &quiet;
                    // Its end is that of `lb-watch`, which stops us, too.
                    if said.is_ok() {
                        self.heard = true;
                        ends = earlier(ends, Some(self.after(GRACE)));
                    }
                },
                recv(items) -> item => {
                    if self.read(item.ok()) == Said::Fallen {
                        ends = earlier(ends, Some(self.after(GRACE)));
                    }
                },
                recv(given_up) -> _ => return None,
                recv(overdue) -> _ => self.permit = None,
            }
        }
    }

    fn read(&mut self, item: Option<Item<ConnectionEvent>>) -> Said {
        let said = match &mut self.watch {
            Some((_, read)) => read(item),
            None => Said::Nothing,
        };
        if said == Said::Ended {
            self.watch = None;
        }
        said
    }

    fn end_by_stop(&self) -> Option<Instant> {
        if self.hurry.is_none_or(|hurry| hurry.get().is_some()) {
            // There is no time for more than the least.
            let least = clock::now() + GRACE;
            let passed = self.earliest.map(|at| at.min(clock::now() + PASSAGE));
            return Some(passed.map_or(least, |passed| least.max(passed)));
        }
        match self.earliest {
            Some(_) => None,
            None => Some(clock::now() + LEISURE),
        }
    }

    fn after(&self, moment: Duration) -> Instant {
        let then = clock::now() + moment;
        self.earliest.map_or(then, |earliest| then.max(earliest))
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::nsm::permits::Permits;
    use crate::sync::stop::stop_pair;

    #[test]
    fn news_ends_a_wait_after_a_moment_and_an_answer_meanwhile_counts() {
        let (_stopper, stop) = stop_pair();
        let (tell, news) = bounded(1);
        let (answer_tx, answer) = bounded(1);
        tell.send(()).unwrap();
        let mut patience = Patience::until(&stop).or_news(&news);
        let begun = clock::now();
        assert_eq!(patience.wait::<u8>(&answer), None);
        assert!(begun.elapsed() >= GRACE && patience.has_heard());

        tell.send(()).unwrap();
        answer_tx.send(7).unwrap();
        let mut patience = Patience::until(&stop).or_news(&news);
        assert_eq!(patience.wait(&answer), Some(7));
        // Without interest in news it is left for the next who has.
        answer_tx.send(8).unwrap();
        let mut patience = Patience::until(&stop);
        assert_eq!(patience.wait(&answer), Some(8));
        assert!(!patience.has_heard());
    }

    #[test]
    fn an_answer_that_nobody_needs_is_waited_for_a_moment_longer() {
        let (_cutter, cut) = stop_pair();
        let (stopper, stop) = stop_pair();
        stopper.stop();
        let (answer_tx, answer) = bounded(1);
        let begun = clock::now();
        let hurry = OnceLock::from(begun);
        let mut patience = Patience::until(&cut).or_stop(&stop, Some(&hurry));
        assert_eq!(patience.wait::<u8>(&answer), None);
        assert!((GRACE..PASSAGE).contains(&begun.elapsed()));
        // nsmgr would forget a Close that did not get through.
        let begun = clock::now();
        let mut patience = Patience::until(&cut)
            .or_stop(&stop, Some(&hurry))
            .of_close(LAST_PASSAGE);
        assert_eq!(patience.wait::<u8>(&answer), None);
        assert!((PASSAGE..LAST_PASSAGE).contains(&begun.elapsed()));

        answer_tx.send(7).unwrap();
        let mut patience = Patience::until(&cut).or_stop(&stop, Some(&hurry));
        assert_eq!(patience.wait(&answer), Some(7));
    }

    #[test]
    fn the_departure_of_an_lb_alone_ends_no_close_and_a_request_late() {
        let (_cutter, cut) = stop_pair();
        let (stopper, stop) = stop_pair();
        stopper.stop();
        let (tell, news) = bounded(1);
        let (_answer_tx, answer) = bounded::<u8>(1);
        let hurry = OnceLock::new();
        let patience = || {
            Patience::until(&cut)
                .or_stop(&stop, Some(&hurry))
                .or_news(&news)
        };
        std::thread::scope(|scope| {
            let request = scope.spawn(|| patience().wait(&answer));
            let begun = clock::now();
            assert_eq!(request.join().unwrap(), None);
            assert!(begun.elapsed() >= LAST_PASSAGE);
            // Its return ends a Close, after its passage.
            let close = scope.spawn(|| patience().of_close(PASSAGE).wait(&answer));
            let begun = clock::now();
            tell.send(()).unwrap();
            assert_eq!(close.join().unwrap(), None);
            assert!((PASSAGE..LEISURE).contains(&begun.elapsed()));
        });
    }

    #[test]
    fn the_end_of_all_is_not_put_off() {
        let (cutter, cut) = stop_pair();
        let (stopper, stop) = stop_pair();
        stopper.stop();
        cutter.stop();
        let (_answer_tx, answer) = bounded::<u8>(1);
        let begun = clock::now();
        let hurry = OnceLock::new();
        let mut patience = Patience::until(&cut)
            .or_stop(&stop, Some(&hurry))
            .of_close(PASSAGE);
        assert_eq!(patience.wait(&answer), None);
        assert!(begun.elapsed() < GRACE);
    }

    #[test]
    fn a_call_that_takes_long_gives_its_permit_back() {
        let (_stopper, stop) = stop_pair();
        let permits = Permits::new(1);
        let permit = permits.take(clock::now(), &stop);
        assert!(permit.is_some() && permits.take(clock::now(), &stop).is_none());
        let (tell, news) = bounded(1);
        let (_answer_tx, answer) = bounded::<u8>(1);
        let mut patience = Patience::until(&stop).or_news(&news).with(permit);
        std::thread::scope(|scope| {
            let call = scope.spawn(|| patience.wait(&answer));
            let begun = clock::now();
            assert!(permits.take(begun + HOLD * 10, &stop).is_some());
            assert!(begun.elapsed() >= HOLD / 2, "not before it took long");
            tell.send(()).unwrap();
            assert_eq!(call.join().unwrap(), None);
        });
    }
}
