//! What the registry's word of another process under the endpoint's name does.

use super::*;

#[test]
fn what_is_refused_is_tried_again_at_once_and_the_pauses_start_over() {
    let mut run = Run::connected(SECOND * 600);
    run.monitored(Monitored::Deleted);
    run.expect(peer_down());
    run.now += SECOND;
    for _ in 0..10 {
        run.expect(SessionAction::Request(Plan::Reselect(1)));
        run.answered(Err(Failure::Refused));
        run.pass();
    }
    run.expect(SessionAction::Request(Plan::Reselect(1)));
    run.answered(Err(Failure::Refused));
    run.now += SECOND * 2;
    run.session.replaced(run.now);
    run.expect(SessionAction::Request(Plan::Reselect(1)));
    run.answered(Err(Failure::Refused));
    about(run.pass(), HEAL_FIRST);
}

#[test]
fn a_registry_that_says_so_again_and_again_makes_no_storm() {
    let mut run = Run::connected(SECOND * 600);
    run.monitored(Monitored::Deleted);
    run.expect(peer_down());
    run.now += SECOND;
    let (begun, mut requests) = (run.now, 0);
    while run.now - begun < SECOND * 20 {
        match run.next() {
            SessionAction::Request(_) => {
                requests += 1;
                run.answered(Err(Failure::Refused));
            }
            SessionAction::Wait(_) => run.now += Duration::from_millis(10),
            other => panic!("{other:?}"),
        }
        run.session.replaced(run.now);
    }
    // One a second, and the first few after each start.
    assert!((15..=36).contains(&requests), "{requests} in 20 s");
}

#[test]
fn a_first_request_that_was_given_up_is_looked_for_at_once() {
    let mut run = Run::new();
    run.expect(SessionAction::Look);
    run.looked(Looked::Absent);
    run.expect(SessionAction::Request(Plan::First));
    run.now += SECOND * 2;
    run.answered(Err(Failure::Unclear));
    run.session.replaced(run.now);
    run.expect(SessionAction::Look);
    run.looked(Looked::Absent);
    run.expect(SessionAction::Request(Plan::First));
    run.answered(Err(Failure::Refused));
    run.session.replaced(run.now);
    assert_eq!(run.pass(), LEAST, "not twice within a second");
    run.expect(SessionAction::Request(Plan::First));
}

#[test]
fn what_stands_is_left_alone() {
    let mut run = Run::connected(SECOND * 600);
    run.session.replaced(run.now);
    about(run.pass(), SECOND * 120);
    run.expect(SessionAction::Request(Plan::Refresh(1)));
}
