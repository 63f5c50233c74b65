//! The gRPC services of the endpoint. Handlers run on gRPC's poll thread: they
//! decode, find the caller's session, and queue a job; nothing here waits.

use std::sync::Arc;
use std::time::Duration;

use grpcio::{
    Deadline, Metadata, RpcContext, RpcStatus, ServerStreamingSink, Service, ServiceBuilder,
    UnarySink,
};
use log::debug;
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;

use super::convert::parse_rfc3339;
use super::feed::feed;
use super::jobs::{Call, Job, JobQueue};
use super::path::PeerToken;
use super::reply::{Awaited, Permits, reply};
use super::session::TlsSession;
use crate::proto::connection::{Connection, MonitorScopeSelector};
use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse};
use crate::proto::networkservice::NetworkServiceRequest;
use crate::rpc::encoded::{Encoded, encoded};
use crate::rpc::method;
use crate::rpc::status::{Code, RpcError};
use crate::transport::server::PeerTable;

/// Requests that may wait for an answer at a time.
const REQUESTS_MAX: usize = 1024;
/// Bytes of these, as they were sent: 32 KiB for each, or 32 of the largest.
const REQUESTS_BYTES_MAX: usize = 32 * 1024 * 1024;
/// The header with the caller's token (sdk pkg/tools/token/context.go).
const TOKEN: &str = "nsm-client-token";
/// The header with the time at which it expires.
const TOKEN_EXPIRES: &str = "nsm-client-token-expires";
/// What health is asked about; all of it serves as long as anything answers.
const SERVICES: [&str; 3] = [
    "",
    "networkservice.NetworkService",
    "connection.MonitorConnection",
];

/// What every handler has.
#[derive(Clone)]
pub struct Handlers {
    /// The queue of `nse`.
    pub queue: Arc<JobQueue>,
    /// Who called.
    pub peers: PeerTable,
    /// `NSM_MAX_TOKEN_LIFETIME`.
    pub token_lifetime: Duration,
    /// Requests that wait.
    pub permits: Permits,
}

/// The services, to be given to the server.
#[must_use]
pub fn services(handlers: &Handlers) -> Vec<Service> {
    let (request, close, monitor) = (handlers.clone(), handlers.clone(), handlers.clone());
    let watch = handlers.clone();
    let network_service = ServiceBuilder::new()
        .add_unary_handler(&method::REQUEST, move |ctx, req, sink| {
            request.request(&ctx, req, sink);
        })
        .add_unary_handler(&method::CLOSE, move |ctx, req, sink| {
            close.close(&ctx, req, sink);
        })
        .build();
    let monitor_connection = ServiceBuilder::new()
        .add_server_streaming_handler(
            &encoded(&method::MONITOR_CONNECTIONS),
            move |ctx, req, sink| {
                monitor.monitor(&ctx, req, sink);
            },
        )
        .build();
    let health = ServiceBuilder::new()
        .add_unary_handler(&method::HEALTH_CHECK, |ctx, req, sink| {
            check(&ctx, &req, sink);
        })
        .add_server_streaming_handler(&method::HEALTH_WATCH, move |ctx, req, sink| {
            watch.watch(&ctx, &req, sink);
        })
        .build();
    vec![network_service, monitor_connection, health]
}

impl Handlers {
    fn request(
        &self,
        ctx: &RpcContext<'_>,
        request: NetworkServiceRequest,
        sink: UnarySink<Connection>,
    ) {
        let bytes = usize::try_from(request.compute_size()).unwrap_or(usize::MAX);
        let permit = (self.permits).take(bytes, REQUESTS_MAX, REQUESTS_BYTES_MAX);
        let Some(permit) = permit else {
            let text = format!(
                "with this one of {bytes} bytes more than {REQUESTS_MAX} requests or \
                 {REQUESTS_BYTES_MAX} bytes would wait"
            );
            let error = RpcError::status(Code::RESOURCE_EXHAUSTED, text);
            return fail(ctx, sink, &error);
        };
        match self.call(ctx) {
            Ok(call) => {
                let (reply, awaited) = reply(Some(permit));
                self.queue.push(Job::Request(request, call, reply));
                answer(ctx, awaited, sink, |connection| connection);
            }
            Err(error) => fail(ctx, sink, &error),
        }
    }

    fn close(&self, ctx: &RpcContext<'_>, connection: Connection, sink: UnarySink<Empty>) {
        match self.call(ctx) {
            Ok(call) => {
                let (reply, awaited) = reply(None);
                self.queue.push(Job::Close(connection, call, reply));
                answer(ctx, awaited, sink, |()| Empty::new());
            }
            Err(error) => fail(ctx, sink, &error),
        }
    }

    /// As in NSM's endpoints, whoever has a certificate may monitor.
    fn monitor(
        &self,
        ctx: &RpcContext<'_>,
        selector: MonitorScopeSelector,
        sink: ServerStreamingSink<Encoded>,
    ) {
        let (publisher, outlet) = feed();
        self.queue.push(Job::Monitor(selector, publisher));
        ctx.spawn(outlet.run(sink));
    }

    fn watch(
        &self,
        ctx: &RpcContext<'_>,
        request: &HealthCheckRequest,
        sink: ServerStreamingSink<HealthCheckResponse>,
    ) {
        let (publisher, outlet) = feed();
        publisher.send(health(known(request)));
        self.queue.push(Job::Health(publisher));
        ctx.spawn(outlet.run(sink));
    }

    fn call(&self, ctx: &RpcContext<'_>) -> Result<Call, RpcError> {
        let Some(connection) = self.peers.lookup(&ctx.peer()) else {
            let text = "the connection of this call has ended";
            return Err(RpcError::status(Code::UNAVAILABLE, text));
        };
        let deadline: Deadline = ctx.deadline();
        Ok(Call {
            session: Arc::new(TlsSession::new(connection, self.token_lifetime)),
            token: token(ctx.request_headers()),
            is_over: Arc::new(move || deadline.exceeded()),
        })
    }
}

/// The caller's token: both headers, each exactly once and readable. Without
/// them the path's own tokens count (sdk networkservice/common/updatetoken).
fn token(headers: &Metadata) -> Option<PeerToken> {
    let only = |name: &str| {
        let mut values = headers
            .iter()
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value);
        let value = values.next()?;
        values
            .next()
            .is_none()
            .then(|| std::str::from_utf8(value).ok())?
    };
    Some(PeerToken {
        jwt: only(TOKEN)?.to_owned(),
        expires: parse_rfc3339(only(TOKEN_EXPIRES)?)?,
    })
}

/// Sends the answer when it is there.
fn answer<T, M>(
    ctx: &RpcContext<'_>,
    awaited: Awaited<T>,
    sink: UnarySink<M>,
    message: impl FnOnce(T) -> M + Send + 'static,
) where
    T: Send + 'static,
    M: Send + 'static,
{
    ctx.spawn(async move {
        let sent = match awaited.await {
            Ok(value) => sink.success(message(value)).await,
            Err(error) => sink.fail(status(&error)).await,
        };
        log_lost(sent);
    });
}

fn fail<M>(ctx: &RpcContext<'_>, sink: UnarySink<M>, error: &RpcError) {
    let sent = sink.fail(status(error));
    ctx.spawn(async move { log_lost(sent.await) });
}

fn log_lost(sent: grpcio::Result<()>) {
    if let Err(error) = sent {
        debug!("an answer to a target did not leave: {error}");
    }
}

fn status(error: &RpcError) -> RpcStatus {
    match error {
        RpcError::Status { code, message } => RpcStatus::with_message(*code, message.clone()),
        other => RpcStatus::with_message(Code::UNKNOWN, other.to_string()),
    }
}

fn known(request: &HealthCheckRequest) -> bool {
    SERVICES.contains(&request.service.as_str())
}

fn health(known: bool) -> HealthCheckResponse {
    let status = if known {
        ServingStatus::SERVING
    } else {
        ServingStatus::SERVICE_UNKNOWN
    };
    HealthCheckResponse {
        status: status.into(),
        ..HealthCheckResponse::default()
    }
}

fn check(ctx: &RpcContext<'_>, request: &HealthCheckRequest, sink: UnarySink<HealthCheckResponse>) {
    if known(request) {
        let sent = sink.success(health(true));
        ctx.spawn(async move { log_lost(sent.await) });
    } else {
        let error = RpcError::status(Code::NOT_FOUND, "unknown service");
        fail(ctx, sink, &error);
    }
}
