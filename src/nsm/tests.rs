//! The threads of the mesh against a test that plays nsmgr, registry and IPAM:
//! each call of theirs waits until the test answers it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, at, bounded, select};
use ipnetwork::IpNetwork;
use parking_lot::Mutex;
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;

use super::client::{Leases, Nsmgr, Stream};
use super::convert::Template;
use super::netns::Netns;
use super::{LbMesh, LbOptions, Surroundings};
use crate::core::event::Event;
use crate::core::family::{IpFamilies, PerFamily};
use crate::core::ids::{EndpointName, IfName, LeaseId, PortKey};
use crate::core::lease::{Addresses, Lease};
use crate::core::mesh;
use crate::ipam::IpamError;
use crate::kernel::{NetHandle, NetMsg};
use crate::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment, State,
};
use crate::proto::networkservice::NetworkServiceRequest;
use crate::proto::registry::{
    NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceEndpointResponse,
};
use crate::rpc::pump::{Item, StreamError};
use crate::rpc::status::{Code, RpcError};
use crate::sync::clock;
use crate::sync::stop::Stop;
use crate::sync::thread::Threads;

/// No event takes longer; everything here takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
const CLIENT: &str = "proxy-a-x1";
const SERVICE: &str = "load-balancer.t1";

pub(super) fn addresses() -> Addresses {
    let network = |text: &str| text.parse::<IpNetwork>().unwrap();
    Addresses {
        leases: PerFamily {
            v4: Some(Lease {
                src: network("172.16.0.4/24"),
                dst: network("172.16.0.5/24"),
            }),
            v6: Some(Lease {
                src: network("fd00::4/64"),
                dst: network("fd00::5/64"),
            }),
        },
        bridge: PerFamily {
            v4: Some(network("172.16.0.1/24")),
            v6: Some(network("fd00::1/64")),
        },
    }
}

pub(super) fn template() -> Template {
    Template {
        id: "proxy-a-x1-load-balancer.t1-lb-7".to_owned(),
        client: CLIENT.to_owned(),
        service: SERVICE.to_owned(),
        endpoint: "lb-7".to_owned(),
        mtu: 1500,
        netns: "inode://4/4026532548".to_owned(),
    }
}

/// What nsmgr would answer: the path grown to the endpoint, the mechanism from
/// the preferences where there is none.
pub(super) fn answer(request: &NetworkServiceRequest) -> Connection {
    let mut connection = request.connection.clone().unwrap();
    if connection.mechanism.is_none() {
        connection.mechanism = MessageField::some(request.mechanism_preferences[0].clone());
    }
    connection.state = State::UP.into();
    let segments = &mut connection.path.mut_or_insert_default().path_segments;
    for name in ["nsmgr", "forwarder", "lb"].iter().skip(segments.len() - 1) {
        segments.push(PathSegment {
            name: (*name).to_owned(),
            id: format!("{name}-segment"),
            ..PathSegment::default()
        });
    }
    let wall = clock::wall()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    for segment in segments {
        segment.expires = MessageField::some(Timestamp {
            seconds: i64::try_from(wall.as_secs()).unwrap() + 600,
            ..Timestamp::default()
        });
    }
    connection
}

type Answer<T> = Sender<Result<T, RpcError>>;

/// A call that waits for its answer.
enum Call {
    Request(NetworkServiceRequest, Answer<Connection>),
    Close(Connection, Answer<()>),
    Monitor(MonitorScopeSelector, Answer<Stream<ConnectionEvent>>),
    Find(
        NetworkServiceEndpointQuery,
        Answer<Stream<NetworkServiceEndpointResponse>>,
    ),
}

#[derive(Clone)]
struct FakeNsmgr(Sender<Call>);

impl FakeNsmgr {
    fn call<T>(
        &self,
        deadline: Instant,
        stop: &Stop,
        call: impl FnOnce(Answer<T>) -> Call,
    ) -> Result<T, RpcError> {
        let (tx, rx) = bounded(1);
        self.0.send(call(tx)).map_err(|_| RpcError::Cancelled)?;
        let late = RpcError::status(Code::DEADLINE_EXCEEDED, "the test did not answer");
        select! {
            recv(rx) -> answer => answer.unwrap_or(Err(late)),
            recv(stop.receiver()) -> _ => Err(RpcError::Cancelled),
            recv(at(deadline)) -> _ => Err(late),
        }
    }
}

impl Nsmgr for FakeNsmgr {
    fn request(
        &self,
        request: &NetworkServiceRequest,
        netns: &Netns,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Connection, RpcError> {
        let wanted = &request.mechanism_preferences[0].parameters["inodeURL"];
        assert_eq!(wanted, netns.url());
        self.call(deadline, stop, |tx| Call::Request(request.clone(), tx))
    }

    fn close(
        &self,
        connection: &Connection,
        _netns: &Netns,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<(), RpcError> {
        self.call(deadline, stop, |tx| Call::Close(connection.clone(), tx))
    }

    fn monitor(
        &self,
        selector: &MonitorScopeSelector,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Stream<ConnectionEvent>, RpcError> {
        self.call(deadline, stop, |tx| Call::Monitor(selector.clone(), tx))
    }

    fn find(
        &self,
        query: &NetworkServiceEndpointQuery,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Stream<NetworkServiceEndpointResponse>, RpcError> {
        self.call(deadline, stop, |tx| Call::Find(query.clone(), tx))
    }
}

#[derive(Clone)]
struct FakeIpam {
    released: Sender<LeaseId>,
    acquired: Sender<LeaseId>,
    /// What acquiring answers from now on.
    answer: Arc<Mutex<Result<Addresses, IpamError>>>,
}

impl Leases for FakeIpam {
    fn acquire(&self, id: LeaseId, _: Instant, _: &Stop) -> Result<Addresses, IpamError> {
        self.acquired.send(id).unwrap();
        self.answer.lock().clone()
    }

    fn release_later(&self, id: LeaseId) {
        self.released.send(id).unwrap();
    }
}

/// The other end of a stream that the test opened.
struct Feed<T> {
    items: Sender<Item<T>>,
    /// Disconnected when the reader has dropped the stream.
    dropped: Receiver<()>,
}

fn feed<T: Send + 'static>() -> (Feed<T>, Stream<T>) {
    let (tx, rx) = bounded(64);
    let (open, dropped) = bounded::<()>(0);
    let feed = Feed { items: tx, dropped };
    (feed, Stream::new(rx, Box::new(open)))
}

impl<T> Feed<T> {
    fn message(&self, message: T) {
        self.items.send(Item::Message(message)).unwrap();
    }

    fn end(&self, how: Result<(), StreamError>) {
        self.items.send(Item::Ended(how)).unwrap();
    }

    fn expect_dropped(&self) {
        let end = self.dropped.recv_timeout(PATIENCE);
        assert_eq!(end, Err(crossbeam_channel::RecvTimeoutError::Disconnected));
    }
}

/// The mesh, and all that it talks to.
struct World {
    // Dropped first: what waits for an answer then fails at once.
    calls: Receiver<Call>,
    mesh: LbMesh,
    facts: Receiver<NetMsg>,
    released: Receiver<LeaseId>,
    acquired: Receiver<LeaseId>,
    ipam: FakeIpam,
    registry: Feed<NetworkServiceEndpointResponse>,
}

fn world() -> World {
    world_with(Surroundings {
        is_in_place: |_, _| false,
        begun: clock::now(),
    })
}

fn world_in_place(is_in_place: fn(&IfName, &str) -> bool) -> World {
    world_with(Surroundings {
        is_in_place,
        begun: clock::now(),
    })
}

fn world_with(surroundings: Surroundings) -> World {
    let (call_tx, calls) = bounded(64);
    let (fact_tx, facts) = bounded(64);
    let (release_tx, released) = bounded(64);
    let (acquire_tx, acquired) = bounded(64);
    let ipam = FakeIpam {
        released: release_tx,
        acquired: acquire_tx,
        answer: Arc::new(Mutex::new(Ok(addresses()))),
    };
    let options = LbOptions {
        name: CLIENT.to_owned(),
        network_service: SERVICE.to_owned(),
        request_timeout: Duration::from_secs(15),
        mtu: 1500,
        families: IpFamilies::Dual,
    };
    let mesh = LbMesh::start_with(
        &Threads::unsupervised(),
        FakeNsmgr(call_tx),
        ipam.clone(),
        NetHandle::new(fact_tx),
        options,
        surroundings,
    )
    .unwrap();
    let registry = find(&calls, true);
    World {
        mesh,
        calls,
        facts,
        released,
        acquired,
        ipam,
        registry,
    }
}

/// Answers the next call, which must be a Find.
fn find(calls: &Receiver<Call>, watch: bool) -> Feed<NetworkServiceEndpointResponse> {
    match calls.recv_timeout(PATIENCE).unwrap() {
        Call::Find(query, reply) => {
            assert_eq!(query, super::convert::query(SERVICE, watch));
            let (feed, stream) = feed();
            reply.send(Ok(stream)).unwrap();
            feed
        }
        _ => panic!("another call than Find"),
    }
}

impl World {
    fn registers(&self, name: &str) {
        self.registry.message(endpoint(name, false));
    }

    fn request(&self) -> (NetworkServiceRequest, Answer<Connection>) {
        match self.calls.recv_timeout(PATIENCE).unwrap() {
            Call::Request(request, reply) => (request, reply),
            Call::Close(..) => panic!("Close instead of Request"),
            Call::Monitor(..) => panic!("monitor instead of Request"),
            Call::Find(..) => panic!("Find instead of Request"),
        }
    }

    fn close(&self) -> (Connection, Answer<()>) {
        match self.calls.recv_timeout(PATIENCE).unwrap() {
            Call::Close(connection, reply) => (connection, reply),
            _ => panic!("another call than Close"),
        }
    }

    /// Lets the next call, a monitor of this LB, have a stream that begins
    /// with these connections.
    fn monitor(&self, lb: &str, connections: &[Connection]) -> Feed<ConnectionEvent> {
        match self.calls.recv_timeout(PATIENCE).unwrap() {
            Call::Monitor(selector, reply) => {
                let wanted = &selector.path_segments[0];
                assert_eq!(wanted.id, id(lb));
                assert_eq!(wanted.name, CLIENT);
                let (feed, stream) = feed();
                feed.message(event(
                    ConnectionEventType::INITIAL_STATE_TRANSFER,
                    connections,
                ));
                reply.send(Ok(stream)).unwrap();
                feed
            }
            _ => panic!("another call than monitor"),
        }
    }

    /// Plays all that leads to a connection; the answer and its monitor.
    fn connects(&self, lb: &str) -> (Connection, Feed<ConnectionEvent>) {
        self.registers(lb);
        self.monitor(lb, &[]).expect_dropped();
        let (request, reply) = self.request();
        let connection = answer(&request);
        reply.send(Ok(connection.clone())).unwrap();
        self.expect_port(lb, &connection);
        let watch = self.monitor(lb, &[shown(&connection, State::UP)]);
        (connection, watch)
    }

    fn fact(&self) -> Event {
        match self.facts.recv_timeout(PATIENCE).unwrap() {
            NetMsg::Fact(event) => event,
            NetMsg::Quiesce(_) => panic!("the mesh does not quiesce"),
        }
    }

    fn expect_port(&self, lb: &str, connection: &Connection) {
        let peers: [IpAddr; 2] = ["172.16.0.4".parse().unwrap(), "fd00::4".parse().unwrap()];
        let expected = Event::PortExpected {
            key: key(lb),
            ifname: IfName::parse(&connection.mechanism.parameters["name"]).unwrap(),
            peers: peers.into(),
        };
        assert_eq!(self.fact(), expected);
    }

    /// Stops the mesh while the test goes on to answer.
    fn stopping(self, within: Duration) -> (std::thread::JoinHandle<Vec<String>>, Rest) {
        let Self {
            mesh,
            calls,
            facts,
            released,
            acquired,
            ipam,
            registry,
        } = self;
        #[expect(clippy::disallowed_methods, reason = "joined by the test")]
        let stopped = std::thread::spawn(move || mesh.stop(clock::now() + within));
        let rest = Rest {
            calls,
            facts,
            released,
            _acquired: acquired,
            _ipam: ipam,
            _registry: registry,
        };
        (stopped, rest)
    }
}

/// What is left of the world when the mesh stops.
struct Rest {
    calls: Receiver<Call>,
    facts: Receiver<NetMsg>,
    released: Receiver<LeaseId>,
    _acquired: Receiver<LeaseId>,
    _ipam: FakeIpam,
    _registry: Feed<NetworkServiceEndpointResponse>,
}

fn id(lb: &str) -> String {
    format!("{CLIENT}-{SERVICE}-{lb}")
}

fn key(lb: &str) -> PortKey {
    PortKey::Lb(EndpointName::new(lb))
}

fn endpoint(name: &str, deleted: bool) -> NetworkServiceEndpointResponse {
    NetworkServiceEndpointResponse {
        network_service_endpoint: MessageField::some(NetworkServiceEndpoint {
            name: name.to_owned(),
            network_service_names: vec![SERVICE.to_owned()],
            expiration_time: MessageField::some(Timestamp {
                seconds: 32_503_680_000,
                ..Timestamp::default()
            }),
            ..NetworkServiceEndpoint::default()
        }),
        deleted,
        ..NetworkServiceEndpointResponse::default()
    }
}

/// The connection as nsmgr's monitor shows it.
fn shown(connection: &Connection, state: State) -> Connection {
    let mut shown = connection.clone();
    shown.id = "nsmgr-segment".to_owned();
    shown.path.mut_or_insert_default().index = 1;
    shown.state = state.into();
    shown
}

fn event(kind: ConnectionEventType, connections: &[Connection]) -> ConnectionEvent {
    ConnectionEvent {
        type_: kind.into(),
        connections: connections
            .iter()
            .map(|connection| (connection.id.clone(), connection.clone()))
            .collect(),
        ..ConnectionEvent::default()
    }
}

fn update(connection: &Connection, state: State) -> ConnectionEvent {
    event(ConnectionEventType::UPDATE, &[shown(connection, state)])
}

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
    let begun = clock::now();
    let (stopped, rest) = world.stopping(Duration::from_millis(800));
    assert!(
        stopped.join().unwrap().is_empty(),
        "both ended by themselves"
    );
    assert!(begun.elapsed() < Duration::from_millis(900));
    for _ in 0..2 {
        rest.released.recv_timeout(PATIENCE).unwrap();
    }
    drop((first, second));
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
    let (request, reply) = world.request();
    watch.expect_dropped();
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
fn an_lb_that_returns_waits_for_the_close_of_the_old_connection() {
    let world = world();
    let (_, _watch) = world.connects("lb-1");
    world.registry.message(endpoint("lb-1", true));
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
