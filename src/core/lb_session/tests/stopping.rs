//! What is closed when the session is told to stop, in each of its states.

use super::*;
use crate::core::lb_session::ending::CLOSE_PAUSE;

/// Stops the run at once and plays it to its end; what was closed.
fn ending(mut run: Run, looked: &Looked<u32>) -> (Vec<Event>, Vec<u32>) {
    let (mut events, mut closed) = (Vec::new(), Vec::new());
    run.session.stop(Stopping::AtOnce, run.now);
    for _ in 0..10 {
        match run.next() {
            SessionAction::Report(event) => events.push(event),
            SessionAction::Close(connection) => {
                closed.push(connection);
                run.session.closed(Closed::Answered, run.now);
            }
            SessionAction::Look => run.looked(looked.clone()),
            SessionAction::Done => return (events, closed),
            other => panic!("{other:?} while stopping"),
        }
    }
    panic!("does not end");
}

#[test]
fn stopping_in_each_state_closes_what_is_connected_once() {
    let release = || vec![Event::PortReleased { key: key() }];
    let found = || Looked::Found {
        connection: 4,
        intact: false,
    };

    let run = Run::new();
    assert_eq!(
        ending(run, &found()),
        (vec![], vec![]),
        "nothing was asked yet"
    );

    let mut run = Run::new();
    run.looked(Looked::Absent);
    assert_eq!(
        ending(run, &found()),
        (vec![], vec![]),
        "nothing was requested"
    );

    let mut run = Run::new();
    run.looked(found());
    assert_eq!(ending(run, &found()), (vec![], vec![4]), "a predecessor's");

    let run = Run::connected(SECOND * 600);
    assert_eq!(ending(run, &found()), (release(), vec![1]), "connected");

    let mut run = Run::connected(SECOND * 600);
    run.pass();
    run.answered(Err(Failure::Unclear));
    assert_eq!(ending(run, &found()), (release(), vec![1]), "in a refresh");

    let mut run = Run::connected(SECOND * 600);
    run.monitored(Monitored::Down);
    run.expect(peer_down());
    run.answered(Err(Failure::Unclear));
    assert_eq!(ending(run, &found()), (release(), vec![1]), "healing");

    let mut run = Run::new();
    run.looked(Looked::Absent);
    run.answered(Err(Failure::Unusable(Some(Box::new(3)))));
    assert_eq!(ending(run, &found()), (vec![], vec![3]), "discarding");
}

#[test]
fn an_lb_that_leaves_gets_no_new_packets_before_its_port_goes() {
    let mut run = Run::connected(SECOND * 600);
    run.session.stop(Stopping::Drained, run.now);
    run.expect(peer_down());
    assert_eq!(run.pass(), DRAIN);
    run.expect(released());
    run.expect(SessionAction::Close(1));
    run.session.closed(Closed::Answered, run.now);
    run.expect(SessionAction::Done);

    // The same in a refresh that failed; an order to end at once cuts it short.
    let mut run = Run::connected(SECOND * 600);
    run.pass();
    run.answered(Err(Failure::Unclear));
    run.session.stop(Stopping::Drained, run.now);
    run.expect(peer_down());
    run.session.stop(Stopping::AtOnce, run.now);
    run.expect(released());
    run.expect(SessionAction::Close(1));
}

#[test]
fn what_carries_no_traffic_is_closed_without_delay() {
    // Reported as down, acted upon or not yet.
    for acted in [true, false] {
        let mut run = Run::connected(SECOND * 600);
        run.monitored(Monitored::Down);
        if acted {
            run.expect(peer_down());
        }
        run.session.stop(Stopping::Drained, run.now);
        run.expect(released());
        run.expect(SessionAction::Close(1));
    }
    // Never told.
    let mut run = Run::new();
    run.looked(Looked::Found {
        connection: 4,
        intact: true,
    });
    run.session.stop(Stopping::Drained, run.now);
    run.expect(SessionAction::Close(4));
}

#[test]
fn stopping_in_a_first_request_looks_for_what_it_left() {
    for (looked, closed) in [
        (
            Looked::Found {
                connection: 4,
                intact: false,
            },
            vec![4],
        ),
        (Looked::Absent, vec![]),
        (Looked::Unreachable, vec![]),
    ] {
        let mut run = Run::new();
        run.looked(Looked::Absent);
        run.answered(Err(Failure::Unclear));
        assert_eq!(ending(run, &looked), (vec![], closed.clone()));

        // Still unclear when nsmgr could not be asked meanwhile.
        let mut run = Run::new();
        run.looked(Looked::Absent);
        run.answered(Err(Failure::Unclear));
        for _ in 0..LOOKS {
            run.looked(Looked::Unreachable);
        }
        run.expect(SessionAction::Request(Plan::First));
        assert_eq!(ending(run, &looked), (vec![], closed));
    }
}

/// A connection whose Close is due, since the LB leaves or since its answer was
/// of no use.
fn closing(leaves: bool) -> Run {
    let mut run = Run::new();
    run.looked(Looked::Found {
        connection: 4,
        intact: true,
    });
    if leaves {
        run.session.stop(Stopping::Drained, run.now);
    } else {
        run.expect(SessionAction::Request(Plan::Adopt(4)));
        run.answered(Err(Failure::Unusable(None)));
    }
    run
}

#[test]
fn a_close_that_fails_is_made_again_but_not_for_ever() {
    for leaves in [true, false] {
        let mut run = closing(leaves);
        for tries in 1..3 {
            run.expect(SessionAction::Close(4));
            assert!(run.session.closed(Closed::Failed, run.now));
            about(run.pass(), CLOSE_PAUSE * tries);
        }
        run.expect(SessionAction::Close(4));
        assert!(!run.session.closed(Closed::Failed, run.now));
        if leaves {
            run.expect(SessionAction::Done);
        } else {
            about(run.pass(), REQUEST_PAUSE);
            run.expect(SessionAction::Look);
        }
    }
}

#[test]
fn what_ends_the_repetition_of_a_close() {
    type End = fn(&mut Run);
    let cases: [(End, bool, &str); 4] = [
        (|run| run.session.replaced(run.now), false, "the LB is back"),
        (
            |run| {
                run.session.stop(Stopping::AtOnce, run.now);
                run.expect(SessionAction::Close(4));
                run.session.closed(Closed::GivenUp, run.now);
            },
            false,
            "no time",
        ),
        (
            |run| {
                run.pass();
                run.expect(SessionAction::Close(4));
                run.session.closed(Closed::Answered, run.now);
            },
            false,
            "an answer",
        ),
        (|_| {}, true, "nothing"),
    ];
    for (end, goes_on, why) in cases {
        let mut run = closing(true);
        run.expect(SessionAction::Close(4));
        run.session.closed(Closed::Failed, run.now);
        end(&mut run);
        let over = run.next() == SessionAction::Done;
        assert_ne!(over, goes_on, "{why}");
    }
}

#[test]
fn an_lb_that_leaves_in_a_first_request_is_looked_for_twice() {
    let mut run = Run::new();
    run.looked(Looked::Absent);
    run.answered(Err(Failure::Unclear));
    run.session.stop(Stopping::Drained, run.now);
    run.expect(SessionAction::Look);
    run.looked(Looked::Absent);
    // nsmgr was about to connect it.
    about(run.pass(), LOOK_PAUSE);
    run.expect(SessionAction::Look);
    run.looked(Looked::Found {
        connection: 4,
        intact: false,
    });
    run.expect(SessionAction::Close(4));
}
