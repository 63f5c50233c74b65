//! Small concurrency pieces of the lab's control plane.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use grpcio::Deadline;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{STACK_LARGE, STACK_SMALL, Threads};
use parking_lot::{Condvar, Mutex};

/// Runs `body` on a thread of its own that nobody waits for.
pub fn detach(name: &str, body: impl FnOnce() + Send + 'static) {
    match Threads::unsupervised().spawn(name, STACK_LARGE, move |_| body()) {
        Ok(thread) => thread.abandon(),
        Err(error) => eprintln!("lab: thread {name}: {error}"),
    }
}

/// Calls of one key run one at a time, in order of arrival.
#[derive(Default)]
pub struct Turns {
    queues: Mutex<Queues>,
    changed: Condvar,
}

#[derive(Default)]
struct Queues {
    next: u64,
    waiting: BTreeMap<String, VecDeque<u64>>,
}

/// A place in the queue of a key; dropping it lets the next one run.
pub struct Ticket {
    turns: Arc<Turns>,
    key: String,
    number: u64,
}

impl Turns {
    pub fn ticket(self: &Arc<Self>, key: &str) -> Ticket {
        let mut queues = self.queues.lock();
        queues.next += 1;
        let number = queues.next;
        queues
            .waiting
            .entry(key.to_owned())
            .or_default()
            .push_back(number);
        Ticket {
            turns: Arc::clone(self),
            key: key.to_owned(),
            number,
        }
    }
}

impl Ticket {
    /// Waits until it is first; false after `deadline`.
    pub fn wait(&self, deadline: Instant) -> bool {
        let mut queues = self.turns.queues.lock();
        loop {
            if queues.waiting[&self.key].front() == Some(&self.number) {
                return true;
            }
            if self
                .turns
                .changed
                .wait_until(&mut queues, deadline)
                .timed_out()
            {
                return false;
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut queues = self.turns.queues.lock();
        if let Some(queue) = queues.waiting.get_mut(&self.key) {
            queue.retain(|number| *number != self.number);
            if queue.is_empty() {
                queues.waiting.remove(&self.key);
            }
        }
        drop(queues);
        self.turns.changed.notify_all();
    }
}

/// Holds calls back while it is shut.
#[derive(Default)]
pub struct Gate {
    shut: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub fn set_shut(&self, shut: bool) {
        *self.shut.lock() = shut;
        self.changed.notify_all();
    }

    /// Waits until it is open, however long that takes.
    pub fn open(&self) {
        let mut shut = self.shut.lock();
        while *shut {
            self.changed.wait(&mut shut);
        }
    }

    /// Waits until it is open; false after `deadline`.
    pub fn pass(&self, deadline: Instant) -> bool {
        let mut shut = self.shut.lock();
        while *shut {
            if self.changed.wait_until(&mut shut, deadline).timed_out() {
                return false;
            }
        }
        true
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Jobs at points in time, one for each key, on the thread `lab-timers`; each
/// job gets a thread of its own.
pub struct Timers(Arc<TimerState>);

#[derive(Default)]
struct TimerState {
    jobs: Mutex<Jobs>,
    changed: Condvar,
}

#[derive(Default)]
struct Jobs {
    by_key: BTreeMap<String, (Instant, Job)>,
    stopped: bool,
}

impl Timers {
    pub fn start() -> std::io::Result<Self> {
        let state = Arc::new(TimerState::default());
        let for_thread = Arc::clone(&state);
        Threads::unsupervised()
            .spawn("lab-timers", STACK_SMALL, move |_| for_thread.run())?
            .abandon();
        Ok(Self(state))
    }

    /// Runs `job` at `at`, instead of the key's present one.
    pub fn arm(&self, key: &str, at: Instant, job: impl FnOnce() + Send + 'static) {
        let mut jobs = self.0.jobs.lock();
        jobs.by_key.insert(key.to_owned(), (at, Box::new(job)));
        drop(jobs);
        self.0.changed.notify_all();
    }

    pub fn cancel(&self, key: &str) {
        self.0.jobs.lock().by_key.remove(key);
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.0.jobs.lock().stopped = true;
        self.0.changed.notify_all();
    }
}

impl TimerState {
    fn run(&self) {
        let mut jobs = self.jobs.lock();
        while !jobs.stopped {
            let now = clock::now();
            let first = jobs.by_key.iter().min_by_key(|(_, (at, _))| *at);
            match first.map(|(key, (at, _))| (key.clone(), *at)) {
                Some((key, at)) if at <= now => {
                    if let Some((_, job)) = jobs.by_key.remove(&key) {
                        detach("lab-timer", job);
                    }
                }
                Some((_, at)) => {
                    let _ = self.changed.wait_until(&mut jobs, at);
                }
                None => self.changed.wait(&mut jobs),
            }
        }
        // Jobs may own what owns this: drop them outside the lock.
        let left = std::mem::take(&mut jobs.by_key);
        drop(jobs);
        drop(left);
    }
}

/// How long a call may still take; `None` when it has no deadline. grpcio keeps
/// the time to itself.
pub fn remaining(deadline: Deadline) -> Option<Duration> {
    /// `gpr_timespec` of the C core.
    #[repr(C)]
    struct Timespec {
        seconds: i64,
        nanos: i32,
        clock: u32,
    }
    const { assert!(size_of::<Deadline>() == size_of::<Timespec>()) }
    // SAFETY: `Deadline` is a struct whose only field is a `gpr_timespec`, a C
    // struct of these three integers; the size was compared above.
    let at: Timespec = unsafe { std::mem::transmute(deadline) };
    let _ = at.clock;
    if at.seconds == i64::MAX {
        return None;
    }
    let seconds = u64::try_from(at.seconds).unwrap_or(0);
    let nanos = u32::try_from(at.nanos).unwrap_or(0);
    let at = std::time::UNIX_EPOCH + Duration::new(seconds, nanos);
    Some(at.duration_since(clock::wall()).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;

    #[test]
    fn turns_are_taken_in_order_of_arrival() {
        let turns = Arc::new(Turns::default());
        let soon = || clock::now() + Duration::from_millis(20);
        let (first, second) = (turns.ticket("a"), turns.ticket("a"));
        let other = turns.ticket("b");
        assert!(first.wait(soon()) && other.wait(soon()));
        assert!(!second.wait(soon()));
        drop(first);
        assert!(second.wait(soon()));
    }

    #[test]
    fn a_timer_is_replaced_and_cancelled() {
        let timers = Timers::start().unwrap();
        let (tx, rx) = bounded(8);
        let at = |ms| clock::now() + Duration::from_millis(ms);
        for (key, ms, value) in [("a", 60_000, 1), ("b", 30, 2), ("a", 1, 3), ("c", 10, 4)] {
            let tx = tx.clone();
            timers.arm(key, at(ms), move || tx.send(value).unwrap());
        }
        timers.cancel("c");
        let get = || rx.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!((get(), get()), (3, 2));
        assert!(rx.try_recv().is_err());
    }

    #[test]
    fn the_remaining_time_of_a_deadline() {
        let left = remaining(Duration::from_secs(15).into()).unwrap();
        assert!(
            left <= Duration::from_secs(15) && left > Duration::from_secs(14),
            "{left:?}"
        );
    }
}
