//! nsmgr against a minimal good client, and against each thing that it must
//! refuse.

mod daemon;
mod endpoint;
mod refusals;
mod rig;

use super::*;
use crate::path::client_id;
use crate::policy::unknown;
use meridio_proxy::proto::connection::{Connection, ConnectionEventType, State};
use meridio_proxy::rpc::status::Code;
use rig::{LB_SERVICE, LIMIT, PROXY_SERVICE, Rig, event, find, find_event, soon};

/// A first answer's path, labels, and the pair that was made.
fn assert_complete(rig: &Rig, first: &Connection) {
    assert_eq!((first.id.as_str(), first.path.index), ("c1", 0));
    let segments = &first.path.path_segments;
    let names: Vec<_> = segments.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(
        names,
        ["client", "nsmgr-node-a", "forwarder-node-a", "lb-1"]
    );
    let stamped = segments
        .iter()
        .all(|s| s.expires.is_some() && !s.token.is_empty());
    assert!(stamped, "{segments:?}");
    assert_eq!(first.labels["nodeName"], "node-a");
    assert_eq!(first.context.MTU, 1500);
    rig.datapath
        .assert_pair("server-c1", "client-c1", &rig.netns, &rig.lb.netns());
}

#[test]
fn life_of_a_connection_to_an_lb() {
    let rig = Rig::new();
    let session = rig.session();
    let first = rig
        .request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap();
    assert_complete(&rig, &first);

    let monitor = session.monitor(&rig.selector("c1")).unwrap();
    let (kind, seen) = event(&monitor);
    assert_eq!(kind, ConnectionEventType::INITIAL_STATE_TRANSFER);
    let own = first.path.path_segments[1].id.clone();
    assert_eq!(
        (&seen.id, seen.path.index, client_id(&seen)),
        (&own, 1, "c1".to_owned())
    );

    let second = rig.request(&session, first.clone()).unwrap();
    assert_eq!(second.path.path_segments[1].id, own);
    assert_eq!(second.mechanism, first.mechanism);
    assert_eq!(event(&monitor).0, ConnectionEventType::UPDATE);

    let mut again = second;
    again.state = State::RESELECT_REQUESTED.into();
    again.mechanism.clear();
    let third = rig.request(&session, again).unwrap();
    assert_eq!(third.state, State::UP.into());
    assert_eq!(event(&monitor).0, ConnectionEventType::DELETE);
    assert_eq!(event(&monitor).0, ConnectionEventType::UPDATE);
    assert_eq!(
        rig.datapath.log().join(" "),
        "connect connect disconnect connect"
    );

    session.close(&third, LIMIT).unwrap();
    assert_eq!(event(&monitor).0, ConnectionEventType::DELETE);
    session.close(&third, LIMIT).unwrap();
    assert_eq!((rig.nsmgr.connections().len(), rig.nsmgr.crosses()), (0, 0));
    assert_eq!(
        rig.lb.log().join(" "),
        "request connected request connected close request connected close"
    );
    rig.assert_no_refusals();
}

#[test]
fn an_lb_is_found_until_it_is_removed() {
    let rig = Rig::new();
    let session = rig.session();
    let finds = session.find_endpoints(&find(LB_SERVICE, true)).unwrap();
    let (found, deleted) = find_event(&finds);
    assert_eq!((found.name.as_str(), deleted), ("lb-1", false));
    assert!(found.url.starts_with("inode://"), "{}", found.url);
    assert_eq!(rig.nsmgr.streams(), (0, 1));
    rig.nsmgr.remove_endpoint("lb-1");
    let (gone, deleted) = find_event(&finds);
    assert_eq!((gone.name.as_str(), deleted), ("lb-1", true));
    rig.assert_no_refusals();
}

#[test]
fn removing_an_lb_deletes_its_connections_and_killing_one_does_not() {
    let rig = Rig::new();
    let session = rig.session();
    let up = rig
        .request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap();
    let monitor = session.monitor(&rig.selector("c1")).unwrap();
    event(&monitor);
    rig.nsmgr.kill_endpoint("lb-1");
    assert_eq!(rig.nsmgr.connections().len(), 1);
    let error = rig.request(&session, up).unwrap_err().to_string();
    assert!(error.contains("does not answer"), "{error}");
    // A failed refresh is told as DOWN, also to who asks later.
    let (kind, down) = event(&monitor);
    assert_eq!(
        (kind, down.state),
        (ConnectionEventType::UPDATE, State::DOWN.into())
    );
    rig.nsmgr.remove_endpoint("lb-1");
    assert_eq!(event(&monitor).0, ConnectionEventType::DELETE);
    rig.assert_no_refusals();
}

#[test]
fn a_killed_lb_expires() {
    let rig = Rig::new();
    rig.nsmgr.set_expire_period(Duration::from_millis(300));
    rig.nsmgr.add_endpoint(LB_SERVICE, rig.lb.clone());
    let finds = rig.session();
    let finds = finds.find_endpoints(&find(LB_SERVICE, true)).unwrap();
    // It is refreshed, which watchers see.
    for _ in 0..4 {
        assert!(!find_event(&finds).1);
    }
    rig.nsmgr.kill_endpoint("lb-1");
    while !find_event(&finds).1 {}
    assert!(rig.nsmgr.registered(LB_SERVICE).is_empty());
}

#[test]
fn a_connection_ends_before_its_token() {
    let rig = Rig::with_lifetime(Duration::from_secs(6));
    let session = rig.session();
    rig.request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap();
    let monitor = session.monitor(&rig.selector("c1")).unwrap();
    event(&monitor);
    let before = clock::now();
    assert_eq!(event(&monitor).0, ConnectionEventType::DELETE);
    // Six seconds less the five of the deadline.
    assert!(
        before.elapsed() < Duration::from_secs(3),
        "{:?}",
        before.elapsed()
    );
    assert_eq!(rig.nsmgr.crosses(), 0);
    rig.assert_no_refusals();
}

#[test]
fn restart_forgets_and_the_path_brings_the_pair_back() {
    let rig = Rig::new();
    let session = rig.session();
    let up = rig
        .request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap();
    let monitor = session.monitor(&rig.selector("c1")).unwrap();
    event(&monitor);
    rig.nsmgr.restart().unwrap();
    rig::ended(&monitor);
    assert!(rig.nsmgr.connections().is_empty());
    assert_eq!(rig.nsmgr.crosses(), 1, "the forwarder lives on");
    assert!(
        rig.request(&session, up.clone()).is_err(),
        "old connections are cut"
    );

    let session = rig.session();
    let mut again = up.clone();
    again.state = State::RESELECT_REQUESTED.into();
    again.mechanism.clear();
    let new = rig.request(&session, again).unwrap();
    assert_eq!(new.path.path_segments[2].id, up.path.path_segments[2].id);
    assert_eq!(rig.datapath.log(), ["connect", "disconnect", "connect"]);
    assert_eq!(rig.nsmgr.crosses(), 1);
    rig.assert_no_refusals();
}

#[test]
fn scripted_trouble() {
    let rig = Rig::new();
    let session = rig.session();
    rig.nsmgr.fail_next_requests([unknown("scripted")]);
    let c = rig.new_connection("c1", "lb-1");
    assert!(
        rig.request(&session, c.clone())
            .unwrap_err()
            .to_string()
            .contains("scripted")
    );
    rig.nsmgr.pause_calls(true);
    let short = Duration::from_millis(200);
    let late = rig.request_within(&session, c.clone(), short).unwrap_err();
    assert_eq!(late.code(), Some(Code::DEADLINE_EXCEEDED));
    rig.nsmgr.pause_calls(false);
    rig.datapath.fail(true);
    assert!(
        rig.request(&session, c.clone())
            .unwrap_err()
            .to_string()
            .contains("data path")
    );
    assert_eq!((rig.nsmgr.crosses(), rig.nsmgr.connections().len()), (0, 0));
    rig.datapath.fail(false);
    rig.request(&session, c).unwrap();
    let monitor = session.monitor(&rig.selector("c1")).unwrap();
    event(&monitor);
    assert!(rig.nsmgr.down_connection("c1") && !rig.nsmgr.down_connection("c2"));
    let (kind, down) = event(&monitor);
    assert_eq!(
        (kind, down.state),
        (ConnectionEventType::UPDATE, State::DOWN.into())
    );
    assert!(rig.nsmgr.end_connection("c1") && !rig.nsmgr.end_connection("c1"));
    assert_eq!(event(&monitor).0, ConnectionEventType::DELETE);
    rig.nsmgr.drop_streams();
    rig::ended(&monitor);
    assert_eq!(rig.nsmgr.streams(), (0, 0));
    rig.assert_no_refusals();
}

#[test]
fn an_endpoint_registers_and_leaves() {
    let rig = Rig::new();
    let proxy = rig.proxy();
    let session = rig.session();
    let finds = session.find_endpoints(&find(PROXY_SERVICE, true)).unwrap();
    let reply = proxy.register(&session);
    let path = reply
        .headers
        .iter()
        .find(|(key, _)| *key == "path")
        .unwrap()
        .1;
    let path = crate::path::RegistryPath::parse(std::str::from_utf8(path).unwrap()).unwrap();
    assert_eq!((path.index, path.tokens.len()), (0, 3));
    let answer = reply.message;
    assert_eq!(answer.url, proxy.registration().url);
    assert_eq!(answer.path_ids.len(), 3);
    let left = answer.expiration_time.seconds - crate::path::timestamp(clock::wall()).seconds;
    assert!((50..=60).contains(&left), "{left}");
    rig.nsmgr
        .wait_registered(PROXY_SERVICE, "proxy-1", soon())
        .unwrap();
    assert_eq!(find_event(&finds).0.url, answer.url);
    // Its own descriptor comes back with the event.
    assert!(session.dialed.files.count() > 0);

    let files = [&proxy.file];
    session.unregister_endpoint(&answer, &files, LIMIT).unwrap();
    assert!(find_event(&finds).1);
    session.unregister_endpoint(&answer, &files, LIMIT).unwrap();
    assert!(rig.nsmgr.registered(PROXY_SERVICE).is_empty());
    rig.assert_no_refusals();
}

#[test]
fn a_registration_expires_early_by_the_deadline_and_hides_after_a_restart() {
    let rig = Rig::new();
    let proxy = rig.proxy();
    let session = rig.session();
    rig.nsmgr
        .set_expire_period(LIMIT + Duration::from_millis(300));
    let finds = session.find_endpoints(&find(PROXY_SERVICE, true)).unwrap();
    let before = clock::now();
    proxy.register(&session);
    assert!(!find_event(&finds).1);
    assert!(find_event(&finds).1);
    assert!(
        before.elapsed() < Duration::from_secs(3),
        "{:?}",
        before.elapsed()
    );

    rig.nsmgr.set_expire_period(Duration::from_secs(60));
    proxy.register(&session);
    rig.nsmgr.restart().unwrap();
    assert!(rig.nsmgr.registered(PROXY_SERVICE).is_empty());
    let session = rig.session();
    proxy.register(&session);
    assert_eq!(rig.nsmgr.registered(PROXY_SERVICE), ["proxy-1"]);
    rig.assert_no_refusals();
}

#[test]
fn life_of_a_target() {
    let rig = Rig::new();
    let proxy = rig.proxy();
    let session = rig.session();
    proxy.register(&session);
    let events = rig.nsmgr.target_events();
    let up = rig.nsmgr.connect_target(rig.target("t1")).unwrap();
    let names: Vec<_> = up
        .path
        .path_segments
        .iter()
        .map(|s| s.name.as_str())
        .collect();
    assert_eq!(
        names,
        ["target", "nsmgr-node-a", "forwarder-node-a", "proxy-1"]
    );
    assert_eq!(up.context.ip_context.src_ip_addrs, ["172.16.0.2/24"]);
    rig.datapath
        .assert_pair("server-t1", "client-t1", &rig.netns, &proxy.netns);

    let mut more = rig.target("t1");
    let mut ip = up.context.ip_context.clone().unwrap();
    ip.src_ip_addrs.push("20.0.0.1/32".to_owned());
    more.ip_context = ip;
    let more = rig.nsmgr.connect_target(more).unwrap();
    assert_eq!(more.context.ip_context.src_ip_addrs.len(), 2);
    assert_eq!(more.path.path_segments[3].id, up.path.path_segments[3].id);
    assert!(events.try_recv().is_err(), "a refresh is no DOWN");
    assert_eq!(proxy.dials(), 3, "probe and one for each Request");

    proxy.close_all();
    let event = events.recv_timeout(LIMIT).unwrap();
    assert_eq!(event.id, "t1");
    let mut heal = rig.target("t1");
    heal.ip_context = more.context.ip_context.clone().unwrap();
    let healed = rig.nsmgr.connect_target(heal).unwrap();
    assert_eq!(healed.context.ip_context.src_ip_addrs.len(), 2);
    assert_eq!(
        rig.datapath.log(),
        ["connect", "connect", "disconnect", "connect"]
    );

    rig.nsmgr.close_target("t1").unwrap();
    rig.nsmgr.close_target("t1").unwrap();
    assert_eq!((rig.nsmgr.crosses(), rig.nsmgr.connections().len()), (0, 0));
    assert_eq!(proxy.connections(), 0);
    rig.assert_no_refusals();
}

#[test]
fn a_targets_refreshes_keep_it_up() {
    // Refreshed every 1.2 seconds; closed after four otherwise. The endpoint's
    // registration, bounded by the same tokens, lasts for five and a half.
    let rig = Rig::with_lifetime(Duration::from_secs(6));
    let proxy = rig.proxy();
    proxy.register_within(&rig.session(), Duration::from_millis(500));
    let events = rig.nsmgr.target_events();
    rig.nsmgr.connect_target(rig.target("t1")).unwrap();
    let down = events.recv_timeout(Duration::from_millis(4500));
    assert!(down.is_err(), "{down:?}, {:?}", rig.nsmgr.refusals());
    let log = rig.datapath.log();
    assert!(
        log.len() >= 3 && log.iter().all(|what| *what == "connect"),
        "{log:?}"
    );
    rig.nsmgr.close_target("t1").unwrap();
    rig.assert_no_refusals();
}

#[test]
fn an_endpoint_that_goes_away_takes_its_targets_down() {
    let rig = Rig::new();
    let proxy = rig.proxy();
    proxy.register(&rig.session());
    let events = rig.nsmgr.target_events();
    rig.nsmgr.connect_target(rig.target("t1")).unwrap();
    drop(proxy);
    assert_eq!(events.recv_timeout(LIMIT).unwrap().id, "t1");
    let error = rig.nsmgr.connect_target(rig.target("t1")).unwrap_err();
    assert!(error.contains("dial"), "{error}");
}

#[test]
fn bad_answers_of_an_endpoint_are_refused() {
    let rig = Rig::new();
    let proxy = rig.proxy();
    proxy.register(&rig.session());
    type Mangle = fn(&mut Connection);
    let cases: [(&str, Mangle); 9] = [
        ("id was", |c| c.id = "x".to_owned()),
        ("MTU", |c| c.context.mut_or_insert_default().MTU = 0),
        ("interface name", |c| {
            c.mechanism
                .mut_or_insert_default()
                .parameters
                .insert("name".into(), "a/b".into());
        }),
        ("inode://", |c| {
            c.mechanism
                .mut_or_insert_default()
                .parameters
                .remove("inodeURL");
        }),
        ("labels", |c| c.labels.clear()),
        ("state", |c| c.state = State::DOWN.into()),
        ("segments", |c| {
            c.path.mut_or_insert_default().path_segments.pop();
        }),
        ("token of segment 0", |c| {
            c.path.mut_or_insert_default().path_segments[0]
                .token
                .clear();
        }),
        ("expires of segment 3", |c| {
            c.path.mut_or_insert_default().path_segments[3]
                .expires
                .clear();
        }),
    ];
    for (want, mangle) in cases {
        proxy.mangle(Some(mangle));
        let error = rig.nsmgr.connect_target(rig.target("t1")).unwrap_err();
        assert!(error.contains(want), "{want}: {error}");
    }
    assert_eq!(
        (rig.nsmgr.crosses(), proxy.connections()),
        (0, 0),
        "closed after each"
    );
    assert_eq!(rig.nsmgr.refusals().len(), cases.len());
}
