//! The gRPC health service (grpc.health.v1), on gRPC's poll thread: handlers
//! read the [`HealthCell`] and never wait.
//!
//! Check of an unknown service fails with NOT_FOUND; Watch of one says
//! SERVICE_UNKNOWN and stays open, as the protocol has it (health.proto).

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::Poll;

use futures_util::Sink;
use futures_util::future::poll_fn;
use grpcio::{
    RpcContext, RpcStatus, RpcStatusCode, Server, ServerCredentials, ServerStreamingSink, Service,
    ServiceBuilder, UnarySink, WriteFlags,
};
use log::{debug, info};

use super::{HealthCell, ProbeService, Watcher};
use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse};
use crate::rpc::env::Rpc;
use crate::rpc::method::{HEALTH_CHECK, HEALTH_WATCH};
use crate::rpc::server::shut_down;
use crate::sync::clock;

/// Watch streams that one server keeps; more are refused with
/// RESOURCE_EXHAUSTED.
const WATCHERS_MAX: usize = 64;
/// Characters of an unknown service's name that are repeated.
const NAME_SHOWN: usize = 64;

/// Why the health server could not be started.
#[derive(Debug)]
pub struct HealthServerError {
    what: String,
    cause: String,
}

impl HealthServerError {
    fn new(what: impl Into<String>, cause: impl fmt::Display) -> Self {
        Self {
            what: what.into(),
            cause: cause.to_string(),
        }
    }
}

impl fmt::Display for HealthServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "health server: {}: {}", self.what, self.cause)
    }
}

impl std::error::Error for HealthServerError {}

/// The service with `cell`'s answers, for any server.
#[must_use]
pub fn service(cell: &HealthCell) -> Service {
    let (for_check, for_watch) = (cell.clone(), cell.clone());
    ServiceBuilder::new()
        .add_unary_handler(&HEALTH_CHECK, move |context, request, sink| {
            check(&for_check, &context, &request, sink);
        })
        .add_server_streaming_handler(&HEALTH_WATCH, move |context, request, sink| {
            watch(&for_watch, &context, &request, sink);
        })
        .build()
}

/// The server that the exec probes ask.
pub struct HealthServer {
    server: Server,
    path: PathBuf,
    /// Device and inode of the socket: what else is at `path` later belongs to
    /// a successor.
    socket: (u64, u64),
}

impl HealthServer {
    /// Listens on the unix socket `path`; makes its directory, and takes the
    /// place of a socket that a predecessor left.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made, or something else is at `path`.
    pub fn start(rpc: &Rpc, path: &Path, cell: &HealthCell) -> Result<Self, HealthServerError> {
        let at_path = |error| HealthServerError::new(path.display().to_string(), error);
        clear(path).map_err(at_path)?;
        // gRPC unlinks the path that it listens on when its server ends, be
        // its socket still there or a successor's. So it is told another one,
        // and the socket is moved: that also takes the place of a
        // predecessor's in one step, with no moment without any.
        let made = path.with_extension("sock.new");
        let address = made.to_str().ok_or_else(|| {
            HealthServerError::new(path.display().to_string(), "the path is not UTF-8")
        })?;
        let mut server = rpc
            .server()
            .register_service(service(cell))
            .build()
            .map_err(|error| HealthServerError::new("setting up", error))?;
        server
            .add_listening_port(format!("unix:{address}"), ServerCredentials::insecure())
            .map_err(|error| HealthServerError::new(format!("listening on {address}"), error))?;
        server.start();
        let socket = fs::rename(&made, path)
            .and_then(|()| identity(path))
            .map_err(at_path)?;
        Ok(Self {
            server,
            path: path.to_owned(),
            socket,
        })
    }

    /// Ends the server and its calls, and removes the socket, unless another
    /// one has taken its place.
    pub fn stop(self) {
        // A watch ends with the server only: there is nothing to wait for.
        shut_down(self.server, clock::now());
        if identity(&self.path).is_ok_and(|found| found == self.socket) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at `path`.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Makes the directory; nothing but a socket may be at `path`.
fn clear(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => Ok(()),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "exists and is no socket",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn check(
    cell: &HealthCell,
    context: &RpcContext<'_>,
    request: &HealthCheckRequest,
    sink: UnarySink<HealthCheckResponse>,
) {
    let Some(service) = ProbeService::parse(&request.service) else {
        let name: String = request.service.chars().take(NAME_SHOWN).collect();
        let status = RpcStatus::with_message(
            RpcStatusCode::NOT_FOUND,
            format!("unknown service {name:?}"),
        );
        let answered = sink.fail(status);
        context.spawn(async move {
            let _ = answered.await;
        });
        return;
    };
    let serving = cell.serving(service);
    if !serving && matches!(service, ProbeService::Readiness | ProbeService::Liveness) {
        info!(service = request.service.as_str(), status = cell.describe(); "Probe service");
    }
    let answered = sink.success(answer(status(serving)));
    context.spawn(async move {
        // The prober may have gone; there is nobody to tell.
        let _ = answered.await;
    });
}

fn watch(
    cell: &HealthCell,
    context: &RpcContext<'_>,
    request: &HealthCheckRequest,
    sink: ServerStreamingSink<HealthCheckResponse>,
) {
    let Some(watcher) = cell.watch(WATCHERS_MAX) else {
        let answered = sink.fail(RpcStatus::with_message(
            RpcStatusCode::RESOURCE_EXHAUSTED,
            format!("{WATCHERS_MAX} watches are open already"),
        ));
        context.spawn(async move {
            let _ = answered.await;
        });
        return;
    };
    let service = ProbeService::parse(&request.service);
    context.spawn(async move {
        let error = follow(&watcher, service, sink).await;
        debug!("Watch of a health service ended: {error}");
    });
}

/// Sends the status, then each change, until the peer has gone. A status that
/// changes to and fro while an earlier one is being sent is left out.
async fn follow(
    watcher: &Watcher,
    service: Option<ProbeService>,
    mut sink: ServerStreamingSink<HealthCheckResponse>,
) -> grpcio::Error {
    let mut sent = None;
    poll_fn(|context| {
        loop {
            // Registers the task for the end of the call too.
            match Pin::new(&mut sink).poll_ready(context) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => return Poll::Pending,
            }
            let now = match service {
                Some(service) => status(watcher.serving(service, context.waker())),
                None => ServingStatus::SERVICE_UNKNOWN,
            };
            if sent != Some(now) {
                let message = (answer(now), WriteFlags::default());
                if let Err(error) = Pin::new(&mut sink).start_send(message) {
                    return Poll::Ready(error);
                }
                sent = Some(now);
                continue;
            }
            return match Pin::new(&mut sink).poll_flush(context) {
                Poll::Ready(Err(error)) => Poll::Ready(error),
                _ => Poll::Pending,
            };
        }
    })
    .await
}

fn status(serving: bool) -> ServingStatus {
    if serving {
        ServingStatus::SERVING
    } else {
        ServingStatus::NOT_SERVING
    }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
        ..Default::default()
    }
}
