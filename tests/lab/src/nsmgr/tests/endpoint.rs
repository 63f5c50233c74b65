//! A minimal endpoint such as the daemon's: mTLS on a unix socket, path,
//! tokens, monitor, and its namespace's descriptor with each answer.

use std::os::unix::fs::OpenOptionsExt;

use grpcio::{RpcContext, RpcStatus, Service, ServiceBuilder, UnarySink};
use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::proto::health::{HealthCheckRequest, HealthCheckResponse};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::proto::registry::{
    Destination, Match, NetworkService, NetworkServiceEndpoint, NetworkServiceLabels,
};
use meridio_proxy::rpc::call::Reply;
use meridio_proxy::rpc::method;
use protobuf::well_known_types::empty::Empty;

use super::rig::{LIMIT, PROXY_SERVICE, Rig, file};
use super::*;
use crate::client::Session;
use crate::forwarder::{mechanism, netns_url};
use crate::path;
use crate::policy::envelope;
use crate::tls::{Peer, file_id, inode_url};

type Mangle = fn(&mut Connection);

pub struct Proxy {
    shared: Arc<Shared>,
    pub netns: Arc<OwnedFd>,
    /// `O_PATH` descriptor of the socket file.
    pub file: OwnedFd,
    url: String,
    _listener: TlsListener,
}

struct Shared {
    hop: Hop,
    peers: Peers,
    netns: Arc<OwnedFd>,
    monitors: Monitors,
    mangle: Mutex<Option<Mangle>>,
    /// The connections on which calls came.
    seen: Mutex<Vec<Arc<Peer>>>,
}

impl Proxy {
    pub fn start(rig: &Rig) -> Self {
        let netns = file(&rig.directory.join("netns-proxy"));
        let socket = rig.directory.join("listen.on");
        let shared = Arc::new(Shared {
            hop: Hop {
                name: "proxy-1".to_owned(),
                ..rig.client.hop.clone()
            },
            peers: Peers::default(),
            netns: Arc::clone(&netns),
            monitors: Monitors::default(),
            mangle: Mutex::default(),
            seen: Mutex::default(),
        });
        let listener = TlsListener::start(
            &Rpc::new(),
            shared.hop.svid.clone(),
            &socket,
            shared.peers.clone(),
            Notes::default(),
            vec![service(&shared)],
        )
        .unwrap();
        let mut options = std::fs::OpenOptions::new();
        let file = options
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&socket)
            .unwrap();
        let (id, file) = file_id(file.into()).unwrap();
        Self {
            shared,
            netns,
            file,
            url: inode_url(id),
            _listener: listener,
        }
    }

    pub fn registration(&self) -> NetworkServiceEndpoint {
        let labels = NetworkServiceLabels {
            labels: [("nodeName".to_owned(), "node-a".to_owned())].into(),
            ..Default::default()
        };
        NetworkServiceEndpoint {
            name: "proxy-1".to_owned(),
            network_service_names: vec![PROXY_SERVICE.to_owned()],
            network_service_labels: [(PROXY_SERVICE.to_owned(), labels)].into(),
            url: self.url.clone(),
            ..Default::default()
        }
    }

    pub fn register(&self, session: &Session) -> Reply<NetworkServiceEndpoint> {
        self.register_within(session, LIMIT)
    }

    pub fn register_within(
        &self,
        session: &Session,
        limit: Duration,
    ) -> Reply<NetworkServiceEndpoint> {
        session.register_service(&network_service(), limit).unwrap();
        session
            .register_endpoint(&self.registration(), &[&self.file], limit)
            .unwrap()
    }

    pub fn mangle(&self, mangle: Option<Mangle>) {
        *self.shared.mangle.lock() = mangle;
    }

    /// Connections on which calls came.
    pub fn dials(&self) -> usize {
        self.shared.seen.lock().len()
    }

    pub fn connections(&self) -> usize {
        self.shared.monitors.all().len()
    }

    /// Closes all connections unasked.
    pub fn close_all(&self) {
        for connection in self.shared.monitors.all() {
            self.shared.monitors.delete(&connection.id);
        }
    }
}

pub fn network_service() -> NetworkService {
    let node = || [("nodeName".to_owned(), "{{.nodeName}}".to_owned())].into();
    let route = Destination {
        destination_selector: node(),
        ..Default::default()
    };
    NetworkService {
        name: PROXY_SERVICE.to_owned(),
        payload: "ETHERNET".to_owned(),
        matches: vec![Match {
            source_selector: node(),
            routes: vec![route],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn service(shared: &Arc<Shared>) -> Service {
    let (requests, closes) = (Arc::clone(shared), Arc::clone(shared));
    let (monitors, health) = (Arc::clone(shared), Arc::clone(shared));
    ServiceBuilder::new()
        .add_unary_handler(
            &method::REQUEST,
            move |context: RpcContext<'_>, request: NetworkServiceRequest, sink: UnarySink<_>| {
                reply(&context, sink, requests.request(&context, request));
            },
        )
        .add_unary_handler(
            &method::CLOSE,
            move |context: RpcContext<'_>, connection: Connection, sink: UnarySink<_>| {
                reply(&context, sink, closes.close(&context, connection));
            },
        )
        .add_server_streaming_handler(
            &method::MONITOR_CONNECTIONS,
            move |context: RpcContext<'_>, selector, sink| {
                monitors.monitors.open(selector).serve(&context, sink);
            },
        )
        .add_unary_handler(
            &method::HEALTH_CHECK,
            move |context: RpcContext<'_>, _: HealthCheckRequest, sink: UnarySink<_>| {
                health.peer(&context);
                let mut answer = HealthCheckResponse::new();
                answer.status = ServingStatus::SERVING.into();
                reply(&context, sink, Ok(answer));
            },
        )
        .build()
}

fn reply<T: Send + 'static>(
    context: &RpcContext<'_>,
    sink: UnarySink<T>,
    result: Result<T, RpcError>,
) {
    let sent = match result {
        Ok(message) => sink.success(message),
        Err(error) => sink.fail(RpcStatus::with_message(
            error.code().unwrap(),
            error.to_string(),
        )),
    };
    context.spawn(async move {
        let _ = sent.await;
    });
}

impl Shared {
    fn peer(&self, context: &RpcContext<'_>) -> Arc<Peer> {
        let peer = self.peers.lookup(&context.peer()).unwrap();
        let mut seen = self.seen.lock();
        if !seen.iter().any(|before| Arc::ptr_eq(before, &peer)) {
            seen.push(Arc::clone(&peer));
        }
        peer
    }

    /// As inside the endpoint: its own id and index, its own segment last.
    fn enter(&self, context: &RpcContext<'_>, connection: &mut Connection) -> Result<(), RpcError> {
        let peer = self.peer(context);
        let token = envelope(context.request_headers(), &peer, clock::wall()).map_err(unknown)?;
        self.hop
            .admit(connection, &peer.identity, &token, &peer.own)?;
        path::trim(connection);
        peer.attach(&self.netns);
        Ok(())
    }

    fn request(
        &self,
        context: &RpcContext<'_>,
        request: NetworkServiceRequest,
    ) -> Result<Connection, RpcError> {
        let mut connection = request.connection.unwrap();
        self.enter(context, &mut connection)?;
        if connection.state == State::RESELECT_REQUESTED.into() {
            self.monitors.delete(&connection.id);
        }
        connection.state = State::UP.into();
        if connection.mechanism.is_none() {
            assert!(
                request
                    .mechanism_preferences
                    .iter()
                    .any(|m| m.type_ == "KERNEL")
            );
        }
        let url = netns_url(&self.netns).unwrap();
        connection.mechanism = Some(mechanism("proxy.c1.t-aaaa", &url)).into();
        let context = connection.context.mut_or_insert_default();
        context.MTU = 1500;
        let ip = context.ip_context.mut_or_insert_default();
        if ip.src_ip_addrs.is_empty() {
            ip.src_ip_addrs = vec!["172.16.0.2/24".to_owned()];
            ip.dst_ip_addrs = vec!["172.16.0.3/24".to_owned()];
            ip.extra_prefixes = vec!["172.16.0.1/24".to_owned()];
        }
        self.monitors.update(connection.clone());
        path::leave(&mut connection);
        if let Some(mangle) = *self.mangle.lock() {
            mangle(&mut connection);
        }
        Ok(connection)
    }

    fn close(
        &self,
        context: &RpcContext<'_>,
        mut connection: Connection,
    ) -> Result<Empty, RpcError> {
        // A mangled answer comes back mangled.
        if self.mangle.lock().is_some() {
            for connection in self.monitors.all() {
                self.monitors.delete(&connection.id);
            }
            return Ok(Empty::new());
        }
        self.enter(context, &mut connection)?;
        self.monitors.delete(&connection.id);
        Ok(Empty::new())
    }
}
