//! What is wrong at present, so that an outage is one warning for each of its
//! causes: texts vary with every attempt, and causes take turns.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A stream that stood this long worked, though it had nothing to say.
const STEADY: Duration = Duration::from_secs(5);

/// What is wrong at present, by cause. The causes are words of the program, so
/// there are only ever a few.
#[derive(Debug, Default)]
pub struct Troubles(BTreeMap<&'static str, String>);

impl Troubles {
    /// Whether `cause` is new, and so worth a warning. The first text is kept
    /// until [`Troubles::over`].
    pub fn is_new(&mut self, cause: &'static str, text: &str) -> bool {
        if self.0.contains_key(cause) {
            return false;
        }
        self.0.insert(cause, text.to_owned());
        true
    }

    /// Forgets these causes, which have ended: each is new again. What was
    /// said of them first, if anything was.
    pub fn over(&mut self, causes: &[&str]) -> Option<String> {
        let said: Vec<String> = causes
            .iter()
            .filter_map(|cause| self.0.remove(*cause))
            .collect();
        (!said.is_empty()).then(|| said.join("; "))
    }
}

/// The ends of a stream that is opened again whenever it ends. Most are
/// routine: nsmgr ends it every few seconds in some versions, and the rotation
/// of an SVID ends its connection.
#[derive(Debug, Default)]
pub struct Ends {
    /// When the present stream was opened, unless it has brought something.
    idle_since: Option<Instant>,
    fruitless: u32,
}

impl Ends {
    /// The stream was opened.
    pub fn opened(&mut self, now: Instant) {
        self.idle_since = Some(now);
    }

    /// The stream brought something.
    pub fn heard(&mut self) {
        self.idle_since = None;
    }

    /// The stream ended: how many in a row have now done so at once and
    /// brought nothing. A single one may have met a peer that was stopping.
    pub fn ended(&mut self, now: Instant) -> u32 {
        let idle = self.idle_since.take();
        let is_fruitless = idle.is_some_and(|since| now.saturating_duration_since(since) < STEADY);
        self.fruitless = if is_fruitless {
            self.fruitless.saturating_add(1)
        } else {
            0
        };
        self.fruitless
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::clock;

    #[test]
    fn only_streams_that_bring_nothing_again_and_again_are_fruitless() {
        let (mut ends, now) = (Ends::default(), clock::now());
        let at_once = now + Duration::from_millis(10);
        // As some versions end it, and each rotation.
        for _ in 0..5 {
            ends.opened(now);
            ends.heard();
            assert_eq!(ends.ended(at_once), 0, "it had brought something");
            ends.opened(now);
            assert_eq!(ends.ended(now + STEADY), 0, "it stood");
        }
        for expected in 1..4 {
            ends.opened(now);
            assert_eq!(ends.ended(at_once), expected);
        }
        ends.opened(now);
        ends.heard();
        assert_eq!(ends.ended(at_once), 0);
        ends.opened(now);
        assert_eq!(ends.ended(at_once), 1, "counted anew");
    }

    #[test]
    fn a_cause_is_new_once_until_it_is_over() {
        let mut troubles = Troubles::default();
        for round in 0..3 {
            let text = format!("attempt {round}");
            assert_eq!(troubles.is_new("a", &text), round == 0, "the text varies");
            assert_eq!(
                troubles.is_new("b", "b failed"),
                round == 0,
                "they take turns"
            );
        }
        assert_eq!(troubles.over(&["c"]), None);
        assert_eq!(troubles.over(&["a"]), Some("attempt 0".to_owned()));
        assert_eq!(troubles.over(&["a"]), None, "told once");
        assert!(!troubles.is_new("b", "b failed"), "it goes on");
        assert!(troubles.is_new("a", "attempt 3"));
        assert_eq!(
            troubles.over(&["a", "b"]),
            Some("attempt 3; b failed".to_owned())
        );
    }
}
