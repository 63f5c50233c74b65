//! The thread that moves the bytes of connections, all of them with one
//! poll(2): `tls-<name>` for those that a connector dials, `relay-in` for those
//! that a server accepted.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::error;
use parking_lot::Mutex;

use super::link::Link;
use crate::rpc::env::SLOTS_HELD_MAX;
use crate::sync::clock;
use crate::sync::poll::{self, Interest, Readiness, WakeFd};
use crate::sync::stop::Stop;
use crate::sync::thread::{Joined, STACK_SMALL, ThreadHandle, Threads};

/// How long the last bytes of all connections may take when the relay stops.
const STOP_LINGER: Duration = Duration::from_millis(250);

/// How long the rest of a peer's request may take while gRPC's slots run out.
const SLOT_LIMIT: Duration = Duration::from_secs(1);

/// A running relay. Dropping it ends its connections.
pub(super) struct Relay {
    inbox: Arc<Mutex<Vec<Link>>>,
    wake: Arc<WakeFd>,
    /// `None` when it was stopped.
    thread: Mutex<Option<ThreadHandle>>,
}

impl Relay {
    /// Starts the thread `name`.
    pub(super) fn start(threads: &Threads, name: &str) -> io::Result<Self> {
        let inbox = Arc::new(Mutex::new(Vec::new()));
        let wake = Arc::new(WakeFd::new()?);
        let (links, woken) = (Arc::clone(&inbox), Arc::clone(&wake));
        let thread = threads.spawn(name, STACK_SMALL, move |stop| {
            run(&links, &woken, &stop);
        })?;
        Ok(Self {
            inbox,
            wake,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// With a stand-in for the thread.
    #[cfg(test)]
    pub(super) fn of_thread(thread: ThreadHandle) -> Self {
        Self {
            inbox: Arc::default(),
            wake: Arc::new(WakeFd::new().unwrap()),
            thread: Mutex::new(Some(thread)),
        }
    }

    /// What links of this relay wake it with.
    pub(super) fn wake(&self) -> &Arc<WakeFd> {
        &self.wake
    }

    /// Takes a link over.
    pub(super) fn add(&self, link: Link) {
        self.inbox.lock().push(link);
        self.wake.wake();
    }

    /// Ends all connections and the thread. The thread's name when it did not
    /// end by `deadline`; it is left alone then.
    pub(super) fn stop_by(&self, deadline: Instant) -> Option<String> {
        let mut thread = self.thread.lock().take()?;
        thread.stop();
        self.wake.wake();
        end_by(thread, deadline)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.get_mut() {
            thread.stop();
            self.wake.wake();
        }
    }
}

/// Waits for a thread that was told to stop. Its name when it did not end by
/// `deadline`; nobody waits for it any more then.
pub(super) fn end_by(mut thread: ThreadHandle, deadline: Instant) -> Option<String> {
    if thread.join_by(deadline) == Joined::Yes {
        return None;
    }
    let name = thread.name().to_owned();
    thread.abandon();
    Some(name)
}

fn run(inbox: &Mutex<Vec<Link>>, wake: &WakeFd, stop: &Stop) {
    let mut links: Vec<Link> = Vec::new();
    let mut ready: Vec<Readiness> = Vec::new();
    let mut all = true;
    let mut limit: Option<Instant> = None;
    loop {
        let new = std::mem::take(&mut *inbox.lock());
        all |= !new.is_empty();
        links.extend(new);
        if limit.is_none() && stop.is_set() {
            limit = Some(clock::now() + STOP_LINGER);
            for link in &links {
                link.handle().request_close();
            }
            all = true;
        }
        let now = clock::now();
        let more = turn(&mut links, &ready, all, now);
        let freed = free_slots(&mut links, now);
        links.retain(|link| !link.is_over());
        if limit.is_some_and(|limit| links.is_empty() || now >= limit) {
            return;
        }
        match wait(
            &links,
            wake,
            more,
            limit.into_iter().chain(freed).min(),
            now,
        ) {
            Ok((woken, found)) => {
                all = woken;
                ready = found;
            }
            Err(error) => {
                error!("relay cannot wait for {} connections: {error}", links.len());
                return;
            }
        }
    }
}

/// A turn of every link that is ready or due, or of all. True when one has
/// more to do at once.
fn turn(links: &mut [Link], ready: &[Readiness], all: bool, now: Instant) -> bool {
    let mut more = false;
    for (index, link) in links.iter_mut().enumerate() {
        let is_ready = ready
            .get(2 * index..2 * index + 2)
            .is_some_and(|pair| pair.iter().any(|found| found.read || found.write));
        if all || is_ready || link.deadline().is_some_and(|at| at <= now) {
            more |= link.turn(now);
        }
    }
    more
}

/// Each call holds one of gRPC's slots until its request is complete, whichever
/// connection it is on, and without a slot no peer is served, nor the own probe.
/// While too many are held, the connections are cut that have held the most of
/// them for too long. When the next one is due.
fn free_slots(links: &mut [Link], now: Instant) -> Option<Instant> {
    let mut held: usize = links.iter().map(|link| link.unfinished().0).sum();
    while held > SLOTS_HELD_MAX {
        let due = |link: &Link| Some(link.unfinished().1? + SLOT_LIMIT);
        let next = links.iter().filter_map(due).min()?;
        let most = links
            .iter_mut()
            .filter(|link| due(link).is_some_and(|due| due <= now))
            .max_by_key(|link| link.unfinished().0);
        let Some(link) = most else {
            return Some(next);
        };
        let count = link.unfinished().0;
        held -= count;
        let why = format!("{count} calls without their end take the places of others");
        link.cut(&why, now);
    }
    None
}

/// Waits; whether all links want a turn, and the readiness of each pair.
fn wait(
    links: &[Link],
    wake: &WakeFd,
    more: bool,
    limit: Option<Instant>,
    now: Instant,
) -> io::Result<(bool, Vec<Readiness>)> {
    let mut interests: Vec<Interest> = links.iter().flat_map(Link::interests).collect();
    interests.push(wake.interest());
    let due = links.iter().filter_map(Link::deadline).chain(limit).min();
    let deadline = if more { Some(now) } else { due };
    let mut found = poll::wait(&interests, deadline)?;
    let woken = found.pop().is_some_and(|wake| wake.read);
    if woken {
        wake.drain();
    }
    Ok((woken || more, found))
}
