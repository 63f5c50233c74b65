//! Log lines that others cause. Strangers could otherwise fill the log, whoever
//! reaches the socket, and a peer that is down does as long as it lasts; both
//! push out the lines of others.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Lines that may be written in one period.
const LINES_MAX: u32 = 10;
const PERIOD: Duration = Duration::from_secs(5);

/// Says whether a line may be written.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    /// The present period's end.
    until: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Complaints {
    /// `None` to leave a line out; else what to append to it: nothing, or how
    /// many were left out before.
    pub(super) fn admit(&mut self, now: Instant) -> Option<String> {
        if self.until.is_none_or(|until| until <= now) {
            self.until = Some(now + PERIOD);
            self.written = 0;
        }
        if self.written >= LINES_MAX {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.written += 1;
        Some(match std::mem::take(&mut self.left_out) {
            0 => String::new(),
            count => format!(" (before, {count} such lines were left out)"),
        })
    }
}

/// Different texts that are kept. A peer has a few addresses, and each of them
/// a few ways to fail.
const TEXTS_MAX: usize = 16;

/// What has been said of one trouble: attempts that fail in turn for several
/// reasons say each of them once.
#[derive(Debug, Default)]
pub(super) struct Said(VecDeque<String>);

impl Said {
    /// Whether this was not said before; it is then taken to be said.
    pub(super) fn is_new(&mut self, text: &str) -> bool {
        if self.0.iter().any(|said| said == text) {
            return false;
        }
        if self.0.len() >= TEXTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(text.to_owned());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::clock;

    #[test]
    fn lines_are_left_out_and_counted() {
        let (mut complaints, start) = (Complaints::default(), clock::now());
        for _ in 0..LINES_MAX {
            assert_eq!(complaints.admit(start), Some(String::new()));
        }
        for _ in 0..70 {
            assert_eq!(complaints.admit(start + PERIOD / 2), None);
        }
        let next = complaints.admit(start + PERIOD).unwrap();
        assert!(next.contains("70"), "{next}");
        assert_eq!(complaints.admit(start + PERIOD), Some(String::new()));
    }

    #[test]
    fn reasons_that_take_turns_are_said_once_each() {
        let mut said = Said::default();
        assert!(said.is_new("10.0.0.1: refused"));
        assert!(said.is_new("10.0.0.2: timed out"));
        for _ in 0..5 {
            assert!(!said.is_new("10.0.0.1: refused"));
            assert!(!said.is_new("10.0.0.2: timed out"));
        }
        for number in 0..100 {
            assert!(said.is_new(&number.to_string()));
        }
        assert_eq!(said.0.len(), TEXTS_MAX);
    }
}
