//! NSM's client side, as a good client uses it: one session is one mTLS
//! connection on which calls carry tokens signed for that session, and
//! descriptors. Used by targets towards nsmgr, by the forwarder towards the
//! daemon's endpoint, and by tests.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use grpcio::Method;
use meridio_proxy::proto::connection::{Connection, ConnectionEvent, MonitorScopeSelector};
use meridio_proxy::proto::health::{HealthCheckRequest, HealthCheckResponse};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse,
};
use meridio_proxy::rpc::call::{self, Options, Reply};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::pump::{self, Pump};
use meridio_proxy::rpc::status::RpcError;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;

use crate::path::{RegistryPath, format_rfc3339};
use crate::policy::{EXPIRES_HEADER, Hop, PATH_HEADER, TOKEN_HEADER, unknown};
use crate::tls::{Alpn, Dialed, Dialer};

/// Request headers, name and value.
pub type Headers = Vec<(String, String)>;

/// Changes the headers of a call.
pub type Tamper = dyn Fn(&mut Headers) + Send + Sync;

/// Dials sessions.
#[derive(Clone)]
pub struct NsmClient {
    pub hop: Hop,
    pub rpc: Rpc,
    /// How long dial and handshake may take.
    pub dial_timeout: Duration,
    /// Changes the headers of each call: for tests of refusals.
    pub tamper: Option<Arc<Tamper>>,
    /// Whether to offer ALPN.
    pub alpn: Alpn,
}

impl NsmClient {
    pub fn new(hop: Hop, rpc: Rpc) -> Self {
        Self {
            hop,
            rpc,
            dial_timeout: Duration::from_secs(5),
            tamper: None,
            alpn: Alpn::H2,
        }
    }

    fn dialer(&self) -> (Dialer, Instant) {
        let dialer = Dialer {
            rpc: self.rpc.clone(),
            svid: self.hop.svid.clone(),
            alpn: self.alpn,
        };
        (dialer, clock::now() + self.dial_timeout)
    }

    /// A new session with the server at `socket`.
    pub fn dial(&self, socket: &Path) -> Result<Session, RpcError> {
        let (dialer, deadline) = self.dialer();
        self.session(dialer.dial(socket, deadline))
    }

    /// A new session with the server whose socket file `socket` refers to.
    pub fn dial_file(&self, socket: &OwnedFd) -> Result<Session, RpcError> {
        let (dialer, deadline) = self.dialer();
        self.session(dialer.dial_file(socket, deadline))
    }

    fn session(&self, dialed: Result<Dialed, String>) -> Result<Session, RpcError> {
        Ok(Session {
            dialed: dialed.map_err(unknown)?,
            client: self.clone(),
        })
    }
}

/// One connection to a server. Dropping it cuts it.
pub struct Session {
    pub dialed: Dialed,
    client: NsmClient,
}

impl Session {
    /// The envelope of one call on this connection.
    pub fn headers(&self) -> Result<Headers, RpcError> {
        let hop = &self.client.hop;
        let token = hop.token_as(&self.dialed.own, &self.dialed.peer)?;
        let mut headers = vec![
            (TOKEN_HEADER.to_owned(), token.jwt),
            (EXPIRES_HEADER.to_owned(), format_rfc3339(token.expires)),
        ];
        if let Some(tamper) = &self.client.tamper {
            tamper(&mut headers);
        }
        Ok(headers)
    }

    fn unary<Req, Resp: Send + Unpin + 'static>(
        &self,
        method: &Method<Req, Resp>,
        request: &Req,
        headers: Headers,
        timeout: Duration,
    ) -> Result<Reply<Resp>, RpcError> {
        let mut options = Options::with_timeout(timeout);
        options.headers = headers;
        let (_stopper, stop) = stop_pair();
        call::unary(&self.dialed.channel, method, request, &options, &stop)
    }

    fn stream<Req, Resp: Send + 'static>(
        &self,
        method: &Method<Req, Resp>,
        request: &Req,
    ) -> Result<Pump<Resp>, RpcError> {
        let options = Options {
            headers: self.headers()?,
            ..Options::default()
        };
        pump::open(&self.dialed.channel, method, request, &options)
    }

    fn attach(&self, files: &[&OwnedFd]) {
        for file in files {
            self.dialed.attach(file);
        }
    }

    /// Makes or refreshes a connection; `files` are what its inode URLs name.
    pub fn request(
        &self,
        request: &NetworkServiceRequest,
        files: &[&OwnedFd],
        timeout: Duration,
    ) -> Result<Connection, RpcError> {
        self.attach(files);
        let headers = self.headers()?;
        let reply = self.unary(&method::REQUEST, request, headers, timeout)?;
        Ok(reply.message)
    }

    pub fn close(&self, connection: &Connection, timeout: Duration) -> Result<(), RpcError> {
        let headers = self.headers()?;
        self.unary(&method::CLOSE, connection, headers, timeout)?;
        Ok(())
    }

    pub fn monitor(
        &self,
        selector: &MonitorScopeSelector,
    ) -> Result<Pump<ConnectionEvent>, RpcError> {
        self.stream(&method::MONITOR_CONNECTIONS, selector)
    }

    fn registry_headers(&self) -> Result<Headers, RpcError> {
        let mut headers = self.headers()?;
        // A test may have put its own there.
        if !headers.iter().any(|(name, _)| name == PATH_HEADER) {
            headers.push((PATH_HEADER.to_owned(), RegistryPath::default().to_json()));
        }
        Ok(headers)
    }

    pub fn register_service(
        &self,
        service: &NetworkService,
        timeout: Duration,
    ) -> Result<Reply<NetworkService>, RpcError> {
        let headers = self.registry_headers()?;
        self.unary(&method::NS_REGISTER, service, headers, timeout)
    }

    pub fn register_endpoint(
        &self,
        endpoint: &NetworkServiceEndpoint,
        files: &[&OwnedFd],
        timeout: Duration,
    ) -> Result<Reply<NetworkServiceEndpoint>, RpcError> {
        self.attach(files);
        let headers = self.registry_headers()?;
        self.unary(&method::NSE_REGISTER, endpoint, headers, timeout)
    }

    pub fn unregister_endpoint(
        &self,
        endpoint: &NetworkServiceEndpoint,
        files: &[&OwnedFd],
        timeout: Duration,
    ) -> Result<(), RpcError> {
        self.attach(files);
        let headers = self.registry_headers()?;
        self.unary(&method::NSE_UNREGISTER, endpoint, headers, timeout)?;
        Ok(())
    }

    pub fn find_endpoints(
        &self,
        query: &NetworkServiceEndpointQuery,
    ) -> Result<Pump<NetworkServiceEndpointResponse>, RpcError> {
        self.stream(&method::NSE_FIND, query)
    }

    /// The health of `service`, without NSM's envelope.
    pub fn health(
        &self,
        service: &str,
        timeout: Duration,
    ) -> Result<HealthCheckResponse, RpcError> {
        let request = HealthCheckRequest {
            service: service.to_owned(),
            ..Default::default()
        };
        let reply = self.unary(&method::HEALTH_CHECK, &request, Vec::new(), timeout)?;
        Ok(reply.message)
    }
}
