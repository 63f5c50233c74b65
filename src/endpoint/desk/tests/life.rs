//! Connections that come, stay and go.

use super::*;
use crate::proto::connectioncontext::Route;

#[test]
fn a_first_request_is_answered_completely() {
    let mut bench = Bench::new();
    let outlet = bench.monitor();
    let mut request = Bench::request_of("t1", "f1", Some("other"));
    request
        .connection
        .mut_or_insert_default()
        .path
        .mut_or_insert_default()
        .path_segments[2]
        .name = "somebody".to_owned();
    what_others_put_in(request.connection.mut_or_insert_default());
    let asked = request.connection.clone().unwrap();
    let mut awaited = bench.send(request);
    assert!(answered(&mut awaited).is_none() && bench.facts().is_empty());
    bench.ipam_answers(Ok(lease(2)));
    let answer = answered(&mut awaited).unwrap().unwrap();

    assert_eq!((answer.id.as_str(), answer.path.index), ("f1", 1));
    assert_eq!(answer.state.enum_value(), Ok(State::UP));
    assert_eq!(answer.labels, asked.labels);
    assert_eq!(
        (&answer.payload, &answer.network_service),
        (&asked.payload, &asked.network_service)
    );
    let segments = &answer.path.path_segments;
    assert_eq!(segments.len(), 3);
    assert_eq!(
        segments[0], asked.path.path_segments[0],
        "the target's segment is untouched"
    );
    assert_eq!(segments[1].token, "fwd>us@1600");
    assert_eq!(segments[1].expires.seconds, 1_500);
    assert_eq!(
        (segments[2].name.as_str(), segments[2].token.as_str()),
        ("us", "us>fwd@1600")
    );
    assert!(segments[2].expires.seconds > 1_000 && segments[2].id != "other");

    let ifname = assert_link(&bench, &answer);
    assert_eq!(answer.context.MTU, 1400);
    let ip = &answer.context.ip_context;
    assert_eq!(ip.src_ip_addrs, ["172.16.0.2/24"]);
    assert_eq!(ip.dst_ip_addrs, ["172.16.0.102/24"]);
    assert_eq!(ip.extra_prefixes, ["172.16.0.1/24"]);

    let own = own_id(&answer);
    let fact = format!("target connection {own} is up on {ifname}, peers 172.16.0.2");
    assert_eq!(bench.facts(), [fact]);
    assert_eq!(bench.ipam_log(), ["acquire t1"]);
    assert_all_else_is_as_asked(asked, &answer);
    let events = events(&outlet).0;
    assert!(
        events[0].connections.is_empty(),
        "the present first, even if it is nothing"
    );
    let told = &events[1].connections[&own];
    assert_eq!((told.id.as_str(), told.path.index), (own.as_str(), 2));
}

/// Fields that are none of ours.
fn what_others_put_in(connection: &mut Connection) {
    "us".clone_into(&mut connection.network_service_endpoint_name);
    let context = connection.context.mut_or_insert_default();
    context.dns_context.mut_or_insert_default();
    let ip = context.ip_context.mut_or_insert_default();
    ip.excluded_prefixes.push("10.96.0.0/16".to_owned());
    ip.src_routes.push(Route::default());
    let segments = &mut connection.path.mut_or_insert_default().path_segments;
    let metrics = &mut segments[0].metrics;
    metrics.insert("client_interface".to_owned(), "nsm-0".to_owned());
}

/// Puts what we answer into the request; then the two are equal.
fn assert_all_else_is_as_asked(mut asked: Connection, answer: &Connection) {
    asked.state = answer.state;
    asked.mechanism = answer.mechanism.clone();
    let (to, from) = (asked.context.mut_or_insert_default(), &answer.context);
    to.MTU = from.MTU;
    let (to, from) = (to.ip_context.mut_or_insert_default(), &from.ip_context);
    to.src_ip_addrs.clone_from(&from.src_ip_addrs);
    to.dst_ip_addrs.clone_from(&from.dst_ip_addrs);
    to.extra_prefixes.clone_from(&from.extra_prefixes);
    let segments = &mut asked.path.mut_or_insert_default().path_segments;
    let (renewed, own) = (&answer.path.path_segments[1], &answer.path.path_segments[2]);
    segments[1].token.clone_from(&renewed.token);
    segments[1].expires = renewed.expires.clone();
    segments[2] = own.clone();
    assert_eq!(*answer, asked);
}

/// The interface, and the namespace that it goes to.
fn assert_link(bench: &Bench, answer: &Connection) -> String {
    let segments = &answer.path.path_segments;
    let mechanism = &answer.mechanism;
    let ifname = &mechanism.parameters["name"];
    assert!(
        ifname.starts_with("proxy.c.t.-") && ifname.len() == 15,
        "{ifname}"
    );
    assert_eq!(
        segments[2].metrics["server_interface"],
        format!("KERNEL/{ifname}")
    );
    let netns = std::fs::metadata("/proc/self/ns/net").unwrap();
    let url = format!("inode://{}/{}", netns.dev(), netns.ino());
    assert_eq!(mechanism.parameters["inodeURL"], url);
    let attached = std::mem::take(&mut *bench.session.attached.lock());
    let passed = std::fs::File::from(attached.into_iter().next().unwrap())
        .metadata()
        .unwrap();
    assert_eq!((passed.dev(), passed.ino()), (netns.dev(), netns.ino()));
    ifname.clone()
}

#[test]
fn a_refresh_keeps_everything_but_tokens() {
    let mut bench = Bench::new();
    let first = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let mut with_vip = refresh(&first);
    let context = with_vip
        .connection
        .mut_or_insert_default()
        .context
        .mut_or_insert_default();
    context.MTU = 0;
    context
        .ip_context
        .mut_or_insert_default()
        .src_ip_addrs
        .push("20.0.0.1/32".to_owned());
    context
        .extra_context
        .insert("kept".to_owned(), "1".to_owned());
    let second = bench.connect(with_vip, 2);
    assert_eq!(own_id(&second), own_id(&first));
    assert_eq!(second.mechanism, first.mechanism);
    assert_eq!(second.context.MTU, 1400);
    assert_eq!(
        second.context.ip_context.src_ip_addrs,
        ["172.16.0.2/24", "20.0.0.1/32"]
    );
    assert_eq!(second.context.extra_context["kept"], "1");
    assert_eq!(
        bench.session.attached.lock().len(),
        2,
        "the namespace goes with each answer"
    );
    assert_eq!(bench.ipam_log(), ["acquire t1", "acquire t1"]);
    let third = bench.connect(refresh(&second), 2);
    assert_eq!(third.context, second.context);
    assert_eq!(bench.desk.targets.len(), 1);
}

#[test]
fn a_connection_from_before_a_restart_keeps_its_id_interface_and_addresses() {
    let mut before = Bench::new();
    let answer = before.connect(Bench::request_of("t1", "f1", None), 2);
    let mut after = Bench::new();
    let mut request = refresh(&answer);
    // What is right of our own segment is nobody's any more.
    let path = request.connection.mut_or_insert_default().path.as_mut();
    path.unwrap().path_segments.push(PathSegment::default());
    let again = after.connect(request, 2);
    assert_eq!(again.path.path_segments.len(), 3);
    assert_eq!(again.path.path_segments[2].id, own_id(&answer));
    assert_eq!(again.mechanism, answer.mechanism);
    assert_eq!(again.context, answer.context);
    assert_eq!(after.facts(), before.facts());
}

#[test]
fn order_within_a_connection_parallel_between_connections() {
    let mut bench = Bench::new();
    let first = bench.connect(Bench::request_of("t1", "f1", Some("own-1")), 2);
    let mut slow = bench.send(refresh(&first));
    let mut close = bench.send_close(first.clone());
    let mut again = bench.send(refresh(&first));
    let mut other = bench.send(Bench::request_of("t2", "f2", None));
    assert_eq!(bench.ipam_log(), ["acquire t1", "acquire t1", "acquire t2"]);
    assert!(
        answered(&mut close).is_none(),
        "it waits for the Request before it"
    );
    bench.ipam_answers(Ok(lease(2)));
    assert!(answered(&mut slow).unwrap().is_ok());
    assert!(answered(&mut close).unwrap().is_ok());
    assert!(answered(&mut again).is_none());
    assert_eq!(bench.ipam_log(), ["release t1", "acquire t1"]);
    bench.ipam_answers(Ok(lease(3)));
    assert!(answered(&mut other).unwrap().is_ok());
    bench.ipam_answers(Ok(lease(2)));
    assert!(answered(&mut again).unwrap().is_ok());
}

#[test]
fn closing_twice_and_what_was_never_there() {
    let mut bench = Bench::new();
    let outlet = bench.monitor();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = bench.facts();
    use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER, UPDATE};
    assert_eq!(kinds(&outlet), [(INITIAL_STATE_TRANSFER, 0), (UPDATE, 1)]);
    for _ in 0..2 {
        let mut close = bench.send_close(up.clone());
        assert_eq!(answered(&mut close), Some(Ok(())));
    }
    assert_eq!(
        answered(&mut bench.send_close(Connection::default())),
        Some(Ok(()))
    );
    let own = own_id(&up);
    assert_eq!(
        bench.facts(),
        [format!("target connection {own} is closed")]
    );
    assert_eq!(bench.ipam_log(), ["acquire t1", "release t1"]);
    assert_eq!(kinds(&outlet), [(DELETE, 1)]);
    assert!(bench.desk.targets.is_empty());
}

#[test]
fn reselect_is_close_then_request_with_the_same_addresses() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = (bench.facts(), bench.ipam_log());
    let outlet = bench.monitor();
    for known in [true, false] {
        let mut request = refresh(&up);
        request.mechanism_preferences = Bench::request_of("", "", None).mechanism_preferences;
        let connection = request.connection.mut_or_insert_default();
        connection.state = State::RESELECT_REQUESTED.into();
        connection.mechanism = None.into();
        let answer = bench.connect(request, 2);
        assert_eq!(answer.state.enum_value(), Ok(State::UP));
        assert_eq!(own_id(&answer), own_id(&up));
        assert_eq!(answer.context, up.context);
        let facts = bench.facts();
        assert_eq!(facts.len(), if known { 2 } else { 1 }, "{facts:?}");
        assert_eq!(facts[0].contains("is closed"), known);
        assert_eq!(bench.ipam_log(), ["acquire t1"], "no release comes between");
        assert_ne!(
            answer.mechanism.parameters["name"],
            up.mechanism.parameters["name"]
        );
        // Once more for a connection that this process does not know.
        bench = Bench::new();
    }
    use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER, UPDATE};
    assert_eq!(
        kinds(&outlet),
        [(INITIAL_STATE_TRANSFER, 1), (DELETE, 1), (UPDATE, 1)]
    );
}

#[test]
fn a_reselect_that_fails_pays_the_lease_back() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let mut request = refresh(&up);
    request.connection.mut_or_insert_default().state = State::RESELECT_REQUESTED.into();
    let mut awaited = bench.send(request);
    bench.ipam_answers(Err(IpamError::Stopped));
    assert_eq!(code(&mut awaited), Code::UNAVAILABLE);
    assert_eq!(bench.ipam_log(), ["acquire t1", "acquire t1", "release t1"]);
    assert!(bench.desk.targets.is_empty());
}

#[test]
fn two_connections_of_one_target_share_its_lease() {
    let mut bench = Bench::new();
    let old = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let new = bench.connect(Bench::request_of("t1", "f2", None), 2);
    assert_ne!(own_id(&old), own_id(&new));
    assert_ne!(
        old.mechanism.parameters["name"],
        new.mechanism.parameters["name"]
    );
    let _ = bench.ipam_log();
    answered(&mut bench.send_close(old)).unwrap().unwrap();
    assert!(
        bench.ipam_log().is_empty(),
        "the other one lives on these addresses"
    );
    answered(&mut bench.send_close(new)).unwrap().unwrap();
    assert_eq!(bench.ipam_log(), ["release t1"]);
}

#[test]
fn a_connection_that_is_not_refreshed_is_closed() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = bench.facts();
    let expiry = bench.now.mono + Duration::from_secs(500);
    assert_eq!(bench.desk.next_deadline(), Some(expiry));
    bench.now.mono = expiry;
    // A refresh is under way when the time comes: it counts.
    let mut late = bench.send(refresh(&up));
    bench.desk.tick(bench.now);
    assert_eq!(bench.desk.next_deadline(), None, "told once");
    bench.ipam_answers(Ok(lease(2)));
    assert!(answered(&mut late).unwrap().is_ok());
    let expiry = expiry + Duration::from_secs(500);
    assert_eq!(bench.desk.next_deadline(), Some(expiry));
    let _ = (bench.facts(), bench.ipam_log());
    bench.now.mono = expiry;
    bench.desk.tick(bench.now);
    assert_eq!(
        bench.facts(),
        [format!("target connection {} is closed", own_id(&up))]
    );
    assert_eq!(bench.ipam_log(), ["release t1"]);
    assert!(bench.desk.targets.is_empty());
}

#[test]
fn a_preferred_name_is_taken_if_it_is_free() {
    let mut bench = Bench::new();
    let mut names = Vec::new();
    for target in ["t1", "t2"] {
        let mut request = Bench::request_of(target, target, None);
        let parameters = &mut request.mechanism_preferences[0].parameters;
        parameters.insert("name".to_owned(), "nsm-0".to_owned());
        let answer = bench.connect(request, 2);
        names.push(answer.mechanism.parameters["name"].clone());
    }
    assert_eq!(names[0], "nsm-0");
    assert!(names[1].starts_with("proxy.c.t.-"), "{names:?}");
}

#[test]
fn what_this_process_does_not_know_is_echoed() {
    let mut bench = Bench::new();
    let mut request = Bench::request_of("t1", "f1", None);
    let connection = request.connection.mut_or_insert_default();
    let unknown = connection.special_fields.mut_unknown_fields();
    unknown.add_length_delimited(99, vec![1, 2]);
    let path = connection.path.mut_or_insert_default();
    let segment = &mut path.path_segments[0];
    segment
        .special_fields
        .mut_unknown_fields()
        .add_varint(77, 5);
    let answer = bench.connect(request, 2);
    assert!(answer.special_fields.unknown_fields().get(99).is_some());
    let segment = &answer.path.path_segments[0];
    assert!(segment.special_fields.unknown_fields().get(77).is_some());
}

#[test]
fn a_link_without_interface() {
    let mut bench = Bench::new();
    let mut request = Bench::request_of("t1", "f1", None);
    request.mechanism_preferences[0].type_ = "NOOP".to_owned();
    let answer = bench.connect(request, 2);
    assert!(answer.mechanism.parameters.is_empty());
    assert!(bench.session.attached.lock().is_empty());
    answered(&mut bench.send_close(answer)).unwrap().unwrap();
    assert!(bench.facts().is_empty(), "no port was brought");
    assert_eq!(bench.ipam_log(), ["acquire t1", "release t1"]);
}

#[test]
fn a_vip_that_is_of_no_use_here_costs_the_target_nothing() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let mut update = refresh(&up);
    let connection = update.connection.mut_or_insert_default();
    let context = connection.context.mut_or_insert_default();
    let ip = context.ip_context.mut_or_insert_default();
    for vip in ["20.0.0.1/32", "2000::1/128", "no address"] {
        ip.src_ip_addrs.push(vip.to_owned());
    }
    let asked = ip.clone();
    for _ in 0..2 {
        let answer = bench.connect(update.clone(), 2);
        assert_eq!(*answer.context.ip_context, asked);
    }
}
