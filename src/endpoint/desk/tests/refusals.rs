//! Jobs that fail, and what stays as it was.

use super::*;

#[test]
fn ipam_failing_refuses_a_first_request_and_leaves_an_old_connection() {
    let mut bench = Bench::new();
    let mut first = bench.send(Bench::request_of("t1", "f1", None));
    let error = RpcError::status(Code::NOT_FOUND, "no conduit");
    bench.ipam_answers(Err(IpamError::Rpc(error)));
    assert_eq!(code(&mut first), Code::NOT_FOUND);
    assert!(bench.desk.targets.is_empty() && bench.facts().is_empty());

    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = (bench.facts(), bench.ipam_log());
    let outlet = bench.monitor();
    let mut again = bench.send(refresh(&up));
    bench.ipam_answers(Err(IpamError::Deadline("no route".to_owned())));
    assert_eq!(code(&mut again), Code::DEADLINE_EXCEEDED);
    assert!(bench.facts().is_empty());
    assert_eq!(bench.ipam_log(), ["acquire t1"], "nothing is released");
    assert_eq!(
        kinds(&outlet),
        [(ConnectionEventType::INITIAL_STATE_TRANSFER, 1)]
    );
}

/// A target without addresses asks again for as long as it lives.
#[test]
fn the_same_refusal_is_one_line_and_then_counted() {
    let mut bench = Bench::new();
    for _ in 0..3 {
        let mut awaited = bench.send(Bench::request_of("t1", "f1", None));
        let error = RpcError::status(Code::NOT_FOUND, "no conduit");
        bench.ipam_answers(Err(IpamError::Rpc(error)));
        assert_eq!(code(&mut awaited), Code::NOT_FOUND);
    }
    let line = "Request of a target refused: NOT_FOUND: IPAM: NOT_FOUND: no conduit";
    let later = bench.now.mono + Duration::from_secs(60);
    assert_eq!(
        bench.desk.refusals.admit(line, later),
        Some(" (2 more since the last such line)".to_owned())
    );
}

#[test]
fn a_full_queue_of_ipam_is_waited_for() {
    let mut bench = Bench::new();
    let begun = bench.now.mono;
    let mut awaited = bench.send(Bench::request_of("t1", "f1", None));
    bench.ipam_answers(Err(IpamError::Busy));
    assert!(answered(&mut awaited).is_none());
    let again = bench.desk.next_deadline().unwrap();
    assert!(again > begun && again < begun + Duration::from_secs(1));
    assert_eq!(bench.ipam_log(), ["acquire t1"]);
    bench.now.mono = again;
    bench.desk.tick(bench.now);
    assert_eq!(bench.ipam_log(), ["acquire t1"]);
    assert_eq!(bench.desk.next_deadline(), None);
    bench.now.mono = begun + IPAM_TIMEOUT;
    bench.ipam_answers(Err(IpamError::Busy));
    assert_eq!(code(&mut awaited), Code::RESOURCE_EXHAUSTED, "not for ever");
    assert_eq!(bench.desk.next_deadline(), None);
}

#[test]
fn an_answer_that_nobody_waits_for_establishes_nothing() {
    let mut bench = Bench::new();
    let mut awaited = bench.send(Bench::request_of("t1", "f1", None));
    bench.over.store(true, Ordering::Relaxed);
    bench.ipam_answers(Ok(lease(2)));
    assert_eq!(code(&mut awaited), Code::DEADLINE_EXCEEDED);
    assert!(bench.desk.targets.is_empty() && bench.facts().is_empty());
    // Nor does it keep the addresses for ever.
    assert_eq!(bench.ipam_log(), ["acquire t1", "abandon t1"]);
}

#[test]
fn addresses_that_another_connection_uses_are_not_abandoned() {
    let mut bench = Bench::new();
    bench.connect(Bench::request_of("t1", "f1", None), 2);
    let mut second = bench.send(Bench::request_of("t1", "f2", None));
    bench.over.store(true, Ordering::Relaxed);
    bench.ipam_answers(Ok(lease(2)));
    assert_eq!(code(&mut second), Code::DEADLINE_EXCEEDED);
    assert_eq!(bench.ipam_log(), ["acquire t1", "acquire t1"]);
}

/// The known addresses must be answered before the caller gives up.
#[test]
fn a_refresh_waits_less_for_ipam_than_a_first_request() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let mut reselect = refresh(&up);
    reselect.connection.mut_or_insert_default().state = State::RESELECT_REQUESTED.into();
    for request in [refresh(&up), reselect] {
        bench.connect(request, 2);
    }
    let waits = bench.ipam.0.lock().deadlines.clone();
    let waits: Vec<_> = waits.into_iter().map(|at| at - bench.now.mono).collect();
    assert_eq!(waits, [IPAM_TIMEOUT, RENEW_TIMEOUT, RENEW_TIMEOUT]);
}

#[test]
fn a_request_whose_caller_gave_up_closes_nothing() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = (bench.facts(), bench.ipam_log());
    let mut reselect = refresh(&up);
    reselect.connection.mut_or_insert_default().state = State::RESELECT_REQUESTED.into();
    bench.over.store(true, Ordering::Relaxed);
    assert_eq!(code(&mut bench.send(reselect)), Code::DEADLINE_EXCEEDED);
    assert!(bench.facts().is_empty() && bench.ipam_log().is_empty());
}

#[test]
fn an_unauthorised_call_leaves_the_connection() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = bench.facts();
    let good = Arc::clone(&bench.session);
    bench.session = Arc::new(Plain::new("us", "stranger"));
    let mut close = bench.send_close(up.clone());
    let error = answered(&mut close).unwrap().unwrap_err();
    assert_eq!(error.code(), Some(Code::PERMISSION_DENIED));
    let mut reselect = refresh(&up);
    reselect.connection.mut_or_insert_default().state = State::RESELECT_REQUESTED.into();
    assert_eq!(code(&mut bench.send(reselect)), Code::PERMISSION_DENIED);
    assert!(bench.facts().is_empty());
    bench.session = good;
    assert_eq!(answered(&mut bench.send_close(up)), Some(Ok(())));
}

type Change = fn(&mut NetworkServiceRequest);
fn connection(request: &mut NetworkServiceRequest) -> &mut Connection {
    request.connection.mut_or_insert_default()
}
const ROWS: [(&str, Code, Change); 11] = [
    ("no connection", Code::PERMISSION_DENIED, |r| {
        r.connection = None.into();
    }),
    ("no path", Code::PERMISSION_DENIED, |r| {
        connection(r).path = None.into();
    }),
    ("no segments", Code::PERMISSION_DENIED, |r| {
        connection(r)
            .path
            .mut_or_insert_default()
            .path_segments
            .clear();
    }),
    ("index out of range", Code::UNKNOWN, |r| {
        connection(r).path.mut_or_insert_default().index = 7;
    }),
    ("no id of the target", Code::UNKNOWN, |r| {
        connection(r).path.mut_or_insert_default().path_segments[0]
            .id
            .clear();
    }),
    ("rubbish for a token", Code::PERMISSION_DENIED, |r| {
        "x".clone_into(&mut connection(r).path.mut_or_insert_default().path_segments[0].token);
    }),
    ("hostile interface", Code::UNKNOWN, |r| {
        let parameters = &mut r.mechanism_preferences[0].parameters;
        parameters.insert("name".to_owned(), "../../x".to_owned());
    }),
    ("the bridge", Code::UNKNOWN, |r| {
        let parameters = &mut r.mechanism_preferences[0].parameters;
        parameters.insert("name".to_owned(), "bridge0".to_owned());
    }),
    ("interface of another", Code::ALREADY_EXISTS, |r| {
        let mut mechanism = r.mechanism_preferences.remove(0);
        let name = "proxy.c.t.-take".to_owned();
        mechanism.parameters.insert("name".to_owned(), name);
        connection(r).mechanism = Some(mechanism).into();
    }),
    ("no mechanism", Code::UNKNOWN, |r| {
        r.mechanism_preferences.clear();
    }),
    ("oversized", Code::INVALID_ARGUMENT, |r| {
        connection(r).payload = "x".repeat(3 * 1024 * 1024);
    }),
];

#[test]
fn hostile_requests_are_refused_and_change_nothing() {
    let mut bench = Bench::new();
    let mut taken = Bench::request_of("t0", "f0", None);
    let name = "proxy.c.t.-take".to_owned();
    taken.mechanism_preferences[0]
        .parameters
        .insert("name".to_owned(), name);
    bench.connect(taken, 9);
    let _ = bench.facts();
    for (what, expected, change) in ROWS {
        let mut request = Bench::request_of("t1", "f1", None);
        change(&mut request);
        let mut awaited = bench.send(request);
        assert!(bench.ipam.0.lock().owed.is_empty(), "{what}: IPAM is asked");
        let error = answered(&mut awaited).unwrap().unwrap_err();
        assert_eq!(error.code(), Some(expected), "{what}: {error}");
        assert!(error.to_string().len() < 2 * ERROR_MAX, "{what}");
        assert!(bench.facts().is_empty(), "{what}");
        assert_eq!(bench.desk.targets.len(), 1, "{what}");
    }
    // Without a token in the headers the path's own counts, and its expiry is
    // missing here.
    let (reply, mut awaited) = reply(None);
    let mut request = Bench::request_of("t1", "f1", None);
    connection(&mut request)
        .path
        .mut_or_insert_default()
        .path_segments[1]
        .token = "fwd>us@1600".to_owned();
    let call = Call {
        token: None,
        ..bench.call()
    };
    bench
        .desk
        .handle(Job::Request(request, call, reply), bench.now);
    assert_eq!(code(&mut awaited), Code::UNKNOWN);
}

#[test]
fn what_is_unanswered_at_the_end_is_unavailable() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = (bench.facts(), bench.ipam_log());
    let mut waits = bench.send(refresh(&up));
    let mut behind = bench.send(refresh(&up));
    let (queued, mut late) = reply(None);
    bench
        .queue
        .push(Job::Request(refresh(&up), bench.call(), queued));
    let outlet = bench.monitor();
    bench.queue.close();
    let (after, mut too_late) = reply(None);
    bench
        .queue
        .push(Job::Request(refresh(&up), bench.call(), after));
    let ipam = bench.ipam.clone();
    let net = bench.net.clone();
    drop(bench);
    for awaited in [&mut waits, &mut behind, &mut late, &mut too_late] {
        assert_eq!(code(awaited), Code::UNAVAILABLE);
    }
    assert!(events(&outlet).1);
    assert_eq!(ipam.0.lock().log, ["acquire t1"], "leases stay");
    assert!(net.try_iter().next().is_none(), "ports stay");
}
