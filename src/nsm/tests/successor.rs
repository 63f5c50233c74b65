//! An LB dies, and another process takes its name: what waits for the dead one
//! is given up when the registry shows the successor.

use super::world::{endpoint_at, refused_stream};
use super::*;

/// What is given up, and made again, is made within this.
const SOON: Duration = Duration::from_secs(1);

#[test]
fn what_waits_for_a_dead_lb_is_given_up_for_its_successor() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(update(&connection, State::DOWN));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    // nsmgr closes towards the dead one, and has no answer.
    let (closed, _never_answered) = world.close();
    assert_eq!(closed.path, connection.path);
    world
        .registry
        .message(endpoint_at("lb-1", "unix:///second"));
    let begun = clock::now();
    let (request, _never_answered_either) = world.request();
    // The Close had its time to reach the forwarder.
    assert!(begun.elapsed() < SOON * 2, "{:?}", begun.elapsed());
    assert_eq!(request.connection.state, State::RESELECT_REQUESTED.into());
    assert_eq!(request.connection.path, connection.path);
    // The successor dies in its turn.
    world.registry.message(endpoint_at("lb-1", "unix:///third"));
    let (again, reply) = world.request();
    // No two Requests begin within a second.
    assert!(begun.elapsed() < SOON * 3, "{:?}", begun.elapsed());
    assert_eq!(again.connection, request.connection, "with the same path");
    let rebuilt = answer(&again);
    reply.send(Ok(rebuilt.clone())).unwrap();
    world.expect_port("lb-1", &rebuilt);
    let watch = world.monitor("lb-1", &[shown(&rebuilt, State::UP)]);
    // Nothing is left that would be given up now.
    world
        .registry
        .message(endpoint_at("lb-1", "unix:///fourth"));
    watch.message(update(&rebuilt, State::REFRESH_REQUESTED));
    let (refresh, reply) = world.request();
    assert_eq!(refresh.connection.state, State::UP.into());
    reply.send(Ok(answer(&refresh))).unwrap();
    assert!(world.facts.recv_timeout(SOON).is_ok(), "still connected");
}

#[test]
fn a_refresh_is_not_given_up_for_a_word_of_the_registry() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(update(&connection, State::REFRESH_REQUESTED));
    let (refresh, reply) = world.request();
    world
        .registry
        .message(endpoint_at("lb-1", "unix:///second"));
    // As after a restart of nsmgr, to which the LB registers anew.
    assert!(world.calls.recv_timeout(SOON).is_err(), "another call");
    reply.send(Ok(answer(&refresh))).unwrap();
    assert!(matches!(world.fact(), Event::PortExpected { .. }));
}

/// nsmgr is stuck, and the LB falls: no packet more goes there.
#[test]
fn the_fall_of_an_lb_does_not_wait_for_a_refresh() {
    for kind in [ConnectionEventType::UPDATE, ConnectionEventType::DELETE] {
        let world = world();
        let (connection, watch) = world.connects("lb-1");
        watch.message(update(&connection, State::REFRESH_REQUESTED));
        let (_, _never_answered) = world.request();
        let begun = clock::now();
        watch.message(event(kind, &[shown(&connection, State::DOWN)]));
        assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
        assert!(begun.elapsed() < SOON / 4, "{:?}", begun.elapsed());
        // Nor does what follows.
        if kind == ConnectionEventType::UPDATE {
            let (_, reply) = world.close();
            reply.send(Ok(())).unwrap();
        }
        let (request, _reply) = world.request();
        assert_eq!(request.connection.state, State::RESELECT_REQUESTED.into());
        assert!(begun.elapsed() < SOON * 2, "{:?}", begun.elapsed());
        assert!(world.facts.is_empty(), "told twice");
    }
}

#[test]
fn an_lb_that_was_down_during_a_refresh_is_up_when_it_succeeds() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(update(&connection, State::REFRESH_REQUESTED));
    let (refresh, reply) = world.request();
    watch.message(update(&connection, State::DOWN));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    watch.message(update(&connection, State::UP));
    // Read before the answer.
    while !watch.items.is_empty() {
        std::thread::yield_now();
    }
    let refreshed = answer(&refresh);
    reply.send(Ok(refreshed.clone())).unwrap();
    world.expect_port("lb-1", &refreshed);
    assert!(world.calls.recv_timeout(SOON / 2).is_err(), "another call");
}

#[test]
fn an_lb_that_leaves_during_a_refresh_gets_no_packets_more() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(update(&connection, State::REFRESH_REQUESTED));
    let (_, _never_answered) = world.request();
    let begun = clock::now();
    world.registry.message(endpoint("lb-1", true));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

#[test]
fn a_first_request_to_a_dead_lb_is_looked_for_and_made_again() {
    let world = world();
    world.registers("lb-1");
    world.monitor("lb-1", &[]);
    let (first, _never_answered) = world.request();
    world
        .registry
        .message(endpoint_at("lb-1", "unix:///second"));
    let begun = clock::now();
    // nsmgr may have connected it just then.
    let orphan = answer(&first);
    world.monitor("lb-1", &[shown(&orphan, State::UP)]);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let (closed, reply) = world.close();
    assert_eq!(closed.path.path_segments, orphan.path.path_segments);
    reply.send(Ok(())).unwrap();
    let (request, _reply) = world.request();
    assert_eq!(
        request.connection.path.path_segments,
        orphan.path.path_segments
    );
    assert_eq!(request.connection.state, State::RESELECT_REQUESTED.into());
}

#[test]
fn a_close_to_a_dead_lb_is_given_up_when_it_is_registered_again() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(update(&connection, State::DOWN));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    let (_, _never_answered) = world.close();
    world.registry.message(endpoint("lb-1", true));
    let (_, _never_answered) = world.close();
    world
        .registry
        .message(endpoint_at("lb-1", "unix:///second"));
    let begun = clock::now();
    world.monitor("lb-1", &[]);
    // The Close had its time to reach the forwarder, and more than one that a
    // reselect with the same path follows.
    assert!(
        (SOON * 2..SOON * 4).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    let (request, _reply) = world.request();
    assert_eq!(request.connection.path.path_segments.len(), 1, "a new one");
}

/// nsmgr forgets a connection whose Close was cancelled, though it did not reach
/// the forwarder, whose interfaces are then left.
#[test]
fn a_close_is_not_cancelled_by_the_departure_of_its_lb_nor_by_its_return() {
    let departs = || endpoint("lb-1", true);
    let returns = || endpoint_at("lb-1", "unix:///second");
    for (news, then) in [(departs(), "Close"), (returns(), "Request")] {
        let world = world();
        let (connection, watch) = world.connects("lb-1");
        watch.message(update(&connection, State::DOWN));
        assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
        let (_, reply) = world.close();
        world.registry.message(news);
        // A busy node takes its time.
        assert!(world.calls.recv_timeout(SOON / 2).is_err(), "another call");
        reply.send(Ok(())).expect("the Close has been cancelled");
        match world.calls.recv_timeout(PATIENCE).unwrap() {
            Call::Close(..) => assert_eq!(then, "Close"),
            Call::Request(..) => assert_eq!(then, "Request"),
            _ => panic!("neither Close nor Request"),
        }
    }
}

/// A Close that nsmgr was never reached with, or refused, would leave all that
/// was connected.
#[test]
fn a_close_that_fails_is_made_again_with_the_same_path() {
    let world = world();
    let (connection, _watch) = world.connects("lb-1");
    world.registry.message(endpoint("lb-1", true));
    for code in [Code::UNAVAILABLE, Code::DEADLINE_EXCEEDED] {
        let (closed, reply) = world.close();
        assert_eq!(closed.path, connection.path);
        assert!(world.released.is_empty(), "the lease is given up");
        let failed = RpcError::status(code, "nsmgr is busy");
        reply.send(Err(failed)).unwrap();
    }
    let (closed, reply) = world.close();
    assert_eq!(closed.path, connection.path);
    reply.send(Ok(())).unwrap();
    let released = world.released.recv_timeout(PATIENCE).unwrap();
    assert_eq!(released, LeaseId::new(id("lb-1")));
    assert!(world.calls.is_empty());
}

/// A dead LB leaves the registry while the Close before the reselect waits in
/// vain: nsmgr would give up what it does towards the forwarder.
#[test]
fn a_close_before_a_reselect_is_not_cancelled_by_the_departure_of_its_lb() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(update(&connection, State::DOWN));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    let (_, reply) = world.close();
    world.registry.message(endpoint("lb-1", true));
    assert!(world.calls.recv_timeout(SOON * 2).is_err(), "another call");
    reply.send(Ok(())).expect("the Close has been cancelled");
    let (closed, _reply) = world.close();
    assert_eq!(closed.path, connection.path);
}

/// What nsmgr connects while its caller gives up, it forgets.
#[test]
fn a_request_under_way_has_a_moment_to_be_answered_when_its_lb_leaves() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(update(&connection, State::DOWN));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    let (_, reply) = world.close();
    reply.send(Ok(())).unwrap();
    let (request, reply) = world.request();
    world.registry.message(endpoint("lb-1", true));
    assert!(world.calls.recv_timeout(SOON / 10).is_err(), "another call");
    let rebuilt = answer(&request);
    reply.send(Ok(rebuilt.clone())).expect("given up at once");
    let (closed, _reply) = world.close();
    assert_eq!(closed.path, rebuilt.path);
}

#[test]
fn a_refused_lb_is_asked_again_when_its_successor_registers() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(event(
        ConnectionEventType::DELETE,
        &[shown(&connection, State::UP)],
    ));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    let refuse = || RpcError::status(Code::UNKNOWN, "all forwarders have failed");
    // 0.2, 0.4, 0.8 s later; what is deleted is not closed once more.
    for _ in 0..4 {
        let (_, reply) = world.request();
        reply.send(Err(refuse())).unwrap();
    }
    // The next would be after 1.6 s, no sooner than 1 s after the last.
    let begun = clock::now();
    world
        .registry
        .message(endpoint_at("lb-1", "unix:///second"));
    let (_, _reply) = world.request();
    assert!(begun.elapsed() < SOON + SOON / 4, "{:?}", begun.elapsed());
}

#[test]
fn a_monitor_that_is_refused_prevents_nothing() {
    for refusal in [Code::PERMISSION_DENIED, Code::UNIMPLEMENTED] {
        let world = world();
        world.registers("lb-1");
        // nsmgr before v1.7 shows connections only to those who made them.
        refused_stream(&world.calls, refusal);
        let (request, reply) = world.request();
        let connection = answer(&request);
        reply.send(Ok(connection.clone())).unwrap();
        world.expect_port("lb-1", &connection);
        refused_stream(&world.calls, refusal);
        // It is opened again, and until then the connection stands.
        let watch = world.monitor("lb-1", &[shown(&connection, State::UP)]);
        assert!(world.facts.is_empty());
        watch.message(update(&connection, State::REFRESH_REQUESTED));
        let (refresh, _reply) = world.request();
        assert_eq!(refresh.connection.state, State::UP.into());
    }
}

#[test]
fn a_failed_refresh_leaves_the_monitor_armed() {
    for stream_ends in [false, true] {
        let world = world();
        let (connection, watch) = world.connects("lb-1");
        watch.message(update(&connection, State::REFRESH_REQUESTED));
        let (_, reply) = world.request();
        if stream_ends {
            watch.end(Ok(()));
        }
        let refused = RpcError::status(Code::UNKNOWN, "all forwarders have failed");
        reply.send(Err(refused)).unwrap();
        let _watch = if stream_ends {
            // The next refresh may come before the stream is opened.
            loop {
                match world.calls.recv_timeout(PATIENCE).unwrap() {
                    Call::Monitor(_, reply) => {
                        let (feed, stream) = feed();
                        let down = shown(&connection, State::DOWN);
                        feed.message(event(ConnectionEventType::INITIAL_STATE_TRANSFER, &[down]));
                        reply.send(Ok(stream)).unwrap();
                        break feed;
                    }
                    Call::Request(_, reply) => {
                        let refused = RpcError::status(Code::UNKNOWN, "refused");
                        reply.send(Err(refused)).unwrap();
                    }
                    _ => panic!("another call"),
                }
            }
        } else {
            watch.message(update(&connection, State::DOWN));
            watch
        };
        assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    }
}
