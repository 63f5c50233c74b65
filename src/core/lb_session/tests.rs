//! Scripted runs in virtual time.

mod falling;
mod stopping;
mod successor;

use std::time::{Duration, Instant};

use super::refresh::{LEAST, MOST};
use super::*;
use crate::core::ids::IfName;

/// A connection stands for itself by a number: who made it.
type Session = LbSession<u32>;

const SECOND: Duration = Duration::from_secs(1);

struct Run {
    session: Session,
    now: Instant,
}

impl Run {
    #[expect(clippy::disallowed_methods, reason = "the start of virtual time")]
    fn new() -> Self {
        let now = Instant::now();
        Self {
            session: LbSession::new(EndpointName::new("lb-1"), Jitter::new(1), now),
            now,
        }
    }

    /// A run that is connected with connection 1, whose path lives `life`.
    fn connected(life: Duration) -> Self {
        let mut run = Self::new();
        run.expect(SessionAction::Look);
        run.looked(Looked::Absent);
        run.expect(SessionAction::Request(Plan::First));
        run.answered(Ok(good(1, life)));
        run.expect(SessionAction::Report(port_expected(1)));
        run.expect(SessionAction::Watch);
        run.session.watching(true, run.now);
        run
    }

    fn next(&mut self) -> SessionAction<u32> {
        self.session.next(self.now)
    }

    #[track_caller]
    #[expect(clippy::needless_pass_by_value, reason = "a script reads better so")]
    fn expect(&mut self, action: SessionAction<u32>) {
        assert_eq!(self.next(), action);
    }

    /// Lets the time pass that the session wants to wait; how long it was.
    #[track_caller]
    fn pass(&mut self) -> Duration {
        match self.next() {
            SessionAction::Wait(until) => {
                let waited = until - self.now;
                self.now = until;
                waited
            }
            other => panic!("{other:?} instead of a wait"),
        }
    }

    fn looked(&mut self, looked: Looked<u32>) {
        self.session.looked(looked, self.now);
    }

    fn answered(&mut self, outcome: Result<Established<u32>, Failure<u32>>) {
        self.session.answered(outcome, self.now);
    }

    /// What nsmgr may still hold of `connection` is closed before a reselect.
    #[track_caller]
    fn clears(&mut self, connection: u32) {
        self.expect(SessionAction::Clear(connection));
        self.session.cleared();
    }

    fn monitored(&mut self, event: Monitored) {
        self.session.monitored(event, self.now);
    }
}

fn good(connection: u32, life: Duration) -> Established<u32> {
    Established {
        connection,
        ifname: IfName::parse(&format!("if{connection}")).unwrap(),
        peers: ["172.16.0.4".parse().unwrap()].into(),
        lives: vec![Some(life * 2), Some(life), Some(life * 3)],
    }
}

fn key() -> PortKey {
    PortKey::Lb(EndpointName::new("lb-1"))
}

fn port_expected(connection: u32) -> Event {
    let Established { ifname, peers, .. } = good(connection, SECOND);
    Event::PortExpected {
        key: key(),
        ifname,
        peers,
    }
}

fn peer_down() -> SessionAction<u32> {
    SessionAction::Report(Event::PeerDown { key: key() })
}

fn released() -> SessionAction<u32> {
    SessionAction::Report(Event::PortReleased { key: key() })
}

/// Jitter is a tenth at most.
#[track_caller]
fn about(actual: Duration, expected: Duration) {
    let ratio = actual.as_secs_f64() / expected.as_secs_f64();
    assert!(
        (0.9..=1.1).contains(&ratio),
        "{actual:?} is not about {expected:?}"
    );
}

#[test]
fn refresh_arithmetic() {
    let s = |seconds| Some(Duration::from_secs(seconds));
    for (lives, expected) in [
        (vec![s(600), s(600)], 120),
        (vec![s(600), s(300), s(900)], 60),
        (vec![s(5)], 1),
        (vec![s(1)], 1),
        (vec![s(86_400)], 600),
        (vec![], 10),
        (vec![None, None], 10),
        (vec![s(0)], 10),
        (vec![s(600), None], 10),
        (vec![s(600), s(0)], 10),
        (vec![s(10), s(0)], 2),
    ] {
        assert_eq!(refresh_after(&lives), SECOND * expected, "{lives:?}");
    }
}

#[test]
fn refreshes_keep_the_connection_and_the_stream() {
    let mut run = Run::connected(SECOND * 600);
    for n in 1..20 {
        about(run.pass(), SECOND * 120);
        run.expect(SessionAction::Request(Plan::Refresh(n)));
        run.answered(Ok(good(n + 1, SECOND * 600)));
        run.expect(SessionAction::Report(port_expected(n + 1)));
    }
}

#[test]
fn paths_without_usable_expiry_make_no_storm() {
    let mut run = Run::connected(SECOND * 600);
    let mut waited = run.pass();
    let begun = run.now;
    for n in 1..50 {
        run.expect(SessionAction::Request(Plan::Refresh(n)));
        let mut answer = good(n + 1, SECOND);
        answer.lives = vec![None, Some(Duration::ZERO)];
        run.answered(Ok(answer));
        run.expect(SessionAction::Report(port_expected(n + 1)));
        waited = run.pass();
        about(waited, SECOND * 10);
    }
    assert!(run.now - begun > SECOND * 400, "{waited:?}");
}

#[test]
fn a_first_request_is_repeated_after_a_pause_for_ever() {
    let mut run = Run::new();
    run.expect(SessionAction::Look);
    run.looked(Looked::Absent);
    for _ in 0..100 {
        run.expect(SessionAction::Request(Plan::First));
        run.answered(Err(Failure::Refused));
        about(run.pass(), REQUEST_PAUSE);
    }
    run.expect(SessionAction::Request(Plan::First));
    run.answered(Err(Failure::NotSent));
    about(run.pass(), REQUEST_PAUSE);
    run.expect(SessionAction::Request(Plan::First));
}

#[test]
fn an_unclear_first_request_is_looked_for_before_the_next() {
    let mut run = Run::new();
    run.expect(SessionAction::Look);
    run.looked(Looked::Absent);
    run.expect(SessionAction::Request(Plan::First));
    run.answered(Err(Failure::Unclear));
    about(run.pass(), REQUEST_PAUSE);
    run.expect(SessionAction::Look);
    run.looked(Looked::Found {
        connection: 7,
        intact: false,
    });
    run.clears(7);
    run.expect(SessionAction::Request(Plan::Reselect(7)));
    run.answered(Ok(good(8, SECOND * 600)));
    run.expect(SessionAction::Report(port_expected(8)));
    run.expect(SessionAction::Watch);
}

#[test]
fn nsmgr_that_cannot_be_asked_is_asked_again_but_not_for_ever() {
    let mut run = Run::new();
    for _ in 1..LOOKS {
        run.expect(SessionAction::Look);
        run.looked(Looked::Unreachable);
        about(run.pass(), LOOK_PAUSE);
    }
    run.expect(SessionAction::Look);
    run.looked(Looked::Unreachable);
    run.expect(SessionAction::Request(Plan::First));
}

#[test]
fn a_predecessor_is_adopted_if_intact_and_rebuilt_if_not() {
    let found = |intact| Looked::Found {
        connection: 5,
        intact,
    };
    let mut run = Run::new();
    run.expect(SessionAction::Look);
    run.looked(found(true));
    run.expect(SessionAction::Request(Plan::Adopt(5)));
    run.answered(Ok(good(5, SECOND * 600)));
    run.expect(SessionAction::Report(port_expected(5)));
    run.expect(SessionAction::Watch);

    let mut run = Run::new();
    run.expect(SessionAction::Look);
    run.looked(found(false));
    run.clears(5);
    run.expect(SessionAction::Request(Plan::Reselect(5)));
    run.answered(Err(Failure::Refused));
    about(run.pass(), HEAL_FIRST);
    run.expect(SessionAction::Request(Plan::Reselect(5)));

    // Refused as it is, it is rebuilt.
    for (failure, expected) in [
        (Failure::Refused, Plan::Reselect(5)),
        (Failure::Unclear, Plan::Reselect(5)),
        (Failure::NotSent, Plan::Adopt(5)),
    ] {
        let mut run = Run::new();
        run.expect(SessionAction::Look);
        run.looked(found(true));
        run.expect(SessionAction::Request(Plan::Adopt(5)));
        run.answered(Err(failure));
        run.pass();
        if expected == Plan::Reselect(5) {
            run.clears(5);
        }
        run.expect(SessionAction::Request(expected));
    }
}

#[test]
fn down_and_deleted_take_the_hop_away_and_heal_by_reselect() {
    for event in [Monitored::Down, Monitored::Deleted] {
        let mut run = Run::connected(SECOND * 600);
        run.now += SECOND * 30;
        run.monitored(event);
        run.expect(peer_down());
        if event == Monitored::Down {
            run.clears(1);
        }
        let mut waits = Vec::new();
        for _ in 0..9 {
            run.expect(SessionAction::Request(Plan::Reselect(1)));
            run.answered(Err(Failure::Refused));
            waits.push(run.pass());
        }
        about(waits[0], HEAL_FIRST);
        about(waits[3], HEAL_FIRST * 8);
        about(waits[7], HEAL_MOST);
        about(waits[8], HEAL_MOST);
        run.expect(SessionAction::Request(Plan::Reselect(1)));
        run.answered(Ok(good(2, SECOND * 600)));
        run.expect(SessionAction::Report(port_expected(2)));
        run.expect(SessionAction::Watch);
    }
}

#[test]
fn a_peer_that_fails_after_each_success_is_not_rebuilt_in_a_tight_loop() {
    let mut run = Run::connected(SECOND * 600);
    let begun = run.now;
    for n in 1..=20 {
        run.monitored(Monitored::Down);
        run.expect(peer_down());
        if n > 1 || matches!(run.next(), SessionAction::Wait(_)) {
            run.pass();
        }
        run.clears(n);
        run.expect(SessionAction::Request(Plan::Reselect(n)));
        run.answered(Ok(good(n + 1, SECOND * 600)));
        run.expect(SessionAction::Report(port_expected(n + 1)));
        run.expect(SessionAction::Watch);
        run.session.watching(true, run.now);
    }
    assert!(run.now - begun >= SECOND * 19);
}

#[test]
fn only_the_last_report_counts() {
    let mut run = Run::connected(SECOND * 600);
    run.monitored(Monitored::Down);
    run.monitored(Monitored::Up);
    about(run.pass(), SECOND * 120);
}

#[test]
fn losing_the_stream_keeps_everything_and_reopens_with_growing_pauses() {
    let mut run = Run::connected(SECOND * 3000);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        run.session.watch_ended(run.now);
        pauses.push(run.pass());
        run.expect(SessionAction::Watch);
        run.session.watching(false, run.now);
        pauses.push(run.pass());
        run.expect(SessionAction::Watch);
    }
    about(pauses[0], WATCH_FIRST);
    about(pauses[8], WATCH_MOST);
    run.session.watching(true, run.now);
    run.monitored(Monitored::Up);
    run.session.watch_ended(run.now);
    about(run.pass(), WATCH_FIRST);
}

#[test]
fn what_nsmgr_forgot_is_told_again_as_it_is_and_rebuilt_if_refused_for_long() {
    let mut run = Run::connected(SECOND * 600);
    run.monitored(Monitored::Absent);
    assert!(run.pass() <= LEAST, "not twice within a second");
    run.expect(SessionAction::Request(Plan::Refresh(1)));
    run.answered(Ok(good(2, SECOND * 600)));
    run.expect(SessionAction::Report(port_expected(2)));
    about(run.pass(), SECOND * 120);

    run.monitored(Monitored::Absent);
    run.expect(SessionAction::Request(Plan::Refresh(2)));
    run.answered(Err(Failure::Refused));
    // The forwarder has not registered anew yet; traffic goes on.
    about(run.pass(), HEAL_FIRST);
    run.expect(SessionAction::Request(Plan::Refresh(2)));
    run.answered(Ok(good(3, SECOND * 600)));
    run.expect(SessionAction::Report(port_expected(3)));

    run.now += SECOND * 5;
    run.monitored(Monitored::Absent);
    let (begun, mut tries) = (run.now, 0);
    loop {
        match run.session.next(run.now) {
            SessionAction::Wait(until) => run.now = until,
            SessionAction::Request(Plan::Refresh(3)) => {
                tries += 1;
                run.answered(Err(Failure::Refused));
            }
            action => {
                assert_eq!(action, SessionAction::Request(Plan::Reselect(3)));
                break;
            }
        }
    }
    assert!((4..8).contains(&tries), "{tries}");
    assert!((RETELL..RETELL * 2).contains(&(run.now - begun)));
}

#[test]
fn a_requested_refresh_is_made_soon() {
    let mut run = Run::connected(SECOND * 600);
    run.now += SECOND * 5;
    run.monitored(Monitored::RefreshRequested);
    run.expect(SessionAction::Request(Plan::Refresh(1)));
    run.answered(Ok(good(2, SECOND * 600)));
    run.expect(SessionAction::Report(port_expected(2)));
    run.monitored(Monitored::RefreshRequested);
    assert_eq!(run.pass(), LEAST);
}

#[test]
fn a_refresh_that_keeps_failing_becomes_a_reselect_when_the_path_is_dead() {
    let mut run = Run::connected(SECOND * 60);
    let begun = run.now;
    run.pass();
    let mut refreshes = 0;
    loop {
        assert!(run.now - begun < SECOND * 100, "no end of refreshes");
        match run.next() {
            SessionAction::Request(Plan::Refresh(1)) => {
                refreshes += 1;
                run.answered(Err(Failure::Unclear));
            }
            SessionAction::Request(Plan::Reselect(1)) => break,
            SessionAction::Wait(until) => run.now = until,
            other => panic!("{other:?}: the hop stays"),
        }
    }
    let lasted = run.now - begun;
    assert!(lasted >= SECOND * 60 && lasted < SECOND * 63, "{lasted:?}");
    assert!((20..40).contains(&refreshes), "{refreshes} in 48 s");
}

#[test]
fn an_unusable_answer_is_closed_before_the_next_request() {
    let mut run = Run::new();
    run.expect(SessionAction::Look);
    run.looked(Looked::Absent);
    run.expect(SessionAction::Request(Plan::First));
    run.answered(Err(Failure::Unusable(Some(Box::new(3)))));
    run.expect(SessionAction::Close(3));
    run.session.closed(Closed::Answered, run.now);
    about(run.pass(), REQUEST_PAUSE);
    run.expect(SessionAction::Request(Plan::First));
    // One that failed to the end may be there still, so it is looked for.
    run.answered(Err(Failure::Unusable(Some(Box::new(4)))));
    run.expect(SessionAction::Close(4));
    run.session.closed(Closed::GivenUp, run.now);
    about(run.pass(), REQUEST_PAUSE);
    run.expect(SessionAction::Look);
    run.looked(Looked::Absent);
    run.expect(SessionAction::Request(Plan::First));
    // Without a path it cannot be closed, so it is looked for.
    run.answered(Err(Failure::Unusable(None)));
    about(run.pass(), REQUEST_PAUSE);
    run.expect(SessionAction::Look);
}

#[test]
fn an_unusable_refresh_takes_the_port_back() {
    for (unusable, closed) in [(Some(Box::new(9)), 9), (None, 1)] {
        let mut run = Run::connected(SECOND * 600);
        run.pass();
        run.expect(SessionAction::Request(Plan::Refresh(1)));
        run.answered(Err(Failure::Unusable(unusable)));
        run.expect(released());
        run.expect(SessionAction::Close(closed));
        run.session.closed(Closed::Answered, run.now);
        about(run.pass(), REQUEST_PAUSE);
        run.expect(SessionAction::Request(Plan::First));
    }
}

#[test]
fn lives_beyond_all_clocks_do_not_overflow() {
    let mut run = Run::connected(SECOND * 600);
    run.pass();
    let mut answer = good(2, SECOND);
    answer.lives = vec![Some(Duration::MAX)];
    run.answered(Ok(answer));
    run.expect(SessionAction::Report(port_expected(2)));
    about(run.pass(), MOST);
}
