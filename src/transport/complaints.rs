//! Log lines that strangers cause: whoever reaches the socket could otherwise
//! fill the log, and push out the lines of others.

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
}
