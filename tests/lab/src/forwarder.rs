//! The forwarder: joins a client's end and an endpoint's end through the
//! descriptors of their namespaces, never by a name it was told. It dials the
//! endpoint anew for each Request through the `O_PATH` descriptor of its
//! socket, and keeps a monitor stream for each connection
//! (networkservice/common/{dial,discover,monitor,heal}).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::select;
use meridio_proxy::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment, State,
};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::pump::Item;
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::spiffe::PeerIdentity;
use meridio_proxy::spiffe::jwt::Token;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{STACK_SMALL, ThreadHandle, Threads};
use parking_lot::Mutex;

use crate::client::{NsmClient, Session};
use crate::datapath::{Datapath, End, LocalEndpoint};
use crate::path;
use crate::policy::{Hop, Notes, unknown};
use crate::tls::{file_id, inode_url};

mod answer;

pub use answer::{judge_answer, mechanism};

/// Accept, TLS and HTTP/2 settings of an endpoint (`NSM_DIAL_TIMEOUT`).
const DIAL_TIMEOUT: Duration = Duration::from_millis(750);

/// Where a connection leads.
#[derive(Clone)]
pub enum Destination {
    /// An endpoint in this process, with the identity of its path segment.
    Local(Arc<dyn LocalEndpoint>, Hop),
    /// An endpoint behind a socket file, by its name in the registry.
    Socket(String, Arc<OwnedFd>),
}

impl Destination {
    fn name(&self) -> String {
        match self {
            Self::Local(endpoint, _) => endpoint.name(),
            Self::Socket(name, _) => name.clone(),
        }
    }
}

/// The client's end: its namespace and the name it wants for the interface.
#[derive(Clone)]
pub struct ClientEnd {
    pub netns: Arc<OwnedFd>,
    pub ifname: String,
}

/// Told, with the id of nsmgr's segment, that a connection is down.
pub type Down = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// One call of nsmgr.
pub struct Call<'a> {
    /// nsmgr and its token for the forwarder.
    pub caller: &'a PeerIdentity,
    pub token: &'a Token,
    pub deadline: Instant,
}

pub struct Forwarder {
    pub hop: Hop,
    client: NsmClient,
    datapath: Arc<dyn Datapath>,
    notes: Notes,
    down: Down,
    crosses: Mutex<BTreeMap<String, Cross>>,
}

/// A connection that exists.
struct Cross {
    destination: Destination,
    /// As the endpoint answered it, with its mechanism.
    answer: Connection,
    /// The endpoint's namespace.
    netns: Arc<OwnedFd>,
    // INVARIANT: before the session, so that its end is not taken for DOWN.
    monitor: Option<ThreadHandle>,
    /// Keeps the connection on which the monitor runs; `None` for local ones.
    _session: Option<Session>,
}

/// What an endpoint answered: the connection, its namespace, and the session
/// that it came on unless it is local.
type Asked = (Connection, Arc<OwnedFd>, Option<Session>);

impl Forwarder {
    pub fn new(hop: Hop, rpc: Rpc, datapath: Arc<dyn Datapath>, notes: Notes, down: Down) -> Self {
        let mut client = NsmClient::new(hop.clone(), rpc);
        client.dial_timeout = DIAL_TIMEOUT;
        Self {
            hop,
            client,
            datapath,
            notes,
            down,
            crosses: Mutex::default(),
        }
    }

    /// Makes, refreshes or moves a connection; `connection` is as nsmgr holds
    /// it, and so is the answer.
    pub fn request(
        &self,
        mut connection: Connection,
        call: &Call<'_>,
        client: &ClientEnd,
        destination: &Destination,
    ) -> Result<Connection, RpcError> {
        let own = self.hop.identity();
        let of_client = connection.mechanism.clone();
        self.hop
            .admit(&mut connection, call.caller, call.token, &own)?;
        let id = connection.id.clone();
        let known = self.crosses.lock().remove(&id);
        let known = self.keep_or_close(known, &connection, destination, call);
        let established = known.is_some();
        if let Some(cross) = &known {
            connection.mechanism = cross.answer.mechanism.clone();
        } else {
            connection.mechanism.clear();
        }
        connection.network_service_endpoint_name = destination.name();
        let asked = match destination {
            Destination::Local(endpoint, hop) => self.ask_local(&connection, &**endpoint, hop),
            Destination::Socket(_, socket) => {
                // On a refresh the endpoint's own namespace travels back to it.
                let again = known.as_ref().map(|cross| Arc::clone(&cross.netns));
                self.ask_socket(&connection, socket, again.as_deref(), call)
            }
        };
        let cross = match asked.and_then(|asked| self.cross(destination, asked)) {
            Ok(cross) => cross,
            Err(error) => {
                // What was established stays so.
                known.map(|cross| self.crosses.lock().insert(id, cross));
                return Err(error);
            }
        };
        if let Err(reason) = self.join(&cross, client) {
            if established {
                self.crosses.lock().insert(id, cross);
            } else {
                self.close_endpoint(cross, call);
                self.datapath.disconnect(&id);
            }
            return Err(unknown(format!("data path: {reason}")));
        }
        if let Destination::Local(endpoint, _) = destination {
            endpoint.connected(&cross.answer);
        }
        let mut result = cross.answer.clone();
        self.crosses.lock().insert(id, cross);
        result.mechanism = of_client;
        path::leave(&mut result);
        Ok(result)
    }

    /// Ends a connection; one that is not known is no error.
    pub fn close(&self, mut connection: Connection, call: &Call<'_>) -> Result<(), RpcError> {
        let own = self.hop.identity();
        self.hop
            .admit(&mut connection, call.caller, call.token, &own)?;
        let known = self.crosses.lock().remove(&connection.id);
        if let Some(cross) = known {
            self.close_endpoint(cross, call);
            self.datapath.disconnect(&connection.id);
        }
        Ok(())
    }

    fn cross(&self, destination: &Destination, asked: Asked) -> Result<Cross, RpcError> {
        let (answer, netns, session) = asked;
        let monitor = match &session {
            Some(session) => Some(self.watch(session, &answer)?),
            None => None,
        };
        Ok(Cross {
            destination: destination.clone(),
            answer,
            netns,
            monitor,
            _session: session,
        })
    }

    /// Knows no connection any more; interfaces stay.
    pub fn forget(&self) {
        let gone = std::mem::take(&mut *self.crosses.lock());
        drop(gone);
    }

    /// Connections that exist.
    pub fn count(&self) -> usize {
        self.crosses.lock().len()
    }

    /// What a Request builds upon; a reselect, or another endpoint, first
    /// closes what is there.
    fn keep_or_close(
        &self,
        known: Option<Cross>,
        connection: &Connection,
        destination: &Destination,
        call: &Call<'_>,
    ) -> Option<Cross> {
        let cross = known?;
        let reselect = connection.state == State::RESELECT_REQUESTED.into();
        if !reselect && cross.destination.name() == destination.name() {
            return Some(cross);
        }
        self.close_endpoint(cross, call);
        self.datapath.disconnect(&connection.id);
        None
    }

    fn close_endpoint(&self, mut cross: Cross, call: &Call<'_>) {
        // Its DELETE is our own doing.
        cross.monitor = None;
        match &cross.destination {
            Destination::Local(endpoint, _) => endpoint.close(&cross.answer),
            Destination::Socket(_, socket) => {
                let left = call.deadline.saturating_duration_since(clock::now());
                // Errors are ignored, as in the SDK: the state goes anyway.
                if let Ok(session) = self.client.dial_file(socket) {
                    // The endpoint's own namespace travels back to it: the
                    // SDK's endpoints wait for it (mechanisms/recvfd).
                    session.dialed.attach(&cross.netns);
                    let _ = session.close(&cross.answer, left);
                }
            }
        }
    }

    fn ask_local(
        &self,
        connection: &Connection,
        endpoint: &dyn LocalEndpoint,
        hop: &Hop,
    ) -> Result<Asked, RpcError> {
        let mut asked = connection.clone();
        let peer = hop.as_peer();
        let token = self.hop.token(&peer)?;
        hop.admit(&mut asked, &self.hop.as_peer(), &token, &hop.identity())?;
        path::trim(&mut asked);
        if asked.mechanism.is_none() {
            asked.mechanism = Some(mechanism("", "")).into();
        }
        let id = connection.id.clone();
        let mut answer = endpoint.request(asked).map_err(unknown)?;
        path::leave(&mut answer);
        answer.id = id;
        answer.state = State::UP.into();
        Ok((answer, endpoint.netns(), None))
    }

    fn ask_socket(
        &self,
        connection: &Connection,
        socket: &OwnedFd,
        again: Option<&OwnedFd>,
        call: &Call<'_>,
    ) -> Result<Asked, RpcError> {
        let session = self.client.dial_file(socket)?;
        let mut request = NetworkServiceRequest::new();
        request.connection = Some(connection.clone()).into();
        if connection.mechanism.is_none() {
            let mut memif = mechanism("", "");
            memif.type_ = "MEMIF".to_owned();
            memif.parameters.clear();
            let mut kernel = mechanism("", "");
            kernel.parameters.clear();
            request.mechanism_preferences = vec![memif, kernel];
        }
        let left = call.deadline.saturating_duration_since(clock::now());
        let files: Vec<&OwnedFd> = again.into_iter().collect();
        let answer = session.request(&request, &files, left)?;
        let what = format!("endpoint answered {}", path::client_id(connection));
        let netns = judge_answer(connection, &answer, &session.dialed.peer, &self.hop)
            .and_then(|file| session.dialed.files.wait(file, call.deadline));
        match netns {
            Ok(netns) => Ok((answer, netns, Some(session))),
            Err(reason) => {
                self.notes.refuse(&what, &reason);
                let _ = session.close(&answer, left);
                Err(unknown(format!("{what}: {reason}")))
            }
        }
    }

    fn join(&self, cross: &Cross, client: &ClientEnd) -> Result<(), String> {
        let answer = &cross.answer;
        let client_id = path::client_id(answer);
        let name = answer.mechanism.parameters.get("name");
        let near = End {
            netns: Arc::clone(&client.netns),
            ifname: client.ifname.clone(),
            alias: format!("server-{client_id}"),
        };
        let far = End {
            netns: Arc::clone(&cross.netns),
            ifname: name.cloned().ok_or("the endpoint named no interface")?,
            alias: format!("client-{client_id}"),
        };
        self.datapath.connect(&answer.id, &near, &far, answer)
    }

    /// Follows an endpoint's monitor until the connection is replaced or
    /// closed; anything but good news means DOWN.
    fn watch(&self, session: &Session, answer: &Connection) -> Result<ThreadHandle, RpcError> {
        let path = &answer.path;
        let ours = &path.path_segments[path.index as usize];
        let nsmgr = path.path_segments[path.index as usize - 1].id.clone();
        let selector = MonitorScopeSelector {
            path_segments: vec![PathSegment {
                name: ours.name.clone(),
                id: ours.id.clone(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let pump = session.monitor(&selector)?;
        let mut watch = Watch {
            first: true,
            own: ours.id.clone(),
            index: path.index as usize,
            client: path::client_id(answer),
            notes: self.notes.clone(),
        };
        let down = Arc::clone(&self.down);
        Threads::unsupervised()
            .spawn("lab-fwd-watch", STACK_SMALL, move |stop| {
                let reason = loop {
                    select! {
                        recv(pump.items()) -> item => {
                            if let Err(reason) = watch.judge(item.ok()) {
                                break reason;
                            }
                        }
                        recv(stop.receiver()) -> _ => return,
                    }
                };
                if !stop.is_set() {
                    down(&nsmgr, &reason);
                }
            })
            .map_err(|error| unknown(format!("thread: {error}")))
    }
}

/// What a monitor stream is judged by.
struct Watch {
    /// No event has come yet.
    first: bool,
    own: String,
    index: usize,
    client: String,
    notes: Notes,
}

impl Watch {
    /// `Err` says why the connection is down.
    fn judge(&mut self, item: Option<Item<ConnectionEvent>>) -> Result<(), String> {
        let event = match item {
            Some(Item::Message(event)) => event,
            Some(Item::Ended(Ok(()))) => return Err("monitor stream ended".to_owned()),
            Some(Item::Ended(Err(error))) => return Err(format!("monitor stream: {error}")),
            None => return Err("monitor stream is gone".to_owned()),
        };
        let kind = event.type_.enum_value_or_default();
        let what = format!("monitor of {}", self.client);
        let initial = kind == ConnectionEventType::INITIAL_STATE_TRANSFER;
        if initial != std::mem::take(&mut self.first) {
            let reason = format!("{kind:?} at the wrong place of the stream");
            self.notes.violation(&what, &reason);
        }
        let mine = event.connections.values().find(|c| {
            let segment = c.path.path_segments.get(self.index);
            let index = c.path.index as usize;
            segment.is_some_and(|s| s.id == self.own)
                && (index == self.index || index == self.index + 1)
        });
        let Some(mine) = mine else {
            let reason = format!("{kind:?} without the connection");
            self.notes.violation(&what, &reason);
            return Ok(());
        };
        if kind == ConnectionEventType::DELETE {
            return Err("the endpoint closed the connection".to_owned());
        }
        if mine.state == State::DOWN.into() {
            return Err("the endpoint says DOWN".to_owned());
        }
        Ok(())
    }
}

/// The `inode://` URL of a namespace.
pub fn netns_url(netns: &OwnedFd) -> Result<String, String> {
    let copy = netns.try_clone().map_err(|e| format!("dup: {e}"))?;
    let (file, _) = file_id(copy).map_err(|e| format!("stat: {e}"))?;
    Ok(inode_url(file))
}
