//! What topologies and tests ask of nsmgr.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceLabels,
};
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::sync::clock;

use super::targets::{TargetEvent, TargetRequest};
use super::{Inner, Lb, Nsmgr, Socket};
use crate::datapath::LocalEndpoint;
use crate::path::{RegistryPath, client_id, timestamp};
use crate::policy::Hop;
use crate::registry::Registry;
use crate::tls::{file_id, inode_url};

impl Nsmgr {
    /// Registers an endpoint of the lab's own, and its network service, and
    /// keeps it registered.
    pub fn add_endpoint(&self, service: &str, endpoint: Arc<dyn LocalEndpoint>) {
        let inner = self.inner();
        let name = endpoint.name();
        let hop = Hop::new(
            &inner.options.trust,
            "ns/lab/sa/load-balancer",
            &name,
            inner.options.token_lifetime,
        );
        let lb = Lb {
            service: service.to_owned(),
            endpoint,
            hop,
            alive: true,
        };
        inner.state.lock().lbs.insert(name.clone(), lb);
        inner.keep_lb(&name).expect("the lab's own registration");
    }

    /// Unregisters an endpoint that goes in good order: watchers see it deleted,
    /// and its connections stand until their clients close them.
    pub fn unregister_endpoint(&self, name: &str) {
        let inner = self.inner();
        inner.timers.cancel(&format!("lb/{name}"));
        let Some(lb) = inner.state.lock().lbs.get(name).cloned() else {
            return;
        };
        let path = inner.lb_path(&lb);
        let gone = path.and_then(|mut path| {
            inner
                .registry
                .unregister_endpoint(name, &mut path, &inner.hop)
        });
        gone.expect("the lab's own registration");
    }

    /// Unregisters an endpoint and closes its connections (monitors see
    /// DELETE).
    pub fn remove_endpoint(&self, name: &str) {
        self.unregister_endpoint(name);
        let inner = self.inner();
        for connection in inner.monitors.all() {
            if connection.network_service_endpoint_name == name {
                inner.end(&connection.id);
            }
        }
        let mut state = inner.state.lock();
        state.sockets.remove(name);
        state.lbs.remove(name);
    }

    /// The endpoint is dead without a word: no event, Requests for it fail, and
    /// its registration runs out.
    pub fn kill_endpoint(&self, name: &str) {
        let inner = self.inner();
        inner.timers.cancel(&format!("lb/{name}"));
        if let Some(lb) = inner.state.lock().lbs.get_mut(name) {
            lb.alive = false;
        }
    }

    /// Ends: the socket is removed, connections and streams are cut.
    pub fn stop(&self) {
        let listener = self.inner().listener.lock().take();
        self.drop_streams();
        drop(listener);
    }

    /// A new nsmgr process under the old name: a new socket file, nothing
    /// known. Registry and forwarder keep what they have; the lab's own
    /// endpoints come back at once.
    pub fn restart(&self) -> Result<(), String> {
        self.stop();
        let inner = self.inner();
        for connection in inner.monitors.all() {
            inner.timers.cancel(&format!("conn/{}", connection.id));
        }
        inner.monitors.clear();
        let lbs: Vec<_> = {
            let mut state = inner.state.lock();
            for name in state.sockets.keys() {
                inner.timers.cancel(&format!("nsmgr/{name}"));
            }
            state.owners = crate::policy::Owners::default();
            state.sockets.clear();
            state.netns.clear();
            let alive = state.lbs.iter().filter(|(_, lb)| lb.alive);
            alive.map(|(name, _)| name.clone()).collect()
        };
        inner.listen()?;
        for name in lbs {
            inner.keep_lb(&name).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Ends all open streams with UNAVAILABLE; connections stay.
    pub fn drop_streams(&self) {
        self.inner().end_streams();
    }

    /// Cuts all mTLS connections.
    pub fn cut_connections(&self) {
        self.inner().peers.cut_all();
    }

    /// Holds all unary calls back, until their deadline or `false`.
    pub fn pause_calls(&self, paused: bool) {
        self.inner().gate.set_shut(paused);
    }

    /// Fails the next Requests, one each.
    pub fn fail_next_requests(&self, failures: impl IntoIterator<Item = RpcError>) {
        self.inner().state.lock().failures.extend(failures);
    }

    /// How long registrations live without a refresh, from now on: 60 s unless
    /// set, as in NSM.
    pub fn set_expire_period(&self, period: Duration) {
        self.inner().state.lock().expire_period = period;
    }

    /// Tells that a client's connection is DOWN, as when its forwarder dies;
    /// false when there is none.
    pub fn down_connection(&self, client_id: &str) -> bool {
        let inner = self.inner();
        let found = inner.by_client_id(client_id);
        found.is_some_and(|connection| inner.monitors.down(&connection.id))
    }

    /// Ends a client's connection unasked, with DELETE; false when there is
    /// none.
    pub fn end_connection(&self, client_id: &str) -> bool {
        let inner = self.inner();
        let found = inner.by_client_id(client_id);
        found
            .inspect(|connection| inner.end(&connection.id))
            .is_some()
    }

    /// Gives nsmgr a new SVID, as a rotation does.
    pub fn rotate(&self, ttl: Duration) {
        let hop = &self.inner().hop;
        let id = hop.identity().svid.id.as_str().to_owned();
        self.inner().options.trust.refill(&hop.svid, &id, ttl);
    }

    /// Connects a target, or refreshes or updates its connection; heals it when
    /// it is down. Blocks; one call at a time for each target.
    pub fn connect_target(&self, request: TargetRequest) -> Result<Connection, String> {
        self.inner().connect_target(request)
    }

    /// Closes a target's connection; one that is not there is no error.
    pub fn close_target(&self, id: &str) -> Result<(), String> {
        self.inner().close_target(id)
    }

    /// Tells when targets go DOWN. All receivers share one queue.
    pub fn target_events(&self) -> Receiver<TargetEvent> {
        self.inner().events.1.clone()
    }

    /// Everything that was refused, with the reason, and violations.
    pub fn refusals(&self) -> Vec<String> {
        self.inner().notes.all()
    }

    /// Waits for a refusal that contains `text`.
    pub fn wait_refusal(&self, text: &str, deadline: Instant) -> Result<String, String> {
        self.inner().notes.wait(text, deadline)
    }

    /// The connections that nsmgr holds, as inside it.
    pub fn connections(&self) -> Vec<Connection> {
        self.inner().monitors.all()
    }

    /// The pairs that the forwarder holds.
    pub fn crosses(&self) -> usize {
        self.inner().forwarder.count()
    }

    /// Open MonitorConnections streams and Find streams of clients.
    pub fn streams(&self) -> (usize, usize) {
        let mut finds = self.inner().finds.lock();
        finds.retain(|find| !find.is_over());
        (self.inner().monitors.streams(), finds.len())
    }

    /// Open mTLS connections of clients.
    pub fn peers(&self) -> usize {
        self.inner().peers.count()
    }

    /// The endpoints of a service that can be reached.
    pub fn registered(&self, service: &str) -> Vec<String> {
        let inner = self.inner();
        let all = inner.registry.endpoints_of(service);
        let reachable = all.into_iter().filter_map(|e| inner.localise(e, false));
        reachable.map(|(endpoint, _)| endpoint.name).collect()
    }

    /// Waits until the endpoint is registered.
    pub fn wait_registered(
        &self,
        service: &str,
        name: &str,
        deadline: Instant,
    ) -> Result<(), String> {
        let (tx, rx) = bounded(64);
        let (itself, wanted) = (self.inner().itself.clone(), name.to_owned());
        let mut filter = NetworkServiceEndpoint::new();
        filter.name = name.to_owned();
        filter.network_service_names = vec![service.to_owned()];
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(filter).into(),
            watch: true,
            ..Default::default()
        };
        let deliver = move |endpoint: NetworkServiceEndpoint, deleted: bool| {
            let found = itself
                .upgrade()
                .and_then(|inner| inner.localise(endpoint, deleted));
            if found.is_some_and(|(endpoint, _)| !deleted && endpoint.name == wanted) {
                let _ = tx.try_send(());
                return false;
            }
            true
        };
        self.inner()
            .registry
            .find_endpoints(&query, Box::new(deliver));
        rx.recv_deadline(deadline)
            .map_err(|_| format!("endpoint {name} of {service} is not registered in time"))
    }
}

impl Inner {
    fn by_client_id(&self, id: &str) -> Option<Connection> {
        let all = self.monitors.all();
        all.into_iter().find(|c| client_id(c) == id)
    }

    /// The path of an LB's registration up to nsmgr.
    fn lb_path(&self, lb: &Lb) -> Result<RegistryPath, RpcError> {
        let mut path = RegistryPath::default();
        let to_nsmgr = lb.hop.token(&self.hop.as_peer())?;
        let answer = self.hop.token(&lb.hop.as_peer())?;
        path.enter(&to_nsmgr.jwt, &answer.jwt)
            .map_err(crate::policy::unknown)?;
        Ok(path)
    }

    /// Registers an LB, and again at a third of its life.
    pub(super) fn keep_lb(&self, name: &str) -> Result<(), RpcError> {
        let (lb, period) = {
            let state = self.state.lock();
            let lb = state.lbs.get(name).filter(|lb| lb.alive).cloned();
            (lb, state.expire_period)
        };
        let Some(lb) = lb else { return Ok(()) };
        // The real LB's socket would be passed; nsmgr's own stands for it.
        let socket = self.own_socket().map_err(crate::policy::unknown)?;
        self.state.lock().sockets.insert(name.to_owned(), socket);
        let service = NetworkService {
            name: lb.service.clone(),
            payload: "ETHERNET".to_owned(),
            ..Default::default()
        };
        self.registry
            .register_service(service, &mut self.lb_path(&lb)?, &self.hop)?;
        let endpoint = NetworkServiceEndpoint {
            name: name.to_owned(),
            network_service_names: vec![lb.service.clone()],
            network_service_labels: [(lb.service.clone(), NetworkServiceLabels::new())].into(),
            url: self.public_url(),
            expiration_time: Some(timestamp(clock::wall() + period)).into(),
            ..Default::default()
        };
        let registry: &Arc<Registry> = &self.registry;
        registry.register_endpoint(endpoint, &mut self.lb_path(&lb)?, &self.hop, Duration::ZERO)?;
        let again = name.to_owned();
        self.later(&format!("lb/{name}"), period / 3, move |inner| {
            if let Err(error) = inner.keep_lb(&again) {
                inner
                    .notes
                    .refuse("registration of an LB", &error.to_string());
            }
        });
        Ok(())
    }

    fn own_socket(&self) -> Result<Socket, String> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = &self.options.socket;
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
            .map_err(|error| format!("open {}: {error}", path.display()))?;
        let (id, file) = file_id(OwnedFd::from(file)).map_err(|error| format!("stat: {error}"))?;
        Ok(Socket {
            url: inode_url(id),
            file: Some(Arc::new(file)),
        })
    }
}
