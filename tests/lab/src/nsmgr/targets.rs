//! The targets as clients of nsmgr: what Meridio's TAPA does with NSM's SDK.
//! Each has an identity of its own and dials nsmgr anew for each call.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Sender, select};
use meridio_proxy::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, Path, PathSegment,
    State,
};
use meridio_proxy::proto::connectioncontext::IPContext;
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::rpc::pump::Item;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{STACK_SMALL, ThreadHandle, Threads};
use parking_lot::Mutex;

use super::Inner;
use crate::client::{NsmClient, Session};
use crate::forwarder::{mechanism, netns_url};
use crate::path::earliest_expiry;
use crate::policy::Hop;

/// A try of Meridio's TAPA; less where tokens live so short that nsmgr, which
/// ends a connection that much before its token, would end it at once.
const REQUEST_LIMIT: Duration = Duration::from_secs(15);

/// What a target wants.
#[derive(Clone)]
pub struct TargetRequest {
    /// The connection's id: IPAM's key, and the end of the aliases.
    pub id: String,
    /// The target's name: that of its path segment.
    pub name: String,
    /// The network service, `proxy.<conduit>.<trench>.<namespace>`.
    pub service: String,
    /// Its namespace.
    pub netns: Arc<OwnedFd>,
    /// The name of its interface.
    pub ifname: String,
    /// Labels of the request; `nodeName` at least.
    pub labels: HashMap<String, String>,
    /// Empty at first, and to keep what there is; afterwards the last answer's
    /// with VIPs among `src_ip_addrs` and their policy routes.
    pub ip_context: IPContext,
}

/// A target's connection went DOWN; `Inner::connect_target` heals it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetEvent {
    pub id: String,
    pub reason: String,
}

/// The targets by id; the lock of one is held during its calls.
#[derive(Default)]
pub struct Targets(Mutex<BTreeMap<String, Arc<Mutex<Option<Target>>>>>);

impl Targets {
    /// Forgets a target without a Close.
    pub(super) fn forget(&self, id: &str) {
        let gone = self.0.lock().remove(id);
        drop(gone);
    }

    /// A target takes its connection for DOWN, as when its monitor ends.
    pub(super) fn lose_sight(&self, id: &str) {
        let slot = self.0.lock().get(id).cloned();
        let Some(slot) = slot else { return };
        if let Some(target) = slot.lock().as_ref() {
            target.down.store(true, Ordering::Release);
        }
    }

    /// Forgets all targets without a Close.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.0.lock());
        drop(all);
    }
}

pub struct Target {
    client: NsmClient,
    request: TargetRequest,
    connection: Connection,
    down: Arc<AtomicBool>,
    // INVARIANT: before the session, so that its end is not taken for DOWN.
    _watch: ThreadHandle,
    _session: Session,
}

impl Inner {
    fn target(&self, id: &str) -> Arc<Mutex<Option<Target>>> {
        Arc::clone(self.targets.0.lock().entry(id.to_owned()).or_default())
    }

    pub(super) fn connect_target(&self, request: TargetRequest) -> Result<Connection, String> {
        let slot = self.target(&request.id);
        let mut slot = slot.lock();
        self.connect(&mut slot, request)
    }

    fn connect(
        &self,
        slot: &mut Option<Target>,
        request: TargetRequest,
    ) -> Result<Connection, String> {
        let client = match slot.as_ref() {
            Some(target) => target.client.clone(),
            None => self.target_client(&request.name),
        };
        let asked = asked(&request, slot.as_ref())?;
        let session = client
            .dial(&self.options.socket)
            .map_err(|e| e.to_string())?;
        let connection = session
            .request(&asked, &[&request.netns], self.request_limit())
            .map_err(|error| format!("Request of target {}: {error}", request.id))?;
        let down = Arc::new(AtomicBool::new(false));
        let watch = self
            .watch_target(&session, &request, &down)
            .inspect_err(|_| {
                // Nobody would ever close it.
                let _ = session.close(&connection, self.request_limit());
            })?;
        self.refresh_target(&request.id, &connection);
        *slot = Some(Target {
            client,
            request,
            connection: connection.clone(),
            down,
            _watch: watch,
            _session: session,
        });
        Ok(connection)
    }

    pub(super) fn close_target(&self, id: &str) -> Result<(), String> {
        self.timers.cancel(&format!("target/{id}"));
        let slot = self.target(id);
        let Some(target) = slot.lock().take() else {
            return Ok(());
        };
        let session = target.client.dial(&self.options.socket);
        let closed = session.and_then(|s| s.close(&target.connection, self.request_limit()));
        closed.map_err(|error| format!("Close of target {id}: {error}"))
    }

    fn request_limit(&self) -> Duration {
        REQUEST_LIMIT.min(self.options.token_lifetime / 3)
    }

    fn target_client(&self, name: &str) -> NsmClient {
        let (trust, lifetime) = (&self.options.trust, self.options.token_lifetime);
        let hop = Hop::new(trust, &format!("ns/lab/pod/{name}"), name, lifetime);
        NsmClient::new(hop, self.rpc.clone())
    }

    /// A fifth of the earliest expiry after each answer, as NSM's SDK.
    fn refresh_target(&self, id: &str, connection: &Connection) {
        let left = earliest_expiry(connection)
            .and_then(|at| at.duration_since(clock::wall()).ok())
            .unwrap_or_default();
        let delay = (left / 5).max(Duration::from_secs(1));
        let id = id.to_owned();
        self.later(&format!("target/{id}"), delay, move |inner| {
            let slot = inner.target(&id);
            let mut slot = slot.lock();
            let Some(target) = slot.as_ref() else { return };
            // A connection that is down is its owner's to heal.
            if target.down.load(Ordering::Acquire) {
                return;
            }
            let mut request = target.request.clone();
            request.ip_context = IPContext::new();
            if let Err(reason) = inner.connect(&mut slot, request) {
                tell(&inner.events.0, &id, &reason);
            }
        });
    }

    fn watch_target(
        &self,
        session: &Session,
        request: &TargetRequest,
        down: &Arc<AtomicBool>,
    ) -> Result<ThreadHandle, String> {
        let selector = MonitorScopeSelector {
            path_segments: vec![segment(&request.name, &request.id)],
            ..Default::default()
        };
        let pump = session
            .monitor(&selector)
            .map_err(|error| error.to_string())?;
        let (id, down) = (request.id.clone(), Arc::clone(down));
        let events = self.events.0.clone();
        Threads::unsupervised()
            .spawn("lab-target", STACK_SMALL, move |stop| {
                let reason = loop {
                    select! {
                        recv(pump.items()) -> item => {
                            if let Some(reason) = bad_news(item.ok(), &id) {
                                break reason;
                            }
                        }
                        recv(stop.receiver()) -> _ => return,
                    }
                };
                if !stop.is_set() && !down.swap(true, Ordering::AcqRel) {
                    tell(&events, &id, &reason);
                }
            })
            .map_err(|error| format!("thread: {error}"))
    }
}

fn tell(events: &Sender<TargetEvent>, id: &str, reason: &str) {
    // Nobody may be listening; the first events are as good as the last.
    let _ = events.try_send(TargetEvent {
        id: id.to_owned(),
        reason: reason.to_owned(),
    });
}

/// The Request of a target: new, refresh or update, or heal.
fn asked(request: &TargetRequest, known: Option<&Target>) -> Result<NetworkServiceRequest, String> {
    let mut connection = match known {
        Some(target) => target.connection.clone(),
        None => Connection {
            id: request.id.clone(),
            network_service: request.service.clone(),
            payload: "ETHERNET".to_owned(),
            labels: request.labels.clone(),
            path: Some(Path {
                path_segments: vec![segment(&request.name, &request.id)],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        },
    };
    let context = connection.context.mut_or_insert_default();
    if request.ip_context != IPContext::default() {
        context.ip_context = Some(request.ip_context.clone()).into();
        context.MTU = 0;
    }
    if known.is_some_and(|target| target.down.load(Ordering::Acquire)) {
        connection.mechanism.clear();
        connection.network_service_endpoint_name.clear();
        connection.state = State::RESELECT_REQUESTED.into();
    }
    let url = netns_url(&request.netns)?;
    Ok(NetworkServiceRequest {
        connection: Some(connection).into(),
        mechanism_preferences: vec![mechanism(&request.ifname, &url)],
        ..Default::default()
    })
}

fn segment(name: &str, id: &str) -> PathSegment {
    PathSegment {
        name: name.to_owned(),
        id: id.to_owned(),
        ..Default::default()
    }
}

/// Why a connection is down, if an item of its monitor says so.
fn bad_news(item: Option<Item<ConnectionEvent>>, id: &str) -> Option<String> {
    let event = match item {
        Some(Item::Message(event)) => event,
        Some(Item::Ended(Ok(()))) => return Some("monitor stream ended".to_owned()),
        Some(Item::Ended(Err(error))) => return Some(format!("monitor stream: {error}")),
        None => return Some("monitor stream is gone".to_owned()),
    };
    let mine = event
        .connections
        .values()
        .find(|c| c.path.index == 1 && c.path.path_segments.first().is_some_and(|s| s.id == id))?;
    if event.type_ == ConnectionEventType::DELETE.into() {
        return Some("DELETE".to_owned());
    }
    (mine.state == State::DOWN.into()).then(|| "DOWN".to_owned())
}
