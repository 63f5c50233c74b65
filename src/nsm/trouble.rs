//! What is wrong at present, so that an outage is one warning for each of its
//! causes: texts vary with every attempt, and causes take turns.

use std::collections::BTreeMap;

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

#[cfg(test)]
mod tests {
    use super::*;

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
