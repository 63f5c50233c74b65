//! Unary calls: with a deadline, stoppable, and, where one thread has many in
//! flight, answered by a callback on the gRPC poll thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use crossbeam_channel::{bounded, select};
use futures_util::future::poll_fn;
use futures_util::task::AtomicWaker;
use grpcio::{CallOption, Channel, Client, ClientUnaryReceiver, Metadata, MetadataBuilder, Method};

use super::status::RpcError;
use crate::sync::stop::Stop;

/// What a successful unary call brought.
#[derive(Debug)]
pub struct Reply<T> {
    /// The message.
    pub message: T,
    /// The response headers (initial metadata).
    pub headers: Metadata,
}

/// How a call is made.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The deadline. Every unary call has one.
    pub timeout: Duration,
    /// Request headers: lower-case name, printable value.
    pub headers: Vec<(String, String)>,
    /// Wait for the channel to connect instead of failing at once. Only for
    /// channels that gRPC dials itself.
    pub wait_for_ready: bool,
}

impl Options {
    /// A call with a deadline and nothing else.
    #[must_use]
    pub fn with_timeout(timeout: Duration) -> Self {
        Self {
            timeout,
            ..Self::default()
        }
    }

    /// For unary calls.
    fn unary(&self) -> Result<CallOption, RpcError> {
        Ok(self.stream()?.timeout(self.timeout))
    }

    /// For streams, which have no deadline.
    ///
    /// # Errors
    ///
    /// When a header cannot be sent.
    pub(super) fn stream(&self) -> Result<CallOption, RpcError> {
        let mut option = CallOption::default();
        if self.wait_for_ready {
            option = option.wait_for_ready(true);
        }
        if !self.headers.is_empty() {
            let mut metadata = MetadataBuilder::with_capacity(self.headers.len());
            for (name, value) in &self.headers {
                metadata
                    .add_str(name, value)
                    .map_err(|error| RpcError::Library(format!("header {name}: {error}")))?;
            }
            option = option.headers(metadata.build());
        }
        Ok(option)
    }
}

/// Cancels its RPC when dropped, from whichever thread; an RPC that has ended
/// is not touched.
#[derive(Debug)]
#[must_use = "dropping the guard cancels the call"]
pub struct CancelGuard(Option<Arc<Flag>>);

impl CancelGuard {
    pub(super) fn new(flag: Arc<Flag>) -> Self {
        Self(Some(flag))
    }

    /// Lets the call run to its end, or its deadline.
    pub fn detach(mut self) {
        self.0 = None;
    }
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        if let Some(flag) = &self.0 {
            flag.raise();
        }
    }
}

/// Tells a future on the poll thread to cancel its call.
#[derive(Debug, Default)]
pub(super) struct Flag {
    raised: AtomicBool,
    waker: AtomicWaker,
}

impl Flag {
    fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Registers the polling task, then reads: a raise in between wakes it.
    pub(super) fn is_raised(&self, context: &std::task::Context<'_>) -> bool {
        self.waker.register(context.waker());
        self.raised.load(Ordering::Acquire)
    }
}

/// Starts a unary call; `done` runs once, on the gRPC poll thread (or, when
/// the call cannot be started, right here), and must not block.
pub fn start<Req, Resp, F>(
    channel: &Channel,
    method: &Method<Req, Resp>,
    request: &Req,
    options: &Options,
    done: F,
) -> CancelGuard
where
    Resp: Send + Unpin + 'static,
    F: FnOnce(Result<Reply<Resp>, RpcError>) + Send + 'static,
{
    let client = Client::new(channel.clone());
    let started = options.unary().and_then(|option| {
        client
            .unary_call_async(method, request, option)
            .map_err(RpcError::from)
    });
    let receiver = match started {
        Ok(receiver) => receiver,
        Err(error) => {
            done(Err(error));
            return CancelGuard(None);
        }
    };
    let flag = Arc::new(Flag::default());
    let guard = CancelGuard::new(Arc::clone(&flag));
    client.spawn(async move { done(finish(receiver, &flag).await) });
    guard
}

async fn finish<Resp: Unpin>(
    mut receiver: ClientUnaryReceiver<Resp>,
    flag: &Flag,
) -> Result<Reply<Resp>, RpcError> {
    let mut cancelled = false;
    let headers = {
        // The receiver is polled through one of its own futures; cancelling
        // needs it back, so the future is made anew after that.
        let first = poll_until_raised(&mut receiver, flag).await;
        match first {
            Some(result) => result,
            None => {
                cancelled = true;
                receiver.cancel();
                receiver.headers().await.cloned()
            }
        }
    };
    if cancelled {
        return Err(RpcError::Cancelled);
    }
    let headers = headers?;
    // Nothing is left to be cancelled: gRPC reports headers, message and status
    // of a unary call together, when all of them are there.
    let message = receiver.message().await?;
    Ok(Reply { message, headers })
}

/// The headers, which come with the message at the end of the call; `None` when
/// the flag is raised before.
async fn poll_until_raised<Resp>(
    receiver: &mut ClientUnaryReceiver<Resp>,
    flag: &Flag,
) -> Option<Result<Metadata, grpcio::Error>> {
    let mut headers = Box::pin(async { receiver.headers().await.cloned() });
    poll_fn(|context| {
        if let Poll::Ready(result) = headers.as_mut().poll(context) {
            return Poll::Ready(Some(result));
        }
        if flag.is_raised(context) {
            return Poll::Ready(None);
        }
        Poll::Pending
    })
    .await
}

/// Makes a unary call and waits for its end, its deadline, or `stop`.
///
/// # Errors
///
/// The peer's status, DEADLINE_EXCEEDED, or [`RpcError::Cancelled`] after
/// `stop`.
pub fn unary<Req, Resp>(
    channel: &Channel,
    method: &Method<Req, Resp>,
    request: &Req,
    options: &Options,
    stop: &Stop,
) -> Result<Reply<Resp>, RpcError>
where
    Resp: Send + Unpin + 'static,
{
    let (tx, rx) = bounded(1);
    let guard = start(channel, method, request, options, move |result| {
        let _ = tx.try_send(result);
    });
    let result = select! {
        recv(rx) -> result => result.unwrap_or(Err(RpcError::Cancelled)),
        recv(stop.receiver()) -> _ => Err(RpcError::Cancelled),
    };
    drop(guard);
    result
}
