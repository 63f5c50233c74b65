//! Parsers of values.

use std::time::Duration;

/// Parses a duration in Go's syntax, e.g. `1h15m30.5s`.
///
/// # Errors
///
/// What is wrong with the text.
pub fn parse_duration(_text: &str) -> Result<Duration, String> {
    todo!()
}
