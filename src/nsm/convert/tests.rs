//! The exact messages, and answers that must not be used.

use std::time::Duration;

use super::*;
use crate::core::family::PerFamily;
use crate::nsm::tests::{addresses, answer, template};
use crate::proto::connection::Path;
use crate::proto::connectioncontext::{ConnectionContext, IPContext};
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;

fn name(text: &str) -> IfName {
    IfName::parse(text).unwrap()
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn preference(ifname: &str) -> Mechanism {
    Mechanism {
        cls: "LOCAL".to_owned(),
        type_: "KERNEL".to_owned(),
        parameters: [
            ("name".to_owned(), ifname.to_owned()),
            ("inodeURL".to_owned(), "inode://4/4026532548".to_owned()),
        ]
        .into(),
        ..Mechanism::default()
    }
}

#[test]
fn the_first_request_is_exactly_this() {
    let request = template().request(Plan::First, &addresses(), &name("load-balan-aZ09"));
    let expected = NetworkServiceRequest {
        connection: MessageField::some(Connection {
            id: "proxy-a-x1-load-balancer.t1-lb-7".to_owned(),
            network_service: "load-balancer.t1".to_owned(),
            payload: "ETHERNET".to_owned(),
            network_service_endpoint_name: "lb-7".to_owned(),
            context: MessageField::some(ConnectionContext {
                ip_context: MessageField::some(IPContext {
                    src_ip_addrs: strings(&["172.16.0.5/24", "fd00::5/64"]),
                    dst_ip_addrs: strings(&["172.16.0.4/24", "fd00::4/64"]),
                    ..IPContext::default()
                }),
                MTU: 1500,
                ..ConnectionContext::default()
            }),
            path: MessageField::some(Path {
                index: 0,
                path_segments: vec![PathSegment {
                    name: "proxy-a-x1".to_owned(),
                    id: "proxy-a-x1-load-balancer.t1-lb-7".to_owned(),
                    ..PathSegment::default()
                }],
                ..Path::default()
            }),
            ..Connection::default()
        }),
        mechanism_preferences: vec![preference("load-balan-aZ09")],
        ..NetworkServiceRequest::default()
    };
    assert_eq!(request, expected);
}

#[test]
fn a_refresh_repeats_the_last_answer_with_all_that_others_put_into_it() {
    let first = template().request(Plan::First, &addresses(), &name("load-balan-aZ09"));
    let mut last = answer(&first);
    last.state = State::DOWN.into();
    last.labels
        .insert("nodeName".to_owned(), "node-1".to_owned());
    let context = last.context.mut_or_insert_default();
    context.MTU = 9000;
    context.extra_context.insert("a".to_owned(), "b".to_owned());
    let ip = context.ip_context.mut_or_insert_default();
    ip.excluded_prefixes = strings(&["10.0.0.0/8"]);
    ip.src_ip_addrs.clear();
    last.special_fields.mut_unknown_fields().add_varint(99, 5);

    let request = template().request(
        Plan::Refresh(last.clone()),
        &addresses(),
        &name("load-balan-new0"),
    );
    last.state = State::UP.into();
    let context = last.context.mut_or_insert_default();
    context.MTU = 1500;
    context.ip_context.mut_or_insert_default().src_ip_addrs =
        strings(&["172.16.0.5/24", "fd00::5/64"]);
    assert_eq!(request.connection, MessageField::some(last));
    assert_eq!(
        request.mechanism_preferences,
        vec![preference("load-balan-aZ09")],
        "a connection that keeps its interface is offered no other"
    );
}

#[test]
fn a_reselect_keeps_the_path_and_drops_the_mechanism() {
    let first = template().request(Plan::First, &addresses(), &name("load-balan-aZ09"));
    // As a monitor shows it.
    let mut shown = answer(&first);
    shown.id = "nsmgr-segment".to_owned();
    shown.path.mut_or_insert_default().index = 1;
    shown.network_service_endpoint_name.clear();
    let request = template().request(
        Plan::Reselect(shown),
        &addresses(),
        &name("load-balan-new0"),
    );
    let mut expected = answer(&first);
    expected.state = State::RESELECT_REQUESTED.into();
    expected.mechanism = MessageField::none();
    assert_eq!(request.connection, MessageField::some(expected));
    assert_eq!(
        request.mechanism_preferences,
        vec![preference("load-balan-new0")]
    );
}

#[test]
fn one_family_alone() {
    let mut only = addresses();
    only.leases.v4 = None;
    let request = template().request(Plan::First, &only, &name("a"));
    let ip = &request.connection.context.ip_context;
    assert_eq!(ip.src_ip_addrs, ["fd00::5/64"]);
    assert_eq!(ip.dst_ip_addrs, ["fd00::4/64"]);
}

type Change = fn(&mut Connection);

fn ip(connection: &mut Connection) -> &mut IPContext {
    connection
        .context
        .mut_or_insert_default()
        .ip_context
        .mut_or_insert_default()
}

fn check(change: Change) -> Result<Established<Connection>, Unusable> {
    let first = template().request(Plan::First, &addresses(), &name("load-balan-aZ09"));
    let mut connection = answer(&first);
    change(&mut connection);
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    template().check(connection, &addresses(), now)
}

#[test]
fn a_good_answer_gives_interface_peers_and_lives() {
    let good = check(|connection| {
        let path = connection.path.mut_or_insert_default();
        path.path_segments[1].expires = MessageField::some(Timestamp {
            seconds: 1600,
            ..Timestamp::default()
        });
    })
    .unwrap();
    assert_eq!(good.ifname, name("load-balan-aZ09"));
    let peers: Vec<String> = good.peers.iter().map(ToString::to_string).collect();
    assert_eq!(peers, ["172.16.0.4", "fd00::4"]);
    assert_eq!(good.lives[1], Some(Duration::from_secs(600)));
    // Further addresses of the peer in the subnet are hops too.
    let more = check(|c| ip(c).dst_ip_addrs.push("172.16.0.9/24".to_owned())).unwrap();
    assert_eq!(more.peers.len(), 3);
}

const HOSTILE: &[(Change, &str)] = &[
    (|c| c.id = "other".to_owned(), "id is \"other\""),
    (|c| c.path = MessageField::none(), "begins with []"),
    (
        |c| c.path.mut_or_insert_default().index = 1,
        "the path has index 1",
    ),
    (
        |c| c.path.mut_or_insert_default().path_segments.truncate(1),
        "begins with",
    ),
    (
        |c| c.path.mut_or_insert_default().path_segments[0].id.clear(),
        "begins with",
    ),
    (
        |c| c.path.mut_or_insert_default().path_segments[0].name = "eve".to_owned(),
        "\"eve\"",
    ),
    (
        |c| c.network_service_endpoint_name = "lb-8".to_owned(),
        "endpoint \"lb-8\"",
    ),
    (|c| c.network_service_endpoint_name.clear(), "endpoint \"\""),
    (|c| c.mechanism = MessageField::none(), "mechanism is \"\""),
    (
        |c| c.mechanism.mut_or_insert_default().type_ = "VXLAN".to_owned(),
        "\"VXLAN\"",
    ),
    (
        |c| c.mechanism.mut_or_insert_default().parameters.clear(),
        "no interface name",
    ),
    (
        |c| {
            let parameters = &mut c.mechanism.mut_or_insert_default().parameters;
            parameters.insert("name".to_owned(), "../../etc/passwd".to_owned());
        },
        "no interface name",
    ),
    (
        |c| {
            let parameters = &mut c.mechanism.mut_or_insert_default().parameters;
            parameters.insert("name".to_owned(), "x".repeat(10_000));
        },
        "the mechanism \"xxx",
    ),
    (|c| ip(c).dst_ip_addrs.clear(), "no IPv4 address"),
    (
        |c| ip(c).dst_ip_addrs = vec!["172.16.0.4/24".to_owned(); 17],
        "the peer has 17 addresses",
    ),
    (|c| ip(c).dst_ip_addrs.truncate(1), "no IPv6 address"),
    (
        |c| ip(c).dst_ip_addrs[0] = "172.16.0.4/33".to_owned(),
        "\"172.16.0.4/33\" is no address",
    ),
    (
        |c| ip(c).dst_ip_addrs[0] = "nonsense\n".to_owned(),
        "\"nonsense\\n\" is no address",
    ),
    (
        |c| ip(c).src_ip_addrs[0] = String::new(),
        "\"\" is no address",
    ),
    (
        |c| ip(c).dst_ip_addrs[0] = "8.8.8.8/32".to_owned(),
        "8.8.8.8/32 is no neighbour",
    ),
    (
        |c| ip(c).dst_ip_addrs[0] = "172.16.0.5/24".to_owned(),
        "172.16.0.5/24 is no neighbour",
    ),
    (
        |c| ip(c).dst_ip_addrs.push("0.0.0.0/0".to_owned()),
        "0.0.0.0/0 is no neighbour",
    ),
];

#[test]
fn hostile_answers_are_refused_with_the_reason() {
    for (change, expected) in HOSTILE {
        let error = check(*change).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn a_family_that_is_not_used_is_refused() {
    let mut v4 = addresses();
    v4.leases.v6 = None;
    let first = template().request(Plan::First, &v4, &name("a"));
    let mut connection = answer(&first);
    ip(&mut connection)
        .dst_ip_addrs
        .push("fd00::4/64".to_owned());
    let error = template()
        .check(connection, &v4, SystemTime::UNIX_EPOCH)
        .unwrap_err();
    assert_eq!(error, Unusable::ForeignAddress("fd00::4/64".to_owned()));
}

/// The connection as nsmgr's monitor shows it.
fn shown(state: State) -> Connection {
    let first = template().request(Plan::First, &addresses(), &name("load-balan-aZ09"));
    let mut connection = answer(&first);
    connection.id = "nsmgr-segment".to_owned();
    connection.path.mut_or_insert_default().index = 1;
    connection.state = state.into();
    connection
}

fn foreign() -> Connection {
    let mut connection = shown(State::DOWN);
    connection.path.mut_or_insert_default().path_segments[0].id = "foreign".to_owned();
    connection
}

/// Our id, but another connection at nsmgr.
fn orphan() -> Connection {
    let mut connection = shown(State::DOWN);
    connection.path.mut_or_insert_default().path_segments[1].id = "orphan".to_owned();
    connection
}

fn event(kind: ConnectionEventType, connections: Vec<Connection>) -> ConnectionEvent {
    let numbered = connections.into_iter().enumerate();
    ConnectionEvent {
        type_: kind.into(),
        connections: numbered.map(|(n, c)| (n.to_string(), c)).collect(),
        ..ConnectionEvent::default()
    }
}

#[test]
fn monitor_events_are_read_by_the_first_segment() {
    use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER as INITIAL, UPDATE};
    let mut unknown_state = shown(State::UP);
    unknown_state.state = protobuf::EnumOrUnknown::from_i32(77);
    let mut deeper = shown(State::DOWN);
    deeper.path.mut_or_insert_default().index = 2;
    for (kind, connections, expected) in [
        (INITIAL, vec![], Some(Monitored::Absent)),
        (INITIAL, vec![foreign()], Some(Monitored::Absent)),
        (
            INITIAL,
            vec![foreign(), shown(State::UP)],
            Some(Monitored::Up),
        ),
        (INITIAL, vec![shown(State::DOWN)], Some(Monitored::Down)),
        (UPDATE, vec![foreign()], None),
        (UPDATE, vec![], None),
        (UPDATE, vec![deeper], None),
        (UPDATE, vec![shown(State::DOWN)], Some(Monitored::Down)),
        (
            UPDATE,
            vec![shown(State::REFRESH_REQUESTED)],
            Some(Monitored::RefreshRequested),
        ),
        (UPDATE, vec![unknown_state], Some(Monitored::Up)),
        (DELETE, vec![shown(State::UP)], Some(Monitored::Deleted)),
        (DELETE, vec![foreign()], None),
        (DELETE, vec![orphan()], None),
        (INITIAL, vec![orphan()], Some(Monitored::Absent)),
    ] {
        let event = event(kind, connections);
        assert_eq!(
            template().monitored(&event, "nsmgr-segment"),
            expected,
            "{event:?}"
        );
    }
    let mut unknown_type = event(UPDATE, vec![shown(State::DOWN)]);
    unknown_type.type_ = protobuf::EnumOrUnknown::from_i32(9);
    assert_eq!(template().monitored(&unknown_type, "nsmgr-segment"), None);
}

#[test]
fn a_predecessors_connection_is_found_and_judged() {
    let initial = |connections| event(ConnectionEventType::INITIAL_STATE_TRANSFER, connections);
    let find = |connection: Connection| template().find_own(initial(vec![foreign(), connection]));
    let found = find(shown(State::UP)).unwrap();
    let several = initial(vec![orphan(), shown(State::UP), orphan()]);
    assert_eq!(template().find_own(several), Some(shown(State::UP)));
    assert_eq!(
        template().interface_of_up(&found),
        Some(name("load-balan-aZ09"))
    );
    assert!(has_addresses(&found, &addresses()));

    let mut no_nsmgr = shown(State::UP);
    no_nsmgr
        .path
        .mut_or_insert_default()
        .path_segments
        .truncate(1);
    assert!(
        find(no_nsmgr).is_none(),
        "nsmgr could not find it by this path"
    );

    assert!(template().interface_of_up(&shown(State::DOWN)).is_none());
    let mut elsewhere = shown(State::UP);
    let mechanism = elsewhere.mechanism.mut_or_insert_default();
    mechanism
        .parameters
        .insert("inodeURL".to_owned(), "inode://4/1".to_owned());
    assert!(template().interface_of_up(&elsewhere).is_none());
    let mut none = shown(State::UP);
    none.mechanism = MessageField::none();
    assert!(template().interface_of_up(&none).is_none());

    let mut moved = addresses();
    moved.leases = PerFamily::from_fn(|family| {
        let lease = (*moved.leases.get(family))?;
        Some(Lease {
            src: lease.dst,
            dst: lease.src,
        })
    });
    assert!(!has_addresses(&found, &moved));
}

#[test]
fn registry_answers() {
    let now = Now::read();
    let endpoint = |seconds: Option<i64>| NetworkServiceEndpointResponse {
        network_service_endpoint: MessageField::some(NetworkServiceEndpoint {
            name: "lb-7".to_owned(),
            network_service_names: strings(&["load-balancer.t1"]),
            expiration_time: seconds
                .map(|seconds| Timestamp {
                    seconds,
                    ..Timestamp::default()
                })
                .into(),
            ..NetworkServiceEndpoint::default()
        }),
        ..NetworkServiceEndpointResponse::default()
    };
    let read = |response| sighting(response, "load-balancer.t1", &now);
    let wall = now.wall.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let unix = i64::try_from(wall.as_secs()).unwrap();

    let later = read(endpoint(Some(unix + 60))).unwrap().expires.unwrap().at;
    let left = later.duration_since(now.mono);
    assert!(left > Duration::from_secs(58) && left <= Duration::from_secs(60));
    let past = read(endpoint(Some(unix - 60))).unwrap().expires.unwrap().at;
    assert!(now.mono.duration_since(past) >= Duration::from_secs(60));
    assert!(read(endpoint(Some(i64::MAX))).unwrap().expires.is_some());
    for gone in [None, Some(-1), Some(i64::MIN)] {
        assert_eq!(read(endpoint(gone)).unwrap().expires, None, "{gone:?}");
    }
    let mut deleted = endpoint(Some(unix));
    deleted.deleted = true;
    assert!(read(deleted).unwrap().deleted);

    // Who listens elsewhere, or was registered anew, is another process.
    let incarnation = |change: fn(&mut NetworkServiceEndpoint)| {
        let mut response = endpoint(Some(unix));
        change(response.network_service_endpoint.mut_or_insert_default());
        read(response).unwrap().incarnation
    };
    let before = incarnation(|_| {});
    assert_eq!(incarnation(|_| {}), before);
    assert_eq!(
        incarnation(|e| e.expiration_time.mut_or_insert_default().nanos = 5),
        before
    );
    assert_ne!(incarnation(|e| e.url = "unix:///x".to_owned()), before);
    assert_ne!(
        incarnation(|e| e.initial_registration_time.mut_or_insert_default().nanos = 5),
        before
    );

    assert!(read(NetworkServiceEndpointResponse::default()).is_none());
    assert!(sighting(endpoint(Some(unix)), "another", &now).is_none());

    // The endpoint must be there: registries fail without it.
    let query = query("load-balancer.t1", true);
    assert!(query.watch && query.network_service_endpoint.is_some());
    assert_eq!(
        query.network_service_endpoint.network_service_names,
        ["load-balancer.t1"]
    );
    assert!(query.network_service_endpoint.name.is_empty());
}
