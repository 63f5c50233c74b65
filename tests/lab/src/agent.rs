//! A SPIRE agent as a workload sees it: the Workload API on a unix socket, in
//! plain gRPC. Every push is a full `X509SVIDResponse`. One agent serves one
//! workload; it does not look at who connects.

mod faults;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::future::poll_fn;
use futures_util::task::AtomicWaker;
use futures_util::{Sink, SinkExt};
use grpcio::{
    RpcContext, RpcStatus, RpcStatusCode, Server, ServerCredentials, ServerStreamingSink,
    ServiceBuilder, WriteFlags,
};
use meridio_proxy::proto::workload::{X509SVID, X509SVIDResponse};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method::FETCH_X509_SVID;
use meridio_proxy::rpc::server::shut_down;
use meridio_proxy::sync::watch::Watch;
use parking_lot::Mutex;

use crate::pki::{Pki, Svid};
use crate::wire::Wire;

/// The agent. Dropping it ends the server.
pub struct Agent {
    path: PathBuf,
    rpc: Rpc,
    shared: Arc<Shared>,
    /// The line ends before the server.
    server: Option<(Wire, Server)>,
}

struct Shared {
    state: Mutex<State>,
    /// Streams that are open.
    open: Watch<usize>,
    /// Calls that came, refused ones included.
    calls: Watch<usize>,
}

struct State {
    pki: Pki,
    id: String,
    ttl: Duration,
    federated: Vec<Pki>,
    /// Why there is no SVID, if there is none.
    refusal: Option<RpcStatus>,
    /// What a new stream is told first.
    current: X509SVIDResponse,
    streams: Vec<Arc<Stream>>,
}

enum Push {
    Response(X509SVIDResponse),
    End(RpcStatus),
}

#[derive(Default)]
struct Stream {
    queue: Mutex<VecDeque<Push>>,
    waker: AtomicWaker,
}

impl Stream {
    fn push(&self, push: Push) {
        self.queue.lock().push_back(push);
        self.waker.wake();
    }
}

impl Agent {
    /// Serves on the socket `path`, with SVIDs of `pki` for `id`.
    #[must_use]
    pub fn start(path: &Path, pki: &Pki, id: &str, ttl: Duration) -> Self {
        let mut state = State {
            pki: pki.clone(),
            id: id.to_owned(),
            ttl,
            federated: Vec::new(),
            refusal: None,
            current: X509SVIDResponse::default(),
            streams: Vec::new(),
        };
        state.renew();
        let mut agent = Self {
            path: path.to_owned(),
            rpc: Rpc::new(),
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                open: Watch::new(0),
                calls: Watch::new(0),
            }),
            server: None,
        };
        agent.restart();
        agent
    }

    /// The value for `SPIFFE_ENDPOINT_SOCKET`.
    #[must_use]
    pub fn address(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Issues a new SVID (new key) and pushes it.
    pub fn rotate(&self) {
        let mut state = self.shared.state.lock();
        state.renew();
        state.broadcast();
    }

    /// The lifetime of SVIDs from the next rotation on.
    pub fn set_ttl(&self, ttl: Duration) {
        self.shared.state.lock().ttl = ttl;
    }

    /// The ID of SVIDs from the next rotation on.
    pub fn set_id(&self, id: &str) {
        id.clone_into(&mut self.shared.state.lock().id);
    }

    /// Replaces the authority and issues and pushes a new SVID.
    pub fn set_pki(&self, pki: &Pki) {
        let mut state = self.shared.state.lock();
        state.pki = pki.clone();
        state.renew();
        state.broadcast();
    }

    /// Federates with other trust domains and pushes their bundles.
    pub fn set_federated(&self, others: &[&Pki]) {
        let mut state = self.shared.state.lock();
        state.federated = others.iter().map(|&pki| pki.clone()).collect();
        state.renew();
        state.broadcast();
    }

    /// Pushes `response` as it is, good or bad; new streams get it too.
    pub fn push(&self, response: X509SVIDResponse) {
        let mut state = self.shared.state.lock();
        state.current = response;
        state.broadcast();
    }

    /// Ends all streams with PERMISSION_DENIED and refuses new ones, as for a
    /// workload without a registration entry; `false` takes it back.
    pub fn withhold(&self, withheld: bool) {
        self.refuse(withheld.then(no_identity).as_ref());
    }

    /// Ends all streams with `status` and refuses new ones.
    fn refuse(&self, status: Option<&RpcStatus>) {
        self.shared.state.lock().refusal = status.cloned();
        if let Some(status) = status {
            self.end_streams(status.clone());
        }
    }

    /// Ends all streams as a broken connection does.
    pub fn drop_streams(&self) {
        self.end_streams(unavailable());
    }

    /// Ends all streams with `status`.
    pub fn end_streams(&self, status: RpcStatus) {
        for stream in self.shared.state.lock().streams.drain(..) {
            stream.push(Push::End(status.clone()));
        }
    }

    /// Ends the server; the socket stays where it is, as after a crash.
    pub fn stop(&mut self) {
        if let Some((wire, server)) = self.server.take() {
            self.drop_streams();
            drop(wire);
            shut_down(server, Instant::now() + Duration::from_secs(2));
        }
    }

    /// Serves again, on the same socket. No effect when it does already.
    pub fn restart(&mut self) {
        if self.server.is_some() {
            return;
        }
        let inner = self.path.with_extension("inner");
        for path in [&self.path, &inner] {
            let _ = std::fs::remove_file(path);
        }
        let shared = Arc::clone(&self.shared);
        let service = ServiceBuilder::new()
            .add_server_streaming_handler(&FETCH_X509_SVID, move |context, _request, sink| {
                fetch(&shared, &context, sink);
            })
            .build();
        let mut server = self.rpc.server().register_service(service).build().unwrap();
        server
            .add_listening_port(
                format!("unix:{}", inner.display()),
                ServerCredentials::insecure(),
            )
            .unwrap();
        server.start();
        let wire = Wire::unix(&self.path, &inner).unwrap();
        self.server = Some((wire, server));
    }

    /// How many streams are open; can be waited for.
    #[must_use]
    pub fn open_streams(&self) -> &Watch<usize> {
        &self.shared.open
    }

    /// How many calls came so far, refused ones included.
    #[must_use]
    pub fn calls(&self) -> &Watch<usize> {
        &self.shared.calls
    }

    /// The response that a new stream gets at present.
    #[must_use]
    pub fn current(&self) -> X509SVIDResponse {
        self.shared.state.lock().current.clone()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop();
        for path in [&self.path, &self.path.with_extension("inner")] {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl State {
    fn renew(&mut self) {
        let svid = self.pki.issue(&self.id, self.ttl);
        let others: Vec<&Pki> = self.federated.iter().collect();
        self.current = response(&svid, &others);
    }

    fn broadcast(&self) {
        for stream in &self.streams {
            stream.push(Push::Response(self.current.clone()));
        }
    }
}

/// The response with this one SVID.
#[must_use]
pub fn response(svid: &Svid, federated: &[&Pki]) -> X509SVIDResponse {
    let mut response = X509SVIDResponse::default();
    response.svids.push(X509SVID {
        spiffe_id: svid.id.clone(),
        x509_svid: svid.chain_der.clone(),
        x509_svid_key: svid.key_pkcs8_der.clone(),
        bundle: svid.bundle_der.clone(),
        ..Default::default()
    });
    for pki in federated {
        response
            .federated_bundles
            .insert(format!("spiffe://{}", pki.trust_domain()), pki.bundle_der());
    }
    response
}

fn no_identity() -> RpcStatus {
    RpcStatus::with_message(
        RpcStatusCode::PERMISSION_DENIED,
        "no identity issued".to_owned(),
    )
}

fn unavailable() -> RpcStatus {
    RpcStatus::with_message(RpcStatusCode::UNAVAILABLE, "agent is going away".to_owned())
}

/// SPIRE wants the security header exactly once, so that a browser cannot be
/// made to call the socket.
fn has_security_header(context: &RpcContext<'_>) -> bool {
    let values: Vec<&[u8]> = context
        .request_headers()
        .iter()
        .filter(|(name, _)| *name == "workload.spiffe.io")
        .map(|(_, value)| value)
        .collect();
    values == [b"true"]
}

fn fetch(
    shared: &Arc<Shared>,
    context: &RpcContext<'_>,
    sink: ServerStreamingSink<X509SVIDResponse>,
) {
    shared.calls.set(shared.calls.get() + 1);
    let stream = match admit(shared, context) {
        Ok(stream) => stream,
        Err(status) => {
            let failed = sink.fail(status);
            context.spawn(async move {
                let _ = failed.await;
            });
            return;
        }
    };
    let shared = Arc::clone(shared);
    context.spawn(async move {
        count(&shared.open, 1);
        serve(&stream, sink).await;
        shared
            .state
            .lock()
            .streams
            .retain(|other| !Arc::ptr_eq(other, &stream));
        count(&shared.open, -1);
    });
}

/// A new stream with the present state in its queue, or why there is none.
fn admit(shared: &Shared, context: &RpcContext<'_>) -> Result<Arc<Stream>, RpcStatus> {
    if !has_security_header(context) {
        return Err(RpcStatus::with_message(
            RpcStatusCode::INVALID_ARGUMENT,
            "security header missing from request".to_owned(),
        ));
    }
    let mut state = shared.state.lock();
    if let Some(status) = &state.refusal {
        return Err(status.clone());
    }
    let stream = Arc::new(Stream::default());
    stream.push(Push::Response(state.current.clone()));
    state.streams.push(Arc::clone(&stream));
    Ok(stream)
}

/// Only the gRPC server's one poll thread counts, so this is no race.
fn count(cell: &Watch<usize>, by: isize) {
    cell.set(cell.get().checked_add_signed(by).unwrap());
}

async fn serve(stream: &Stream, mut sink: ServerStreamingSink<X509SVIDResponse>) {
    loop {
        let next = poll_fn(|context| next_push(stream, &mut sink, context)).await;
        match next {
            Some(Push::Response(response)) => {
                if sink.send((response, WriteFlags::default())).await.is_err() {
                    return;
                }
            }
            Some(Push::End(status)) => {
                let _ = sink.fail(status).await;
                return;
            }
            None => return,
        }
    }
}

/// The next thing to send; `None` when the client has gone.
fn next_push(
    stream: &Stream,
    sink: &mut ServerStreamingSink<X509SVIDResponse>,
    context: &mut Context<'_>,
) -> Poll<Option<Push>> {
    stream.waker.register(context.waker());
    if let Some(push) = stream.queue.lock().pop_front() {
        return Poll::Ready(Some(push));
    }
    match Pin::new(sink).poll_ready(context) {
        Poll::Ready(Err(_)) => Poll::Ready(None),
        _ => Poll::Pending,
    }
}
