//! How long an answer of nsmgr is waited for.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, never, select};

use super::permits::Permit;
use crate::sync::clock;
use crate::sync::stop::Stop;

/// An answer that is still to come so long after the registry had news of the
/// endpoint is not waited for: a good one takes less than this.
const GRACE: Duration = Duration::from_millis(300);
/// An answer that takes longer keeps no others waiting: the peer is stuck, or
/// slow without our doing.
const HOLD: Duration = Duration::from_secs(1);

/// What one call is waited with.
pub(super) struct Patience<'a> {
    stop: &'a Stop,
    /// Says that another process has the endpoint's name now.
    news: Option<&'a Receiver<()>>,
    permit: Option<(Permit, Instant)>,
    heard: bool,
}

impl<'a> Patience<'a> {
    /// Only `stop` ends the wait.
    pub(super) fn until(stop: &'a Stop) -> Self {
        Self {
            stop,
            news: None,
            permit: None,
            heard: false,
        }
    }

    /// `news` ends it, too, after a moment.
    pub(super) fn or_news(self, news: &'a Receiver<()>) -> Self {
        Self {
            news: Some(news),
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

    /// What stops the wait for a connection to nsmgr.
    pub(super) fn stop(&self) -> &Stop {
        self.stop
    }

    /// Whether there was news during the call.
    pub(super) fn has_heard(&self) -> bool {
        self.heard
    }

    /// Waits for the answer; `None` when it is given up. Without an answer and
    /// without news it ends when `answer` does: calls have deadlines.
    pub(super) fn wait<T>(&mut self, answer: &Receiver<T>) -> Option<T> {
        let quiet = never();
        let mut news = self.news.unwrap_or(&quiet);
        let mut given_up = never();
        loop {
            let overdue = match &self.permit {
                Some((_, until)) => at(*until),
                None => never(),
            };
            select! {
                recv(answer) -> answer => return answer.ok(),
                recv(self.stop.receiver()) -> _ => return None,
                recv(news) -> said => {
                    news = &quiet;
                    // Its end is that of `lb-watch`, which stops us, too.
                    if said.is_ok() {
                        self.heard = true;
                        given_up = at(clock::now() + GRACE);
                    }
                },
                recv(given_up) -> _ => return None,
                recv(overdue) -> _ => self.permit = None,
            }
        }
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
