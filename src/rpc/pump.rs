//! A server stream as a bounded channel: a future on the gRPC poll thread
//! moves each message over, and dropping the [`Pump`] cancels the RPC.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use futures_util::Stream;
use futures_util::future::poll_fn;
use grpcio::{Channel, Client, ClientSStreamReceiver, Method};

use super::call::{CancelGuard, Flag, Options};
use super::status::RpcError;

/// Messages that may wait for a slow reader before the stream is given up. The
/// streams that the daemon reads are opened again then, and start with the
/// full state, so nothing is lost but time.
const BOUND: usize = 64;

/// What a stream brings.
#[derive(Debug)]
pub enum Item<T> {
    /// A message.
    Message(T),
    /// The last item: `Ok` when the peer ended the stream in order.
    Ended(Result<(), StreamError>),
}

/// Why a stream ended out of order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamError {
    /// The RPC failed.
    Rpc(RpcError),
    /// The reader was more messages behind than are kept for it, which are 64.
    Lagged,
}

impl StreamError {
    /// Whether the peer sent what is no message: no routine end of a stream.
    #[must_use]
    pub fn is_undecodable(&self) -> bool {
        matches!(self, Self::Rpc(RpcError::Undecodable(_)))
    }
}

impl std::fmt::Display for StreamError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rpc(error) => error.fmt(f),
            Self::Lagged => write!(f, "the reader fell more than {BOUND} messages behind"),
        }
    }
}

impl std::error::Error for StreamError {}

/// A running stream. Dropping it cancels the RPC.
#[derive(Debug)]
pub struct Pump<T> {
    items: Receiver<Item<T>>,
    _guard: CancelGuard,
}

impl<T> Pump<T> {
    /// The channel to select on. After `Ended` it is disconnected.
    #[must_use]
    pub fn items(&self) -> &Receiver<Item<T>> {
        &self.items
    }
}

/// Opens a stream.
///
/// # Errors
///
/// Only what keeps the call from being started; everything later arrives as
/// [`Item::Ended`].
pub fn open<Req, Resp>(
    channel: &Channel,
    method: &Method<Req, Resp>,
    request: &Req,
    options: &Options,
) -> Result<Pump<Resp>, RpcError>
where
    Resp: Send + 'static,
{
    let client = Client::new(channel.clone());
    let receiver = client.server_streaming(method, request, options.stream()?)?;
    // One slot more than may wait: the end always has room.
    let (tx, items) = bounded(BOUND + 1);
    let flag = Arc::new(Flag::default());
    let guard = CancelGuard::new(Arc::clone(&flag));
    client.spawn(forward(receiver, tx, flag));
    Ok(Pump {
        items,
        _guard: guard,
    })
}

async fn forward<T>(mut receiver: ClientSStreamReceiver<T>, tx: Sender<Item<T>>, flag: Arc<Flag>) {
    loop {
        let next = poll_fn(|context| {
            if flag.is_raised(context) {
                return Poll::Ready(None);
            }
            Pin::new(&mut receiver).poll_next(context).map(Some)
        })
        .await;
        let last = match next {
            None => {
                // Dropping an unfinished receiver cancels the call.
                return;
            }
            Some(Some(Ok(message))) => {
                if tx.len() >= BOUND {
                    Err(StreamError::Lagged)
                } else {
                    match tx.try_send(Item::Message(message)) {
                        Ok(()) => continue,
                        Err(TrySendError::Full(_)) => Err(StreamError::Lagged),
                        Err(TrySendError::Disconnected(_)) => return,
                    }
                }
            }
            Some(Some(Err(error))) => Err(StreamError::Rpc(error.into())),
            Some(None) => Ok(()),
        };
        let _ = tx.try_send(Item::Ended(last));
        return;
    }
}
