//! nsmgr with registry and forwarder, as strict as the real ones, in one
//! process: NetworkService, MonitorConnection, both registries and health on
//! one mTLS unix socket. All clients come over that socket: the daemon, and the
//! lab's targets with identities of their own.
//!
//! Chain of a Request: `serve` (envelope, order of arrival) → `chain` (path,
//! tokens, policies, discovery, descriptors) → [`crate::forwarder`] → endpoint.

mod api;
mod chain;
mod discover;
mod faults;
pub(crate) mod parts;
mod registration;
mod serve;
mod targets;
mod tell;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::sync::clock;
use parking_lot::Mutex;

use crate::datapath::{Datapath, LocalEndpoint};
use crate::fault::dropped;
use crate::forwarder::Forwarder;
use crate::monitor::{Monitors, Outbox};
use crate::pki::Pki;
use crate::policy::{Hop, Notes, Owners};
use crate::registry::Registry;
use crate::spoil::Spoils;
use crate::tls::{Peers, TlsListener};
use meridio_proxy::proto::registry::NetworkServiceEndpointResponse;
use parts::{Gate, Timers, Turns};

pub use faults::{ForwarderProcess, LbProcess, RegistryProcess, TargetProcess};
pub use targets::{TargetEvent, TargetRequest};

/// What an nsmgr is made of.
#[derive(Clone)]
pub struct NsmgrOptions {
    /// Its unix socket.
    pub socket: PathBuf,
    /// Issues the identities of nsmgr, registry, forwarder, LBs and targets.
    pub trust: Arc<Pki>,
    /// The node's name: label `nodeName`, and part of the hops' names.
    pub node: String,
    /// What joins the ends of connections.
    pub datapath: Arc<dyn Datapath>,
    /// Lifetime of the tokens of all lab peers.
    pub token_lifetime: Duration,
}

/// A change to a connection that an answer tells.
type Tamper = Box<dyn Fn(&mut Connection) + Send>;

/// A running nsmgr; clones are the same one. The last one ends it.
#[derive(Clone)]
pub struct Nsmgr(Arc<Handle>);

struct Handle(Arc<Inner>);

impl Drop for Handle {
    /// Ends everything here, on the owner's thread: a call that still runs
    /// holds [`Inner`] a little longer.
    fn drop(&mut self) {
        let inner = &self.0;
        let listener = inner.listener.lock().take();
        inner.end_streams();
        drop(listener);
        inner.targets.clear();
    }
}

struct Inner {
    options: NsmgrOptions,
    rpc: Rpc,
    hop: Hop,
    notes: Notes,
    peers: Peers,
    turns: Arc<Turns>,
    gate: Gate,
    troubles: faults::Troubles,
    timers: Arc<Timers>,
    registry: Arc<Registry>,
    forwarder: Forwarder,
    /// The connections, as inside nsmgr, and those who follow them.
    monitors: Arc<Monitors>,
    finds: Mutex<Vec<Outbox<NetworkServiceEndpointResponse>>>,
    state: Mutex<State>,
    listener: Mutex<Option<TlsListener>>,
    spoils: Spoils,
    tamper: Mutex<Option<Tamper>>,
    targets: targets::Targets,
    events: (Sender<TargetEvent>, Receiver<TargetEvent>),
    itself: Weak<Inner>,
}

/// What nsmgr knows; a restart forgets it, but not the lab's own LBs.
struct State {
    owners: Owners,
    /// Endpoints registered here: name → socket (registry/common/localbypass).
    sockets: BTreeMap<String, Socket>,
    lbs: BTreeMap<String, Lb>,
    /// By own segment id: the client's namespace and its URL.
    netns: BTreeMap<String, (String, Arc<OwnedFd>)>,
    /// Scripted failures of the next Requests.
    failures: VecDeque<RpcError>,
    /// Longest life of a registration without a refresh (`NSM_EXPIRE_PERIOD`).
    expire_period: Duration,
}

#[derive(Clone)]
struct Socket {
    url: String,
    /// `None` where the URL is no inode's: the lab cannot reach it.
    file: Option<Arc<OwnedFd>>,
}

/// An endpoint of the lab's own.
#[derive(Clone)]
struct Lb {
    service: String,
    endpoint: Arc<dyn LocalEndpoint>,
    hop: Hop,
    alive: bool,
}

impl Nsmgr {
    /// Listens.
    ///
    /// # Errors
    ///
    /// When the socket, or a thread, cannot be made.
    pub fn start(options: NsmgrOptions) -> Result<Self, String> {
        let (trust, node) = (Arc::clone(&options.trust), options.node.clone());
        let lifetime = options.token_lifetime;
        let hop = |path: &str, name: &str| Hop::new(&trust, path, name, lifetime);
        let timers = Arc::new(Timers::start().map_err(|e| format!("timers: {e}"))?);
        let rpc = Rpc::new();
        let notes = Notes::default();
        let monitors = Arc::new(Monitors::default());
        let for_down = Arc::clone(&monitors);
        let forwarder = Forwarder::new(
            hop("ns/nsm/sa/forwarder", &format!("forwarder-{node}")),
            rpc.clone(),
            Arc::clone(&options.datapath),
            notes.clone(),
            Arc::new(move |id: &str, _: &str| {
                for_down.down(id);
            }),
        );
        let registry = Registry::new(hop("ns/nsm/sa/registry", "registry"), Arc::clone(&timers));
        let inner = Arc::new_cyclic(|itself| Inner {
            hop: hop("ns/nsm/sa/nsmgr", &format!("nsmgr-{node}")),
            options,
            rpc,
            notes,
            peers: Peers::default(),
            turns: Arc::default(),
            gate: Gate::default(),
            troubles: faults::Troubles::default(),
            timers,
            registry: Arc::new(registry),
            forwarder,
            monitors,
            finds: Mutex::default(),
            state: Mutex::new(State {
                owners: Owners::default(),
                sockets: BTreeMap::new(),
                lbs: BTreeMap::new(),
                netns: BTreeMap::new(),
                failures: VecDeque::new(),
                expire_period: Duration::from_secs(60),
            }),
            listener: Mutex::default(),
            spoils: Spoils::default(),
            tamper: Mutex::default(),
            targets: targets::Targets::default(),
            events: bounded(1024),
            itself: itself.clone(),
        });
        inner.listen()?;
        Ok(Self(Arc::new(Handle(inner))))
    }
}

impl Nsmgr {
    /// Which answers are spoilt, by the path of their method. A stream begins
    /// in good order, then brings what is spoilt.
    pub fn spoils(&self) -> &Spoils {
        &self.inner().spoils
    }

    /// What is done to each connection before a Request is answered with it.
    pub fn tamper<F>(&self, tamper: F)
    where
        F: Fn(&mut Connection) + Send + 'static,
    {
        *self.inner().tamper.lock() = Some(Box::new(tamper));
    }

    fn inner(&self) -> &Inner {
        &self.0.0
    }
}

impl Inner {
    fn listen(&self) -> Result<(), String> {
        let listener = TlsListener::start(
            &self.rpc,
            self.hop.svid.clone(),
            &self.options.socket,
            self.peers.clone(),
            self.notes.clone(),
            vec![serve::service(&self.itself)],
        )?;
        *self.listener.lock() = Some(listener);
        Ok(())
    }

    /// Ends all open streams with UNAVAILABLE.
    fn end_streams(&self) {
        self.monitors.end_streams(&dropped());
        self.end_finds(&dropped());
    }

    /// nsmgr's address for other nodes, which it gives the registry.
    fn public_url(&self) -> String {
        format!("tcp://{}:5001", self.options.node)
    }

    /// Runs `job` on this, if it still exists, after `delay`.
    fn later(&self, key: &str, delay: Duration, job: impl FnOnce(&Self) + Send + 'static) {
        let itself = self.itself.clone();
        self.timers.arm(key, clock::now() + delay, move || {
            if let Some(inner) = itself.upgrade() {
                job(&inner);
            }
        });
    }
}

#[cfg(test)]
mod tests;
