//! Delay schedules: how long to wait before something is tried again.

use std::time::Duration;

/// Spreads delays so that many connections that failed together do not come
/// back together. A small generator (SplitMix64) whose seed is passed in: the
/// same seed gives the same delays.
#[derive(Debug, Clone)]
pub struct Jitter(u64);

impl Jitter {
    /// `seed` is best different for each owner.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// `delay`, at most a tenth shorter or longer.
    pub fn spread(&mut self, delay: Duration) -> Duration {
        // 0..=200 thousandths on top of nine tenths.
        let thousandths = u32::try_from(self.next() % 201).unwrap_or(100);
        let whole = delay.saturating_mul(900 + thousandths);
        if whole == Duration::MAX {
            return delay;
        }
        whole / 1000
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Delays that double from `first` up to `most`.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    /// The first delay is `first`, no delay is longer than `most`.
    #[must_use]
    pub const fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            next: first,
        }
    }

    /// The delay after one more failure.
    pub fn after_failure(&mut self) -> Duration {
        let delay = self.next.min(self.most);
        self.next = delay.saturating_mul(2).min(self.most);
        delay
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_cap_and_start_over() {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
        let delays: Vec<u128> = (0..6)
            .map(|_| backoff.after_failure().as_millis())
            .collect();
        assert_eq!(delays, [200, 400, 800, 1600, 2000, 2000]);
        backoff.reset();
        assert_eq!(backoff.after_failure(), Duration::from_millis(200));
        let mut flat = Backoff::new(Duration::from_secs(3), Duration::from_secs(2));
        assert_eq!(flat.after_failure(), Duration::from_secs(2));
    }

    #[test]
    fn jitter_stays_within_a_tenth_and_varies() {
        let mut jitter = Jitter::new(7);
        let delay = Duration::from_secs(120);
        let spread: Vec<Duration> = (0..1000).map(|_| jitter.spread(delay)).collect();
        assert!(spread.iter().all(|d| (108..=132).contains(&d.as_secs())));
        assert!(spread.iter().any(|d| *d < Duration::from_secs(112)));
        assert!(spread.iter().any(|d| *d > Duration::from_secs(128)));
        assert_eq!(jitter.spread(Duration::ZERO), Duration::ZERO);
        assert_eq!(jitter.spread(Duration::MAX), Duration::MAX);
    }
}
