//! Log lines: JSON objects on standard output, in the form of Meridio's
//! (pkg/log/logger.go), so that what reads those reads these.
//!
//! A line is made by the thread that logs and written by the thread `log`, with
//! a bounded queue between: a reader of standard output that does not read
//! delays nobody. Lines that find the queue full are dropped, counted, and the
//! count is logged.

mod output;
mod panic;
pub mod repeats;
mod time;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use log::kv::{Error as KvError, Key, Value, VisitSource, VisitValue};
use log::{Level, LevelFilter, Record, info};
use serde_json::{Map, Value as Json};

use crate::sync::clock;
use crate::sync::thread::{Joined, STACK_SMALL, ThreadHandle, Threads};
use output::{Output, Queue};

/// The target of records that are printed with severity `critical`.
pub const CRITICAL: &str = "critical";

/// The name of the thread that writes.
const THREAD: &str = "log";
/// `service_id` of Meridio's proxy.
const SERVICE_ID: &str = "Meridio-proxy";
/// `version` of the log format, not of the program.
const FORMAT_VERSION: &str = "1.0.0";
/// Keys whose text is JSON already.
const JSON_KEYS: [&str; 1] = ["config"];
/// Bytes of a message or a value that are printed.
const TEXT_MAX: usize = 16 * 1024;

/// Running logging: the thread `log`, and the configured level.
pub struct Logging {
    thread: ThreadHandle,
    levels: Levels,
}

/// Changes the level while the daemon runs.
#[derive(Debug, Clone, Copy)]
pub struct Levels {
    configured: LevelFilter,
}

impl Levels {
    /// TRACE, whatever is configured (SIGUSR2).
    pub fn trace(self) {
        set(LevelFilter::Trace);
    }

    /// The configured level (SIGUSR1).
    pub fn configured(self) {
        set(self.configured);
    }
}

fn set(level: LevelFilter) {
    log::set_max_level(level);
    info!(level = level.as_str(); "Log level set");
}

impl Logging {
    /// Takes over logging, gRPC's included, and the reporting of panics. Once
    /// in a process, before other threads are started.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started, or something logs already.
    pub fn start(threads: &Threads, level: LevelFilter) -> io::Result<Self> {
        let output = Output::stdout()?;
        let (queue, lines) = output::queue();
        panic::report_to(&output, &queue, &lines);
        let dropped = queue.dropped();
        let thread = threads.spawn(THREAD, STACK_SMALL, move |stop| {
            output::run(&output, &lines, &dropped, &stop);
        })?;
        let logger = logger(queue);
        log::set_boxed_logger(Box::new(logger)).map_err(io::Error::other)?;
        // gRPC's own verbosity follows the level at this moment: errors only,
        // its other lines say nothing to an operator.
        log::set_max_level(LevelFilter::Error);
        grpcio::redirect_log();
        log::set_max_level(level);
        Ok(Self {
            thread,
            levels: Levels { configured: level },
        })
    }

    /// For the thread that takes the signals.
    #[must_use]
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// Writes what is queued, for at most `limit`.
    pub fn finish(mut self, limit: Duration) {
        if self.thread.join_within(limit) == Joined::StillRunning {
            // Nobody reads standard output; the process ends regardless.
            self.thread.abandon();
        }
    }
}

fn logger(queue: Queue) -> env_logger::Logger {
    env_logger::Builder::new()
        // The level is steered by `log::set_max_level`, which the macros read
        // before they make a record.
        .filter_level(LevelFilter::Trace)
        .target(env_logger::Target::Pipe(Box::new(queue)))
        .format(|buffer, record| buffer.write_all(&line(record, clock::wall())))
        .build()
}

/// The line for `record`, with its line feed.
#[must_use]
pub fn line(record: &Record<'_>, now: SystemTime) -> Vec<u8> {
    let severity = match record.level() {
        Level::Error if record.target() == CRITICAL => "critical",
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    let mut extra = Extra(Map::new());
    if record
        .module_path()
        .is_some_and(|path| path.starts_with("grpcio"))
    {
        extra.0.insert("subsystem".to_owned(), "gRPC".into());
    }
    // The visitor keeps what it can and never fails.
    let _ = record.key_values().visit(&mut extra);
    entry(severity, now, record.args().to_string(), extra.0)
}

/// A line of its parts, the fields in Meridio's order.
fn entry(severity: &str, now: SystemTime, message: String, extra: Map<String, Json>) -> Vec<u8> {
    let text = |text: &str| Json::from(text).to_string();
    let mut line = format!(
        r#"{{"severity":{},"timestamp":{},"service_id":{},"message":{},"version":{},"extra_data":{}}}"#,
        text(severity),
        text(&time::format(now)),
        text(SERVICE_ID),
        Json::from(cut(message)),
        text(FORMAT_VERSION),
        Json::Object(extra),
    )
    .into_bytes();
    line.push(b'\n');
    line
}

/// At most [`TEXT_MAX`] bytes of `text`.
fn cut(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        text.push('…');
    }
    text
}

/// Collects key-values as JSON, each by its own type.
struct Extra(Map<String, Json>);

impl<'kvs> VisitSource<'kvs> for Extra {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), KvError> {
        let mut json = ToJson(Json::Null);
        value.visit(&mut json)?;
        if JSON_KEYS.contains(&key.as_str())
            && let Json::String(text) = &json.0
            && let Ok(parsed) = serde_json::from_str(text)
        {
            json.0 = parsed;
        }
        self.0.insert(key.as_str().to_owned(), json.0);
        Ok(())
    }
}

struct ToJson(Json);

impl<'v> VisitValue<'v> for ToJson {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), KvError> {
        self.0 = cut(value.to_string()).into();
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), KvError> {
        self.0 = Json::Null;
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), KvError> {
        self.0 = value.into();
        Ok(())
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), KvError> {
        self.0 = value.into();
        Ok(())
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), KvError> {
        self.0 = value.into();
        Ok(())
    }

    fn visit_bool(&mut self, value: bool) -> Result<(), KvError> {
        self.0 = value.into();
        Ok(())
    }
}

/// Leaves the reason of the process's end where Kubernetes shows it: the
/// container's termination message.
pub fn termination_message(text: &str) {
    let opened = std::fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open("/dev/termination-log");
    if let Ok(mut file) = opened {
        // Outside Kubernetes there is no such file, and nobody to be told.
        let _ = file.write_all(cut(text.to_owned()).as_bytes());
    }
}

/// Shared by the queue's ends.
type Count = Arc<std::sync::atomic::AtomicU64>;

#[cfg(test)]
mod tests;
