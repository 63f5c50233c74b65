//! A played world around the mesh.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, at, bounded, select};
use ipnetwork::IpNetwork;
use parking_lot::Mutex;
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::core::event::Event;
use crate::core::family::{IpFamilies, PerFamily};
use crate::core::ids::{EndpointName, IfName, LeaseId, PortKey};
use crate::core::lease::{Addresses, Lease};
use crate::ipam::IpamError;
use crate::kernel::{NetHandle, NetMsg};
use crate::nsm::client::{Leases, Nsmgr, Stream};
use crate::nsm::convert::Template;
use crate::nsm::netns::Netns;
use crate::nsm::patience::Patience;
use crate::nsm::{LbMesh, LbOptions, Surroundings};
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
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
pub(super) const CLIENT: &str = "proxy-a-x1";
pub(super) const SERVICE: &str = "load-balancer.t1";

pub(in crate::nsm) fn addresses() -> Addresses {
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

pub(in crate::nsm) fn template() -> Template {
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
pub(in crate::nsm) fn answer(request: &NetworkServiceRequest) -> Connection {
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

pub(super) type Answer<T> = Sender<Result<T, RpcError>>;

/// A call that waits for its answer.
pub(super) enum Call {
    Request(NetworkServiceRequest, Answer<Connection>),
    Close(Connection, Answer<()>),
    Monitor(MonitorScopeSelector, Answer<Stream<ConnectionEvent>>),
    Find(
        NetworkServiceEndpointQuery,
        Answer<Stream<NetworkServiceEndpointResponse>>,
    ),
}

#[derive(Clone)]
pub(super) struct FakeNsmgr(Sender<Call>);

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

    /// As [`NsmCaller`](crate::nsm::caller::NsmCaller) waits; the end of the
    /// answer's channel is that of the deadline.
    fn patient<T: Send + 'static>(
        &self,
        deadline: Instant,
        patience: &mut Patience<'_>,
        call: impl FnOnce(Answer<T>) -> Call,
    ) -> Result<T, RpcError> {
        let (tx, rx) = bounded(1);
        self.0.send(call(tx)).map_err(|_| RpcError::Cancelled)?;
        let late = RpcError::status(Code::DEADLINE_EXCEEDED, "the test did not answer");
        let (answer_tx, answer) = bounded(1);
        #[expect(clippy::disallowed_methods, reason = "ends at the deadline")]
        std::thread::spawn(move || {
            let result = rx.recv_deadline(deadline).unwrap_or(Err(late));
            let _ = answer_tx.send(result);
        });
        patience.wait(&answer).unwrap_or(Err(RpcError::Cancelled))
    }
}

impl Nsmgr for FakeNsmgr {
    fn request(
        &self,
        request: &NetworkServiceRequest,
        netns: &Netns,
        deadline: Instant,
        patience: &mut Patience<'_>,
    ) -> Result<Connection, RpcError> {
        let wanted = &request.mechanism_preferences[0].parameters["inodeURL"];
        assert_eq!(wanted, netns.url());
        self.patient(deadline, patience, |tx| Call::Request(request.clone(), tx))
    }

    fn close(
        &self,
        connection: &Connection,
        _netns: &Netns,
        deadline: Instant,
        patience: &mut Patience<'_>,
    ) -> Result<(), RpcError> {
        self.patient(deadline, patience, |tx| Call::Close(connection.clone(), tx))
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
pub(super) struct FakeIpam {
    pub(super) released: Sender<LeaseId>,
    pub(super) acquired: Sender<LeaseId>,
    /// What acquiring answers from now on.
    pub(super) answer: Arc<Mutex<Result<Addresses, IpamError>>>,
}

impl Leases for FakeIpam {
    fn acquire(&self, id: LeaseId, _: Instant, _: &Stop) -> Result<Addresses, IpamError> {
        // Nobody reads at the end of a test.
        let _ = self.acquired.send(id);
        self.answer.lock().clone()
    }

    fn release_later(&self, id: LeaseId) {
        let _ = self.released.send(id);
    }
}

/// The other end of a stream that the test opened.
pub(super) struct Feed<T> {
    pub(super) items: Sender<Item<T>>,
    /// Disconnected when the reader has dropped the stream.
    pub(super) dropped: Receiver<()>,
}

pub(super) fn feed<T: Send + 'static>() -> (Feed<T>, Stream<T>) {
    let (tx, rx) = bounded(64);
    let (open, dropped) = bounded::<()>(0);
    let feed = Feed { items: tx, dropped };
    (feed, Stream::new(rx, Box::new(open)))
}

impl<T> Feed<T> {
    pub(super) fn message(&self, message: T) {
        self.items.send(Item::Message(message)).unwrap();
    }

    pub(super) fn end(&self, how: Result<(), StreamError>) {
        self.items.send(Item::Ended(how)).unwrap();
    }

    pub(super) fn expect_dropped(&self) {
        let end = self.dropped.recv_timeout(PATIENCE);
        assert_eq!(end, Err(crossbeam_channel::RecvTimeoutError::Disconnected));
    }
}

/// The mesh, and all that it talks to.
pub(super) struct World {
    // Dropped before the mesh, which waits for its threads: what they wait for
    // then fails at once.
    pub(super) calls: Receiver<Call>,
    pub(super) facts: Receiver<NetMsg>,
    pub(super) released: Receiver<LeaseId>,
    pub(super) acquired: Receiver<LeaseId>,
    pub(super) mesh: LbMesh,
    pub(super) ipam: FakeIpam,
    pub(super) registry: Feed<NetworkServiceEndpointResponse>,
}

pub(super) fn world() -> World {
    world_with(Surroundings {
        is_in_place: |_, _| false,
        begun: clock::now(),
    })
}

pub(super) fn world_in_place(is_in_place: fn(&IfName, &str) -> bool) -> World {
    world_with(Surroundings {
        is_in_place,
        begun: clock::now(),
    })
}

pub(super) fn world_with(surroundings: Surroundings) -> World {
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
pub(super) fn find(calls: &Receiver<Call>, watch: bool) -> Feed<NetworkServiceEndpointResponse> {
    match calls.recv_timeout(PATIENCE).unwrap() {
        Call::Find(query, reply) => {
            assert_eq!(query, crate::nsm::convert::query(SERVICE, watch));
            let (feed, stream) = feed();
            reply.send(Ok(stream)).unwrap();
            feed
        }
        _ => panic!("another call than Find"),
    }
}

impl World {
    pub(super) fn registers(&self, name: &str) {
        self.registry.message(endpoint(name, false));
    }

    pub(super) fn request(&self) -> (NetworkServiceRequest, Answer<Connection>) {
        match self.calls.recv_timeout(PATIENCE).unwrap() {
            Call::Request(request, reply) => (request, reply),
            Call::Close(..) => panic!("Close instead of Request"),
            Call::Monitor(..) => panic!("monitor instead of Request"),
            Call::Find(..) => panic!("Find instead of Request"),
        }
    }

    pub(super) fn close(&self) -> (Connection, Answer<()>) {
        match self.calls.recv_timeout(PATIENCE).unwrap() {
            Call::Close(connection, reply) => (connection, reply),
            _ => panic!("another call than Close"),
        }
    }

    /// Lets the next call, a monitor of this LB, have a stream that begins
    /// with these connections.
    pub(super) fn monitor(&self, lb: &str, connections: &[Connection]) -> Feed<ConnectionEvent> {
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
    pub(super) fn connects(&self, lb: &str) -> (Connection, Feed<ConnectionEvent>) {
        self.registers(lb);
        self.monitor(lb, &[]).expect_dropped();
        let (request, reply) = self.request();
        let connection = answer(&request);
        reply.send(Ok(connection.clone())).unwrap();
        self.expect_port(lb, &connection);
        let watch = self.monitor(lb, &[shown(&connection, State::UP)]);
        (connection, watch)
    }

    pub(super) fn fact(&self) -> Event {
        match self.facts.recv_timeout(PATIENCE).unwrap() {
            NetMsg::Fact(event) => event,
            _ => panic!("the mesh tells facts only"),
        }
    }

    pub(super) fn expect_port(&self, lb: &str, connection: &Connection) {
        let peers: [IpAddr; 2] = ["172.16.0.4".parse().unwrap(), "fd00::4".parse().unwrap()];
        let expected = Event::PortExpected {
            key: key(lb),
            ifname: IfName::parse(&connection.mechanism.parameters["name"]).unwrap(),
            peers: peers.into(),
        };
        assert_eq!(self.fact(), expected);
    }

    /// Stops the mesh while the test goes on to answer.
    pub(super) fn stopping(self, within: Duration) -> (std::thread::JoinHandle<Vec<String>>, Rest) {
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
pub(super) struct Rest {
    pub(super) calls: Receiver<Call>,
    pub(super) facts: Receiver<NetMsg>,
    pub(super) released: Receiver<LeaseId>,
    pub(super) _acquired: Receiver<LeaseId>,
    pub(super) _ipam: FakeIpam,
    pub(super) _registry: Feed<NetworkServiceEndpointResponse>,
}

pub(super) fn id(lb: &str) -> String {
    format!("{CLIENT}-{SERVICE}-{lb}")
}

pub(super) fn key(lb: &str) -> PortKey {
    PortKey::Lb(EndpointName::new(lb))
}

pub(super) fn endpoint(name: &str, deleted: bool) -> NetworkServiceEndpointResponse {
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

/// The same LB, registered by another process, which listens elsewhere.
pub(super) fn endpoint_at(name: &str, url: &str) -> NetworkServiceEndpointResponse {
    let mut response = endpoint(name, false);
    let endpoint = response.network_service_endpoint.mut_or_insert_default();
    url.clone_into(&mut endpoint.url);
    response
}

/// Lets the next call, a monitor, have a stream that is refused.
pub(super) fn refused_stream(calls: &Receiver<Call>, code: Code) {
    match calls.recv_timeout(PATIENCE).unwrap() {
        Call::Monitor(_, reply) => {
            let (feed, stream) = feed();
            let refusal = RpcError::status(code, "no sufficient privileges");
            feed.end(Err(StreamError::Rpc(refusal)));
            reply.send(Ok(stream)).unwrap();
        }
        _ => panic!("another call than monitor"),
    }
}

/// The connection as nsmgr's monitor shows it.
pub(super) fn shown(connection: &Connection, state: State) -> Connection {
    let mut shown = connection.clone();
    shown.id = "nsmgr-segment".to_owned();
    shown.path.mut_or_insert_default().index = 1;
    shown.state = state.into();
    shown
}

pub(super) fn event(kind: ConnectionEventType, connections: &[Connection]) -> ConnectionEvent {
    ConnectionEvent {
        type_: kind.into(),
        connections: connections
            .iter()
            .map(|connection| (connection.id.clone(), connection.clone()))
            .collect(),
        ..ConnectionEvent::default()
    }
}

pub(super) fn update(connection: &Connection, state: State) -> ConnectionEvent {
    event(ConnectionEventType::UPDATE, &[shown(connection, state)])
}
