//! Putting the daemon together: what is started in which order (`parts`), what
//! brings it down (here), in which order it stops (`shutdown`). Runs on the
//! main thread.

pub mod bridge_mac;
pub mod debug;
mod parts;
pub mod shutdown;
mod signals;

use std::fmt;
use std::io::Write;

use crossbeam_channel::{Receiver, bounded, select};
use log::{error, info, warn};

use crate::cli::VERSION;
use crate::config::Config;
use crate::logging::{self, Levels, Logging};
use crate::sync::clock;
use crate::sync::thread::{ThreadEnded, Threads};
use crate::transport::descriptors;
use parts::Parts;
use shutdown::{LAST_LIMIT, STAGES};

/// Notices to `main` that may wait; the first one decides.
const CONTROL_BOUND: usize = 16;

/// Why the daemon stops.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cause {
    /// Somebody asked for it.
    Signal(&'static str),
    /// A thread ended unasked, which only a bug or a dead system makes it do.
    ThreadEnded(String),
    /// It could not be started: what, and why.
    Start(&'static str, String),
}

impl Cause {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Signal(_) => 0,
            Self::ThreadEnded(_) | Self::Start(..) => 1,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(name) => write!(f, "{name}"),
            Self::ThreadEnded(name) => write!(f, "thread {name} ended although nobody stopped it"),
            Self::Start(what, why) => write!(f, "starting {what}: {why}"),
        }
    }
}

/// What `main` listens to.
struct Control {
    signals: Receiver<&'static str>,
    ended: Receiver<ThreadEnded>,
}

impl Control {
    /// Waits until something brings the daemon down.
    fn wait(&self) -> Cause {
        self.wait_for(&crossbeam_channel::never(), || false)
            .unwrap_or(Cause::Signal("nothing"))
    }

    /// Waits until `is_met`, asked after each token of `changes`; `Some` when
    /// the daemon shall stop instead.
    fn wait_for(&self, changes: &Receiver<()>, is_met: impl Fn() -> bool) -> Option<Cause> {
        loop {
            select! {
                // The senders live in threads whose end is itself a notice, so
                // a closed channel means that the other one has the reason.
                recv(self.signals) -> name => {
                    return Some(name.map_or_else(
                        |_| Cause::ThreadEnded("signals".to_owned()),
                        Cause::Signal,
                    ));
                }
                recv(self.ended) -> ended => {
                    let name = ended.map_or_else(|_| "unknown".to_owned(), |ended| ended.name);
                    return Some(Cause::ThreadEnded(name));
                }
                recv(changes) -> _ => if is_met() {
                    return None;
                },
            }
        }
    }
}

/// Runs the daemon until something ends it; returns the exit status.
#[must_use]
pub fn run(config: &Config) -> u8 {
    let (tx, ended) = bounded(CONTROL_BOUND);
    let threads = Threads::new(tx);
    let logging = match Logging::start(&threads, config.log_level) {
        Ok(logging) => logging,
        Err(error) => {
            // There is no log to say it in.
            let _ = writeln!(std::io::stderr(), "starting the log: {error}");
            return 1;
        }
    };
    info!(config = config.to_json().to_string(), release = VERSION; "Configuration read");
    for warning in config.warnings() {
        warn!("{warning}");
    }
    descriptors::raise_limit();
    let cause = supervise(config, &threads, ended, logging.levels());
    info!("Proxy shutting done");
    logging.finish(LAST_LIMIT);
    cause.exit_status()
}

fn supervise(
    config: &Config,
    threads: &Threads,
    ended: Receiver<ThreadEnded>,
    levels: Levels,
) -> Cause {
    let (signal_thread, signals) = match signals::start(threads, levels) {
        Ok(started) => started,
        Err(error) => {
            let cause = Cause::Start("the signals thread", error.to_string());
            report(&cause);
            return cause;
        }
    };
    let control = Control { signals, ended };
    let mut parts = Parts::new();
    let cause = match parts.start(config, threads, &control) {
        Ok(()) => {
            info!("Proxy started");
            control.wait()
        }
        Err(cause) => cause,
    };
    report(&cause);
    stop(&mut parts);
    signal_thread.join_by(clock::now() + LAST_LIMIT);
    cause
}

fn report(cause: &Cause) {
    if let Cause::Signal(signal) = cause {
        info!(signal = *signal; "Proxy shutting down");
    } else {
        logging::termination_message(&cause.to_string());
        error!(target: logging::CRITICAL, error = cause.to_string(); "Proxy shutting down");
    }
}

fn stop(parts: &mut Parts) {
    for budget in STAGES {
        let begun = clock::now();
        let late = parts.stop(budget.stage, begun + budget.limit);
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let stage = budget.stage.to_string();
        if late.is_empty() {
            info!(stage, took_ms = took; "Stage of the stop done");
        } else {
            warn!(stage, took_ms = took, late = late.join(", "); "Stage of the stop overran");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> (
        crossbeam_channel::Sender<&'static str>,
        crossbeam_channel::Sender<ThreadEnded>,
        Control,
    ) {
        let (signal, signals) = bounded(1);
        let (end, ended) = bounded(CONTROL_BOUND);
        (signal, end, Control { signals, ended })
    }

    #[test]
    fn a_signal_is_a_success_and_an_ended_thread_a_failure() {
        let (signal, _end, heard) = control();
        signal.send("SIGTERM").unwrap();
        let cause = heard.wait();
        assert_eq!(cause, Cause::Signal("SIGTERM"));
        assert_eq!(cause.exit_status(), 0);

        let (_signal, end, heard) = control();
        let name = "net".to_owned();
        end.send(ThreadEnded { name: name.clone() }).unwrap();
        let cause = heard.wait();
        assert_eq!(cause, Cause::ThreadEnded(name));
        assert_eq!(cause.exit_status(), 1);
        assert_eq!(Cause::Start("x", String::new()).exit_status(), 1);
    }

    #[test]
    fn waiting_for_something_ends_with_it_or_with_a_stop() {
        let (signal, _end, heard) = control();
        let cell = crate::sync::watch::Watch::new(true);
        assert_eq!(heard.wait_for(&cell.subscribe(), || cell.get()), None);
        cell.set(false);
        signal.send("SIGINT").unwrap();
        assert_eq!(
            heard.wait_for(&cell.subscribe(), || cell.get()),
            Some(Cause::Signal("SIGINT"))
        );
    }
}
