//! A panic ends the process, and the log says why. The test runs itself once
//! more as the process that panics.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests end by panicking too"
)]

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use log::{LevelFilter, info};
use meridio_proxy::logging::Logging;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::sync::thread::{STACK_SMALL, Threads};
use serde_json::Value;

/// Set in the process that panics.
const CHILD: &str = "MERIDIO_TEST_PANIC";
/// The signal of abort(3).
const SIGABRT: i32 = 6;

fn panic_on_a_thread() {
    let threads = Threads::unsupervised();
    let _logging = Logging::start(&threads, LevelFilter::Info).unwrap();
    info!("before");
    let thread = threads.spawn("victim", STACK_SMALL, |_| panic!("a \"bug\"\nof ours"));
    let (_stopper, stop) = stop_pair();
    // The abort comes first.
    let _ = stop.wait(Duration::from_secs(20));
    drop(thread);
}

#[test]
fn a_panic_is_logged_behind_what_was_queued_and_aborts() {
    if std::env::var_os(CHILD).is_some() {
        return panic_on_a_thread();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_panic_is_logged_behind_what_was_queued_and_aborts",
        ])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert_eq!(output.status.signal(), Some(SIGABRT));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!(lines[0]["message"], "before");
    let (line, extra) = (&lines[1], &lines[1]["extra_data"]);
    assert_eq!(line["severity"], "critical");
    assert_eq!(extra["thread"], "victim");
    assert_eq!(extra["error"], "a \"bug\"\nof ours");
    assert!(
        extra["location"]
            .as_str()
            .unwrap()
            .contains("tests/panic.rs")
    );
    assert!(
        extra["backtrace"]
            .as_str()
            .unwrap()
            .contains("panic_on_a_thread")
    );
}
