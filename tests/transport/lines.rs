//! The warnings that connections cause, by the connection's name.

use std::sync::OnceLock;

use log::kv::Key;
use log::{LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;

/// Lines that are kept.
const LINES_MAX: usize = 1000;

#[derive(Default)]
struct Lines(Mutex<Vec<(String, String)>>);

static LINES: OnceLock<Lines> = OnceLock::new();

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let name = record.key_values().get(Key::from("connection"));
        let mut lines = self.0.lock();
        if let Some(name) = name
            && lines.len() < LINES_MAX
        {
            lines.push((name.to_string(), record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// Keeps warnings from now on.
pub fn start() {
    let lines = LINES.get_or_init(Lines::default);
    // The second test of the process finds it set.
    let _ = log::set_logger(lines);
    log::set_max_level(LevelFilter::Warn);
}

/// What was said of the connection of that name.
pub fn of(name: &str) -> Vec<String> {
    let lines = LINES.get().unwrap().0.lock();
    let of = lines.iter().filter(|(found, _)| found == name);
    of.map(|(_, text)| text.clone()).collect()
}
