//! The calls to IPAM: started here, never waited for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use super::IpamOptions;
use super::convert;
use crate::core::lease::{Failure, IpamCall, Verb};
use crate::proto::ipam::Prefix;
use crate::rpc::call::{self, CancelGuard, Options};
use crate::rpc::method;
use crate::rpc::status::{Code, RpcError};
use crate::sync::stop::Stop;
use crate::sync::watch::Watch;
use crate::transport::client::{Connection, Connector, ConnectorState};

/// Deadline of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);

/// How a call ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// An Allocate; the address as IPAM gave it.
    Allocated(Result<IpNetwork, Failure<RpcError>>),
    /// A Release.
    Released(Result<(), Failure<RpcError>>),
}

impl Outcome {
    /// A call that was not made.
    pub(super) fn unsent(verb: Verb, error: RpcError) -> Self {
        match verb {
            Verb::Allocate => Self::Allocated(Err(Failure::Unsent(error))),
            Verb::Release => Self::Released(Err(Failure::Unsent(error))),
        }
    }
}

/// A call in flight. Dropping it cancels the call.
pub(super) struct Running {
    _guard: CancelGuard,
    // A connection that is replaced lives until its last call has ended.
    _connection: Arc<Connection>,
}

/// Makes the calls of one node.
pub(super) struct Client {
    connector: Connector,
    options: IpamOptions,
}

impl Client {
    pub(super) fn new(connector: Connector, options: IpamOptions) -> Self {
        Self { connector, options }
    }

    /// The present connection; does not wait for one.
    ///
    /// # Errors
    ///
    /// Why there is none, in the words of gRPC.
    pub(super) fn connection(&self) -> Result<Arc<Connection>, RpcError> {
        Ok(self.connector.current()?)
    }

    /// Waits until there is a connection, or until `deadline`.
    pub(super) fn wait(&self, deadline: Instant, stop: &Stop) {
        // Why there is none is told by the first call.
        let _ = self.connector.acquire(deadline, stop);
    }

    /// Whether there is a connection.
    pub(super) fn state(&self) -> Watch<ConnectorState> {
        self.connector.state().clone()
    }

    /// Starts `call`; `done` runs once on gRPC's poll thread, or right here
    /// when the call cannot be started, and must not block.
    pub(super) fn start<F>(&self, connection: Arc<Connection>, call: &IpamCall, done: F) -> Running
    where
        F: FnOnce(Outcome) + Send + 'static,
    {
        let request = convert::request(&self.options, call);
        let options = Options::with_timeout(CALL_TIMEOUT);
        let channel = connection.channel();
        let guard = match call.verb {
            Verb::Allocate => {
                let asked = call.clone();
                let done = move |result: Result<call::Reply<_>, RpcError>| {
                    done(Outcome::Allocated(allocated(&asked, result)));
                };
                call::start(channel, &method::IPAM_ALLOCATE, &request, &options, done)
            }
            Verb::Release => {
                let done = move |result: Result<call::Reply<_>, RpcError>| {
                    done(Outcome::Released(result.map(drop).map_err(failure)));
                };
                call::start(channel, &method::IPAM_RELEASE, &request, &options, done)
            }
        };
        Running {
            _guard: guard,
            _connection: connection,
        }
    }
}

/// The address that an Allocate brought. An answer that cannot be decoded is
/// an answer all the same: IPAM has executed the call.
fn allocated(
    call: &IpamCall,
    result: Result<call::Reply<Prefix>, RpcError>,
) -> Result<IpNetwork, Failure<RpcError>> {
    match result {
        Ok(reply) => convert::address(call, &reply.message).map_err(Failure::Unusable),
        Err(error @ RpcError::Undecodable(_)) => Err(Failure::Unusable(format!("{call}: {error}"))),
        Err(error) => Err(failure(error)),
    }
}

/// What a failed call says about its execution. IPAM's own errors all come as
/// UNKNOWN (Meridio v1.2.8, pkg/ipam/server.go); the statuses that gRPC itself
/// makes up leave it open whether the call was executed.
fn failure(error: RpcError) -> Failure<RpcError> {
    match error.code() {
        Some(Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED | Code::CANCELLED | Code::INTERNAL) => {
            Failure::Lost(error)
        }
        Some(_) => Failure::Refused(error),
        None => Failure::Lost(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures() {
        let of = |code| failure(RpcError::status(code, ""));
        assert!(matches!(of(Code::UNAVAILABLE), Failure::Lost(_)));
        assert!(matches!(of(Code::DEADLINE_EXCEEDED), Failure::Lost(_)));
        assert!(matches!(of(Code::UNKNOWN), Failure::Refused(_)));
        assert!(matches!(of(Code::UNIMPLEMENTED), Failure::Refused(_)));
        assert!(matches!(
            failure(RpcError::Library(String::new())),
            Failure::Lost(_)
        ));
    }
}
