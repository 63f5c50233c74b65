//! Registration of services and endpoints at nsmgr, and Find (registry/chains
//! of nsmgr: updatepath, authorize, clientinfo, expire, recvfd, sendfd,
//! localbypass).

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse,
};
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::sync::clock;
use protobuf::well_known_types::empty::Empty;

use super::serve::{Answer, Incoming};
use super::{Inner, Socket};
use crate::client::NsmClient;
use crate::monitor::Outbox;
use crate::path::{RegistryPath, system_time, timestamp};
use crate::policy::{denied, unknown};
use crate::registry::{NO_FILTER, crashed, effective_expiry, judge};
use crate::tls::parse_inode_url;

/// The forwarder's patience with an endpoint (`NSM_DIAL_TIMEOUT`).
const PROBE_LIMIT: Duration = Duration::from_millis(750);

impl Inner {
    /// nsmgr's hop of a registration: path, tokens, policies, ownership.
    fn admit_registration(
        &self,
        call: &Incoming,
        key: &str,
    ) -> Result<(RegistryPath, String), RpcError> {
        // Without the header the policies see an empty path.
        let path = call.path.clone();
        let mut path = path.ok_or_else(|| denied("header path is absent or no JSON"))?;
        let (peer, own) = (&call.peer.identity, &call.peer.own);
        let token = self.hop.token_as(own, peer)?;
        let caller = call.token.as_ref().map_or("", |token| &token.jwt);
        path.enter(caller, &token.jwt).map_err(unknown)?;
        let client = judge(&self.state.lock().owners, key, &path, peer)?;
        Ok((path, client))
    }

    pub(super) fn register_service(
        &self,
        call: &Incoming,
        service: NetworkService,
    ) -> Result<Answer<NetworkService>, RpcError> {
        let key = format!("ns/{}", service.name);
        let (mut path, client) = self.admit_registration(call, &key)?;
        let service = self
            .registry
            .register_service(service, &mut path, &self.hop)?;
        self.state.lock().owners.set(&key, &client);
        Ok(Answer(service, Some(path)))
    }

    pub(super) fn unregister_service(
        &self,
        call: &Incoming,
        service: NetworkService,
    ) -> Result<Answer<Empty>, RpcError> {
        let key = format!("ns/{}", service.name);
        let (mut path, _) = self.admit_registration(call, &key)?;
        self.registry
            .unregister_service(&service, &mut path, &self.hop)?;
        self.state.lock().owners.forget(&key);
        Ok(Answer(Empty::new(), Some(path)))
    }

    pub(super) fn register_endpoint(
        &self,
        call: &Incoming,
        mut endpoint: NetworkServiceEndpoint,
    ) -> Result<Answer<NetworkServiceEndpoint>, RpcError> {
        let name = endpoint.name.clone();
        let key = format!("nse/{name}");
        let (mut path, client) = self.admit_registration(call, &key)?;
        self.judge_endpoint(&endpoint)?;
        for labels in endpoint.network_service_labels.values_mut() {
            let node = self.options.node.clone();
            labels.labels.entry("nodeName".to_owned()).or_insert(node);
        }
        let now = clock::wall();
        let own = self.hop.token_as(&call.peer.own, &call.peer.identity)?;
        let effective = effective_expiry(
            endpoint.expiration_time.as_ref().map(system_time),
            [
                call.token.as_ref().map_or(now, |token| token.expires),
                own.expires,
            ],
            self.state.lock().expire_period,
            now,
        );
        endpoint.expiration_time = Some(timestamp(effective)).into();
        let url = endpoint.url.clone();
        let file = self.socket_file(call, &endpoint)?;
        let socket = Socket { url, file };
        let before = self.state.lock().sockets.insert(name.clone(), socket);
        let registered = self.register_upstream(endpoint, &mut path, call.remaining);
        let mut endpoint = registered.inspect_err(|_| {
            // A failure below drops the descriptor; it must come again.
            self.state.lock().sockets.remove(&name);
            drop(before);
        })?;
        self.state.lock().owners.set(&key, &client);
        let left = effective.duration_since(now).unwrap_or_default();
        let delay = left.saturating_sub(call.remaining);
        self.later(&format!("nsmgr/{name}"), delay, move |inner| {
            inner.state.lock().sockets.remove(&name);
        });
        endpoint.url = self.local_url(&endpoint.name).unwrap_or_default();
        Ok(Answer(endpoint, Some(path)))
    }

    fn register_upstream(
        &self,
        mut endpoint: NetworkServiceEndpoint,
        path: &mut RegistryPath,
        remaining: Duration,
    ) -> Result<NetworkServiceEndpoint, RpcError> {
        endpoint.url = self.public_url();
        self.registry
            .register_endpoint(endpoint, path, &self.hop, remaining)
    }

    pub(super) fn unregister_endpoint(
        &self,
        call: &Incoming,
        endpoint: NetworkServiceEndpoint,
    ) -> Result<Answer<Empty>, RpcError> {
        let name = &endpoint.name;
        let key = format!("nse/{name}");
        let (mut path, _) = self.admit_registration(call, &key)?;
        if name.is_empty() {
            return Err(unknown("invalid endpoint specified"));
        }
        if !self.state.lock().sockets.contains_key(name) {
            // recvfd waits for the descriptor; localbypass then knows nothing
            // and tells the registry nothing.
            self.wait_file(call, &endpoint.url)?;
            return Ok(Answer(Empty::new(), Some(path)));
        }
        self.registry
            .unregister_endpoint(name, &mut path, &self.hop)?;
        self.timers.cancel(&format!("nsmgr/{name}"));
        let mut state = self.state.lock();
        state.owners.forget(&key);
        state.sockets.remove(name);
        drop(state);
        Ok(Answer(Empty::new(), Some(path)))
    }

    /// The descriptor of an endpoint's socket: held, or waited for; it should
    /// lead to a server that answers. The real nsmgr takes other URLs as they
    /// are.
    fn socket_file(
        &self,
        call: &Incoming,
        endpoint: &NetworkServiceEndpoint,
    ) -> Result<Option<Arc<OwnedFd>>, RpcError> {
        let held = self.state.lock().sockets.get(&endpoint.name).cloned();
        if let Some(socket) = held
            && socket.url == endpoint.url
        {
            return Ok(socket.file);
        }
        let Some(file) = self.wait_file(call, &endpoint.url)? else {
            let reason = format!("URL {:?} is not inode://", endpoint.url);
            self.notes.violation("Register", &reason);
            return Ok(None);
        };
        if let Err(reason) = self.probe(&file) {
            let what = format!("socket of endpoint {}", endpoint.name);
            self.notes.violation(&what, &reason);
        }
        Ok(Some(file))
    }

    fn wait_file(&self, call: &Incoming, url: &str) -> Result<Option<Arc<OwnedFd>>, RpcError> {
        if !url.starts_with("inode:") {
            return Ok(None);
        }
        let file = parse_inode_url(url).map_err(unknown)?;
        let file = call.peer.files.wait(file, call.deadline);
        file.map(Some).map_err(|reason| {
            self.notes.refuse("registration", &reason);
            RpcError::status(Code::DEADLINE_EXCEEDED, reason)
        })
    }

    /// Whether the forwarder could dial what `file` refers to.
    fn probe(&self, file: &OwnedFd) -> Result<(), String> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let meta = std::fs::metadata(&path).map_err(|e| format!("stat: {e}"))?;
        if meta.permissions().mode() & 0o222 != 0o222 {
            return Err("not writable for other users: the forwarder cannot dial it".to_owned());
        }
        let mut client = NsmClient::new(self.forwarder.hop.clone(), self.rpc.clone());
        client.dial_timeout = PROBE_LIMIT;
        let session = client.dial_file(file).map_err(|e| e.to_string())?;
        let health = session
            .health("", PROBE_LIMIT)
            .map_err(|e| format!("health: {e}"))?;
        if health.status == ServingStatus::SERVING.into() {
            Ok(())
        } else {
            Err(format!("health: {:?}", health.status))
        }
    }

    pub(super) fn find_endpoints(
        &self,
        call: &Incoming,
        query: NetworkServiceEndpointQuery,
    ) -> Result<Outbox<NetworkServiceEndpointResponse>, RpcError> {
        if query.network_service_endpoint.is_none() {
            self.notes.violation("Find", NO_FILTER);
            return Ok(crashed());
        }
        let outbox = Outbox::default();
        let mut finds = self.finds.lock();
        finds.retain(|find| !find.is_over());
        finds.push(outbox.clone());
        drop(finds);
        let (itself, peer, out) = (self.itself.clone(), Arc::clone(&call.peer), outbox.clone());
        let deliver = move |endpoint, deleted| {
            let Some(inner) = itself.upgrade() else {
                return false;
            };
            match inner.localise(endpoint, deleted) {
                Some((endpoint, file)) => {
                    if let Some(file) = file {
                        peer.attach(&file);
                    }
                    out.push(NetworkServiceEndpointResponse {
                        network_service_endpoint: Some(endpoint).into(),
                        deleted,
                        ..Default::default()
                    })
                }
                None => !out.is_over(),
            }
        };
        self.registry.find_endpoints(&query, Box::new(deliver));
        if !query.watch {
            outbox.end(grpcio::RpcStatus::ok());
        }
        Ok(outbox)
    }

    /// An endpoint as this node's clients see it: those registered here with
    /// their socket, and its descriptor; those that carry this nsmgr's address
    /// but are not known here not at all, unless deleted.
    pub(super) fn localise(
        &self,
        mut endpoint: NetworkServiceEndpoint,
        deleted: bool,
    ) -> Option<(NetworkServiceEndpoint, Option<Arc<OwnedFd>>)> {
        if endpoint.url != self.public_url() {
            return Some((endpoint, None));
        }
        let socket = self.state.lock().sockets.get(&endpoint.name).cloned();
        match socket {
            Some(socket) => {
                endpoint.url = socket.url;
                Some((endpoint, socket.file))
            }
            None => deleted.then_some((endpoint, None)),
        }
    }

    fn local_url(&self, name: &str) -> Option<String> {
        let state = self.state.lock();
        state.sockets.get(name).map(|socket| socket.url.clone())
    }

    /// Refuses what nsmgr refuses, and notes what keeps an endpoint from ever
    /// being found or dialled.
    fn judge_endpoint(&self, endpoint: &NetworkServiceEndpoint) -> Result<(), RpcError> {
        let (name, url) = (&endpoint.name, &endpoint.url);
        if name.is_empty() {
            return Err(unknown("cannot register an endpoint without a name"));
        }
        if url.is_empty() || has_bad_escape(url) {
            return Err(unknown(format!(
                "cannot register NSE with passed URL: {url}"
            )));
        }
        let note = |reason: String| self.notes.violation("Register", &reason);
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let inside = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
        let ends = edge(name.as_bytes().first()) && edge(name.as_bytes().last());
        if !ends || !name.bytes().all(inside) || name.len() > 253 {
            note(format!("endpoint name {name:?} is no DNS-1123 subdomain"));
        }
        if endpoint.network_service_names.is_empty() {
            note("endpoint serves no network service".to_owned());
        }
        for service in &endpoint.network_service_names {
            if !endpoint.network_service_labels.contains_key(service) {
                note(format!(
                    "no labels for {service}: the endpoint would never match"
                ));
            }
        }
        Ok(())
    }
}

/// A `%` without two hexadecimal digits, which no URL has.
fn has_bad_escape(url: &str) -> bool {
    let digits =
        |rest: &str| rest.len() >= 2 && rest.bytes().take(2).all(|b| b.is_ascii_hexdigit());
    url.split('%').skip(1).any(|rest| !digits(rest))
}
