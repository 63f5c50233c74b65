//! The NSP service: `ConfigurationManager.WatchVip` and `TargetRegistry`, with
//! full lists at the begin of each stream and at every event, as Meridio's NSP
//! sends them, over mTLS on TCP.

mod faults;
pub(crate) mod feed;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::SinkExt;
use grpcio::{
    RpcContext, RpcStatus, RpcStatusCode, ServerStreamingSink, Service, ServiceBuilder, UnarySink,
    WriteFlags,
};
use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::proto::health::{HealthCheckRequest, HealthCheckResponse};
use meridio_proxy::proto::nsp::target::Status;
use meridio_proxy::proto::nsp::{Target, TargetResponse, Trench, Vip, VipResponse};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::transport::server::{PeerTable, TlsServer};
use parking_lot::{Condvar, Mutex};
use protobuf::MessageField;
use protobuf::well_known_types::empty::Empty;

use crate::fault::dropped;
use crate::spoil::Spoils;
use crate::wire::Wire;
use feed::Feed;

/// How long a stop waits for running calls.
const STOP_LIMIT: Duration = Duration::from_millis(200);

/// NSP; clones refer to the same. Its state outlives its server.
#[derive(Clone)]
pub struct Nsp {
    shared: Arc<Shared>,
    // Beside what its handlers share, so that the last clone ends it.
    server: Arc<Mutex<Option<(Wire, TlsServer)>>>,
}

struct Shared {
    trench: String,
    spoils: Spoils,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    vips: Vec<String>,
    begins_empty: bool,
    refusal: Option<RpcStatus>,
    vip_watches: Vec<Watch<Vip, VipResponse>>,
    /// All watches of VIPs that were ever opened.
    vip_watches_seen: Vec<Vip>,
    targets: BTreeMap<String, Target>,
    target_watches: Vec<Watch<Target, TargetResponse>>,
}

/// An open stream: what was asked, and where messages go.
struct Watch<Req, Resp> {
    request: Req,
    feed: Feed<Out<Resp>>,
}

/// What a stream's future does next.
enum Out<T> {
    Send(T),
    Fail(RpcStatus),
}

impl Nsp {
    /// An NSP that knows `trench` and no VIPs, not serving yet.
    pub fn new(trench: &str) -> Self {
        Self {
            shared: Arc::new(Shared {
                trench: trench.to_owned(),
                spoils: Spoils::default(),
                state: Mutex::new(State::default()),
                changed: Condvar::new(),
            }),
            server: Arc::default(),
        }
    }

    /// Serves on `listener`, which the caller bound in the namespace it wants.
    pub fn serve(
        &self,
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        listener: TcpListener,
    ) -> Result<(), String> {
        let services = vec![
            configuration(&self.shared),
            registry(&self.shared),
            health_service(),
        ];
        let peers = PeerTable::default();
        let (wire, listener) = Wire::tcp(listener).map_err(|error| format!("NSP: {error}"))?;
        let server = TlsServer::start_tcp(threads, rpc, svid, listener, peers, services)
            .map_err(|error| format!("NSP: {error:?}"))?;
        *self.server.lock() = Some((wire, server));
        Ok(())
    }

    /// Ends the server and all streams; what is known stays.
    pub fn stop(&self) {
        let server = self.server.lock().take();
        self.close_streams();
        if let Some((wire, server)) = server {
            drop(wire);
            server.stop(clock::now() + STOP_LIMIT);
        }
    }

    /// Replaces the VIPs, verbatim, and sends them to all watches.
    pub fn set_vips<'a>(&self, vips: impl IntoIterator<Item = &'a str>) {
        let mut state = self.shared.state.lock();
        state.vips = vips.into_iter().map(str::to_owned).collect();
        self.shared.send_vips(&state);
    }

    /// Sends the present list again, as the real one does at each event of its
    /// configuration.
    pub fn repeat_vips(&self) {
        self.shared.send_vips(&self.shared.state.lock());
    }

    /// Which lists are spoilt: WatchVip's, by the path of that method.
    pub fn spoils(&self) -> &Spoils {
        &self.shared.spoils
    }

    /// While set, a new stream begins with an empty list, as with an NSP that
    /// has not read its configuration yet; the next `set_vips` or
    /// `repeat_vips` sends the real one.
    pub fn begin_empty(&self, begins_empty: bool) {
        self.shared.state.lock().begins_empty = begins_empty;
    }

    /// Ends all streams with UNAVAILABLE.
    pub fn drop_streams(&self) {
        self.end_streams(&dropped());
    }

    fn end_streams(&self, status: &RpcStatus) {
        let mut state = self.shared.state.lock();
        for watch in state.vip_watches.drain(..) {
            watch.feed.push(Out::Fail(status.clone()));
        }
        for watch in state.target_watches.drain(..) {
            watch.feed.push(Out::Fail(status.clone()));
        }
    }

    /// Ends all streams in order.
    pub fn close_streams(&self) {
        let mut state = self.shared.state.lock();
        for watch in state.vip_watches.drain(..) {
            watch.feed.close();
        }
        for watch in state.target_watches.drain(..) {
            watch.feed.close();
        }
    }

    /// Waits until `count` watches of VIPs were opened since the start, and
    /// returns their requests.
    pub fn wait_vip_watches(&self, count: usize, deadline: Instant) -> Result<Vec<Vip>, String> {
        let mut state = self.shared.state.lock();
        while state.vip_watches_seen.len() < count {
            if self
                .shared
                .changed
                .wait_until(&mut state, deadline)
                .timed_out()
            {
                let seen = state.vip_watches_seen.len();
                return Err(format!("{seen} watches of VIPs, not {count}"));
            }
        }
        Ok(state.vip_watches_seen.clone())
    }

    /// The registered targets.
    pub fn targets(&self) -> Vec<Target> {
        self.shared.state.lock().targets.values().cloned().collect()
    }

    /// Waits until `count` targets are registered.
    pub fn wait_targets(&self, count: usize, deadline: Instant) -> Result<Vec<Target>, String> {
        let mut state = self.shared.state.lock();
        while state.targets.len() != count {
            if self
                .shared
                .changed
                .wait_until(&mut state, deadline)
                .timed_out()
            {
                return Err(format!("{} targets, not {count}", state.targets.len()));
            }
        }
        Ok(state.targets.values().cloned().collect())
    }

    /// Registers a target without a call, for peers in the same process.
    pub fn register(&self, target: Target) {
        self.shared.register(target);
    }

    /// Removes a target without a call.
    pub fn unregister(&self, target: &Target) {
        self.shared.unregister(target);
    }
}

impl Shared {
    fn register(&self, target: Target) {
        let mut state = self.state.lock();
        state.targets.insert(key(&target), target);
        self.send_targets(&state);
    }

    fn unregister(&self, target: &Target) {
        let mut state = self.state.lock();
        state.targets.remove(&key(target));
        self.send_targets(&state);
    }

    fn send_vips(&self, state: &State) {
        for watch in &state.vip_watches {
            let list = self.vip_list(state, &watch.request);
            watch.feed.push(Out::Send(list));
        }
    }

    /// The VIPs that match `filter`; an empty name matches all, as in
    /// `Vip.Equals` (api/nsp/v1/utils.go).
    fn vip_list(&self, state: &State, filter: &Vip) -> VipResponse {
        let own = &self.trench;
        let matches = filter
            .trench
            .as_ref()
            .is_none_or(|trench| trench.name.is_empty() || trench.name == *own);
        let all = state.vips.iter().enumerate().map(|(n, address)| Vip {
            name: format!("vip-{n}"),
            address: address.clone(),
            trench: MessageField::some(Trench {
                name: own.clone(),
                ..Trench::default()
            }),
            ..Vip::default()
        });
        let vips = all
            .filter(|vip| matches && (filter.name.is_empty() || filter.name == vip.name))
            .collect();
        let mut list = VipResponse {
            vips,
            ..VipResponse::default()
        };
        self.spoils.apply(method::WATCH_VIP.name, &mut list);
        list
    }

    fn send_targets(&self, state: &State) {
        for watch in &state.target_watches {
            let list = target_list(state, &watch.request);
            watch.feed.push(Out::Send(list));
        }
        self.changed.notify_all();
    }
}

fn configuration(shared: &Arc<Shared>) -> Service {
    let nsp = Arc::clone(shared);
    let watch = move |context: RpcContext<'_>, request: Vip, sink| {
        let feed = Feed::new();
        let mut state = nsp.state.lock();
        if let Some(status) = state.refusal.clone() {
            feed.push(Out::Fail(status));
            context.spawn(stream(feed, sink));
            return;
        }
        let first = if state.begins_empty {
            VipResponse::default()
        } else {
            nsp.vip_list(&state, &request)
        };
        feed.push(Out::Send(first));
        state.vip_watches_seen.push(request.clone());
        let feed_end = feed.clone();
        state.vip_watches.push(Watch { request, feed });
        nsp.changed.notify_all();
        drop(state);
        context.spawn(stream(feed_end, sink));
    };
    ServiceBuilder::new()
        .add_server_streaming_handler(&method::WATCH_VIP, watch)
        .build()
}

fn registry(shared: &Arc<Shared>) -> Service {
    let nsp = Arc::clone(shared);
    let register = move |context: RpcContext<'_>, target: Target, sink: UnarySink<Empty>| {
        if target.ips.is_empty() || target.stream.is_none() {
            let text = "a target has addresses and a stream".to_owned();
            fail(&context, sink, text);
            return;
        }
        nsp.register(target);
        answer(&context, sink, Empty::new());
    };
    let nsp = Arc::clone(shared);
    let unregister = move |context: RpcContext<'_>, target: Target, sink: UnarySink<Empty>| {
        nsp.unregister(&target);
        answer(&context, sink, Empty::new());
    };
    let nsp = Arc::clone(shared);
    let watch = move |context: RpcContext<'_>, request: Target, sink| {
        let feed = Feed::new();
        let mut state = nsp.state.lock();
        feed.push(Out::Send(target_list(&state, &request)));
        let feed_end = feed.clone();
        state.target_watches.push(Watch { request, feed });
        drop(state);
        context.spawn(stream(feed_end, sink));
    };
    ServiceBuilder::new()
        .add_unary_handler(&method::TARGET_REGISTER, register)
        .add_unary_handler(&method::TARGET_UNREGISTER, unregister)
        .add_server_streaming_handler(&method::TARGET_WATCH, watch)
        .build()
}

/// What identifies a target: its stream and its addresses.
fn key(target: &Target) -> String {
    let mut ips = target.ips.clone();
    ips.sort();
    format!("{} {}", target.stream.name, ips.join(","))
}

fn target_list(state: &State, filter: &Target) -> TargetResponse {
    let is_match = |given: &str, found: &str| given.is_empty() || given == found;
    let matches = |target: &&Target| {
        let (given, found) = (&filter.stream, &target.stream);
        is_match(&given.name, &found.name)
            && is_match(&given.conduit.name, &found.conduit.name)
            && is_match(&given.conduit.trench.name, &found.conduit.trench.name)
            && filter.type_ == target.type_
            && (filter.status == Status::ANY.into() || filter.status == target.status)
    };
    TargetResponse {
        targets: state.targets.values().filter(matches).cloned().collect(),
        ..TargetResponse::default()
    }
}

/// Sends what comes until the feed ends or the peer has gone.
async fn stream<T>(feed: Feed<Out<T>>, mut sink: ServerStreamingSink<T>) {
    while let Some(out) = feed.next().await {
        match out {
            Out::Send(message) => {
                if sink.send((message, WriteFlags::default())).await.is_err() {
                    return;
                }
            }
            Out::Fail(status) => {
                let _ = sink.fail(status).await;
                return;
            }
        }
    }
    let _ = sink.close().await;
}

/// Answers a call that the handler itself decided.
pub(crate) fn answer<T: Send + 'static>(context: &RpcContext<'_>, sink: UnarySink<T>, message: T) {
    let sent = sink.success(message);
    context.spawn(async move {
        let _ = sent.await;
    });
}

/// Refuses a call as Meridio's services do: a plain Go error is UNKNOWN.
fn fail<T: 'static>(context: &RpcContext<'_>, sink: UnarySink<T>, text: String) {
    let sent = sink.fail(RpcStatus::with_message(RpcStatusCode::UNKNOWN, text));
    context.spawn(async move {
        let _ = sent.await;
    });
}

/// gRPC's health service, SERVING for every name.
pub(crate) fn health_service() -> Service {
    let check = |context: RpcContext<'_>, _: HealthCheckRequest, sink| {
        let response = HealthCheckResponse {
            status: ServingStatus::SERVING.into(),
            ..HealthCheckResponse::default()
        };
        answer(&context, sink, response);
    };
    ServiceBuilder::new()
        .add_unary_handler(&method::HEALTH_CHECK, check)
        .build()
}
