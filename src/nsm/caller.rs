//! Calls to nsmgr with the envelope that it demands: a token signed with the
//! key of the TLS session, and descriptors on that same connection.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use grpcio::Method;

use crate::rpc::call::Reply;
use crate::rpc::pump::Pump;
use crate::rpc::status::RpcError;
use crate::sync::stop::Stop;
use crate::transport::client::Connector;

/// Makes calls to nsmgr.
#[derive(Clone)]
pub struct NsmCaller {
    connector: Connector,
    token_lifetime: Duration,
}

impl NsmCaller {
    /// `token_lifetime` is `NSM_MAX_TOKEN_LIFETIME`.
    #[must_use]
    pub fn new(connector: Connector, token_lifetime: Duration) -> Self {
        Self {
            connector,
            token_lifetime,
        }
    }

    /// A unary call that ends by `deadline`: waits for a connection, attaches
    /// what `descriptors` returns, adds the token headers and `headers`. When
    /// the connection ends under the call, makes it again on the next one
    /// (NSM's calls are idempotent).
    ///
    /// # Errors
    ///
    /// The peer's status; UNAVAILABLE when no connection could be had.
    pub fn unary<Req, Resp>(
        &self,
        _method: &Method<Req, Resp>,
        _request: &Req,
        _headers: &[(String, String)],
        _descriptors: &dyn Fn() -> Vec<OwnedFd>,
        _deadline: Instant,
        _stop: &Stop,
    ) -> Result<Reply<Resp>, RpcError>
    where
        Resp: Send + Unpin + 'static,
    {
        let _ = (&self.connector, self.token_lifetime);
        todo!()
    }

    /// Opens a stream; waits for a connection until `deadline`.
    ///
    /// # Errors
    ///
    /// UNAVAILABLE when no connection could be had.
    pub fn stream<Req, Resp>(
        &self,
        _method: &Method<Req, Resp>,
        _request: &Req,
        _deadline: Instant,
        _stop: &Stop,
    ) -> Result<Pump<Resp>, RpcError>
    where
        Resp: Send + 'static,
    {
        todo!()
    }
}
