//! The registry process: network services and endpoints in memory, with
//! watchers, expiry and ownership (registry/chains/memory,
//! registry/common/{expire,authorize}, tools/matchutils). nsmgr stands before
//! it and calls it directly, with tokens as if over the wire.

mod forget;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use grpcio::RpcStatus;
use meridio_proxy::proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceQuery,
    NetworkServiceResponse,
};
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::spiffe::PeerIdentity;
use meridio_proxy::spiffe::jwt;
use meridio_proxy::sync::clock;
use parking_lot::Mutex;

use crate::monitor::Outbox;
use crate::nsmgr::parts::Timers;
use crate::path::{RegistryPath, system_time, timestamp};
use crate::policy::{Hop, Owners, authorize, denied, refused, unknown};

/// Takes an event of a watcher; false ends the watch.
pub type Deliver = Box<dyn Fn(NetworkServiceEndpoint, bool) -> bool + Send>;

/// The registry.
pub struct Registry {
    pub hop: Hop,
    timers: Arc<Timers>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    services: BTreeMap<String, NetworkService>,
    endpoints: BTreeMap<String, NetworkServiceEndpoint>,
    owners: Owners,
    watchers: Vec<(NetworkServiceEndpoint, Deliver)>,
    service_watchers: Vec<(NetworkService, Outbox<NetworkServiceResponse>)>,
}

impl State {
    fn tell(&mut self, endpoint: &NetworkServiceEndpoint, deleted: bool) {
        self.watchers.retain(|(query, deliver)| {
            !endpoint_matches(query, endpoint) || deliver(endpoint.clone(), deleted)
        });
    }

    fn remove(&mut self, name: &str) {
        if let Some(endpoint) = self.endpoints.remove(name) {
            self.tell(&endpoint, true);
        }
    }
}

impl Registry {
    pub fn new(hop: Hop, timers: Arc<Timers>) -> Self {
        Self {
            hop,
            timers,
            state: Mutex::default(),
        }
    }

    /// The registry's hop of a registration's path: path, tokens, policies,
    /// ownership. Returns the client, which is who the first token says.
    fn admit(
        &self,
        state: &State,
        key: &str,
        path: &mut RegistryPath,
        caller: &Hop,
    ) -> Result<String, RpcError> {
        let peer = caller.as_peer();
        let token = caller.token(&self.hop.as_peer())?;
        let own = self.hop.token(&peer)?;
        path.enter(&token.jwt, &own.jwt).map_err(unknown)?;
        judge(&state.owners, key, path, &peer)
    }

    pub fn register_service(
        &self,
        mut service: NetworkService,
        path: &mut RegistryPath,
        caller: &Hop,
    ) -> Result<NetworkService, RpcError> {
        let mut state = self.state.lock();
        let key = format!("ns/{}", service.name);
        let client = self.admit(&state, &key, path, caller)?;
        if service.name.is_empty() {
            return Err(unknown("cannot register a network service without a name"));
        }
        if service.payload.is_empty() {
            "IP".clone_into(&mut service.payload);
        }
        service.path_ids = path_ids(path);
        state.owners.set(&key, &client);
        let name = service.name.clone();
        state.services.insert(name, service.clone());
        state.service_watchers.retain(|(query, outbox)| {
            !service_matches(query, &service) || outbox.push(service_event(&service, false))
        });
        Ok(service)
    }

    pub fn unregister_service(
        &self,
        service: &NetworkService,
        path: &mut RegistryPath,
        caller: &Hop,
    ) -> Result<(), RpcError> {
        let mut state = self.state.lock();
        let key = format!("ns/{}", service.name);
        self.admit(&state, &key, path, caller)?;
        state.owners.forget(&key);
        if let Some(service) = state.services.remove(&service.name) {
            state.service_watchers.retain(|(query, outbox)| {
                !service_matches(query, &service) || outbox.push(service_event(&service, true))
            });
        }
        Ok(())
    }

    /// Stores an endpoint until its expiry less `remaining`, the time that the
    /// call still had (registry/common/expire).
    pub fn register_endpoint(
        self: &Arc<Self>,
        mut endpoint: NetworkServiceEndpoint,
        path: &mut RegistryPath,
        caller: &Hop,
        remaining: Duration,
    ) -> Result<NetworkServiceEndpoint, RpcError> {
        let mut state = self.state.lock();
        let key = format!("nse/{}", endpoint.name);
        let client = self.admit(&state, &key, path, caller)?;
        if endpoint.name.is_empty() {
            return Err(unknown("cannot register an endpoint without a name"));
        }
        let now = clock::wall();
        let before = state.endpoints.get(&endpoint.name);
        let first = before.and_then(|known| known.initial_registration_time.as_ref().cloned());
        endpoint.initial_registration_time = Some(first.unwrap_or_else(|| timestamp(now))).into();
        endpoint.path_ids = path_ids(path);
        let effective = endpoint.expiration_time.as_ref().map_or(now, system_time);
        state.owners.set(&key, &client);
        let name = endpoint.name.clone();
        state.endpoints.insert(name.clone(), endpoint.clone());
        state.tell(&endpoint, false);
        let left = effective.duration_since(now).unwrap_or_default();
        let weak: Weak<Self> = Arc::downgrade(self);
        let at = clock::now() + left.saturating_sub(remaining);
        self.timers.arm(&format!("registry/{name}"), at, move || {
            if let Some(registry) = weak.upgrade() {
                registry.state.lock().remove(&name);
            }
        });
        Ok(endpoint)
    }

    pub fn unregister_endpoint(
        &self,
        name: &str,
        path: &mut RegistryPath,
        caller: &Hop,
    ) -> Result<(), RpcError> {
        let mut state = self.state.lock();
        let key = format!("nse/{name}");
        self.admit(&state, &key, path, caller)?;
        state.owners.forget(&key);
        self.timers.cancel(&format!("registry/{name}"));
        state.remove(name);
        Ok(())
    }

    /// Calls `deliver` with what is there, and, for a watch, with what comes.
    pub fn find_endpoints(&self, query: &NetworkServiceEndpointQuery, deliver: Deliver) {
        let mut state = self.state.lock();
        let wanted = query.network_service_endpoint.get_or_default().clone();
        let present = state.endpoints.values();
        let found: Vec<_> = present
            .filter(|e| endpoint_matches(&wanted, e))
            .cloned()
            .collect();
        let open = found.into_iter().all(|endpoint| deliver(endpoint, false));
        if open && query.watch {
            state.watchers.push((wanted, deliver));
        }
    }

    pub fn find_services(&self, query: &NetworkServiceQuery) -> Outbox<NetworkServiceResponse> {
        let mut state = self.state.lock();
        let wanted = query.network_service.get_or_default().clone();
        let outbox = Outbox::default();
        for service in state
            .services
            .values()
            .filter(|s| service_matches(&wanted, s))
        {
            outbox.push(service_event(service, false));
        }
        if query.watch {
            state.service_watchers.push((wanted, outbox.clone()));
        } else {
            outbox.end(RpcStatus::ok());
        }
        outbox
    }

    /// Ends the watches of services; those of endpoints end with `deliver`.
    pub fn end_streams(&self, status: &RpcStatus) {
        for (_, outbox) in self.state.lock().service_watchers.drain(..) {
            outbox.end(status.clone());
        }
    }

    pub fn service(&self, name: &str) -> Option<NetworkService> {
        self.state.lock().services.get(name).cloned()
    }

    pub fn endpoint(&self, name: &str) -> Option<NetworkServiceEndpoint> {
        self.state.lock().endpoints.get(name).cloned()
    }

    /// The endpoints of a service.
    pub fn endpoints_of(&self, service: &str) -> Vec<NetworkServiceEndpoint> {
        let state = self.state.lock();
        let serves = |e: &&NetworkServiceEndpoint| {
            e.network_service_names.iter().any(|name| name == service)
        };
        state.endpoints.values().filter(serves).cloned().collect()
    }
}

/// The policies of a registry's hop, and the ownership of `key`; returns the
/// client.
pub fn judge(
    owners: &Owners,
    key: &str,
    path: &RegistryPath,
    peer: &PeerIdentity,
) -> Result<String, RpcError> {
    let tokens = path.so_far();
    authorize(&tokens, path.index, &peer.leaf, clock::wall()).map_err(refused)?;
    let client = jwt::claims(&tokens[0]).map_err(denied)?.sub;
    owners.client_allowed(key, &client).map_err(denied)?;
    Ok(client)
}

/// The SPIFFE IDs of a path.
pub fn path_ids(path: &RegistryPath) -> Vec<String> {
    let claims = path
        .tokens
        .iter()
        .filter_map(|token| jwt::claims(token).ok());
    claims.map(|claims| claims.sub).collect()
}

/// When a registration ends at the latest: what was asked for, both tokens of
/// the hop, and `cap` from now; an absent wish counts as none, and a time
/// before 1970 (Meridio's -1) as at once.
pub fn effective_expiry(
    wished: Option<SystemTime>,
    tokens: [SystemTime; 2],
    cap: Duration,
    now: SystemTime,
) -> SystemTime {
    let latest = (now + cap).min(tokens[0]).min(tokens[1]);
    wished.map_or(latest, |wished| wished.min(latest))
}

/// tools/matchutils: empty fields of the query match all.
pub fn endpoint_matches(query: &NetworkServiceEndpoint, is: &NetworkServiceEndpoint) -> bool {
    let labels = query
        .network_service_labels
        .iter()
        .all(|(service, labels)| {
            is.network_service_labels.get(service).is_some_and(|have| {
                labels
                    .labels
                    .iter()
                    .all(|(key, value)| have.labels.get(key) == Some(value))
            })
        });
    let seconds = |e: &NetworkServiceEndpoint| e.expiration_time.as_ref().map(|at| at.seconds);
    (query.name.is_empty() || query.name == is.name)
        && labels
        && (seconds(query).is_none() || seconds(query) == seconds(is))
        && query
            .network_service_names
            .iter()
            .all(|name| is.network_service_names.contains(name))
        && is.url.contains(&query.url)
}

fn service_matches(query: &NetworkService, is: &NetworkService) -> bool {
    (query.name.is_empty() || query.name == is.name)
        && (query.payload.is_empty() || query.payload == is.payload)
}

fn service_event(service: &NetworkService, deleted: bool) -> NetworkServiceResponse {
    NetworkServiceResponse {
        network_service: Some(service.clone()).into(),
        deleted,
        ..Default::default()
    }
}

/// What is to be said of a Find without a filter message.
pub const NO_FILTER: &str = "Find without a filter message crashes the real registry";

/// What the clients of a registry that crashes see behind nsmgr: a stream
/// without a message, in good order.
pub fn crashed<T: Send + 'static>() -> Outbox<T> {
    let outbox = Outbox::default();
    outbox.end(RpcStatus::ok());
    outbox
}

#[cfg(test)]
mod tests;
