//! How long an answer of nsmgr is waited for.
//!
//! nsmgr works on a Close with the deadline and the cancellation of the call
//! that brought it, and forgets the connection whether or not it got through to
//! the forwarder (sdk pkg/networkservice/common/begin/server.go). So a Close
//! that is given up too early leaves the forwarder with a pair of interfaces
//! which nobody can close any more, until its token expires.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, never, select};

use super::permits::Permit;
use crate::sync::clock;
use crate::sync::stop::Stop;

/// An answer that is still to come so long after there is a reason to give it up
/// is not waited for: a good one takes less than this.
const GRACE: Duration = Duration::from_millis(300);
/// A Close has reached the forwarder so long after it was sent, though the node
/// be busy. What it then waits for is the peer.
const PASSAGE: Duration = Duration::from_secs(1);
/// An answer that takes longer keeps no others waiting: the peer is stuck, or
/// slow without our doing.
const HOLD: Duration = Duration::from_secs(1);

/// What one call is waited with.
pub(super) struct Patience<'a> {
    /// Ends the wait at once.
    cut: &'a Stop,
    /// Is a reason to give it up: nobody needs the answer.
    stop: Option<&'a Stop>,
    /// Says that another process has the endpoint's name now, which is a reason,
    /// too.
    news: Option<&'a Receiver<()>>,
    /// No reason gives it up before.
    earliest: Option<Instant>,
    permit: Option<(Permit, Instant)>,
    heard: bool,
}

impl<'a> Patience<'a> {
    /// Only `cut` ends the wait.
    pub(super) fn until(cut: &'a Stop) -> Self {
        Self {
            cut,
            stop: None,
            news: None,
            earliest: None,
            permit: None,
            heard: false,
        }
    }

    /// `stop` ends it, too, after a moment.
    pub(super) fn or_stop(self, stop: &'a Stop) -> Self {
        Self {
            stop: Some(stop),
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

    /// A Close, begun now, which is given time to reach the forwarder.
    pub(super) fn of_close(self) -> Self {
        Self {
            earliest: Some(clock::now() + PASSAGE),
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
        let (quiet, running) = (never(), never());
        let mut news = self.news.unwrap_or(&quiet);
        let mut stop = self.stop.map_or(&running, Stop::receiver);
        let mut given_up = never();
        loop {
            let overdue = match &self.permit {
                Some((_, until)) => at(*until),
                None => never(),
            };
            select! {
                recv(answer) -> answer => return answer.ok(),
                recv(self.cut.receiver()) -> _ => return None,
                recv(stop) -> _ => {
                    stop = &running;
                    given_up = self.give_up();
                },
                recv(news) -> said => {
                    news = &quiet;
                    // Its end is that of `lb-watch`, which stops us, too.
                    if said.is_ok() {
                        self.heard = true;
                        given_up = self.give_up();
                    }
                },
                recv(given_up) -> _ => return None,
                recv(overdue) -> _ => self.permit = None,
            }
        }
    }

    fn give_up(&self) -> Receiver<Instant> {
        let soon = clock::now() + GRACE;
        at(self.earliest.map_or(soon, |earliest| soon.max(earliest)))
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
        let mut patience = Patience::until(&cut).or_stop(&stop);
        assert_eq!(patience.wait::<u8>(&answer), None);
        assert!((GRACE..PASSAGE).contains(&begun.elapsed()));
        // nsmgr would forget a Close that did not get through.
        let begun = clock::now();
        let mut patience = Patience::until(&cut).or_stop(&stop).of_close();
        assert_eq!(patience.wait::<u8>(&answer), None);
        assert!(begun.elapsed() >= PASSAGE);

        answer_tx.send(7).unwrap();
        let mut patience = Patience::until(&cut).or_stop(&stop);
        assert_eq!(patience.wait(&answer), Some(7));
    }

    #[test]
    fn the_end_of_all_is_not_put_off() {
        let (cutter, cut) = stop_pair();
        let (stopper, stop) = stop_pair();
        stopper.stop();
        cutter.stop();
        let (_answer_tx, answer) = bounded::<u8>(1);
        let begun = clock::now();
        let mut patience = Patience::until(&cut).or_stop(&stop).of_close();
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
