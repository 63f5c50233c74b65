//! The threads of the mesh against a test that plays nsmgr, registry and IPAM:
//! each call of theirs waits until the test answers it.

mod crowd;
mod successor;
mod world;

use std::time::Duration;

use super::Surroundings;
use super::convert::Template;
use super::netns::Netns;
use crate::core::event::Event;
use crate::core::ids::{IfName, LeaseId};
use crate::core::mesh;
use crate::ipam::IpamError;
use crate::kernel::NetMsg;
use crate::proto::connection::{Connection, ConnectionEventType, State};
use crate::proto::registry::NetworkServiceEndpointResponse;
use crate::rpc::pump::StreamError;
use crate::rpc::status::{Code, RpcError};
use crate::sync::clock;
use world::{
    Call, PATIENCE, World, endpoint, event, feed, find, id, key, shown, update, world,
    world_in_place, world_with,
};
pub(super) use world::{addresses, answer, template};

#[test]
fn an_lb_is_connected_and_closed_when_the_mesh_stops() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    assert_eq!(connection.id, id("lb-1"));
    assert_eq!(world.acquired.try_recv(), Ok(LeaseId::new(id("lb-1"))));
    assert!(world.acquired.is_empty(), "once for a Request");

    let (stopped, rest) = world.stopping(PATIENCE);
    watch.expect_dropped();
    match rest.calls.recv_timeout(PATIENCE).unwrap() {
        Call::Close(closed, reply) => {
            assert_eq!(closed, connection, "nsmgr finds it by its whole path");
            // The port has been taken back before.
            assert!(matches!(
                rest.facts.try_recv(),
                Ok(NetMsg::Fact(Event::PortReleased { key: k })) if k == key("lb-1")
            ));
            assert!(rest.released.try_recv().is_err(), "not before the Close");
            reply.send(Ok(())).unwrap();
        }
        _ => panic!("another call than Close"),
    }
    assert_eq!(
        rest.released.recv_timeout(PATIENCE).unwrap(),
        LeaseId::new(id("lb-1"))
    );
    assert!(stopped.join().unwrap().is_empty());
}

#[test]
fn a_silent_nsmgr_does_not_hold_up_the_stop() {
    let world = world();
    let (_, first) = world.connects("lb-1");
    let (_, second) = world.connects("lb-2");
    let (stopped, rest) = world.stopping(Duration::from_secs(1));
    assert!(
        stopped.join().unwrap().is_empty(),
        "both ended by themselves"
    );
    for _ in 0..2 {
        rest.released.recv_timeout(PATIENCE).unwrap();
    }
    drop((first, second));
}

#[test]
fn a_close_that_began_before_the_stop_does_not_hold_it_up() {
    let world = world();
    let (_, _watch) = world.connects("lb-1");
    world.registry.message(endpoint("lb-1", true));
    let (_, _never_answered) = world.close();
    let (stopped, rest) = world.stopping(Duration::from_secs(1));
    assert!(
        stopped.join().unwrap().is_empty(),
        "it ended by itself, not after the 15 s of a Close"
    );
    // The wait before is for the thread; this was sent before its end.
    assert_eq!(rest.released.try_recv(), Ok(LeaseId::new(id("lb-1"))));
    assert!(rest.calls.try_recv().is_err(), "nor was it made again");
}

#[test]
fn a_request_under_way_at_the_stop_is_looked_for_and_closed() {
    let world = world();
    world.registers("lb-1");
    world.monitor("lb-1", &[]);
    let (request, _reply) = world.request();
    let (stopped, rest) = world.stopping(PATIENCE);
    let connection = answer(&request);
    match rest.calls.recv_timeout(PATIENCE).unwrap() {
        Call::Monitor(_, reply) => {
            let (feed, stream) = feed();
            let known = shown(&connection, State::UP);
            feed.message(event(ConnectionEventType::INITIAL_STATE_TRANSFER, &[known]));
            reply.send(Ok(stream)).unwrap();
        }
        _ => panic!("nsmgr is not asked what became of the Request"),
    }
    match rest.calls.recv_timeout(PATIENCE).unwrap() {
        Call::Close(closed, reply) => {
            assert_eq!(
                (&closed.id, &closed.path),
                (&connection.id, &connection.path)
            );
            reply.send(Ok(())).unwrap();
        }
        _ => panic!("another call than Close"),
    }
    assert!(stopped.join().unwrap().is_empty());
    assert!(
        rest.facts.try_recv().is_err(),
        "net was never told of a port"
    );
    rest.released.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_stuck_lb_delays_neither_others_nor_the_registry() {
    let world = world();
    world.registers("stuck");
    world.monitor("stuck", &[]);
    let (_, _never_answered) = world.request();
    let (connection, watch) = world.connects("lb-2");
    // Its deletion ends the Request, asks what became of it, and is over.
    world.registry.message(endpoint("stuck", true));
    world.monitor("stuck", &[]);
    assert_eq!(
        world.released.recv_timeout(PATIENCE).unwrap(),
        LeaseId::new(id("stuck"))
    );
    watch.message(update(&connection, State::DOWN));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-2") });
    let (stopped, rest) = world.stopping(Duration::from_millis(500));
    assert!(stopped.join().unwrap().is_empty());
    drop(rest);
}

#[test]
fn down_heals_by_reselect_with_the_whole_path() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    watch.message(update(&connection, State::DOWN));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    let (closed, reply) = world.close();
    watch.expect_dropped();
    assert_eq!(closed.path, connection.path);
    reply.send(Ok(())).unwrap();
    let (request, reply) = world.request();
    let asked = &request.connection;
    assert_eq!(asked.state, State::RESELECT_REQUESTED.into());
    assert_eq!(asked.path, connection.path);
    assert!(asked.mechanism.is_none());
    assert_eq!(asked.network_service_endpoint_name, "lb-1");
    let rebuilt = answer(&request);
    let name = |c: &Connection| c.mechanism.parameters["name"].clone();
    assert_ne!(
        name(&rebuilt),
        name(&connection),
        "the old one may still be there"
    );
    reply.send(Ok(rebuilt.clone())).unwrap();
    world.expect_port("lb-1", &rebuilt);
    // DOWN may already be in the first event.
    world.monitor("lb-1", &[shown(&rebuilt, State::DOWN)]);
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    let (_, reply) = world.close();
    reply
        .send(Err(RpcError::status(Code::UNKNOWN, "is dead")))
        .unwrap();
    let (again, _) = world.request();
    assert_eq!(again.connection.state, State::RESELECT_REQUESTED.into());
}

#[test]
fn the_end_of_a_stream_changes_nothing_and_foreign_events_neither() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    let mut foreign = shown(&connection, State::DOWN);
    foreign.path.mut_or_insert_default().path_segments[0].id = id("lb-2");
    watch.message(event(ConnectionEventType::DELETE, &[foreign]));
    watch.end(Err(StreamError::Rpc(RpcError::status(
        Code::UNAVAILABLE,
        "nsmgr is gone",
    ))));
    let watch = world.monitor("lb-1", &[shown(&connection, State::UP)]);
    watch.end(Ok(()));
    // A nsmgr that has forgotten the connection is told it as it is.
    let _watch = world.monitor("lb-1", &[]);
    let (request, reply) = world.request();
    assert_eq!(request.connection.state, State::UP.into());
    assert_eq!(request.connection.path, connection.path);
    assert_eq!(request.connection.mechanism, connection.mechanism);
    assert!(world.facts.try_recv().is_err(), "traffic went on");
    let refreshed = answer(&request);
    reply.send(Ok(refreshed.clone())).unwrap();
    world.expect_port("lb-1", &refreshed);
    assert_eq!(world.acquired.len(), 2, "every refresh renews");
}

#[test]
fn ipam_that_is_away_does_not_end_what_stands() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    *world.ipam.answer.lock() = Err(IpamError::Busy);
    watch.message(update(&connection, State::REFRESH_REQUESTED));
    let (request, _reply) = world.request();
    assert_eq!(
        request.connection.context.ip_context,
        connection.context.ip_context
    );
}

#[test]
fn a_first_request_needs_addresses() {
    let world = world();
    *world.ipam.answer.lock() = Err(IpamError::Busy);
    world.registers("lb-1");
    world.monitor("lb-1", &[]).expect_dropped();
    let (stopped, rest) = world.stopping(PATIENCE);
    assert!(stopped.join().unwrap().is_empty());
    assert!(
        rest.calls.try_recv().is_err(),
        "no Request without addresses"
    );
    rest.released.recv_timeout(PATIENCE).unwrap();
}

/// What nsmgr still has of a predecessor's connection to lb-1 in this network
/// namespace.
fn predecessors() -> Connection {
    let template = Template {
        id: id("lb-1"),
        endpoint: "lb-1".to_owned(),
        netns: Netns::own().unwrap().url().to_owned(),
        ..template()
    };
    let request = template.request(
        crate::core::lb_session::Plan::First,
        &addresses(),
        &IfName::parse("load-balan-old0").unwrap(),
    );
    answer(&request)
}

#[test]
fn a_predecessors_port_that_is_in_place_is_taken_over() {
    let world = world_in_place(|name, of| name.as_str() == "load-balan-old0" && of == id("lb-1"));
    let old = predecessors();
    world.registers("lb-1");
    world.monitor("lb-1", &[shown(&old, State::UP)]);
    let (request, reply) = world.request();
    assert_eq!(request.connection.state, State::UP.into());
    assert_eq!(request.connection.mechanism, old.mechanism);
    assert_eq!(request.connection.path, old.path);
    assert_eq!(request.connection.id, id("lb-1"));
    let kept = answer(&request);
    reply.send(Ok(kept.clone())).unwrap();
    world.expect_port("lb-1", &kept);
}

#[test]
fn a_predecessors_port_is_rebuilt_if_anything_differs() {
    type Prepare = fn(&World, &mut Connection);
    let cases: [(bool, Prepare, &str); 4] = [
        (false, |_, _| {}, "not in the bridge"),
        (true, |_, old| old.state = State::DOWN.into(), "down"),
        (
            true,
            |_, old| {
                let mechanism = old.mechanism.mut_or_insert_default();
                mechanism
                    .parameters
                    .insert("inodeURL".to_owned(), "inode://4/1".to_owned());
            },
            "in another network namespace",
        ),
        (
            true,
            |world, _| {
                let mut moved = addresses();
                if let Some(lease) = &mut moved.leases.v4 {
                    lease.dst = "172.16.0.77/24".parse().unwrap();
                }
                *world.ipam.answer.lock() = Ok(moved);
            },
            "other addresses",
        ),
    ];
    for (in_place, prepare, why) in cases {
        let world = if in_place {
            world_in_place(|_, _| true)
        } else {
            world()
        };
        let mut old = shown(&predecessors(), State::UP);
        prepare(&world, &mut old);
        world.registers("lb-1");
        world.monitor("lb-1", &[old.clone()]);
        if why != "other addresses" {
            let (_, reply) = world.close();
            reply.send(Ok(())).unwrap();
        }
        let (request, _reply) = world.request();
        let asked = &request.connection;
        assert_eq!(asked.state, State::RESELECT_REQUESTED.into(), "{why}");
        assert!(asked.mechanism.is_none(), "{why}");
        assert_eq!(asked.path.path_segments, old.path.path_segments, "{why}");
    }
}

#[test]
fn an_unusable_answer_is_closed_and_told_to_nobody() {
    let world = world();
    world.registers("lb-1");
    world.monitor("lb-1", &[]);
    let (request, reply) = world.request();
    let mut bad = answer(&request);
    let context = bad.context.mut_or_insert_default();
    context.ip_context.mut_or_insert_default().dst_ip_addrs[0] = "8.8.8.8/32".to_owned();
    reply.send(Ok(bad.clone())).unwrap();
    let (closed, reply) = world.close();
    assert_eq!(closed.path, bad.path);
    reply.send(Ok(())).unwrap();
    assert!(world.facts.try_recv().is_err());
}

#[test]
fn a_close_that_the_stop_interrupts_is_made_again() {
    let world = world();
    world.registers("lb-1");
    world.monitor("lb-1", &[]);
    let (request, reply) = world.request();
    let mut bad = answer(&request);
    bad.network_service_endpoint_name = "lb-2".to_owned();
    reply.send(Ok(bad.clone())).unwrap();
    let (_, _never_answered) = world.close();
    let (stopped, rest) = world.stopping(PATIENCE);
    match rest.calls.recv_timeout(PATIENCE).unwrap() {
        Call::Close(closed, reply) => {
            assert_eq!(closed.path, bad.path);
            reply.send(Ok(())).unwrap();
        }
        _ => panic!("another call than Close"),
    }
    assert!(stopped.join().unwrap().is_empty());
}

#[test]
fn an_lb_that_returns_waits_for_the_close_of_the_old_connection() {
    let world = world();
    let (_, _watch) = world.connects("lb-1");
    world.registry.message(endpoint("lb-1", true));
    assert_eq!(world.fact(), Event::PeerDown { key: key("lb-1") });
    assert_eq!(world.fact(), Event::PortReleased { key: key("lb-1") });
    let (_, reply) = world.close();
    world.registers("lb-1");
    world.registers("lb-1");
    // Another LB shows that the registry's answers have been read.
    let (_, _other) = world.connects("lb-2");
    reply.send(Ok(())).unwrap();
    world.monitor("lb-1", &[]);
    let (request, _) = world.request();
    assert_eq!(request.connection.path.path_segments.len(), 1, "a new one");
}

#[test]
fn the_registrys_stream_is_opened_again_and_lbs_stay() {
    let mut world = world();
    world.registry.end(Ok(()));
    world.registry = find(&world.calls, true);
    let (_, watch) = world.connects("lb-1");
    world.registry.end(Err(StreamError::Lagged));
    world.registry = find(&world.calls, true);
    world.registers("lb-1");
    world.registers("evil\nname");
    world
        .registry
        .message(NetworkServiceEndpointResponse::default());
    // Another LB shows that all this has been read.
    let (_, _other) = world.connects("lb-2");
    assert_eq!(
        watch.dropped.try_recv(),
        Err(crossbeam_channel::TryRecvError::Empty)
    );
    assert!(world.facts.is_empty());
}

#[test]
fn the_registry_is_asked_for_the_full_list_too() {
    let mut world = world_with(Surroundings {
        is_in_place: |_, _| false,
        // Long enough ago for the first list to be due.
        begun: clock::now().checked_sub(mesh::LIST_INTERVAL).unwrap(),
    });
    let list = find(&world.calls, false);
    list.message(endpoint("lb-1", false));
    world.monitor("lb-1", &[]);
    let (_, _reply) = world.request();
    list.end(Ok(()));
    list.expect_dropped();
    // The watch goes on.
    world.registry.end(Ok(()));
    world.registry = find(&world.calls, true);
}

#[test]
fn the_end_of_a_connection_that_a_lost_answer_left_is_not_ours() {
    let world = world();
    let (connection, watch) = world.connects("lb-1");
    let mut orphan = shown(&connection, State::UP);
    orphan.path.mut_or_insert_default().path_segments[1].id = "orphan".to_owned();
    watch.message(event(ConnectionEventType::DELETE, &[orphan]));
    watch.message(update(&connection, State::REFRESH_REQUESTED));
    let (request, _reply) = world.request();
    assert_eq!(request.connection.state, State::UP.into());
    assert!(world.facts.is_empty());
}
