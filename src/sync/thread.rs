//! Starting, stopping and joining threads. No thread of the daemon is started
//! in any other way, so every one has a name that `ps -T` shows whole, a way
//! to be stopped, and somebody who learns when it ends.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::clock;
use super::stop::{Stop, Stopper, stop_pair};

/// Linux keeps 15 bytes of a thread's name.
pub const NAME_MAX: usize = 15;

/// Stack of a thread that reads top to bottom and recurses nowhere.
pub const STACK_SMALL: usize = 256 * 1024;
/// Stack of a thread that builds larger messages.
pub const STACK_LARGE: usize = 512 * 1024;

/// Says that a thread ended although nobody had told it to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadEnded {
    /// The thread's name.
    pub name: String,
}

/// Starts threads and reports those that end on their own.
#[derive(Debug, Clone)]
pub struct Threads {
    ended: Sender<ThreadEnded>,
}

impl Threads {
    /// `ended` should have room for a message a thread; a full channel drops
    /// the notice, since the first one already brings the daemon down.
    #[must_use]
    pub fn new(ended: Sender<ThreadEnded>) -> Self {
        Self { ended }
    }

    /// A spawner whose notices nobody reads: for tests and short programs.
    #[must_use]
    pub fn unsupervised() -> Self {
        Self {
            ended: bounded(0).0,
        }
    }

    /// Starts `body` on a new thread.
    ///
    /// # Errors
    ///
    /// When the system refuses another thread.
    ///
    /// # Panics
    ///
    /// When `name` is empty or longer than [`NAME_MAX`] bytes: a mistake of
    /// the caller, which every test run meets.
    pub fn spawn<F>(&self, name: &str, stack: usize, body: F) -> std::io::Result<ThreadHandle>
    where
        F: FnOnce(Stop) + Send + 'static,
    {
        assert!(
            !name.is_empty() && name.len() <= NAME_MAX,
            "thread name {name:?} must have 1..={NAME_MAX} bytes"
        );
        let (stopper, stop) = stop_pair();
        let (done_tx, done) = bounded::<std::convert::Infallible>(0);
        let ended = self.ended.clone();
        let owned = name.to_owned();
        #[expect(
            clippy::disallowed_methods,
            reason = "the one place that starts threads"
        )]
        let join = std::thread::Builder::new()
            .name(owned.clone())
            .stack_size(stack)
            .spawn(move || {
                let asked = stop.clone();
                body(stop);
                if !asked.is_set() {
                    let _ = ended.try_send(ThreadEnded { name: owned });
                }
                drop(done_tx);
            })?;
        Ok(ThreadHandle {
            name: name.to_owned(),
            stopper: Some(stopper),
            done,
            join: Some(join),
        })
    }
}

/// Whether a thread ended within the time given to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Joined {
    /// It ended.
    Yes,
    /// It is still running; its handle can be asked again.
    StillRunning,
}

/// A running thread. Dropping the handle tells the thread to stop and waits
/// for it without limit; [`ThreadHandle::join_within`] first bounds the wait.
#[derive(Debug)]
pub struct ThreadHandle {
    name: String,
    // INVARIANT: dropped before `join` is waited for, see `Drop`.
    stopper: Option<Stopper>,
    done: Receiver<std::convert::Infallible>,
    join: Option<JoinHandle<()>>,
}

impl ThreadHandle {
    /// The thread's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells the thread to stop; does not wait.
    pub fn stop(&mut self) {
        self.stopper = None;
    }

    /// Becomes ready (disconnected) when the thread's body has returned.
    #[must_use]
    pub fn done(&self) -> &Receiver<std::convert::Infallible> {
        &self.done
    }

    /// Waits until the thread has ended or `deadline` has passed. Tells it to
    /// stop first.
    pub fn join_by(&mut self, deadline: Instant) -> Joined {
        self.stop();
        match self.done.recv_deadline(deadline) {
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => Joined::StillRunning,
            _ => {
                self.reap();
                Joined::Yes
            }
        }
    }

    /// [`ThreadHandle::join_by`] with a duration from now.
    pub fn join_within(&mut self, timeout: Duration) -> Joined {
        self.join_by(clock::now() + timeout)
    }

    /// Gives up on the thread: it is left running and nobody waits for it.
    /// Only for the end of the process, after its deadline was missed.
    pub fn abandon(mut self) {
        self.stopper = None;
        self.join = None;
    }

    fn reap(&mut self) {
        if let Some(join) = self.join.take() {
            // A panic has already been reported, and ended the process, in
            // the hook.
            let _ = join.join();
        }
    }
}

impl Drop for ThreadHandle {
    fn drop(&mut self) {
        self.stopper = None;
        self.reap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_blocked_threads_stop_at_once() {
        let threads = Threads::unsupervised();
        let mut handles: Vec<_> = (0..20)
            .map(|n| {
                threads
                    .spawn(&format!("blocked-{n}"), STACK_SMALL, |stop| {
                        assert!(stop.wait(Duration::from_secs(600)));
                    })
                    .unwrap()
            })
            .collect();
        let begun = clock::now();
        for handle in &mut handles {
            handle.stop();
        }
        for handle in &mut handles {
            assert_eq!(handle.join_within(Duration::from_secs(5)), Joined::Yes);
        }
        assert!(begun.elapsed() < Duration::from_millis(500));
    }

    #[test]
    fn an_end_nobody_asked_for_is_reported() {
        let (tx, rx) = bounded(1);
        let handle = Threads::new(tx)
            .spawn("short", STACK_SMALL, |_| ())
            .unwrap();
        assert_eq!(
            rx.recv_timeout(Duration::from_secs(5)).unwrap(),
            ThreadEnded {
                name: "short".to_owned()
            }
        );
        drop(handle);
    }

    #[test]
    fn a_thread_that_does_not_stop_is_named_not_waited_for() {
        let (release, held) = bounded::<()>(0);
        let mut handle = Threads::unsupervised()
            .spawn("deaf", STACK_SMALL, move |_| {
                let _ = held.recv();
            })
            .unwrap();
        assert_eq!(
            handle.join_within(Duration::from_millis(10)),
            Joined::StillRunning
        );
        drop(release);
        assert_eq!(handle.join_within(Duration::from_secs(5)), Joined::Yes);
    }
}
