//! What the monitor says while a refresh is under way.

use super::*;

#[test]
fn what_falls_during_a_refresh_is_told_at_once_and_once() {
    let down = || Some(Event::PeerDown { key: key() });
    type Then = Result<Established<u32>, Failure<u32>>;
    let cases: [(Option<Monitored>, Then, SessionAction<u32>, &str); 5] = [
        (
            None,
            Err(Failure::Unclear),
            SessionAction::Clear(1),
            "gave up",
        ),
        (
            None,
            Ok(good(2, SECOND)),
            SessionAction::Clear(2),
            "fell after it",
        ),
        (
            Some(Monitored::Up),
            Ok(good(2, SECOND)),
            SessionAction::Report(port_expected(2)),
            "was refreshed",
        ),
        (
            Some(Monitored::Up),
            Err(Failure::Refused),
            SessionAction::Clear(1),
            "the hop is gone",
        ),
        (
            Some(Monitored::Deleted),
            Err(Failure::Refused),
            SessionAction::Request(Plan::Reselect(1)),
            "nothing is left to close",
        ),
    ];
    for (later, outcome, expected, why) in cases {
        let mut run = Run::connected(SECOND * 600);
        run.pass();
        run.expect(SessionAction::Request(Plan::Refresh(1)));
        assert_eq!(run.session.overheard(Monitored::Up, run.now), None);
        assert_eq!(run.session.overheard(Monitored::Down, run.now), down());
        if let Some(later) = later {
            assert_eq!(run.session.overheard(later, run.now), None, "{why}");
        }
        run.answered(outcome);
        let action = match run.next() {
            SessionAction::Wait(until) => {
                run.now = until;
                run.next()
            }
            action => action,
        };
        assert_eq!(action, expected, "{why}");
    }
}
