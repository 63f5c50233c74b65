//! The `ipam` thread: drives the [`LeaseBook`].

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never, select};
use log::{info, warn};

use super::client::{Client, Outcome, Running};
use super::{Answer, IpamError, IpamOptions};
use crate::core::event::Event;
use crate::core::ids::LeaseId;
use crate::core::lease::{Action, IpamCall, LeaseBook, LeaseSettings};
use crate::kernel::NetHandle;
use crate::rpc::status::RpcError;
use crate::sync::clock;
use crate::sync::stop::{Stop, Stopper};
use crate::transport::client::{Connector, ConnectorState};

/// Calls that are in flight at the same time; the others wait for their turn
/// here. IPAM works them off one after the other, behind the lock of its table
/// (Meridio v1.2.8, pkg/ipam/storage/sqlite): many that wait there, from all
/// nodes at once, would outlive their deadlines and be repeated, for ever.
const CALLS_MAX: usize = 32;
/// Acquires that may wait for IPAM; above it they are answered `Busy`.
const WAITING_MAX: usize = 2048;

/// How long the first connection is waited for before calls are made, and fail.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// Commands taken in one turn, beside the first.
const BURST_MAX: usize = 256;

/// What the handle sends.
pub(super) enum Command {
    /// See [`super::IpamHandle::acquire`].
    Acquire {
        id: LeaseId,
        deadline: Instant,
        answer: Pending,
    },
    /// See [`super::IpamHandle::release_later`].
    ReleaseLater(LeaseId),
    /// See [`super::IpamHandle::abandon`].
    Abandon(LeaseId),
    /// See [`super::IpamHandle::flush`].
    Flush {
        deadline: Instant,
        done: Sender<Infallible>,
    },
}

/// An answer that is owed: dropped without one, it says `Stopped`.
pub(super) struct Pending(Option<Answer>);

impl Pending {
    pub(super) fn new(answer: Answer) -> Self {
        Self(Some(answer))
    }

    pub(super) fn answer(mut self, result: Result<crate::core::lease::Addresses, IpamError>) {
        if let Some(answer) = self.0.take() {
            answer(result);
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(answer) = self.0.take() {
            answer(Err(IpamError::Stopped));
        }
    }
}

/// Whether IPAM is there, and was before. A connection that only takes the
/// place of another, with a new certificate, has the same IPAM at its end.
#[derive(Debug, Default)]
struct Presence {
    was_there: bool,
    is_away: bool,
}

impl Presence {
    /// Whether `state` means that IPAM is there again after it was away.
    fn is_back(&mut self, state: &ConnectorState) -> bool {
        let is_away = *state != ConnectorState::Ready;
        let was_away = std::mem::replace(&mut self.is_away, is_away);
        let is_back = self.was_there && was_away && !is_away;
        self.was_there |= !is_away;
        is_back
    }
}

/// A call with its end.
type Ended = (IpamCall, Outcome);

/// The thread's state.
pub(super) struct Worker {
    book: LeaseBook<RpcError>,
    client: Client,
    net: NetHandle,
    /// Dropped when the bridge has its first addresses.
    first_addresses: Option<Stopper>,
    commands: Receiver<Command>,
    /// How many acquires are in `commands`.
    queued: Arc<AtomicUsize>,
    /// Completions; bounded by the calls in flight, each of which sends one.
    done: (Sender<Ended>, Receiver<Ended>),
    waiting_calls: VecDeque<IpamCall>,
    running: BTreeMap<u64, Running>,
    owed: BTreeMap<u64, Pending>,
    next_ticket: u64,
    flushes: Vec<(Instant, Sender<Infallible>)>,
}

impl Worker {
    pub(super) fn new(
        connector: Connector,
        net: NetHandle,
        options: IpamOptions,
        (commands, queued): (Receiver<Command>, Arc<AtomicUsize>),
        first_addresses: Stopper,
    ) -> Self {
        let settings = LeaseSettings {
            families: options.families,
            release_delay: options.release_delay,
            renew_interval: options.renew_interval,
        };
        Self {
            book: LeaseBook::new(settings, clock::now()),
            client: Client::new(connector, options),
            net,
            first_addresses: Some(first_addresses),
            commands,
            queued,
            done: bounded(CALLS_MAX),
            waiting_calls: VecDeque::new(),
            running: BTreeMap::new(),
            owed: BTreeMap::new(),
            next_ticket: 0,
            flushes: Vec::new(),
        }
    }

    /// Runs until `stop`. Calls in flight are cancelled then, and acquires
    /// that wait are answered `Stopped`.
    pub(super) fn run(mut self, stop: &Stop) {
        let done = self.done.1.clone();
        let commands = self.commands.clone();
        // Calls that are made before there is any connection only fail, which
        // would be logged as if IPAM were away, and are late by a retry.
        self.client.wait(clock::now() + FIRST_PATIENCE, stop);
        let state = self.client.state();
        let states = state.subscribe();
        let mut presence = Presence::default();
        loop {
            let timer = self.next_deadline().map_or_else(never, at);
            select! {
                recv(stop.receiver()) -> _ => return,
                recv(commands) -> command => {
                    // A burst leaves the queue before its calls begin.
                    for command in command.into_iter().chain(commands.try_iter().take(BURST_MAX)) {
                        self.obey(command);
                    }
                }
                recv(done) -> ended => if let Ok((call, outcome)) = ended {
                    self.ended(&call, outcome);
                },
                recv(states) -> _ => if presence.is_back(&state.get()) {
                    let actions = self.book.reconnected(clock::now());
                    self.act(actions);
                },
                recv(timer) -> _ => {
                    let actions = self.book.tick(clock::now());
                    self.act(actions);
                }
            }
            self.start_calls();
            self.end_flushes(clock::now());
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let flushes = self.flushes.iter().map(|(deadline, _)| *deadline);
        flushes.chain(self.book.next_deadline()).min()
    }

    fn obey(&mut self, command: Command) {
        let now = clock::now();
        let actions = match command {
            Command::Acquire {
                id,
                deadline,
                answer,
            } => {
                self.queued.fetch_sub(1, Ordering::Relaxed);
                if self.owed.len() >= WAITING_MAX {
                    answer.answer(Err(IpamError::Busy));
                    return;
                }
                let ticket = self.next_ticket;
                self.next_ticket += 1;
                self.owed.insert(ticket, answer);
                self.book.acquire(ticket, id, deadline, now)
            }
            Command::ReleaseLater(id) => self.book.release_later(id, now),
            Command::Abandon(id) => self.book.abandon(id, now),
            Command::Flush { deadline, done } => {
                self.flushes.push((deadline, done));
                self.book.flush(now)
            }
        };
        self.act(actions);
    }

    fn act(&mut self, actions: Vec<Action<RpcError>>) {
        for action in actions {
            match action {
                Action::Call(call) => self.waiting_calls.push_back(call),
                Action::Answer { ticket, result } => {
                    if let Some(pending) = self.owed.remove(&ticket) {
                        pending.answer(result.map_err(IpamError::from));
                    }
                }
                Action::Bridge(prefixes) => {
                    let event = Event::BridgePrefixes(prefixes);
                    info!("{event}");
                    self.net.tell(event);
                    self.first_addresses = None;
                }
                Action::Log(note) if note.is_problem => warn!("{}", note.text),
                Action::Log(note) => info!("{}", note.text),
            }
        }
    }

    fn start_calls(&mut self) {
        while self.running.len() < CALLS_MAX {
            let Some(call) = self.waiting_calls.pop_front() else {
                return;
            };
            match self.client.connection() {
                Ok(connection) => {
                    let done = self.done.0.clone();
                    let ended = call.clone();
                    let running = self.client.start(connection, &call, move |outcome| {
                        // There is a place for each call in flight.
                        let _ = done.try_send((ended, outcome));
                    });
                    self.running.insert(call.number, running);
                }
                Err(error) => self.ended(&call, Outcome::unsent(call.verb, error)),
            }
        }
    }

    fn ended(&mut self, call: &IpamCall, outcome: Outcome) {
        self.running.remove(&call.number);
        let now = clock::now();
        let actions = match outcome {
            Outcome::Allocated(result) => self.book.allocated(call, result, now),
            Outcome::Released(result) => self.book.released(call, result, now),
        };
        self.act(actions);
    }

    fn end_flushes(&mut self, now: Instant) {
        if self.flushes.is_empty() {
            return;
        }
        let pending = self.book.pending_releases();
        self.flushes.retain(|(deadline, _)| {
            if pending > 0 && *deadline <= now {
                warn!("time is up: {pending} connections keep their addresses in IPAM");
            }
            pending > 0 && *deadline > now
        });
    }
}
