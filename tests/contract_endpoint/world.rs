//! The endpoint with all that it talks to but its forwarders.

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
use meridio_proxy::ipam::Answer;
use meridio_proxy::kernel::{NetHandle, NetMsg};
use meridio_proxy::nsm::caller::NsmCaller;
use meridio_proxy::proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointResponse, NetworkServiceResponse,
};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::status::Code;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::{Stop, Stopper, stop_pair};
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};
use meridio_proxy::transport::server::{PeerTable, TlsServer};
use parking_lot::Mutex;
use protobuf::well_known_types::empty::Empty;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::forwarder::Forwarder;

pub const LIMIT: Duration = Duration::from_secs(15);
pub const HOUR: Duration = Duration::from_secs(3600);
pub const SERVICE: &str = "proxy.c.t.ns";

pub fn soon() -> Instant {
    clock::now() + LIMIT
}

/// A directory that goes with the test.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new() -> Self {
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
pub enum Asked {
    Service(NetworkService),
    Endpoint(NetworkServiceEndpoint, String),
    Watch(String),
    Unregister(NetworkServiceEndpoint),
}

#[derive(Clone)]
pub struct Registry {
    pub asked: Sender<Asked>,
    pub deny_service: Arc<AtomicBool>,
    pub services: Arc<Mutex<Vec<NetworkService>>>,
    pub watches: Arc<Mutex<Vec<ServerStreamingSink<NetworkServiceEndpointResponse>>>>,
}

pub fn header(headers: &Metadata, name: &str) -> String {
    let mut values = headers.iter().filter(|(key, _)| *key == name);
    let (_, value) = values.next().unwrap_or_else(|| panic!("no header {name}"));
    assert!(values.next().is_none(), "header {name} comes twice");
    String::from_utf8(value.to_vec()).unwrap()
}

pub fn respond<T: Send + 'static>(
    ctx: &RpcContext<'_>,
    sink: UnarySink<T>,
    answer: Result<T, Code>,
) {
    let sent = match answer {
        Ok(message) => sink.success(message),
        Err(code) => sink.fail(RpcStatus::new(code)),
    };
    ctx.spawn(async move {
        let _ = sent.await;
    });
}

impl Registry {
    pub fn new() -> (Self, Receiver<Asked>) {
        let (asked, seen) = bounded(1000);
        let registry = Self {
            asked,
            deny_service: Arc::default(),
            services: Arc::default(),
            watches: Arc::default(),
        };
        (registry, seen)
    }

    pub fn saw(&self, ctx: &RpcContext<'_>, asked: Asked) {
        for name in ["nsm-client-token", "nsm-client-token-expires"] {
            header(ctx.request_headers(), name);
        }
        self.asked.try_send(asked).unwrap();
    }

    pub fn services(&self) -> Vec<Service> {
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
pub struct Ipam {
    pub silent: Arc<AtomicBool>,
    pub withheld: Arc<Mutex<Vec<Answer>>>,
    pub released: Arc<Mutex<Vec<String>>>,
    pub known: Arc<Mutex<Vec<LeaseId>>>,
    /// While it is there, the bridge has no addresses.
    pub unaddressed: Arc<Mutex<Option<(Stopper, Stop)>>>,
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

    fn abandon(&self, _: LeaseId) {}

    fn addressed(&self) -> Stop {
        match &*self.unaddressed.lock() {
            Some((_, addressed)) => addressed.clone(),
            None => stop_pair().1,
        }
    }

    fn release_later(&self, id: LeaseId) {
        self.released.lock().push(id.to_string());
    }
}

pub struct World {
    pub directory: Directory,
    pub threads: Threads,
    pub pki: Pki,
    pub peers: Rpc,
    pub nsmgr: Option<TlsServer>,
    pub registry: Registry,
    pub asked: Receiver<Asked>,
    pub ipam: Ipam,
    pub facts: Receiver<NetMsg>,
    pub endpoint: Option<Endpoint>,
    // Held to the end: what the endpoint is made of.
    pub _connector: Connector,
}

impl World {
    pub fn new(prepare: impl FnOnce(&Registry)) -> Self {
        Self::with_ipam(Ipam::default(), prepare)
    }

    pub fn with_ipam(ipam: Ipam, prepare: impl FnOnce(&Registry)) -> Self {
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

    pub fn start_nsmgr(&mut self) {
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

    pub fn asked(&self) -> Asked {
        self.asked.recv_deadline(soon()).unwrap()
    }

    /// Waits for the endpoint's registration; panics at an Unregister.
    pub fn registered(&self) -> NetworkServiceEndpoint {
        loop {
            match self.asked() {
                Asked::Endpoint(nse, _) => return nse,
                Asked::Unregister(..) => panic!("unregistered"),
                Asked::Service(_) | Asked::Watch(_) => {}
            }
        }
    }

    pub fn socket(&self) -> &Path {
        self.endpoint.as_ref().unwrap().socket()
    }

    pub fn forwarder(&self) -> Forwarder {
        Forwarder::new(self, self.socket())
    }

    pub fn fact(&self) -> Event {
        match self.facts.recv_deadline(soon()).unwrap() {
            NetMsg::Fact(event) => event,
            other => panic!("not from the endpoint: {other:?}"),
        }
    }
}

pub fn connect(
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
