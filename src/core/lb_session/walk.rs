//! Random walks: whatever nsmgr answers, `net` is told a consistent story, no
//! session spins, and every stop ends.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::core::ids::IfName;

fn looked(choice: u8) -> Looked<u8> {
    match choice % 4 {
        0 => Looked::Absent,
        1 => Looked::Unreachable,
        n => Looked::Found {
            connection: choice,
            intact: n == 2,
        },
    }
}

fn answer(choice: u8) -> Result<Established<u8>, Failure<u8>> {
    match choice % 8 {
        0 => Err(Failure::NotSent),
        1 => Err(Failure::Refused),
        2 => Err(Failure::Unclear),
        3 => Err(Failure::Unusable(Some(Box::new(choice)))),
        4 => Err(Failure::Unusable(None)),
        _ => Ok(Established {
            connection: choice,
            ifname: IfName::parse("if0").unwrap(),
            peers: std::collections::BTreeSet::new(),
            lives: vec![Some(Duration::from_secs(u64::from(choice))), None],
        }),
    }
}

fn closed(choice: u8) -> Closed {
    [Closed::Answered, Closed::Failed, Closed::GivenUp][usize::from(choice % 3)]
}

fn event(choice: u8) -> Option<Monitored> {
    [
        None,
        Some(Monitored::Up),
        Some(Monitored::Down),
        Some(Monitored::Deleted),
        Some(Monitored::RefreshRequested),
        Some(Monitored::Absent),
    ]
    .get(usize::from(choice % 8))
    .copied()
    .flatten()
}

/// Whether `net` has a port; checks that facts about it make sense.
fn told(event: &Event, has_port: bool) -> bool {
    match event {
        Event::PortExpected { .. } => true,
        Event::PeerDown { .. } => {
            assert!(has_port, "down, but never up");
            true
        }
        Event::PortReleased { .. } => {
            assert!(has_port, "released, but never told");
            false
        }
        other => panic!("{other} is no fact about a port"),
    }
}

proptest! {
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the start of virtual time")]
    fn a_session_keeps_its_word(choices in prop::collection::vec(any::<u8>(), 1..120), seed: u64) {
        let begun = Instant::now();
        let mut now = begun;
        let mut session = LbSession::new(EndpointName::new("lb"), Jitter::new(seed), now);
        let (mut has_port, mut closed_at_stop, mut requests) = (false, 0, 0u32);
        for choice in choices {
            match session.next(now) {
                SessionAction::Look => session.looked(looked(choice), now),
                SessionAction::Request(_) => {
                    requests += 1;
                    session.answered(answer(choice), now);
                }
                SessionAction::Watch => session.watching(choice % 3 > 0, now),
                SessionAction::Close(_) => {
                    session.closed(closed(choice), now);
                }
                SessionAction::Clear(_) => session.cleared(),
                SessionAction::Report(event) => has_port = told(&event, has_port),
                SessionAction::Wait(until) => {
                    prop_assert!(until > now, "a wait for the past spins");
                    if choice % 32 == 31 {
                        session.replaced(now);
                    }
                    match event(choice) {
                        Some(event) => session.monitored(event, now),
                        None if choice % 16 > 7 => session.watch_ended(now),
                        None => now = until,
                    }
                }
                SessionAction::Done => prop_assert!(false, "over before it was stopped"),
            }
        }
        // Two a second in the worst of cases, and a handful at the start.
        let seconds = u32::try_from((now - begun).as_secs()).unwrap();
        prop_assert!(requests <= 8 + 6 * seconds, "{requests} in {seconds} s");

        let drained = seed % 2 == 0;
        session.stop(if drained { Stopping::Drained } else { Stopping::AtOnce }, now);
        let stopped = now;
        for step in 0.. {
            prop_assert!(step < 16, "does not end");
            match session.next(now) {
                SessionAction::Wait(until) => {
                    prop_assert!(until > now && until - stopped <= Duration::from_secs(7));
                    now = until;
                }
                SessionAction::Look => session.looked(looked(seed.to_le_bytes()[0]), now),
                SessionAction::Close(_) => {
                    closed_at_stop += 1;
                    session.closed(closed(seed.to_le_bytes()[1]), now);
                }
                SessionAction::Report(event) => has_port = told(&event, has_port),
                SessionAction::Done => break,
                other => prop_assert!(false, "{other:?} while stopping"),
            }
        }
        prop_assert!(!has_port && closed_at_stop <= 3);
    }
}
