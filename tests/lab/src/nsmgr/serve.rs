//! The gRPC services. Handlers run on gRPC's thread: they judge the envelope,
//! fix the call's place in the order of its key, and hand it to a thread.

use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use grpcio::{
    Metadata, MetadataBuilder, Method, RpcContext, RpcStatus, ServerStreamingSink, Service,
    ServiceBuilder, UnarySink,
};
use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::proto::health::{HealthCheckRequest, HealthCheckResponse};
use meridio_proxy::proto::registry::{NetworkService, NetworkServiceEndpoint};
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::spiffe::jwt::Token;
use meridio_proxy::sync::clock;
use protobuf::Message;

use super::Inner;
use super::parts::{detach, remaining};
use crate::monitor::Outbox;
use crate::path::RegistryPath;
use crate::policy::{PATH_HEADER, envelope, header_values, read_token};
use crate::registry::{NO_FILTER, crashed};
use crate::tls::Peer;

/// The most that a call may take, whatever its deadline.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// How long an answer may take to be written.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// A call on its way in.
pub struct Incoming {
    pub peer: Arc<Peer>,
    /// The token of its headers, if they have one.
    pub token: Option<Token>,
    pub deadline: Instant,
    /// Time that the caller still gave it at arrival; none without a deadline.
    pub remaining: Duration,
    /// The registry's path, if the header is there once and parses.
    pub path: Option<RegistryPath>,
}

/// An answer, with the registry's path where there is one.
pub struct Answer<T>(pub T, pub Option<RegistryPath>);

type Prepare<Req> = fn(&Inner, &mut Req) -> Result<String, RpcError>;
type Run<Req, Resp> = fn(&Inner, &Incoming, Req) -> Result<Answer<Resp>, RpcError>;

pub fn service(inner: &Weak<Inner>) -> Service {
    let builder = connections(ServiceBuilder::new(), inner);
    let builder = registries(builder, inner);
    builder
        .add_unary_handler(&method::HEALTH_CHECK, health)
        .build()
}

fn connections(builder: ServiceBuilder, inner: &Weak<Inner>) -> ServiceBuilder {
    let (enter, run) = (Inner::enter_request, Inner::request);
    let builder = unary(builder, inner, &method::REQUEST, enter, run);
    let (enter, run) = (Inner::enter_close, Inner::close);
    let builder = unary(builder, inner, &method::CLOSE, enter, run);
    stream(
        builder,
        inner,
        &method::MONITOR_CONNECTIONS,
        |inner, _, selector| Ok(inner.monitors.open(selector)),
    )
}

fn registries(mut builder: ServiceBuilder, inner: &Weak<Inner>) -> ServiceBuilder {
    let of_service: Prepare<NetworkService> = |_, service| Ok(service.name.clone());
    let run = Inner::register_service;
    builder = unary(builder, inner, &method::NS_REGISTER, of_service, run);
    let run = Inner::unregister_service;
    builder = unary(builder, inner, &method::NS_UNREGISTER, of_service, run);
    let of_endpoint: Prepare<NetworkServiceEndpoint> = |_, endpoint| Ok(endpoint.name.clone());
    let run = Inner::register_endpoint;
    builder = unary(builder, inner, &method::NSE_REGISTER, of_endpoint, run);
    let run = Inner::unregister_endpoint;
    builder = unary(builder, inner, &method::NSE_UNREGISTER, of_endpoint, run);
    builder = stream(builder, inner, &method::NS_FIND, |inner, _, query| {
        if query.network_service.is_none() {
            inner.notes.violation("Find", NO_FILTER);
            return Ok(crashed());
        }
        Ok(inner.registry.find_services(&query))
    });
    stream(builder, inner, &method::NSE_FIND, Inner::find_endpoints)
}

fn health(
    context: RpcContext<'_>,
    request: HealthCheckRequest,
    sink: UnarySink<HealthCheckResponse>,
) {
    let known = [
        "",
        "networkservice.NetworkService",
        "connection.MonitorConnection",
    ];
    let answer = if known.contains(&request.service.as_str()) {
        sink.success(HealthCheckResponse {
            status: ServingStatus::SERVING.into(),
            ..Default::default()
        })
    } else {
        sink.fail(RpcStatus::new(Code::NOT_FOUND))
    };
    context.spawn(async move {
        let _ = answer.await;
    });
}

fn unary<Req, Resp>(
    builder: ServiceBuilder,
    inner: &Weak<Inner>,
    method: &Method<Req, Resp>,
    prepare: Prepare<Req>,
    run: Run<Req, Resp>,
) -> ServiceBuilder
where
    Req: Send + 'static,
    Resp: Message,
{
    let inner = inner.clone();
    let what = method.name;
    builder.add_unary_handler(method, move |context: RpcContext<'_>, mut request, sink| {
        let Some(inner) = inner.upgrade() else { return };
        let arrived = incoming(&inner, &context, what, true).and_then(|call| {
            let key = prepare(&inner, &mut request)?;
            Ok((call, inner.turns.ticket(&format!("{what} {key}"))))
        });
        let (call, ticket) = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                note_arrival(&inner, what, &error);
                let failed = sink.fail(to_status(&error));
                context.spawn(async move {
                    let _ = failed.await;
                });
                return;
            }
        };
        detach("lab-call", move || {
            let late = || RpcError::status(Code::DEADLINE_EXCEEDED, "held back by the test");
            let mut result = if inner.gate.pass(call.deadline) && ticket.wait(call.deadline) {
                let admitted = inner.troubles.admit(what, call.deadline);
                admitted.and_then(|()| run(&inner, &call, request))
            } else {
                Err(late())
            };
            if let Err(error) = &result
                && matches!(
                    error.code(),
                    Some(Code::PERMISSION_DENIED | Code::INVALID_ARGUMENT | Code::INTERNAL)
                )
            {
                inner.notes.refuse(what, &error.to_string());
            }
            if let Ok(Answer(message, _)) = &mut result {
                inner.spoils.apply(what, message);
            }
            answer(sink, result);
            drop(ticket);
        });
    })
}

fn answer<Resp>(mut sink: UnarySink<Resp>, result: Result<Answer<Resp>, RpcError>) {
    let sent = match result {
        Ok(Answer(message, path)) => {
            if let Some(path) = path {
                sink.set_headers(path_header(path));
            }
            sink.success(message)
        }
        Err(error) => sink.fail(to_status(&error)),
    };
    // A client that has gone is no concern.
    let _ = block_on(sent, ANSWER_LIMIT);
}

/// The path as the caller gets it back: at its own index.
fn path_header(mut path: RegistryPath) -> Metadata {
    path.index = 0;
    let mut metadata = MetadataBuilder::new();
    let _ = metadata.add_str(PATH_HEADER, &path.to_json());
    metadata.build()
}

fn stream<Req, Resp>(
    builder: ServiceBuilder,
    inner: &Weak<Inner>,
    method: &Method<Req, Resp>,
    open: fn(&Inner, &Incoming, Req) -> Result<Outbox<Resp>, RpcError>,
) -> ServiceBuilder
where
    Req: 'static,
    Resp: Message,
{
    let inner = inner.clone();
    let what = method.name;
    builder.add_server_streaming_handler(
        method,
        move |context: RpcContext<'_>, request, sink: ServerStreamingSink<Resp>| {
            let Some(inner) = inner.upgrade() else { return };
            let opened = incoming(&inner, &context, what, false).and_then(|call| {
                inner.troubles.admit_stream(what)?;
                open(&inner, &call, request)
            });
            match opened {
                Ok(outbox) => {
                    let mut spoilt = Resp::new();
                    if inner.spoils.apply(what, &mut spoilt) {
                        outbox.push(spoilt);
                    }
                    outbox.serve(&context, sink);
                }
                Err(error) => {
                    note_arrival(&inner, what, &error);
                    let outbox = Outbox::default();
                    outbox.end(to_status(&error));
                    outbox.serve(&context, sink);
                }
            }
        },
    )
}

/// A connection that ended under its call is nobody's fault.
fn note_arrival(inner: &Inner, what: &str, error: &RpcError) {
    if !error.is_unavailable() {
        inner.notes.refuse(what, &error.to_string());
    }
}

fn incoming(
    inner: &Inner,
    context: &RpcContext<'_>,
    what: &str,
    unary: bool,
) -> Result<Incoming, RpcError> {
    let peer = inner
        .peers
        .lookup(&context.peer())
        .ok_or_else(|| RpcError::status(Code::UNAVAILABLE, "the connection has ended"))?;
    let headers = context.request_headers();
    // What no good client sends, whether or not a policy looks at it.
    if let Err(reason) = envelope(headers, &peer, clock::wall()) {
        inner.notes.violation(what, &reason);
    }
    let left = remaining(context.deadline());
    if unary && left.is_none() {
        inner.notes.violation(what, "call without a deadline");
    }
    // Only the last value counts.
    let path = header_values(headers, PATH_HEADER).pop();
    Ok(Incoming {
        peer,
        token: read_token(headers).ok(),
        deadline: clock::now() + left.unwrap_or(CALL_LIMIT).min(CALL_LIMIT),
        remaining: left.unwrap_or_default(),
        path: path.and_then(|text| RegistryPath::parse(&text).ok()),
    })
}

fn to_status(error: &RpcError) -> RpcStatus {
    match error {
        RpcError::Status { code, message } => RpcStatus::with_message(*code, message.clone()),
        other => RpcStatus::with_message(Code::UNKNOWN, other.to_string()),
    }
}

/// Runs a future on this thread; `None` after `limit`.
fn block_on<F: Future>(future: F, limit: Duration) -> Option<F::Output> {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = Box::pin(future);
    let deadline = clock::now() + limit;
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
        let now = clock::now();
        if now >= deadline {
            return None;
        }
        std::thread::park_timeout(deadline - now);
    }
}
