//! Which endpoint a Request leads to (networkservice/common/{discover,
//! discoverforwarder,roundrobin}, tools/matchutils).

use std::collections::HashMap;

use meridio_proxy::proto::connection::Connection;
use meridio_proxy::proto::registry::{NetworkService, NetworkServiceEndpoint};
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::sync::clock;

use super::Inner;
use crate::forwarder::Destination;
use crate::path::system_time;
use crate::policy::unknown;

impl Inner {
    pub(super) fn discover(&self, connection: &Connection) -> Result<Destination, RpcError> {
        let name = &connection.network_service;
        // Found by name and payload; an empty payload fits all.
        let service = self
            .registry
            .service(name)
            .filter(|ns| connection.payload.is_empty() || ns.payload == connection.payload)
            .ok_or_else(|| unknown(format!("network service {name} is not found")))?;
        let endpoint = if connection.network_service_endpoint_name.is_empty() {
            self.choose_endpoint(&service, connection)?
        } else {
            self.named_endpoint(&service, connection)?
        };
        self.destination(&endpoint.name)
    }

    fn named_endpoint(
        &self,
        service: &NetworkService,
        connection: &Connection,
    ) -> Result<NetworkServiceEndpoint, RpcError> {
        let name = &connection.network_service_endpoint_name;
        self.registry
            .endpoint(name)
            .filter(|endpoint| endpoint.network_service_names.contains(&service.name))
            .ok_or_else(|| unknown(format!("network service endpoint {name} is not found")))
    }

    fn choose_endpoint(
        &self,
        service: &NetworkService,
        connection: &Connection,
    ) -> Result<NetworkServiceEndpoint, RpcError> {
        let candidates = self.registry.endpoints_of(&service.name);
        let of_lb = |e: &NetworkServiceEndpoint| self.state.lock().lbs.contains_key(&e.name);
        if candidates.iter().any(of_lb) {
            let reason = "without an endpoint's name: the mesh would collapse onto one LB";
            self.notes.violation("Request", reason);
        }
        let now = clock::wall();
        candidates
            .into_iter()
            .filter(|e| {
                e.expiration_time
                    .as_ref()
                    .is_none_or(|at| system_time(at) > now)
            })
            .find(|e| matches(service, e, &connection.labels) && self.is_local(&e.name))
            .ok_or_else(|| unknown("network service endpoint candidates not found"))
    }

    fn is_local(&self, name: &str) -> bool {
        self.state.lock().sockets.contains_key(name)
    }

    fn destination(&self, name: &str) -> Result<Destination, RpcError> {
        let state = self.state.lock();
        if let Some(lb) = state.lbs.get(name) {
            if !lb.alive {
                return Err(unknown(format!("endpoint {name} does not answer")));
            }
            let endpoint = std::sync::Arc::clone(&lb.endpoint);
            return Ok(Destination::Local(endpoint, lb.hop.clone()));
        }
        let socket = state.sockets.get(name);
        let file = socket.and_then(|socket| socket.file.clone());
        let file = file.ok_or_else(|| unknown(format!("endpoint {name} is not on this node")))?;
        Ok(Destination::Socket(name.to_owned(), file))
    }
}

/// Whether some match of the service leads these labels to this endpoint.
/// A service without matches leads everywhere.
fn matches(
    service: &NetworkService,
    endpoint: &NetworkServiceEndpoint,
    labels: &HashMap<String, String>,
) -> bool {
    let have = endpoint.network_service_labels.get(&service.name);
    let none = HashMap::new();
    let have = have.map_or(&none, |labels| &labels.labels);
    let holds = |selector: &HashMap<String, String>, of: &HashMap<String, String>| {
        selector.iter().all(|(key, value)| {
            of.get(key)
                .is_some_and(|is| fill(value, labels).as_ref() == Some(is))
        })
    };
    service.matches.is_empty()
        || service.matches.iter().any(|m| {
            holds(&m.source_selector, labels)
                && (m.routes.is_empty()
                    || m.routes
                        .iter()
                        .any(|r| holds(&r.destination_selector, have)))
        })
}

/// Fills `{{.key}}` from the labels: the part of Go's templates that is used.
fn fill(template: &str, labels: &HashMap<String, String>) -> Option<String> {
    let inner = template
        .strip_prefix("{{")
        .and_then(|t| t.strip_suffix("}}"));
    match inner {
        Some(inner) => labels.get(inner.trim().strip_prefix('.')?).cloned(),
        None => Some(template.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use meridio_proxy::proto::registry::{Destination as Route, Match, NetworkServiceLabels};

    #[test]
    fn same_node_selector() {
        let map = |node: &str| HashMap::from([("nodeName".to_owned(), node.to_owned())]);
        let route = Route {
            destination_selector: map("{{.nodeName}}"),
            ..Default::default()
        };
        let service = NetworkService {
            name: "proxy".to_owned(),
            matches: vec![Match {
                source_selector: map("{{.nodeName}}"),
                routes: vec![route],
                ..Default::default()
            }],
            ..Default::default()
        };
        let endpoint = |labels: HashMap<String, String>| NetworkServiceEndpoint {
            network_service_labels: [(
                "proxy".to_owned(),
                NetworkServiceLabels {
                    labels,
                    ..Default::default()
                },
            )]
            .into(),
            ..Default::default()
        };
        for (of_endpoint, of_client, want) in [
            (map("a"), map("a"), true),
            (map("a"), map("b"), false),
            (HashMap::new(), map("a"), false),
            (map("a"), HashMap::new(), false),
        ] {
            assert_eq!(matches(&service, &endpoint(of_endpoint), &of_client), want);
        }
        let bare = NetworkServiceEndpoint::new();
        assert!(
            !matches(&service, &bare, &map("a")),
            "no entry for the service"
        );
    }
}
