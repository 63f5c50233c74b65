//! Thread `signals`: TERM, INT, HUP and QUIT stop the daemon, a second one of
//! them ends the process at once; USR2 and USR1 change the log level.

use std::io;
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded};
use log::warn;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level::{exit, signal_name};

use crate::logging::Levels;
use crate::sync::thread::{Joined, STACK_SMALL, ThreadHandle, Threads};

/// Exit status after a second signal: the stop was not orderly.
const IMPATIENT: i32 = 1;

/// The running thread.
pub(super) struct SignalThread {
    // INVARIANT: closed before `thread` is waited for, see `join_by` and `Drop`.
    handle: Handle,
    thread: ThreadHandle,
}

/// Starts the thread; the first signal to stop arrives, by its name, in the
/// channel.
pub(super) fn start(
    threads: &Threads,
    levels: Levels,
) -> io::Result<(SignalThread, Receiver<&'static str>)> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2])?;
    let handle = signals.handle();
    let (tx, stop_signals) = bounded(1);
    let thread = threads.spawn("signals", STACK_SMALL, move |_| {
        let mut stopping = false;
        for signal in signals.forever() {
            match signal {
                SIGUSR1 => levels.configured(),
                SIGUSR2 => levels.trace(),
                // Not through destructors: whatever hangs may hang there.
                _ if stopping => exit(IMPATIENT),
                _ => {
                    stopping = true;
                    // The channel has room for the one that is ever sent.
                    let _ = tx.try_send(signal_name(signal).unwrap_or("a signal"));
                }
            }
        }
    })?;
    Ok((SignalThread { handle, thread }, stop_signals))
}

impl SignalThread {
    /// Ends the thread. Signals are ignored from then on.
    pub(super) fn join_by(mut self, deadline: Instant) {
        self.close();
        if self.thread.join_by(deadline) == Joined::StillRunning {
            warn!("The signals thread did not end");
        }
    }

    fn close(&mut self) {
        self.thread.stop();
        self.handle.close();
    }
}

impl Drop for SignalThread {
    fn drop(&mut self) {
        self.close();
    }
}
