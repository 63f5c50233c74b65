//! A panic is a bug, and there is no half-alive daemon: the hook logs thread,
//! message and backtrace and ends the process. A panic on one of gRPC's threads
//! would otherwise leave every later call hanging.

use std::backtrace::Backtrace;
use std::panic::PanicHookInfo;
use std::time::Duration;

use crossbeam_channel::Receiver;
use serde_json::Map;

use super::output::{Item, Output, Queue};
use super::{entry, termination_message};
use crate::sync::clock;

/// How long a reader of standard output that does not read may delay the end.
const WRITE_LIMIT: Duration = Duration::from_secs(1);

/// Sets the hook. What is in the queue is written first, so that the lines
/// before the bug are not lost with it.
pub(super) fn report_to(output: &Output, queue: &Queue, lines: &Receiver<Item>) {
    let (output, queue, lines) = (output.clone(), queue.clone(), lines.clone());
    std::panic::set_hook(Box::new(move |panic| {
        let (line, reason) = describe(panic);
        let deadline = clock::now() + WRITE_LIMIT;
        let own = std::thread::current().name() == Some(super::THREAD);
        if own || !queue.write_through(line.clone(), deadline) {
            // The thread `log` is the one that panics, has ended, or is stuck.
            write_directly(&output, &lines, &line);
        }
        termination_message(&reason);
        std::process::abort();
    }));
}

fn write_directly(output: &Output, lines: &Receiver<Item>, last: &[u8]) {
    let deadline = Some(clock::now() + WRITE_LIMIT);
    for item in lines.try_iter() {
        if let Item::Line(line) = item
            && output.write(&line, deadline).is_err()
        {
            return;
        }
    }
    // Nothing is left to be done about a failure.
    let _ = output.write(last, deadline);
}

fn describe(panic: &PanicHookInfo<'_>) -> (Vec<u8>, String) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let what = panic.payload_as_str().unwrap_or("no message");
    let place = panic
        .location()
        .map_or_else(|| "unknown place".to_owned(), ToString::to_string);
    let reason = format!("panic in thread {thread} at {place}: {what}");
    let mut extra = Map::new();
    extra.insert("thread".to_owned(), thread.into());
    extra.insert("location".to_owned(), place.into());
    extra.insert("error".to_owned(), what.into());
    let backtrace = Backtrace::force_capture().to_string();
    extra.insert("backtrace".to_owned(), backtrace.into());
    let message = "Panic: this is a bug, the process aborts".to_owned();
    (entry("critical", clock::wall(), message, extra), reason)
}
