//! When to register, refresh and unregister the endpoint.
//!
//! The network service comes first and is never unregistered: all nodes share
//! it. The endpoint is registered with a lifetime of [`LIFETIME`], refreshed
//! after two thirds of what the registry left of it, and registered anew when
//! the watch of its own entry says that the entry, nsmgr or the registry went
//! away. A hop drops the entry a call's deadline *before* it expires (NSM's
//! registry/common/expire), which is why attempts are kept short.

use std::time::{Duration, Instant};

/// The lifetime asked for, as in Meridio (pkg/nsm/client.go).
pub const LIFETIME: Duration = Duration::from_secs(60);
/// Longest attempt.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// Shortest attempt, for registries that grant short lives.
const ATTEMPT_MIN: Duration = Duration::from_millis(500);
/// Pause after a first failure, doubled up to [`PAUSE_MAX`]; also the shortest
/// time between two registrations, whatever the watch says, doubled up to
/// [`ANEW_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// Longest pause between attempts.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Longest pause before an entry is registered anew whose watch ends again and
/// again.
const ANEW_MAX: Duration = Duration::from_secs(5);
/// A registration that lasted this long was no failure.
const STEADY: Duration = Duration::from_secs(10);
/// When to refresh an entry that, by this node's clock, is expired on arrival:
/// the clocks differ, and asking again at once would not mend them.
const REFRESH_SKEWED: Duration = Duration::from_secs(5);
/// What is left of an entry below this is taken for a difference of clocks.
const SKEWED: Duration = Duration::from_secs(1);

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// Register the network service.
    RegisterService,
    /// See whether the registry has the same network service already.
    CheckService,
    /// Register, or refresh, the endpoint.
    RegisterEndpoint,
    /// Nothing until then.
    Wait(Instant),
    /// Unregister the endpoint.
    Unregister,
    /// Nothing any more.
    Done,
}

/// How an attempt went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Well.
    Done,
    /// The registry's policy refused it.
    Denied,
    /// In another way than well.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Service,
    DeniedService,
    Endpoint,
    Registered,
    Leaving,
    Gone,
}

/// The registration of one endpoint.
#[derive(Debug)]
pub struct Registration {
    phase: Phase,
    /// Not before this.
    due: Instant,
    /// Pause after the next failure.
    pause: Duration,
    /// Time between the last registration and one that the watch asks for.
    anew: Duration,
    /// When the last registration succeeded, or was tried.
    last: Option<Instant>,
    /// A Register was sent: the registry may hold an entry, whatever the
    /// answer was.
    tried: bool,
    attempt: Duration,
}

impl Registration {
    /// Begins at once.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            phase: Phase::Service,
            due: now,
            pause: PAUSE_MIN,
            anew: PAUSE_MIN,
            last: None,
            tried: false,
            attempt: ATTEMPT_MAX,
        }
    }

    /// What to do now.
    pub fn next(&mut self, now: Instant) -> Step {
        match self.phase {
            Phase::Gone => return Step::Done,
            _ if self.due > now => return Step::Wait(self.due),
            Phase::Leaving => return Step::Unregister,
            Phase::Service => return Step::RegisterService,
            Phase::DeniedService => return Step::CheckService,
            Phase::Endpoint | Phase::Registered => {}
        }
        self.phase = Phase::Endpoint;
        self.tried = true;
        self.last = Some(now);
        Step::RegisterEndpoint
    }

    /// The bound of one attempt.
    #[must_use]
    pub fn attempt_timeout(&self) -> Duration {
        self.attempt
    }

    /// Whether the endpoint is registered as far as is known.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        self.phase == Phase::Registered
    }

    /// The answer to [`Step::RegisterService`].
    pub fn service_answered(&mut self, outcome: Outcome, now: Instant) {
        if self.phase != Phase::Service {
            return;
        }
        match outcome {
            Outcome::Done => self.go(Phase::Endpoint, now),
            // Each node registers the same service, and a registry with
            // ownership policies lets only the first one do so.
            Outcome::Denied => self.go(Phase::DeniedService, now),
            Outcome::Failed => self.fail(Phase::Service, now),
        }
    }

    /// The answer to [`Step::CheckService`]: whether the same service is there.
    pub fn service_checked(&mut self, same: bool, now: Instant) {
        if self.phase != Phase::DeniedService {
            return;
        }
        if same {
            self.go(Phase::Endpoint, now);
        } else {
            self.fail(Phase::Service, now);
        }
    }

    /// The registry took the endpoint, and `left` of its life remains by this
    /// node's clock. `jitter` (0..=255) spreads the refreshes of nodes that
    /// were started together: it takes up to 5 % off.
    pub fn endpoint_registered(&mut self, left: Duration, jitter: u8, now: Instant) {
        if self.phase != Phase::Endpoint {
            return;
        }
        self.phase = Phase::Registered;
        self.pause = PAUSE_MIN;
        let used = self.attempt;
        if left < SKEWED {
            self.due = now + REFRESH_SKEWED;
            self.attempt = ATTEMPT_MAX;
            return;
        }
        let left = left.min(LIFETIME);
        self.attempt = (left / 6).clamp(ATTEMPT_MIN, ATTEMPT_MAX);
        let dropped = left.saturating_sub(used);
        let refresh = (left * 2 / 3).min(dropped * 4 / 5).max(PAUSE_MIN);
        self.due = now + refresh - refresh * u32::from(jitter) / (255 * 20);
    }

    /// The registry did not take the endpoint.
    pub fn endpoint_failed(&mut self, now: Instant) {
        if self.phase == Phase::Endpoint {
            self.fail(Phase::Endpoint, now);
        }
    }

    /// The watch of the own entry ended: nsmgr or the registry went away and
    /// may have forgotten both entries. A refresh can have met that before the
    /// watch told of it; then its next attempt begins with the service, too.
    pub fn watch_ended(&mut self, now: Instant) {
        if self.phase == Phase::Endpoint {
            self.phase = Phase::Service;
        }
        self.anew(Phase::Service, now);
    }

    /// The own entry was removed by somebody else, or expired.
    pub fn entry_deleted(&mut self, now: Instant) {
        self.anew(Phase::Endpoint, now);
    }

    /// Unregister, and never register again.
    pub fn leave(&mut self, now: Instant) {
        if self.phase == Phase::Leaving {
            return;
        }
        let next = if self.tried {
            Phase::Leaving
        } else {
            Phase::Gone
        };
        if self.phase != Phase::Gone {
            self.go(next, now);
        }
    }

    /// The answer to [`Step::Unregister`].
    pub fn unregistered(&mut self, outcome: Outcome, now: Instant) {
        if self.phase != Phase::Leaving {
            return;
        }
        match outcome {
            Outcome::Done => self.phase = Phase::Gone,
            Outcome::Denied | Outcome::Failed => self.fail(Phase::Leaving, now),
        }
    }

    fn anew(&mut self, phase: Phase, now: Instant) {
        if self.phase != Phase::Registered {
            return;
        }
        self.phase = phase;
        let last = self.last.unwrap_or(now);
        if now.saturating_duration_since(last) >= STEADY {
            self.anew = PAUSE_MIN;
        }
        self.due = now.max(last + self.anew);
        self.anew = (self.anew * 2).min(ANEW_MAX);
    }

    fn go(&mut self, phase: Phase, now: Instant) {
        self.phase = phase;
        self.due = now;
        self.pause = PAUSE_MIN;
    }

    fn fail(&mut self, phase: Phase, now: Instant) {
        self.phase = phase;
        self.due = now + self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any origin of virtual time")]
    fn start() -> Instant {
        Instant::now()
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Registered at `t`, with `left` of the entry's life.
    fn registered(t: Instant, left: Duration) -> Registration {
        let mut machine = Registration::new(t);
        assert_eq!(machine.next(t), Step::RegisterService);
        machine.service_answered(Outcome::Done, t);
        assert_eq!(machine.next(t), Step::RegisterEndpoint);
        machine.endpoint_registered(left, 0, t);
        machine
    }

    #[test]
    fn refreshes_well_before_a_hop_drops_the_entry() {
        let t = start();
        // The first attempt does not know yet how little it will be granted.
        for (left, first, attempt, then) in [
            (60_000, 40_000, 5_000, 40_000),
            (90_000, 40_000, 5_000, 40_000),
            (12_000, 5_600, 2_000, 8_000),
            (3_000, 200, 500, 2_000),
        ] {
            let mut machine = registered(t, ms(left));
            assert!(machine.is_registered());
            assert_eq!(machine.next(t), Step::Wait(t + ms(first)));
            assert_eq!(machine.attempt_timeout(), ms(attempt));
            let t = t + ms(first);
            assert_eq!(machine.next(t), Step::RegisterEndpoint);
            machine.endpoint_registered(ms(left), 0, t);
            assert_eq!(machine.next(t), Step::Wait(t + ms(then)));
            assert!(ms(then) < ms(left) - ms(attempt), "before a hop drops it");
        }
    }

    #[test]
    fn a_skewed_clock_makes_no_hot_loop() {
        let t = start();
        let mut machine = registered(t, Duration::ZERO);
        assert_eq!(machine.next(t), Step::Wait(t + REFRESH_SKEWED));
    }

    #[test]
    fn jitter_only_shortens() {
        let t = start();
        let mut machine = Registration::new(t);
        let _ = machine.next(t);
        machine.service_answered(Outcome::Done, t);
        let _ = machine.next(t);
        machine.endpoint_registered(LIFETIME, 255, t);
        assert_eq!(machine.next(t), Step::Wait(t + ms(38_000)));
    }

    #[test]
    fn every_failure_is_retried_after_a_growing_pause() {
        let mut now = start();
        let mut machine = Registration::new(now);
        for pause in [200, 400, 800, 1_000, 1_000] {
            assert_eq!(machine.next(now), Step::RegisterService);
            machine.service_answered(Outcome::Failed, now);
            assert_eq!(machine.next(now), Step::Wait(now + ms(pause)));
            now += ms(pause);
        }
        machine.service_answered(Outcome::Done, now);
        for pause in [200, 400] {
            assert_eq!(machine.next(now), Step::RegisterEndpoint);
            machine.endpoint_failed(now);
            assert_eq!(machine.next(now), Step::Wait(now + ms(pause)));
            now += ms(pause);
        }
    }

    #[test]
    fn a_denied_service_is_good_enough_if_it_is_there() {
        let t = start();
        let mut machine = Registration::new(t);
        let _ = machine.next(t);
        machine.service_answered(Outcome::Denied, t);
        assert_eq!(machine.next(t), Step::CheckService);
        machine.service_checked(false, t);
        assert_eq!(machine.next(t), Step::Wait(t + PAUSE_MIN));
        let t = t + PAUSE_MIN;
        assert_eq!(machine.next(t), Step::RegisterService);
        machine.service_answered(Outcome::Denied, t);
        let _ = machine.next(t);
        machine.service_checked(true, t);
        assert_eq!(machine.next(t), Step::RegisterEndpoint);
    }

    #[test]
    fn restarts_and_deletions_register_anew_but_not_in_a_loop() {
        let t = start();
        let later = t + ms(10_000);
        let mut machine = registered(t, LIFETIME);
        machine.watch_ended(later);
        assert_eq!(machine.next(later), Step::RegisterService);

        let mut machine = registered(t, LIFETIME);
        machine.entry_deleted(later);
        assert_eq!(machine.next(later), Step::RegisterEndpoint);

        let mut machine = registered(t, LIFETIME);
        machine.watch_ended(t + ms(1));
        assert_eq!(machine.next(t + ms(1)), Step::Wait(t + PAUSE_MIN));
    }

    /// A refresh is under way when nsmgr or the registry goes: it fails first,
    /// and then the watch ends.
    #[test]
    fn a_restart_met_by_a_refresh_registers_the_service_too() {
        let t = start();
        let mut machine = registered(t, LIFETIME);
        let due = t + ms(40_000);
        assert_eq!(machine.next(due), Step::RegisterEndpoint);
        machine.endpoint_failed(due);
        machine.watch_ended(due);
        assert_eq!(machine.next(due), Step::Wait(due + PAUSE_MIN), "paced");
        assert_eq!(machine.next(due + PAUSE_MIN), Step::RegisterService);
        machine.service_answered(Outcome::Done, due + PAUSE_MIN);
        assert_eq!(machine.next(due + PAUSE_MIN), Step::RegisterEndpoint);
    }

    #[test]
    fn a_watch_that_never_lasts_slows_down_until_one_does() {
        let mut now = start();
        let mut machine = registered(now, LIFETIME);
        for pause in [200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
            machine.watch_ended(now);
            assert_eq!(machine.next(now), Step::Wait(now + ms(pause)));
            now += ms(pause);
            assert_eq!(machine.next(now), Step::RegisterService);
            machine.service_answered(Outcome::Done, now);
            let _ = machine.next(now);
            machine.endpoint_registered(LIFETIME, 0, now);
        }
        now += STEADY;
        machine.watch_ended(now);
        assert_eq!(machine.next(now), Step::RegisterService);
    }

    #[test]
    fn leaves_once_and_is_never_resurrected() {
        let t = start();
        let mut machine = registered(t, LIFETIME);
        machine.leave(t);
        machine.watch_ended(t);
        machine.entry_deleted(t);
        machine.endpoint_registered(LIFETIME, 0, t);
        assert_eq!(machine.next(t), Step::Unregister);
        machine.unregistered(Outcome::Failed, t);
        machine.leave(t);
        assert_eq!(machine.next(t), Step::Wait(t + PAUSE_MIN));
        assert_eq!(machine.next(t + PAUSE_MIN), Step::Unregister);
        machine.unregistered(Outcome::Done, t);
        for _ in 0..2 {
            machine.watch_ended(t);
            machine.leave(t);
            assert_eq!(machine.next(t + LIFETIME), Step::Done);
        }
    }

    #[test]
    fn leaves_in_every_phase() {
        let t = start();
        let mut untouched = Registration::new(t);
        untouched.leave(t);
        assert_eq!(untouched.next(t), Step::Done, "nothing was registered");

        let mut unanswered = Registration::new(t);
        let _ = unanswered.next(t);
        unanswered.service_answered(Outcome::Done, t);
        let _ = unanswered.next(t);
        unanswered.leave(t);
        assert_eq!(unanswered.next(t), Step::Unregister, "it may have arrived");
    }
}
