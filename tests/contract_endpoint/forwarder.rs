//! Who calls the endpoint.

use meridio_proxy::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, Mechanism, MonitorScopeSelector, PathSegment,
};
use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::proto::health::{HealthCheckRequest, HealthCheckResponse};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::rpc::call::{self, Options};
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::pump::{self, Item, Pump};
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::spiffe::jwt::{self, Token};
use meridio_proxy::spiffe::{PeerIdentity, Svid, SvidCell};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::{Stop, Stopper, stop_pair};
use meridio_proxy::transport::client::Connector;
use std::path::Path;

use super::world::{HOUR, LIMIT, SERVICE, World, connect, soon};

/// A forwarder, and the target behind it.
pub struct Forwarder {
    pub cell: SvidCell,
    pub target: SvidCell,
    pub connector: Connector,
    pub stop: Stop,
    pub _stopper: Stopper,
}

pub fn svid(cell: &SvidCell) -> Svid {
    let identity = cell.get().unwrap();
    Svid {
        id: identity.svid.id.clone(),
        chain: identity.svid.chain.clone(),
        key: identity.svid.key.clone(),
        not_after: identity.svid.not_after,
    }
}

impl Forwarder {
    pub fn new(world: &World, socket: &Path) -> Self {
        let cell = world.pki.cell(&world.pki.id("fwd"), HOUR);
        let target = world.pki.cell(&world.pki.id("target"), HOUR);
        let (stopper, stop) = stop_pair();
        let connector = connect(
            &world.threads,
            &world.peers,
            cell.clone(),
            "fwd",
            socket.to_owned(),
        );
        Self {
            cell,
            target,
            connector,
            stop,
            _stopper: stopper,
        }
    }

    /// The target's token for this forwarder.
    pub fn target_token(&self) -> Token {
        let own = svid(&self.cell);
        let peer = PeerIdentity {
            id: own.id,
            not_after: own.not_after,
            leaf: own.chain[0].clone(),
        };
        jwt::sign(&svid(&self.target), &peer, HOUR, clock::wall()).unwrap()
    }

    /// This forwarder's token for the endpoint, signed by whoever has `signer`.
    pub fn options(&self, signer: &SvidCell) -> Options {
        let connection = self.connector.acquire(soon(), &self.stop).unwrap();
        let token = jwt::sign(&svid(signer), connection.peer(), HOUR, clock::wall()).unwrap();
        let expires = meridio_proxy::nsm::caller::rfc3339_nano(token.expires);
        Options {
            headers: vec![
                ("nsm-client-token".to_owned(), token.jwt),
                ("nsm-client-token-expires".to_owned(), expires),
            ],
            ..Options::with_timeout(LIMIT)
        }
    }

    pub fn first_request(&self, target: &str) -> NetworkServiceRequest {
        let mut request = NetworkServiceRequest::default();
        for kind in ["MEMIF", "KERNEL"] {
            request.mechanism_preferences.push(Mechanism {
                cls: "LOCAL".to_owned(),
                type_: kind.to_owned(),
                ..Mechanism::default()
            });
        }
        let connection = request.connection.mut_or_insert_default();
        connection.id = format!("fwd-{target}");
        connection.network_service = SERVICE.to_owned();
        connection.payload = "ETHERNET".to_owned();
        let path = connection.path.mut_or_insert_default();
        path.index = 1;
        let token = self.target_token().jwt;
        for (name, id, token) in [
            ("target", target.to_owned(), token),
            ("fwd", format!("fwd-{target}"), String::new()),
        ] {
            path.path_segments.push(PathSegment {
                name: name.to_owned(),
                id,
                token,
                ..PathSegment::default()
            });
        }
        request
    }

    pub fn request(&self, request: &NetworkServiceRequest) -> Result<Connection, RpcError> {
        self.request_as(&self.cell, request)
    }

    pub fn request_as(
        &self,
        signer: &SvidCell,
        request: &NetworkServiceRequest,
    ) -> Result<Connection, RpcError> {
        let connection = self.connector.acquire(soon(), &self.stop).unwrap();
        let options = self.options(signer);
        let method = &method::REQUEST;
        call::unary(connection.channel(), method, request, &options, &self.stop)
            .map(|reply| reply.message)
    }

    pub fn close(&self, connection: &Connection) -> Result<(), RpcError> {
        let options = self.options(&self.cell);
        let channel = self.connector.acquire(soon(), &self.stop).unwrap();
        call::unary(
            channel.channel(),
            &method::CLOSE,
            connection,
            &options,
            &self.stop,
        )
        .map(|_| ())
    }

    pub fn monitor(&self, target: &str) -> Pump<ConnectionEvent> {
        let selector = MonitorScopeSelector {
            path_segments: vec![PathSegment {
                name: "fwd".to_owned(),
                id: format!("fwd-{target}"),
                ..PathSegment::default()
            }],
            ..MonitorScopeSelector::default()
        };
        let channel = self.connector.acquire(soon(), &self.stop).unwrap();
        let options = self.options(&self.cell);
        pump::open(
            channel.channel(),
            &method::MONITOR_CONNECTIONS,
            &selector,
            &options,
        )
        .unwrap()
    }

    pub fn watch_health(&self, service: &str) -> Pump<HealthCheckResponse> {
        let channel = self.connector.acquire(soon(), &self.stop).unwrap();
        let request = HealthCheckRequest {
            service: service.to_owned(),
            ..HealthCheckRequest::default()
        };
        let (watch, options) = (&method::HEALTH_WATCH, Options::default());
        pump::open(channel.channel(), watch, &request, &options).unwrap()
    }

    pub fn health(&self, service: &str) -> Result<ServingStatus, RpcError> {
        let channel = self.connector.acquire(soon(), &self.stop).unwrap();
        let request = HealthCheckRequest {
            service: service.to_owned(),
            ..HealthCheckRequest::default()
        };
        let options = Options::with_timeout(LIMIT);
        call::unary(
            channel.channel(),
            &method::HEALTH_CHECK,
            &request,
            &options,
            &self.stop,
        )
        .map(|reply| reply.message.status.enum_value().unwrap())
    }
}

pub fn event(pump: &Pump<ConnectionEvent>) -> (ConnectionEventType, usize) {
    match pump.items().recv_deadline(soon()).unwrap() {
        Item::Message(event) => (event.type_.enum_value().unwrap(), event.connections.len()),
        Item::Ended(ended) => panic!("the stream ended: {ended:?}"),
    }
}
