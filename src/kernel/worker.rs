//! Thread `net`: facts in, kernel operations out.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select};
use log::{debug, error, info, warn};

use super::announce::Announcer;
use super::error::{KernelError, OpError};
use super::{EgressSink, NetMsg, Rtnl, said};
use crate::core::dataplane::Dataplane;
use crate::core::desired::{Desired, Warning};
use crate::core::observed::{LinkFact, Observed};
use crate::core::plan::{self, KernelOp};
use crate::sync::clock;
use crate::sync::stop::Stop;

/// Most messages that are taken in before the kernel is brought up to date.
const DRAIN: usize = 256;
/// Most rounds of a turn. A new bridge takes three: make it, use its index,
/// find nothing left to do.
const ROUNDS: usize = 8;
/// A turn that takes longer is logged.
const LONG_TURN: Duration = Duration::from_millis(100);
/// The kernel's state is read anew at least this often.
const FULL: Duration = Duration::from_secs(60);
/// First and longest wait before failed operations are tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// First and longest wait from a foreign change to reading the state anew.
const DAMPING: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// So often a foreign change is undone after the first wait; then the wait
/// doubles each time, so that a fight with another program stays a quiet one.
const PATIENT_MENDS: u32 = 16;
/// After so long without anything to undo a fight is over.
const PEACE: Duration = Duration::from_secs(10);

/// Takes messages until told to stop.
pub fn run<K: Rtnl>(mut net: Net<K>, messages: &Receiver<NetMsg>, stop: &Stop) {
    let mut waiting: Vec<Sender<Infallible>> = Vec::new();
    loop {
        let begun = clock::now();
        net.turn(begun);
        let taken = clock::now().saturating_duration_since(begun);
        if taken > LONG_TURN {
            warn!("a turn of the data plane took {} ms", taken.as_millis());
        }
        waiting.clear();
        let timeout = net.next_deadline().saturating_duration_since(clock::now());
        select! {
            recv(messages) -> message => match message {
                Ok(message) => net.take(message, &mut waiting, clock::now()),
                Err(_) => return,
            },
            recv(stop.receiver()) -> _ => return,
            default(timeout) => {}
        }
        for message in messages.try_iter().take(DRAIN) {
            net.take(message, &mut waiting, clock::now());
        }
    }
}

/// The owner of the kernel's state.
pub struct Net<K> {
    kernel: K,
    dataplane: Dataplane,
    observed: Observed,
    /// The facts and the observation are those that the last plan was made of,
    /// and nothing of it is left to do: another plan would be empty, and with
    /// a thousand VIPs not for free.
    settled: bool,
    /// How many plans were made.
    #[cfg(test)]
    pub plans: usize,
    egress: EgressSink,
    /// The number of connected LBs that was last told on.
    connected: usize,
    /// When the state shall be read anew because somebody changed it.
    resync_at: Option<Instant>,
    /// How often a foreign change was undone without peace in between, and when
    /// it was the last time.
    mends: u32,
    mended_at: Instant,
    /// When what failed is tried again.
    retry_at: Option<Instant>,
    retry_delay: Duration,
    full_at: Instant,
    /// Operations that failed in the last turn, with the error that was logged.
    refused: BTreeMap<KernelOp, OpError>,
    /// What was last warned of.
    warned: BTreeSet<Warning>,
    /// The failure of the last dump, as logged.
    blind: Option<String>,
    announcer: Announcer,
}

impl<K: Rtnl> Net<K> {
    /// With the state as first observed.
    pub fn new(
        kernel: K,
        dataplane: Dataplane,
        observed: Observed,
        egress: EgressSink,
        now: Instant,
    ) -> Self {
        Self {
            kernel,
            dataplane,
            observed,
            settled: false,
            #[cfg(test)]
            plans: 0,
            egress,
            connected: 0,
            resync_at: None,
            mends: 0,
            mended_at: now,
            retry_at: None,
            retry_delay: RETRY.0,
            full_at: now + FULL,
            refused: BTreeMap::new(),
            warned: BTreeSet::new(),
            blind: None,
            announcer: Announcer::default(),
        }
    }

    /// Takes a message in; who waits for a turn is put into `waiting`.
    pub fn take(&mut self, message: NetMsg, waiting: &mut Vec<Sender<Infallible>>, now: Instant) {
        match message {
            NetMsg::Fact(event) => {
                debug!("fact: {event}");
                self.settled = false;
                self.dataplane.apply(event);
            }
            // The echo of what was done, or a change of what is not looked at.
            NetMsg::Link(LinkFact::Seen(link))
                if self.observed.named(&link.name) == Some(&link) => {}
            NetMsg::Link(fact) => {
                self.settled = false;
                if self.observed.link(fact) {
                    self.resync_by(now);
                }
            }
            NetMsg::Foreign => {
                let damping = self.damping(now);
                self.resync_by(now + damping);
            }
            NetMsg::Overrun => self.resync_by(now),
            NetMsg::Quiesce(ack) => waiting.push(ack),
        }
    }

    /// How long to wait for more of a foreign change.
    fn damping(&mut self, now: Instant) -> Duration {
        if now.saturating_duration_since(self.mended_at) > PEACE {
            self.mends = 0;
        }
        let doublings = self.mends.saturating_sub(PATIENT_MENDS).min(10);
        (DAMPING.0 * 2u32.pow(doublings)).min(DAMPING.1)
    }

    fn resync_by(&mut self, at: Instant) {
        self.resync_at = Some(self.resync_at.map_or(at, |old| old.min(at)));
    }

    /// When a turn is due without any message.
    pub fn next_deadline(&self) -> Instant {
        [
            self.resync_at,
            self.retry_at,
            self.dataplane.next_deadline(),
            self.announcer.next_deadline(),
        ]
        .into_iter()
        .flatten()
        .fold(self.full_at, Instant::min)
    }

    /// Brings the kernel to what the facts ask for.
    pub fn turn(&mut self, now: Instant) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let foreign = due(self.resync_at);
        let mut drifted = false;
        if foreign || due(self.retry_at) || self.full_at <= now {
            drifted = self.resync(now);
        }
        // Some hops of a predecessor stay for a time.
        if due(self.dataplane.next_deadline()) {
            self.settled = false;
        }
        let (done, failed) = if self.settled {
            (false, false)
        } else {
            self.rounds(now)
        };
        if foreign && drifted && done {
            self.mends = self.mends.saturating_add(1);
            self.mended_at = now;
        }
        if failed || self.blind.is_some() {
            self.retry_at = Some(now + self.retry_delay);
            self.retry_delay = (self.retry_delay * 2).min(RETRY.1);
        } else {
            self.retry_at = None;
            self.retry_delay = RETRY.0;
        }
        self.tell_egress();
        // Last, so that nothing waits for it.
        if let Some(bridge) = self.observed.bridge().map(|link| link.index) {
            let found = self.dataplane.announced(&self.observed);
            self.announcer.turn(&mut self.kernel, bridge, found, now);
        }
    }

    /// Operations, round after round, until nothing is left to do that did not
    /// fail in this turn. Whether any was done, and whether to try again.
    fn rounds(&mut self, now: Instant) -> (bool, bool) {
        let mut failed: BTreeMap<KernelOp, OpError> = BTreeMap::new();
        let mut done = false;
        let mut at_rest = false;
        for _ in 0..ROUNDS {
            #[cfg(test)]
            {
                self.plans += 1;
            }
            let desired = self.dataplane.desired(&self.observed, now);
            let mut ops = plan::diff(&self.observed, &desired);
            self.warn(desired);
            ops.retain(|op| !failed.contains_key(op));
            if ops.is_empty() {
                at_rest = true;
                break;
            }
            let mut look_again = false;
            let outcomes = self.kernel.apply(&ops);
            for (op, outcome) in ops.into_iter().zip(outcomes) {
                match outcome {
                    Ok(()) => {
                        done = true;
                        look_again |= op.has_side_effects();
                        self.succeeded(&op);
                    }
                    Err(error) => {
                        look_again = true;
                        self.failed(&op, &error);
                        failed.insert(op, error);
                    }
                }
            }
            if look_again {
                self.resync(now);
            }
        }
        if !at_rest {
            error!("the kernel's state did not come to rest in {ROUNDS} rounds, to be tried again");
        }
        let again = !failed.is_empty() || !at_rest;
        self.settled = !again;
        self.refused = failed;
        (done, again)
    }

    fn succeeded(&mut self, op: &KernelOp) {
        said::done(op, &self.observed);
        self.observed.apply(op);
        self.dataplane.succeeded(op);
        if self.refused.remove(op).is_some() {
            info!("done after a failure: {op}");
        } else {
            match op {
                KernelOp::AddRule { .. }
                | KernelOp::DeleteRule(_)
                | KernelOp::ForgetNeighbour { .. }
                | KernelOp::AskNeighbour { .. } => debug!("done: {op}"),
                _ => info!("done: {op}"),
            }
        }
    }

    fn failed(&mut self, op: &KernelOp, error: &OpError) {
        // Whether a lost answer was a refusal, the next dump tells.
        if matches!(error, OpError::Refused { .. }) {
            self.dataplane.failed(op);
        }
        if error.is_a_gone_port(op) {
            debug!("not done: {op}: {error}");
        } else if self.refused.get(op) != Some(error) {
            warn!("failed, to be tried again: {op}: {error}");
        }
    }

    /// Logs warnings that are new.
    fn warn(&mut self, desired: Desired) {
        for warning in desired.warnings.difference(&self.warned) {
            warn!("{warning}");
        }
        self.warned = desired.warnings;
    }

    /// Replaces the observation. Whether it was another.
    fn resync(&mut self, now: Instant) -> bool {
        self.resync_at = None;
        self.full_at = now + FULL;
        match self.kernel.snapshot() {
            Ok(observed) => {
                if self.blind.take().is_some() {
                    info!("the kernel's state can be read again");
                }
                let drifted = self.observed != observed;
                self.settled &= !drifted;
                self.observed = observed;
                drifted
            }
            Err(KernelError(error)) => {
                if self.blind.as_ref() != Some(&error) {
                    error!("the kernel's state cannot be read, to be tried again: {error}");
                }
                self.blind = Some(error);
                false
            }
        }
    }

    fn tell_egress(&mut self) {
        let connected = self.dataplane.connected_lbs();
        if connected == self.connected {
            return;
        }
        self.connected = connected;
        let reason = match connected {
            0 => "no load balancer is connected".to_owned(),
            1 => "1 load balancer is connected".to_owned(),
            n => format!("{n} load balancers are connected"),
        };
        (self.egress)(connected > 0, &reason);
    }
}
