//! The endpoint over real mTLS, against a registry that checks what it is sent
//! and a forwarder that calls as NSM's do. IPAM and `net` are stand-ins.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's way to fail"
)]

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use futures_util::SinkExt;
use grpcio::{
    Metadata, RpcContext, RpcStatus, ServerStreamingSink, Service, ServiceBuilder, UnarySink,
    WriteFlags,
};
use meridio_lab::pki::Pki;
use meridio_proxy::core::event::Event;
use meridio_proxy::core::family::{IpFamilies, PerFamily};
use meridio_proxy::core::ids::LeaseId;
use meridio_proxy::core::lease::{Addresses, Lease};
use meridio_proxy::endpoint::{Endpoint, EndpointOptions, Leases};
use meridio_proxy::ipam::{Answer, IpamError};
use meridio_proxy::kernel::{NetHandle, NetMsg};
use meridio_proxy::nsm::caller::NsmCaller;
use meridio_proxy::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, Mechanism, MonitorScopeSelector, PathSegment,
};
use meridio_proxy::proto::health::HealthCheckRequest;
use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointResponse, NetworkServiceResponse,
};
use meridio_proxy::rpc::call::{self, Options};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::pump::{self, Item, Pump};
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::spiffe::jwt::{self, Token};
use meridio_proxy::spiffe::{PeerIdentity, Svid, SvidCell};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::{Stop, Stopper, stop_pair};
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};
use meridio_proxy::transport::server::{PeerTable, TlsServer};
use parking_lot::Mutex;
use protobuf::well_known_types::empty::Empty;

const LIMIT: Duration = Duration::from_secs(15);
const HOUR: Duration = Duration::from_secs(3600);
const SERVICE: &str = "proxy.c.t.ns";

fn soon() -> Instant {
    clock::now() + LIMIT
}

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ep-{}-{n}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What the registry was asked, with the path header.
#[derive(Debug)]
enum Asked {
    Service(NetworkService),
    Endpoint(NetworkServiceEndpoint, String),
    Watch(String),
    Unregister(NetworkServiceEndpoint),
}

#[derive(Clone)]
struct Registry {
    asked: Sender<Asked>,
    deny_service: Arc<AtomicBool>,
    services: Arc<Mutex<Vec<NetworkService>>>,
    watches: Arc<Mutex<Vec<ServerStreamingSink<NetworkServiceEndpointResponse>>>>,
}

fn header(headers: &Metadata, name: &str) -> String {
    let mut values = headers.iter().filter(|(key, _)| *key == name);
    let (_, value) = values.next().unwrap_or_else(|| panic!("no header {name}"));
    assert!(values.next().is_none(), "header {name} comes twice");
    String::from_utf8(value.to_vec()).unwrap()
}

fn respond<T: Send + 'static>(ctx: &RpcContext<'_>, sink: UnarySink<T>, answer: Result<T, Code>) {
    let sent = match answer {
        Ok(message) => sink.success(message),
        Err(code) => sink.fail(RpcStatus::new(code)),
    };
    ctx.spawn(async move {
        let _ = sent.await;
    });
}

impl Registry {
    fn new() -> (Self, Receiver<Asked>) {
        let (asked, seen) = bounded(1000);
        let registry = Self {
            asked,
            deny_service: Arc::default(),
            services: Arc::default(),
            watches: Arc::default(),
        };
        (registry, seen)
    }

    fn saw(&self, ctx: &RpcContext<'_>, asked: Asked) {
        for name in ["nsm-client-token", "nsm-client-token-expires"] {
            header(ctx.request_headers(), name);
        }
        self.asked.try_send(asked).unwrap();
    }

    fn services(&self) -> Vec<Service> {
        let (a, b, c, d, e) = (
            self.clone(),
            self.clone(),
            self.clone(),
            self.clone(),
            self.clone(),
        );
        let ns = ServiceBuilder::new()
            .add_unary_handler(
                &method::NS_REGISTER,
                move |ctx, service: NetworkService, sink| {
                    header(ctx.request_headers(), "path");
                    a.saw(&ctx, Asked::Service(service.clone()));
                    let denied = a.deny_service.load(Ordering::Relaxed);
                    respond(
                        &ctx,
                        sink,
                        if denied {
                            Err(Code::PERMISSION_DENIED)
                        } else {
                            Ok(service)
                        },
                    );
                },
            )
            .add_server_streaming_handler(&method::NS_FIND, move |ctx, query, mut sink| {
                assert!(query.network_service.is_some(), "nsmgr would crash");
                let found = b.services.lock().clone();
                ctx.spawn(async move {
                    for service in found {
                        let response = NetworkServiceResponse {
                            network_service: Some(service).into(),
                            ..NetworkServiceResponse::default()
                        };
                        let _ = sink.send((response, WriteFlags::default())).await;
                    }
                    let _ = sink.close().await;
                });
            })
            .build();
        let nse = ServiceBuilder::new()
            .add_unary_handler(
                &method::NSE_REGISTER,
                move |ctx, nse: NetworkServiceEndpoint, sink| {
                    let path = header(ctx.request_headers(), "path");
                    c.saw(&ctx, Asked::Endpoint(nse.clone(), path));
                    respond(&ctx, sink, Ok(nse));
                },
            )
            .add_unary_handler(
                &method::NSE_UNREGISTER,
                move |ctx, nse: NetworkServiceEndpoint, sink| {
                    header(ctx.request_headers(), "path");
                    d.saw(&ctx, Asked::Unregister(nse));
                    respond(&ctx, sink, Ok(Empty::new()));
                },
            )
            .add_server_streaming_handler(&method::NSE_FIND, move |ctx, query, sink| {
                assert!(query.watch);
                let name = query.network_service_endpoint.unwrap().name;
                e.watches.lock().push(sink);
                e.saw(&ctx, Asked::Watch(name));
            })
            .build();
        vec![ns, nse]
    }
}

/// IPAM: numbers leases, or withholds its answers.
#[derive(Clone, Default)]
struct Ipam {
    silent: Arc<AtomicBool>,
    withheld: Arc<Mutex<Vec<Answer>>>,
    released: Arc<Mutex<Vec<String>>>,
    known: Arc<Mutex<Vec<LeaseId>>>,
}

impl Leases for Ipam {
    fn acquire(&self, id: LeaseId, _deadline: Instant, answer: Answer) {
        if self.silent.load(Ordering::Relaxed) {
            self.withheld.lock().push(answer);
            return;
        }
        let mut known = self.known.lock();
        let n = known
            .iter()
            .position(|other| *other == id)
            .unwrap_or_else(|| {
                known.push(id);
                known.len() - 1
            });
        let net = |host: usize| format!("172.16.0.{host}/24").parse().unwrap();
        answer(Ok(Addresses {
            leases: PerFamily {
                v4: Some(Lease {
                    src: net(2 * n + 2),
                    dst: net(2 * n + 3),
                }),
                v6: None,
            },
            bridge: PerFamily {
                v4: Some(net(1)),
                v6: None,
            },
        }));
    }

    fn release_later(&self, id: LeaseId) {
        self.released.lock().push(id.to_string());
    }
}

struct World {
    directory: Directory,
    threads: Threads,
    pki: Pki,
    peers: Rpc,
    nsmgr: Option<TlsServer>,
    registry: Registry,
    asked: Receiver<Asked>,
    ipam: Ipam,
    facts: Receiver<NetMsg>,
    endpoint: Option<Endpoint>,
    // Held to the end: what the endpoint is made of.
    _connector: Connector,
}

impl World {
    fn new(prepare: impl FnOnce(&Registry)) -> Self {
        let directory = Directory::new();
        let threads = Threads::unsupervised();
        let pki = Pki::new("td");
        let (rpc, peers) = (Rpc::new(), Rpc::new());
        let (registry, asked) = Registry::new();
        prepare(&registry);
        let cell = pki.cell(&pki.id("proxy"), HOUR);
        let connector = connect(
            &threads,
            &rpc,
            cell.clone(),
            "nsmgr",
            directory.0.join("nsm.sock"),
        );
        let ipam = Ipam::default();
        let (tx, facts) = bounded(1000);
        let mut world = Self {
            nsmgr: None,
            endpoint: None,
            _connector: connector.clone(),
            directory,
            threads,
            pki,
            peers,
            registry,
            asked,
            ipam,
            facts,
        };
        world.start_nsmgr();
        let endpoint = Endpoint::start_with(
            &world.threads,
            &rpc,
            cell,
            NsmCaller::new(connector, HOUR),
            Box::new(world.ipam.clone()),
            NetHandle::new(tx),
            EndpointOptions {
                name: "us".to_owned(),
                service_name: SERVICE.to_owned(),
                node: "node-a".to_owned(),
                mtu: 1400,
                token_lifetime: HOUR,
                families: IpFamilies::V4,
                directory: world.directory.0.clone(),
            },
        );
        world.endpoint = Some(endpoint.unwrap());
        world
    }

    fn start_nsmgr(&mut self) {
        let server = TlsServer::start(
            &self.threads,
            &self.peers,
            self.pki.cell(&self.pki.id("nsmgr"), HOUR),
            self.directory.0.join("nsm.sock"),
            PeerTable::default(),
            self.registry.services(),
        );
        self.nsmgr = Some(server.unwrap());
    }

    fn asked(&self) -> Asked {
        self.asked.recv_deadline(soon()).unwrap()
    }

    /// Waits for the endpoint's registration; panics at an Unregister.
    fn registered(&self) -> NetworkServiceEndpoint {
        loop {
            match self.asked() {
                Asked::Endpoint(nse, _) => return nse,
                Asked::Unregister(..) => panic!("unregistered"),
                Asked::Service(_) | Asked::Watch(_) => {}
            }
        }
    }

    fn socket(&self) -> &Path {
        self.endpoint.as_ref().unwrap().socket()
    }

    fn forwarder(&self) -> Forwarder {
        Forwarder::new(self, self.socket())
    }

    fn fact(&self) -> Event {
        match self.facts.recv_deadline(soon()).unwrap() {
            NetMsg::Fact(event) => event,
            NetMsg::Quiesce(_) => panic!("not from the endpoint"),
        }
    }
}

fn connect(
    threads: &Threads,
    rpc: &Rpc,
    cell: SvidCell,
    name: &'static str,
    socket: PathBuf,
) -> Connector {
    let options = ConnectorOptions {
        name,
        address: Address::Unix(socket),
        authority: "localhost".to_owned(),
        dial_timeout: Duration::from_secs(5),
        backoff_max: Duration::from_millis(200),
    };
    Connector::start(threads, rpc, cell, options).unwrap()
}

/// A forwarder, and the target behind it.
struct Forwarder {
    cell: SvidCell,
    target: SvidCell,
    connector: Connector,
    stop: Stop,
    _stopper: Stopper,
}

fn svid(cell: &SvidCell) -> Svid {
    let identity = cell.get().unwrap();
    Svid {
        id: identity.svid.id.clone(),
        chain: identity.svid.chain.clone(),
        key: identity.svid.key.clone(),
        not_after: identity.svid.not_after,
    }
}

impl Forwarder {
    fn new(world: &World, socket: &Path) -> Self {
        let cell = world.pki.cell(&world.pki.id("fwd"), HOUR);
        let target = world.pki.cell(&world.pki.id("target"), HOUR);
        let (stopper, stop) = stop_pair();
        let connector = connect(
            &world.threads,
            &world.peers,
            cell.clone(),
            "fwd",
            socket.to_owned(),
        );
        Self {
            cell,
            target,
            connector,
            stop,
            _stopper: stopper,
        }
    }

    /// The target's token for this forwarder.
    fn target_token(&self) -> Token {
        let own = svid(&self.cell);
        let peer = PeerIdentity {
            id: own.id,
            not_after: own.not_after,
            leaf: own.chain[0].clone(),
        };
        jwt::sign(&svid(&self.target), &peer, HOUR, clock::wall()).unwrap()
    }

    /// This forwarder's token for the endpoint, signed by whoever has `signer`.
    fn options(&self, signer: &SvidCell) -> Options {
        let connection = self.connector.acquire(soon(), &self.stop).unwrap();
        let token = jwt::sign(&svid(signer), connection.peer(), HOUR, clock::wall()).unwrap();
        let expires = meridio_proxy::nsm::caller::rfc3339_nano(token.expires);
        Options {
            headers: vec![
                ("nsm-client-token".to_owned(), token.jwt),
                ("nsm-client-token-expires".to_owned(), expires),
            ],
            ..Options::with_timeout(LIMIT)
        }
    }

    fn first_request(&self, target: &str) -> NetworkServiceRequest {
        let mut request = NetworkServiceRequest::default();
        for kind in ["MEMIF", "KERNEL"] {
            request.mechanism_preferences.push(Mechanism {
                cls: "LOCAL".to_owned(),
                type_: kind.to_owned(),
                ..Mechanism::default()
            });
        }
        let connection = request.connection.mut_or_insert_default();
        connection.id = format!("fwd-{target}");
        connection.network_service = SERVICE.to_owned();
        connection.payload = "ETHERNET".to_owned();
        let path = connection.path.mut_or_insert_default();
        path.index = 1;
        let token = self.target_token().jwt;
        for (name, id, token) in [
            ("target", target.to_owned(), token),
            ("fwd", format!("fwd-{target}"), String::new()),
        ] {
            path.path_segments.push(PathSegment {
                name: name.to_owned(),
                id,
                token,
                ..PathSegment::default()
            });
        }
        request
    }

    fn request(&self, request: &NetworkServiceRequest) -> Result<Connection, RpcError> {
        self.request_as(&self.cell, request)
    }

    fn request_as(
        &self,
        signer: &SvidCell,
        request: &NetworkServiceRequest,
    ) -> Result<Connection, RpcError> {
        let connection = self.connector.acquire(soon(), &self.stop).unwrap();
        let options = self.options(signer);
        let method = &method::REQUEST;
        call::unary(connection.channel(), method, request, &options, &self.stop)
            .map(|reply| reply.message)
    }

    fn close(&self, connection: &Connection) -> Result<(), RpcError> {
        let options = self.options(&self.cell);
        let channel = self.connector.acquire(soon(), &self.stop).unwrap();
        call::unary(
            channel.channel(),
            &method::CLOSE,
            connection,
            &options,
            &self.stop,
        )
        .map(|_| ())
    }

    fn monitor(&self, target: &str) -> Pump<ConnectionEvent> {
        let selector = MonitorScopeSelector {
            path_segments: vec![PathSegment {
                name: "fwd".to_owned(),
                id: format!("fwd-{target}"),
                ..PathSegment::default()
            }],
            ..MonitorScopeSelector::default()
        };
        let channel = self.connector.acquire(soon(), &self.stop).unwrap();
        let options = self.options(&self.cell);
        pump::open(
            channel.channel(),
            &method::MONITOR_CONNECTIONS,
            &selector,
            &options,
        )
        .unwrap()
    }

    fn health(&self, service: &str) -> Result<ServingStatus, RpcError> {
        let channel = self.connector.acquire(soon(), &self.stop).unwrap();
        let request = HealthCheckRequest {
            service: service.to_owned(),
            ..HealthCheckRequest::default()
        };
        let options = Options::with_timeout(LIMIT);
        call::unary(
            channel.channel(),
            &method::HEALTH_CHECK,
            &request,
            &options,
            &self.stop,
        )
        .map(|reply| reply.message.status.enum_value().unwrap())
    }
}

fn event(pump: &Pump<ConnectionEvent>) -> (ConnectionEventType, usize) {
    match pump.items().recv_deadline(soon()).unwrap() {
        Item::Message(event) => (event.type_.enum_value().unwrap(), event.connections.len()),
        Item::Ended(ended) => panic!("the stream ended: {ended:?}"),
    }
}

#[test]
fn registers_the_service_then_the_endpoint_and_leaves_once() {
    let mut world = World::new(|_| {});
    let Asked::Service(service) = world.asked() else {
        panic!("the service comes first");
    };
    assert_eq!(
        (service.name.as_str(), service.payload.as_str()),
        (SERVICE, "ETHERNET")
    );
    let Asked::Endpoint(nse, path) = world.asked() else {
        panic!("then the endpoint");
    };
    assert_eq!(path, r#"{"Index":0,"PathSegments":[]}"#);
    assert_eq!(nse.name, "us");
    let socket = world.socket().to_owned();
    let meta = std::fs::metadata(&socket).unwrap();
    assert_eq!(nse.url, format!("inode://{}/{}", meta.dev(), meta.ino()));
    assert_eq!(meta.permissions().mode() & 0o777, 0o777);
    assert_eq!(
        nse.network_service_labels[SERVICE].labels["nodeName"],
        "node-a"
    );
    assert!(matches!(world.asked(), Asked::Watch(name) if name == "us"));

    let mut endpoint = world.endpoint.take().unwrap();
    assert!(
        endpoint
            .unregister(clock::now() + Duration::from_secs(3))
            .is_empty()
    );
    assert!(matches!(world.asked(), Asked::Unregister(nse) if nse.name == "us"));
    world.registry.watches.lock().clear();
    assert!(
        endpoint
            .stop(clock::now() + Duration::from_secs(3))
            .is_empty()
    );
    assert!(world.asked.is_empty(), "nothing after the Unregister");
    assert!(
        !socket.parent().unwrap().exists(),
        "the socket goes with its directory"
    );
}

#[test]
fn a_denied_service_that_is_there_does_not_stop_the_endpoint() {
    let world = World::new(|registry| {
        registry.deny_service.store(true, Ordering::Relaxed);
    });
    for _ in 0..2 {
        assert!(
            matches!(world.asked(), Asked::Service(_)),
            "tried again, nothing else"
        );
    }
    let Asked::Service(service) = world.asked() else {
        panic!("no endpoint without its service");
    };
    world.registry.services.lock().push(service);
    assert_eq!(world.registered().name, "us");
}

#[test]
fn registers_anew_after_restarts() {
    let mut world = World::new(|_| {});
    world.registered();
    while !matches!(world.asked(), Asked::Watch(_)) {}
    // The registry's restart only ends the watch.
    world.registry.watches.lock().clear();
    assert!(
        matches!(world.asked(), Asked::Service(_)),
        "it may have forgotten both"
    );
    world.registered();
    while !matches!(world.asked(), Asked::Watch(_)) {}
    // nsmgr's restart ends the connection.
    world.nsmgr.take().unwrap().stop(clock::now());
    world.registry.watches.lock().clear();
    world.start_nsmgr();
    world.registered();
}

#[test]
fn a_target_connects_refreshes_and_closes() {
    use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER, UPDATE};
    let world = World::new(|_| {});
    let forwarder = world.forwarder();
    let before = forwarder.monitor("t1");
    assert_eq!(event(&before), (INITIAL_STATE_TRANSFER, 0));
    let answer = forwarder.request(&forwarder.first_request("t1")).unwrap();
    assert_eq!((answer.id.as_str(), answer.path.index), ("fwd-t1", 1));
    assert_eq!(answer.context.ip_context.src_ip_addrs, ["172.16.0.2/24"]);
    let own = &answer.path.path_segments[2];
    assert_eq!(
        jwt::claims(&own.token).unwrap().aud,
        Some(vec![world.pki.id("fwd")])
    );
    let Event::PortExpected { ifname, peers, .. } = world.fact() else {
        panic!("no port");
    };
    assert_eq!(ifname.as_str(), answer.mechanism.parameters["name"]);
    assert_eq!(peers, BTreeSet::from(["172.16.0.2".parse().unwrap()]));
    assert_eq!(event(&before), (UPDATE, 1));

    // As the real one does: anew for each Request, then a monitor stream.
    let again = world.forwarder();
    let refresh = NetworkServiceRequest {
        connection: Some(answer.clone()).into(),
        ..NetworkServiceRequest::default()
    };
    let mut refresh = refresh;
    let segments = &mut refresh.connection.mut_or_insert_default().path;
    segments.mut_or_insert_default().path_segments[0].token = again.target_token().jwt;
    let second = again.request(&refresh).unwrap();
    assert_eq!(second.context, answer.context);
    assert_eq!(second.mechanism, answer.mechanism);
    let after = again.monitor("t1");
    assert_eq!(event(&after), (INITIAL_STATE_TRANSFER, 1));
    assert!(matches!(world.fact(), Event::PortExpected { .. }));

    for _ in 0..2 {
        again.close(&second).unwrap();
    }
    assert_eq!(event(&before), (UPDATE, 1));
    assert_eq!(event(&before), (DELETE, 1));
    assert_eq!(event(&after), (DELETE, 1));
    assert!(matches!(world.fact(), Event::PortReleased { .. }));
    assert_eq!(*world.ipam.released.lock(), ["t1"]);
}

#[test]
fn a_token_of_another_key_is_refused() {
    let world = World::new(|_| {});
    let forwarder = world.forwarder();
    let stranger = world.pki.cell(&world.pki.id("fwd"), HOUR);
    let request = forwarder.first_request("t1");
    let error = forwarder.request_as(&stranger, &request).unwrap_err();
    assert_eq!(error.code(), Some(Code::PERMISSION_DENIED), "{error}");
    assert!(error.to_string().contains("prev_token_signed"), "{error}");
    let mut foreign = request.clone();
    let path = foreign
        .connection
        .mut_or_insert_default()
        .path
        .mut_or_insert_default();
    path.path_segments[0].token = "rubbish".to_owned();
    let error = forwarder.request(&foreign).unwrap_err();
    assert!(error.to_string().contains("tokens_valid"), "{error}");
    forwarder.request(&request).unwrap();
}

#[test]
fn health() {
    let world = World::new(|_| {});
    let forwarder = world.forwarder();
    for service in [
        "",
        "networkservice.NetworkService",
        "connection.MonitorConnection",
    ] {
        assert_eq!(forwarder.health(service).unwrap(), ServingStatus::SERVING);
    }
    assert_eq!(
        forwarder.health("x").unwrap_err().code(),
        Some(Code::NOT_FOUND)
    );
}

#[test]
fn the_end_answers_what_waits_and_ends_streams_in_order() {
    let mut world = World::new(|_| {});
    let forwarder = world.forwarder();
    let pump = forwarder.monitor("t2");
    let _ = event(&pump);
    forwarder.request(&forwarder.first_request("t1")).unwrap();
    world.ipam.silent.store(true, Ordering::Relaxed);
    let (tx, rx) = bounded(1);
    let options = forwarder.options(&forwarder.cell);
    let connection = forwarder
        .connector
        .acquire(soon(), &forwarder.stop)
        .unwrap();
    let request = forwarder.first_request("t2");
    let channel = connection.channel();
    let guard = call::start(
        channel,
        &method::REQUEST,
        &request,
        &options,
        move |result| {
            let _ = tx.send(result.map(|reply| reply.message));
        },
    );
    // A Close of the unknown is answered at once: that of the same connection
    // would wait, so another one says that the Request has arrived.
    forwarder
        .close(&forwarder.first_request("t3").connection)
        .unwrap();
    assert_eq!(world.ipam.withheld.lock().len(), 1);
    let begun = clock::now();
    let endpoint = world.endpoint.take().unwrap();
    assert!(endpoint.stop(begun + Duration::from_secs(5)).is_empty());
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    let error = rx.recv_deadline(soon()).unwrap().unwrap_err();
    assert_eq!(error.code(), Some(Code::UNAVAILABLE), "{error}");
    guard.detach();
    let ended = pump.items().recv_deadline(soon()).unwrap();
    assert!(matches!(ended, Item::Ended(Ok(()))), "{ended:?}");
    assert!(
        world.ipam.released.lock().is_empty(),
        "leases of targets stay"
    );
}

#[test]
fn requests_are_bounded_and_a_close_is_never_refused() {
    let world = World::new(|_| {});
    world.ipam.silent.store(true, Ordering::Relaxed);
    // A connection carries 256 streams at a time.
    let forwarders: Vec<Forwarder> = (0..5).map(|_| world.forwarder()).collect();
    let (tx, rx) = bounded(2000);
    let mut guards = Vec::new();
    for (n, forwarder) in forwarders.iter().enumerate() {
        let options = forwarder.options(&forwarder.cell);
        let connection = forwarder
            .connector
            .acquire(soon(), &forwarder.stop)
            .unwrap();
        let request = forwarder.first_request(&format!("t{n}"));
        for _ in 0..220 {
            let tx = tx.clone();
            let channel = connection.channel();
            guards.push(call::start(
                channel,
                &method::REQUEST,
                &request,
                &options,
                move |result| {
                    let _ = tx.send(result.map(|reply| reply.message));
                },
            ));
        }
    }
    for _ in 0..1100 - 1024 {
        let error = rx.recv_deadline(soon()).unwrap().unwrap_err();
        assert_eq!(error.code(), Some(Code::RESOURCE_EXHAUSTED), "{error}");
    }
    let other = world.forwarder();
    other.close(&other.first_request("t").connection).unwrap();
    assert!(rx.is_empty(), "the others wait");
    for answer in std::mem::take(&mut *world.ipam.withheld.lock()) {
        answer(Err(IpamError::Stopped));
    }
    for _ in 0..1024 {
        let error = rx.recv_deadline(soon()).unwrap().unwrap_err();
        assert_eq!(error.code(), Some(Code::UNAVAILABLE), "{error}");
    }
    world.ipam.silent.store(false, Ordering::Relaxed);
    other.request(&other.first_request("t")).unwrap();
}

#[test]
fn many_targets_with_a_stream_each() {
    let world = World::new(|_| {});
    let forwarder = world.forwarder();
    let mut pumps = Vec::new();
    for n in 0..60 {
        let target = format!("t{n}");
        forwarder
            .request(&forwarder.first_request(&target))
            .unwrap();
        let pump = forwarder.monitor(&target);
        assert_eq!(
            event(&pump),
            (ConnectionEventType::INITIAL_STATE_TRANSFER, 1)
        );
        pumps.push(pump);
    }
    let names: BTreeSet<String> = (0..60)
        .map(|_| match world.fact() {
            Event::PortExpected { ifname, .. } => ifname.to_string(),
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(names.len(), 60, "each interface has a name of its own");
    assert!(
        pumps.iter().all(|pump| pump.items().is_empty()),
        "each hears of its own only"
    );
}
