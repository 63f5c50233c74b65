//! Lines that the same cause repeats: the first is written, then at most one a
//! minute, with the number of those that were left out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Pause between two lines of one cause.
const PERIOD: Duration = Duration::from_secs(60);
/// Causes that are told apart; further ones share a place.
const CAUSES_MAX: usize = 64;
/// Characters in which causes differ: texts may be a peer's.
const CAUSE_MAX: usize = 160;

/// What was written of late, by cause.
#[derive(Debug, Default)]
pub struct Repeats(BTreeMap<String, Recent>);

#[derive(Debug)]
struct Recent {
    written: Instant,
    left_out: u64,
}

impl Repeats {
    /// `None` to leave out a line about `cause`; else what to append to it:
    /// nothing, or how many were left out since the one before.
    pub fn admit(&mut self, cause: &str, now: Instant) -> Option<String> {
        let mut cause: String = cause.chars().take(CAUSE_MAX).collect();
        if !self.0.contains_key(&cause) && self.0.len() >= CAUSES_MAX {
            self.0.retain(|_, recent| now < recent.written + PERIOD);
            if self.0.len() >= CAUSES_MAX {
                cause.clear();
            }
        }
        match self.0.get_mut(&cause) {
            Some(recent) if now < recent.written + PERIOD => {
                recent.left_out = recent.left_out.saturating_add(1);
                None
            }
            known => {
                let left_out = known.map_or(0, |recent| recent.left_out);
                let (written, none) = (now, 0);
                let recent = Recent {
                    written,
                    left_out: none,
                };
                self.0.insert(cause, recent);
                Some(match left_out {
                    0 => String::new(),
                    count => format!(" ({count} more since the last such line)"),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::clock;

    #[test]
    fn each_cause_is_written_once_and_then_counted_by_the_minute() {
        let (mut repeats, start) = (Repeats::default(), clock::now());
        let second = Duration::from_secs(1);
        for cause in ["a", "b"] {
            assert_eq!(repeats.admit(cause, start), Some(String::new()));
            for n in 1..60 {
                assert_eq!(repeats.admit(cause, start + second * n), None);
            }
        }
        let next = repeats.admit("a", start + PERIOD).unwrap();
        assert_eq!(next, " (59 more since the last such line)");
        assert_eq!(repeats.admit("a", start + PERIOD), None);
        let last = repeats.admit("a", start + PERIOD * 2).unwrap();
        assert_eq!(last, " (1 more since the last such line)");
    }

    #[test]
    fn causes_without_end_take_no_room_and_write_no_lines_without_end() {
        let (mut repeats, start) = (Repeats::default(), clock::now());
        let lines = |repeats: &mut Repeats, now| {
            let texts = (0..10_000).map(|n| format!("{n} {}", "x".repeat(1_000)));
            texts.filter_map(|text| repeats.admit(&text, now)).count()
        };
        assert_eq!(lines(&mut repeats, start), CAUSES_MAX + 1);
        assert!(repeats.0.len() <= CAUSES_MAX + 1);
        assert_eq!(lines(&mut repeats, start + PERIOD / 2), 0);
        assert!(lines(&mut repeats, start + PERIOD * 2) <= CAUSES_MAX + 1);
        assert!(repeats.0.len() <= CAUSES_MAX + 1);
        let long = "y".repeat(1_000_000);
        repeats.admit(&long, start + PERIOD * 9);
        assert!(repeats.0.keys().all(|cause| cause.len() <= CAUSE_MAX));
    }
}
