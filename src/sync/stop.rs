//! Telling a thread to stop: the message is the closing of a channel, so it
//! can be selected on together with everything else a thread waits for, wakes
//! all its readers at once, and cannot be missed.

use std::convert::Infallible;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

/// The sending half: dropping it (or [`Stopper::stop`]) is the message.
#[derive(Debug)]
pub struct Stopper(#[expect(dead_code, reason = "held for its drop")] Sender<Infallible>);

/// The receiving half: cheap to clone, any number of threads may wait on it.
#[derive(Debug, Clone)]
pub struct Stop(Receiver<Infallible>);

/// A connected [`Stopper`] and [`Stop`].
#[must_use]
pub fn stop_pair() -> (Stopper, Stop) {
    let (sender, receiver) = bounded(0);
    (Stopper(sender), Stop(receiver))
}

impl Stopper {
    /// Tells every holder of the [`Stop`] to stop. The same as dropping.
    pub fn stop(self) {
        drop(self);
    }
}

impl Stop {
    /// The channel to put into a `select!`; it becomes ready (disconnected)
    /// when the thread shall stop, and never carries a value.
    #[must_use]
    pub fn receiver(&self) -> &Receiver<Infallible> {
        &self.0
    }

    /// Whether the thread was told to stop.
    #[must_use]
    pub fn is_set(&self) -> bool {
        matches!(self.0.try_recv(), Err(TryRecvError::Disconnected))
    }

    /// Waits for at most `timeout`; true when the thread shall stop.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> bool {
        matches!(
            self.0.recv_timeout(timeout),
            Err(RecvTimeoutError::Disconnected)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_the_stopper_is_the_message() {
        let (stopper, stop) = stop_pair();
        let other = stop.clone();
        assert!(!stop.is_set());
        assert!(!stop.wait(Duration::from_millis(1)));
        stopper.stop();
        assert!(stop.is_set() && other.is_set());
        assert!(other.wait(Duration::from_secs(600)));
    }
}
