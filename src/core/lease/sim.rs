//! The book with the calls in flight and a clock that only the test moves.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use super::*;
use crate::sync::clock;

pub(super) const DELAY: Duration = Duration::from_secs(20);
pub(super) const RENEW: Duration = Duration::from_secs(300);
pub(super) const SHORT: Duration = Duration::from_millis(200);

/// The book, the calls in flight, and what came out.
pub(super) struct Sim {
    pub(super) book: LeaseBook<String>,
    pub(super) now: Instant,
    pub(super) calls: Vec<IpamCall>,
    pub(super) answers: BTreeMap<u64, Result<Addresses, AcquireError<String>>>,
    pub(super) bridges: Vec<PerFamily<Option<IpNetwork>>>,
    pub(super) notes: Vec<Note>,
}

impl Sim {
    pub(super) fn new(families: IpFamilies) -> Self {
        let now = clock::now();
        let settings = LeaseSettings {
            families,
            release_delay: DELAY,
            renew_interval: RENEW,
        };
        let mut sim = Self {
            book: LeaseBook::new(settings, now),
            now,
            calls: Vec::new(),
            answers: BTreeMap::new(),
            bridges: Vec::new(),
            notes: Vec::new(),
        };
        sim.pass(Duration::ZERO);
        sim
    }

    /// IPv4 only, with the bridge's address known.
    pub(super) fn ready() -> Self {
        let mut sim = Self::new(IpFamilies::V4);
        sim.allocate("bridge", "172.16.0.1/24");
        sim
    }

    pub(super) fn take(&mut self, actions: Vec<Action<String>>) {
        for action in actions {
            match action {
                Action::Call(call) => {
                    let same =
                        |other: &IpamCall| other.child == call.child && other.family == call.family;
                    assert!(!self.calls.iter().any(same), "two calls at once: {call}");
                    self.calls.push(call);
                }
                Action::Answer { ticket, result } => {
                    assert!(self.answers.insert(ticket, result).is_none(), "{ticket}");
                }
                Action::Bridge(prefixes) => self.bridges.push(prefixes),
                Action::Log(note) => self.notes.push(note),
            }
        }
    }

    pub(super) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.book.next_deadline().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            let actions = self.book.tick(self.now);
            self.take(actions);
        }
        self.now = end;
    }

    pub(super) fn acquire(&mut self, ticket: u64, id: &str, patience: Duration) {
        let deadline = self.now + patience;
        let actions = self
            .book
            .acquire(ticket, LeaseId::new(id), deadline, self.now);
        self.take(actions);
    }

    pub(super) fn release_later(&mut self, id: &str) {
        let actions = self.book.release_later(LeaseId::new(id), self.now);
        self.take(actions);
    }

    pub(super) fn abandon(&mut self, id: &str) {
        let actions = self.book.abandon(LeaseId::new(id), self.now);
        self.take(actions);
    }

    pub(super) fn reconnected(&mut self) {
        let actions = self.book.reconnected(self.now);
        self.take(actions);
    }

    pub(super) fn flush(&mut self) {
        let actions = self.book.flush(self.now);
        self.take(actions);
    }

    /// The calls in flight as text, in the order in which they were made.
    pub(super) fn in_flight(&self) -> Vec<String> {
        self.calls.iter().map(ToString::to_string).collect()
    }

    pub(super) fn pick(&mut self, verb: Verb, child: &str, family: Family) -> IpamCall {
        let at = self
            .calls
            .iter()
            .position(|call| {
                call.verb == verb && call.child.to_string() == child && call.family == family
            })
            .unwrap_or_else(|| panic!("no {verb:?} {child} in {:?}", self.in_flight()));
        self.calls.remove(at)
    }

    pub(super) fn allocate(&mut self, child: &str, address: &str) {
        let address: IpNetwork = address.parse().unwrap();
        let call = self.pick(Verb::Allocate, child, address.into());
        let actions = self.book.allocated(&call, Ok(address), self.now);
        self.take(actions);
    }

    pub(super) fn fail(&mut self, child: &str, failure: Failure<String>) {
        let call = self.pick(Verb::Allocate, child, Family::V4);
        let actions = self.book.allocated(&call, Err(failure), self.now);
        self.take(actions);
    }

    pub(super) fn release(&mut self, child: &str, result: Result<(), Failure<String>>) {
        let call = self.pick(Verb::Release, child, Family::V4);
        let actions = self.book.released(&call, result, self.now);
        self.take(actions);
    }

    /// Gives the usual addresses to `a`.
    pub(super) fn grant(&mut self) {
        self.allocate("a-src", "172.16.0.2/24");
        self.allocate("a-dst", "172.16.0.3/24");
    }

    pub(super) fn answer(&self, ticket: u64) -> &Result<Addresses, AcquireError<String>> {
        &self.answers[&ticket]
    }

    pub(super) fn src(&self, ticket: u64) -> String {
        let leases = self.answer(ticket).as_ref().unwrap().leases;
        leases.v4.unwrap().src.to_string()
    }
}
