//! A server that echoes, and connectors to it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::poll_fn;
use futures_util::{Sink, SinkExt};
use grpcio::{
    MetadataBuilder, RpcContext, RpcStatus, RpcStatusCode, ServerStreamingSink, Service,
    ServiceBuilder, UnarySink, WriteFlags,
};
use meridio_lab::pki::Pki;
use meridio_proxy::proto::registry::{NetworkService, NetworkServiceQuery, NetworkServiceResponse};
use meridio_proxy::rpc::call::{self, Options, Reply};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method::{NS_FIND, NS_REGISTER};
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::spiffe::{SvidCell, jwt};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::{Stop, Stopper, stop_pair};
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::sync::watch::Watch;
use meridio_proxy::transport::client::{
    Address, Connection, Connector, ConnectorOptions, ConnectorState,
};
use meridio_proxy::transport::server::{PeerTable, TlsServer};

pub const HOUR: Duration = Duration::from_secs(3600);
pub const SERVER_ID: &str = "spiffe://td/ns/server";
pub const CLIENT_ID: &str = "spiffe://td/ns/client";

static NEXT: AtomicUsize = AtomicUsize::new(0);

/// What a test needs around its peers.
pub struct Rig {
    pub rpc: Rpc,
    pub threads: Threads,
    pub pki: Pki,
    pub stop: Stop,
    /// Streams that servers have open.
    pub open: Watch<usize>,
    _stopper: Stopper,
    dir: PathBuf,
}

impl Rig {
    pub fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("mt-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (stopper, stop) = stop_pair();
        Self {
            rpc: Rpc::new(),
            threads: Threads::unsupervised(),
            pki: Pki::new("td"),
            stop,
            open: Watch::new(0),
            _stopper: stopper,
            dir,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn server_cell(&self) -> SvidCell {
        self.pki.cell(SERVER_ID, HOUR)
    }

    pub fn client_cell(&self) -> SvidCell {
        self.pki.cell(CLIENT_ID, HOUR)
    }

    /// An echo server on `path`.
    pub fn serve(&self, svid: SvidCell, path: &Path) -> TlsServer {
        let peers = PeerTable::default();
        let services = vec![echo(&peers, &self.open)];
        TlsServer::start(
            &self.threads,
            &self.rpc,
            svid,
            path.to_owned(),
            peers,
            services,
        )
        .unwrap()
    }

    /// An echo server on loopback.
    pub fn serve_tcp(&self, svid: SvidCell) -> (TlsServer, Address) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp {
            host: "127.0.0.1".to_owned(),
            port: listener.local_addr().unwrap().port(),
        };
        let peers = PeerTable::default();
        let services = vec![echo(&peers, &self.open)];
        let server =
            TlsServer::start_tcp(&self.threads, &self.rpc, svid, listener, peers, services);
        (server.unwrap(), address)
    }

    pub fn connect(&self, svid: SvidCell, address: Address) -> Connector {
        let options = ConnectorOptions {
            name: "peer",
            address,
            authority: "localhost".to_owned(),
            dial_timeout: Duration::from_secs(5),
            backoff_max: Duration::from_millis(20),
        };
        Connector::start(&self.threads, &self.rpc, svid, options).unwrap()
    }

    pub fn connect_unix(&self, svid: SvidCell, path: &Path) -> Connector {
        self.connect(svid, Address::Unix(path.to_owned()))
    }

    pub fn acquire(&self, connector: &Connector) -> Arc<Connection> {
        connector.acquire(soon(), &self.stop).unwrap()
    }

    pub fn echo(
        &self,
        connection: &Connection,
        name: &str,
        headers: &[(String, String)],
    ) -> Result<Reply<NetworkService>, RpcError> {
        let mut options = Options::with_timeout(Duration::from_secs(5));
        options.headers = headers.to_vec();
        call::unary(
            connection.channel(),
            &NS_REGISTER,
            &named(name),
            &options,
            &self.stop,
        )
    }

    /// Waits for the next failed attempt to connect, and says why.
    pub fn refusal(&self, connector: &Connector) -> String {
        let changed = connector.state().subscribe();
        loop {
            match connector.state().get() {
                ConnectorState::Connecting {
                    last_error: Some(error),
                } => return error,
                ConnectorState::Ready => panic!("the connection was made"),
                ConnectorState::Connecting { last_error: None } => {}
            }
            changed.recv_deadline(soon()).unwrap();
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The bound of everything that is expected to happen.
pub fn soon() -> Instant {
    clock::now() + Duration::from_secs(10)
}

pub fn named(name: &str) -> NetworkService {
    NetworkService {
        name: name.to_owned(),
        ..Default::default()
    }
}

/// `Register` answers the name, and the caller's ID as payload; it returns the
/// header `x-back`, and refuses a token that does not fit the session.
/// `Find` answers as many messages as the name's length, then stays open.
fn echo(peers: &PeerTable, open: &Watch<usize>) -> Service {
    let (registers, finds, open) = (peers.clone(), peers.clone(), open.clone());
    ServiceBuilder::new()
        .add_unary_handler(&NS_REGISTER, move |context, request, sink| {
            register(&registers, &context, request, sink);
        })
        .add_server_streaming_handler(&NS_FIND, move |context, request, sink| {
            find(&finds, &open, &context, &request, sink);
        })
        .build()
}

fn register(
    peers: &PeerTable,
    context: &RpcContext<'_>,
    request: NetworkService,
    mut sink: UnarySink<NetworkService>,
) {
    let judged = peers
        .lookup(&context.peer())
        .ok_or_else(|| "no such connection".to_owned())
        .and_then(|peer| {
            check_token(context, &peer)?;
            Ok(peer)
        });
    let answered = match judged {
        Ok(peer) => {
            if let Some(path) = request.name.strip_prefix("attach:") {
                for _ in 0..2 {
                    peer.attach(std::fs::File::open(path).unwrap().into());
                }
            }
            let mut headers = MetadataBuilder::new();
            for (name, value) in context.request_headers() {
                if name == "x-back" {
                    headers
                        .add_str(name, std::str::from_utf8(value).unwrap())
                        .unwrap();
                }
            }
            sink.set_headers(headers.build());
            let mut answer = request;
            answer.payload = peer.peer.id.to_string();
            sink.success(answer)
        }
        Err(error) => sink.fail(RpcStatus::with_message(
            RpcStatusCode::PERMISSION_DENIED,
            error,
        )),
    };
    context.spawn(async move {
        let _ = answered.await;
    });
}

fn check_token(
    context: &RpcContext<'_>,
    peer: &meridio_proxy::transport::server::PeerConnection,
) -> Result<(), String> {
    let headers = context.request_headers();
    let find = |wanted| {
        headers
            .iter()
            .find(|(name, _)| *name == wanted)
            .map(|(_, value)| std::str::from_utf8(value).unwrap())
    };
    let Some(token) = find("nsm-client-token") else {
        return Ok(());
    };
    find("nsm-client-token-expires").ok_or("no expiry")?;
    jwt::verify(token, &peer.peer.leaf).map_err(|error| error.to_string())?;
    let claims = jwt::claims(token).map_err(|error| error.to_string())?;
    if claims.sub != peer.peer.id.as_str() {
        return Err(format!("token of {}", claims.sub));
    }
    if claims.aud != Some(vec![peer.identity.svid.id.to_string()]) {
        return Err(format!("token for {:?}", claims.aud));
    }
    Ok(())
}

fn find(
    peers: &PeerTable,
    open: &Watch<usize>,
    context: &RpcContext<'_>,
    request: &NetworkServiceQuery,
    sink: ServerStreamingSink<NetworkServiceResponse>,
) {
    assert!(peers.lookup(&context.peer()).is_some());
    let count = request.network_service.name.len();
    let open = open.clone();
    // Only gRPC's one server thread counts, so this is no race.
    open.set(open.get() + 1);
    context.spawn(async move {
        stream(count, sink).await;
        open.set(open.get() - 1);
    });
}

async fn stream(count: usize, mut sink: ServerStreamingSink<NetworkServiceResponse>) {
    for _ in 0..count {
        let answer = NetworkServiceResponse::default();
        if sink.send((answer, WriteFlags::default())).await.is_err() {
            return;
        }
    }
    // Open until the client goes.
    poll_fn(|context| match Pin::new(&mut sink).poll_ready(context) {
        Poll::Ready(Err(_)) => Poll::Ready(()),
        _ => Poll::Pending,
    })
    .await;
}
