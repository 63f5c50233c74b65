//! The machine against a reference: random wishes, random fates of the calls,
//! random time, and an IPAM that is nothing but a table.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use proptest::prelude::*;

use super::sim::Sim;
use super::*;
use crate::core::family::Family;

const IDS: [&str; 3] = ["a", "b", "c"];
/// Longer than half a lease is kept.
const LONG: Duration = Duration::from_secs(700);

#[derive(Debug, Clone)]
enum Op {
    Acquire(usize, u64),
    ReleaseLater(usize),
    Abandon(usize),
    End(usize, Fate),
    Pass(u64),
    Reconnected,
}

#[derive(Debug, Clone, Copy)]
enum Fate {
    Done,
    Unsent,
    LostBefore,
    LostAfter,
    Refused,
}

fn op() -> impl Strategy<Value = Op> {
    let fate = prop_oneof![
        4 => Just(Fate::Done),
        1 => Just(Fate::Unsent),
        1 => Just(Fate::LostBefore),
        1 => Just(Fate::LostAfter),
        1 => Just(Fate::Refused),
    ];
    prop_oneof![
        2 => (0..IDS.len(), 1..20_000u64).prop_map(|(id, millis)| Op::Acquire(id, millis)),
        1 => (0..IDS.len()).prop_map(Op::ReleaseLater),
        1 => (0..IDS.len()).prop_map(Op::Abandon),
        8 => (0..64usize, fate).prop_map(|(call, fate)| Op::End(call, fate)),
        1 => (1..30_000u64).prop_map(Op::Pass),
        2 => (1..300u64).prop_map(Op::Pass),
        1 => Just(Op::Reconnected),
    ]
}

/// The last wish for an id.
#[derive(Debug, Clone, Copy)]
enum Wish {
    /// It was acquired since it was last released, first by this ticket.
    Keep(u64),
    Release,
}

struct Model {
    sim: Sim,
    /// IPAM's table: child and family to the host's number.
    table: BTreeMap<(String, Family), u8>,
    wishes: BTreeMap<&'static str, Wish>,
    /// Acquires: deadline and, once it was seen, when the answer came.
    acquires: BTreeMap<u64, (usize, Instant, Option<Instant>)>,
    seen_calls: u64,
}

impl Model {
    fn new() -> Self {
        Self {
            sim: Sim::new(IpFamilies::Dual),
            table: BTreeMap::new(),
            wishes: BTreeMap::new(),
            acquires: BTreeMap::new(),
            seen_calls: 0,
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Acquire(id, millis) => {
                let ticket = self.acquires.len() as u64;
                let patience = Duration::from_millis(*millis);
                self.acquires
                    .insert(ticket, (*id, self.sim.now + patience, None));
                let wish = self.wishes.entry(IDS[*id]).or_insert(Wish::Release);
                if matches!(wish, Wish::Release) {
                    *wish = Wish::Keep(ticket);
                }
                self.sim.acquire(ticket, IDS[*id], patience);
            }
            Op::ReleaseLater(id) => {
                self.wishes.insert(IDS[*id], Wish::Release);
                self.sim.release_later(IDS[*id]);
            }
            Op::Abandon(id) => {
                let waits = |(ticket, (of, ..)): (&u64, &(usize, Instant, Option<Instant>))| {
                    of == id && !self.sim.answers.contains_key(ticket)
                };
                if !self.acquires.iter().any(waits) {
                    self.wishes.insert(IDS[*id], Wish::Release);
                }
                let now = self.sim.now;
                let actions = self.sim.book.abandon(LeaseId::new(IDS[*id]), now);
                self.sim.take(actions);
            }
            Op::End(index, fate) => {
                if !self.sim.calls.is_empty() {
                    let call = self.sim.calls.remove(index % self.sim.calls.len());
                    self.end(&call, *fate);
                }
            }
            Op::Reconnected => self.sim.reconnected(),
            Op::Pass(millis) => self.pass(Duration::from_millis(*millis)),
        }
        self.check();
    }

    /// Looks at what each timer brings before the next one.
    fn pass(&mut self, time: Duration) {
        let end = self.sim.now + time;
        while let Some(at) = self.sim.book.next_deadline().filter(|at| *at < end) {
            self.sim.pass(at.saturating_duration_since(self.sim.now));
            self.check();
        }
        self.sim.pass(end - self.sim.now);
    }

    fn end(&mut self, call: &IpamCall, fate: Fate) {
        let text = || "fate".to_owned();
        let address = match fate {
            Fate::Done | Fate::LostAfter => self.execute(call),
            Fate::Unsent | Fate::LostBefore | Fate::Refused => None,
        };
        let failure = match fate {
            Fate::Done => None,
            Fate::Unsent => Some(Failure::Unsent(text())),
            Fate::LostBefore | Fate::LostAfter => Some(Failure::Lost(text())),
            Fate::Refused => Some(Failure::Refused(text())),
        };
        let now = self.sim.now;
        let actions = match call.verb {
            Verb::Allocate => {
                let result = failure.map_or_else(|| Ok(address.unwrap()), Err);
                self.sim.book.allocated(call, result, now)
            }
            Verb::Release => {
                let result = failure.map_or(Ok(()), Err);
                self.sim.book.released(call, result, now)
            }
        };
        self.sim.take(actions);
    }

    fn execute(&mut self, call: &IpamCall) -> Option<IpNetwork> {
        let key = (call.child.to_string(), call.family);
        if call.verb == Verb::Release {
            self.table.remove(&key);
            return None;
        }
        let taken: Vec<u8> = self
            .table
            .iter()
            .filter(|((_, family), _)| *family == call.family)
            .map(|(_, number)| *number)
            .collect();
        let free = (1..=254).find(|number| !taken.contains(number)).unwrap();
        let number = *self.table.entry(key).or_insert(free);
        Some(address(call.family, number))
    }

    fn check(&mut self) {
        let now = self.sim.now;
        let fresh: Vec<u64> = self
            .sim
            .answers
            .keys()
            .filter(|ticket| self.acquires[*ticket].2.is_none())
            .copied()
            .collect();
        for ticket in fresh {
            let (id, _, answered) = self.acquires.get_mut(&ticket).unwrap();
            *answered = Some(now);
            let id = IDS[*id];
            if let Ok(addresses) = &self.sim.answers[&ticket] {
                self.holds(id, addresses);
            }
        }
        for (ticket, (_, deadline, answered)) in &self.acquires {
            assert!(
                *deadline > now || answered.is_some(),
                "acquire {ticket} was not answered by its deadline"
            );
        }
        for call in &self.sim.calls {
            if call.verb == Verb::Release && call.number >= self.seen_calls {
                self.may_release(call);
            }
        }
        self.seen_calls = self
            .sim
            .calls
            .iter()
            .map(|call| call.number + 1)
            .chain([self.seen_calls])
            .max()
            .unwrap();
    }

    /// What an acquire was told is what IPAM holds, and stays so.
    fn holds(&self, id: &str, addresses: &Addresses) {
        for family in Family::ALL {
            let lease = addresses.leases.get(family).unwrap();
            for (end, told) in [("src", lease.src), ("dst", lease.dst)] {
                let number = self.table.get(&(format!("{id}-{end}"), family));
                let held = number.map(|number| address(family, *number));
                assert_eq!(held, Some(told), "{id}-{end}");
            }
        }
        let goes_back =
            |call: &&IpamCall| call.verb == Verb::Release && call.child.to_string().starts_with(id);
        assert_eq!(self.sim.calls.iter().find(goes_back), None);
    }

    /// A release that begins is one whose id was not acquired later, unless
    /// that came to nothing and nobody came back.
    fn may_release(&self, call: &IpamCall) {
        let name = call.child.to_string();
        let id = IDS.iter().find(|id| name.starts_with(**id)).unwrap();
        match self.wishes[id] {
            Wish::Release => {}
            Wish::Keep(ticket) => {
                let answers = self.answers(id, ticket);
                let failed = answers.iter().all(|answer| *answer == Some(false));
                assert!(failed, "{call} after an acquire");
            }
        }
    }

    /// Whether each acquire of `id` since `first` succeeded, if it ended.
    fn answers(&self, id: &str, first: u64) -> Vec<Option<bool>> {
        self.acquires
            .range(first..)
            .filter(|(_, (of, ..))| IDS[*of] == id)
            .map(|(ticket, _)| self.sim.answers.get(ticket).map(Result::is_ok))
            .collect()
    }

    /// With an IPAM that works all wishes come true.
    fn settle(&mut self) {
        let end = self.sim.now + LONG;
        while self.sim.now < end {
            while !self.sim.calls.is_empty() {
                let call = self.sim.calls.remove(0);
                self.end(&call, Fate::Done);
                self.check();
            }
            self.pass(Duration::from_secs(1));
            self.check();
        }
        assert_eq!(self.sim.book.pending_releases(), 0);
        for (id, wish) in &self.wishes {
            let kept = match wish {
                Wish::Release => false,
                Wish::Keep(ticket) => self.answers(id, *ticket).contains(&Some(true)),
            };
            for family in Family::ALL {
                for end in ["src", "dst"] {
                    let key = (format!("{id}-{end}"), family);
                    assert_eq!(self.table.contains_key(&key), kept, "{key:?}: {wish:?}");
                }
            }
        }
    }
}

fn address(family: Family, number: u8) -> IpNetwork {
    match family {
        Family::V4 => format!("172.16.0.{number}/24"),
        Family::V6 => format!("fd00::{number:x}/64"),
    }
    .parse()
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn wishes_come_true(ops in prop::collection::vec(op(), 1..120)) {
        let mut model = Model::new();
        for op in &ops {
            model.apply(op);
        }
        model.settle();
    }
}
