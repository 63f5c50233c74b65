//! The only place where the daemon reads a clock.
//!
//! Logic takes `now` as an argument; the thread that drives it calls these
//! functions, so that tests run the logic in virtual time.

use std::time::{Duration, Instant, SystemTime};

/// Monotonic time: deadlines, delays, measurements.
#[must_use]
pub fn now() -> Instant {
    #[expect(
        clippy::disallowed_methods,
        reason = "this function is the one reader of the monotonic clock"
    )]
    Instant::now()
}

/// Wall-clock time: what is compared with times that peers sent.
#[must_use]
pub fn wall() -> SystemTime {
    #[expect(
        clippy::disallowed_methods,
        reason = "this function is the one reader of the wall clock"
    )]
    SystemTime::now()
}

/// A pair of readings taken together, to carry a peer's absolute time over to
/// the monotonic clock: a later change of the wall clock then moves nothing.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Monotonic reading.
    pub mono: Instant,
    /// Wall-clock reading taken at the same moment.
    pub wall: SystemTime,
}

impl Now {
    /// Reads both clocks.
    #[must_use]
    pub fn read() -> Self {
        Self {
            mono: now(),
            wall: wall(),
        }
    }

    /// How long until the absolute time `at`; zero when it is past.
    #[must_use]
    pub fn until(&self, at: SystemTime) -> Duration {
        at.duration_since(self.wall).unwrap_or(Duration::ZERO)
    }

    /// The monotonic moment that corresponds to the absolute time `at`; `mono`
    /// itself when `at` is past.
    #[must_use]
    pub fn monotonic(&self, at: SystemTime) -> Instant {
        self.mono + self.until(at)
    }
}
