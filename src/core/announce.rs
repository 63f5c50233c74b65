//! Which addresses on the bridge are announced, and when.
//!
//! Who has resolved an address keeps what it resolved for up to 45 s. A target
//! that comes back with a new interface has a new hardware address at the same
//! IP address, so what load balancers send to it is lost until then, unless
//! somebody tells them (Nordix/Meridio#380, #543). Driven by the thread `net`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::ids::IfIndex;

/// Most steps that are taken at once, and the pause after as many: a burst of
/// targets shall not become a burst of broadcasts.
const BURST: usize = 16;
const PACE: Duration = Duration::from_millis(10);

/// Waits from the first question to looking for its answer, and then from each
/// further question, until the target is given up: it does not answer.
const ANSWERS: [Duration; 7] = [
    Duration::from_millis(5),
    Duration::from_millis(25),
    Duration::from_millis(70),
    Duration::from_millis(200),
    Duration::from_millis(700),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// Waits before an announcement is repeated: frames may be lost while ports
/// settle, and a load balancer may resolve an address at the wrong moment.
const REPEATS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(2)];

/// Where an address is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Behind {
    /// It is the bridge's own.
    Bridge,
    /// It is leased to the targets behind these ports. One, unless a
    /// connection that nobody closed has the lease as well.
    Ports(BTreeSet<IfIndex>),
}

/// The next thing to do for an address.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// Make the kernel ask who has it.
    Ask(IpAddr),
    /// Announce it, if it has answered from where it may be; then report with
    /// [`Announcements::told`] or [`Announcements::unanswered`].
    Announce(IpAddr, Behind),
}

#[derive(Debug)]
struct Due {
    at: Instant,
    asked: usize,
    told: usize,
}

/// The addresses that are known, and what is still to be done for them.
#[derive(Debug, Default)]
pub struct Announcements {
    known: BTreeMap<IpAddr, Behind>,
    due: BTreeMap<IpAddr, Due>,
    paced_until: Option<Instant>,
}

impl Announcements {
    /// Takes over where all addresses are. One that is new, or is where it was
    /// not before, is announced from now on; one that is nowhere any more is
    /// not.
    pub fn observe(&mut self, found: BTreeMap<IpAddr, Behind>, now: Instant) {
        if found == self.known {
            return;
        }
        self.due.retain(|address, _| found.contains_key(address));
        for (address, behind) in &found {
            let moved = match (self.known.get(address), behind) {
                (Some(Behind::Ports(before)), Behind::Ports(ports)) => !ports.is_subset(before),
                (before, behind) => before != Some(behind),
            };
            if moved {
                let due = Due {
                    at: now,
                    asked: 0,
                    told: 0,
                };
                self.due.insert(*address, due);
            }
        }
        self.known = found;
    }

    /// The steps to take now: a bounded number.
    pub fn due(&mut self, now: Instant) -> Vec<Step> {
        if self.paced_until.is_some_and(|until| until > now) {
            return Vec::new();
        }
        let mut steps = Vec::new();
        for (address, due) in &mut self.due {
            if due.at > now {
                continue;
            }
            if steps.len() == BURST {
                break;
            }
            match self.known.get(address) {
                Some(Behind::Ports(_)) if due.asked == 0 => {
                    due.asked = 1;
                    due.at = now + ANSWERS[0];
                    steps.push(Step::Ask(*address));
                }
                Some(behind) => steps.push(Step::Announce(*address, behind.clone())),
                None => {}
            }
        }
        self.paced_until = (steps.len() == BURST).then_some(now + PACE);
        steps
    }

    /// The address was announced, or cannot be.
    pub fn told(&mut self, address: IpAddr, now: Instant) {
        let Some(due) = self.due.get_mut(&address) else {
            return;
        };
        match REPEATS.get(due.told) {
            Some(wait) => {
                due.told += 1;
                due.at = now + *wait;
            }
            None => {
                self.due.remove(&address);
            }
        }
    }

    /// Nobody has answered for the address yet, or somebody who does not have
    /// its lease. True when it shall be asked for once more.
    pub fn unanswered(&mut self, address: IpAddr, now: Instant) -> bool {
        let Some(due) = self.due.get_mut(&address) else {
            return false;
        };
        if due.told > 0 {
            self.told(address, now);
            return false;
        }
        match ANSWERS.get(due.asked) {
            Some(wait) => {
                due.asked += 1;
                due.at = now + *wait;
                true
            }
            None => {
                self.due.remove(&address);
                false
            }
        }
    }

    /// When [`Announcements::due`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let next = self.due.values().map(|due| due.at).min()?;
        Some(self.paced_until.map_or(next, |until| until.max(next)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::clock;

    fn address(n: u8) -> IpAddr {
        IpAddr::from([172, 16, 0, n])
    }

    fn ports(indexes: &[u32]) -> Behind {
        Behind::Ports(indexes.iter().filter_map(|n| IfIndex::new(*n)).collect())
    }

    /// Goes from deadline to deadline; what `answer` says becomes of each.
    fn run(
        machine: &mut Announcements,
        now: &mut Instant,
        answer: impl Fn(IpAddr) -> bool,
    ) -> Vec<(Duration, &'static str)> {
        let begun = *now;
        let mut log = Vec::new();
        while let Some(at) = machine.next_deadline() {
            *now = at.max(*now);
            for step in machine.due(*now) {
                let what = match step {
                    Step::Ask(_) => "ask",
                    Step::Announce(address, _) if answer(address) => {
                        machine.told(address, *now);
                        "tell"
                    }
                    Step::Announce(address, _) => match machine.unanswered(address, *now) {
                        true => "ask",
                        false => "leave",
                    },
                };
                log.push((now.saturating_duration_since(begun), what));
            }
        }
        log
    }

    fn ms(log: &[(Duration, &'static str)]) -> Vec<(u128, &'static str)> {
        log.iter()
            .map(|(at, what)| (at.as_millis(), *what))
            .collect()
    }

    #[test]
    fn a_target_is_asked_then_announced_three_times() {
        let mut now = clock::now();
        let mut machine = Announcements::default();
        machine.observe([(address(9), ports(&[3]))].into(), now);
        let log = run(&mut machine, &mut now, |_| true);
        let once = [(0, "ask"), (5, "tell"), (1005, "tell"), (3005, "tell")];
        assert_eq!(ms(&log), once);
        // The same again says nothing new, another interface does.
        machine.observe([(address(9), ports(&[3]))].into(), now);
        assert_eq!(machine.next_deadline(), None);
        machine.observe([(address(9), ports(&[4]))].into(), now);
        assert_eq!(ms(&run(&mut machine, &mut now, |_| true)), once);
        // A port less is no news, the same one back is.
        machine.observe([(address(9), ports(&[4, 5]))].into(), now);
        let _ = run(&mut machine, &mut now, |_| true);
        machine.observe([(address(9), ports(&[5]))].into(), now);
        assert_eq!(machine.next_deadline(), None);
        machine.observe(BTreeMap::new(), now);
        machine.observe([(address(9), ports(&[5]))].into(), now);
        assert_eq!(ms(&run(&mut machine, &mut now, |_| true)), once);
    }

    #[test]
    fn who_does_not_answer_is_given_up() {
        let mut now = clock::now();
        let mut machine = Announcements::default();
        machine.observe([(address(9), ports(&[3]))].into(), now);
        let log = ms(&run(&mut machine, &mut now, |_| false));
        assert_eq!(log.first(), Some(&(0, "ask")));
        assert_eq!(log.last(), Some(&(7000, "leave")));
        assert_eq!(log.len(), 8);
    }

    #[test]
    fn the_bridge_needs_no_question() {
        let mut now = clock::now();
        let mut machine = Announcements::default();
        machine.observe([(address(1), Behind::Bridge)].into(), now);
        let log = run(&mut machine, &mut now, |_| true);
        assert_eq!(ms(&log), [(0, "tell"), (1000, "tell"), (3000, "tell")]);
    }

    #[test]
    fn what_is_gone_is_not_announced() {
        let now = clock::now();
        let mut machine = Announcements::default();
        machine.observe([(address(9), ports(&[3]))].into(), now);
        assert_eq!(machine.due(now), [Step::Ask(address(9))]);
        machine.observe(BTreeMap::new(), now);
        assert_eq!(machine.next_deadline(), None);
        assert_eq!(machine.due(now + ANSWERS[0]), []);
        assert!(!machine.unanswered(address(9), now));
    }

    #[test]
    fn a_burst_is_paced_and_nobody_is_left_out() {
        let mut now = clock::now();
        let mut machine = Announcements::default();
        let all = (0..120).map(|n| (address(n), ports(&[u32::from(n) + 1])));
        machine.observe(all.collect(), now);
        let log = run(&mut machine, &mut now, |_| true);
        let told = log.iter().filter(|(_, what)| *what == "tell").count();
        assert_eq!(told, 360);
        let mut each: BTreeMap<Duration, usize> = BTreeMap::new();
        for (at, _) in &log {
            *each.entry(*at).or_default() += 1;
        }
        assert!(each.values().all(|steps| *steps <= 16), "{each:?}");
        // All were told once within a fifth of a second.
        let soon = log
            .iter()
            .filter(|(at, what)| *what == "tell" && at.as_millis() < 200);
        assert_eq!(soon.count(), 120);
    }
}
