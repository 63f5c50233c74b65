//! A server stream that is fed from another thread than the one that sends it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::poll_fn;
use futures_util::task::AtomicWaker;
use futures_util::{Sink, SinkExt};
use grpcio::{RpcStatus, ServerStreamingSink, WriteFlags};
use log::debug;
use parking_lot::Mutex;

use crate::rpc::status::Code;

/// Messages that may wait for a slow reader; one that falls further behind
/// gets RESOURCE_EXHAUSTED, and the full state when it comes back.
const BOUND: usize = 1024;

/// The feeding side. Dropping it ends the stream with OK.
#[derive(Debug)]
pub struct Publisher<T>(Arc<Shared<T>>);

/// The sending side, for the gRPC poll thread. Dropping it tells the
/// [`Publisher`] that the reader has gone.
#[derive(Debug)]
pub struct Outlet<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    waker: AtomicWaker,
}

#[derive(Debug)]
struct State<T> {
    queue: VecDeque<T>,
    end: Option<End>,
    gone: bool,
}

/// Why a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Closed,
    Lagged,
}

/// What the sending side does next.
#[derive(Debug, PartialEq, Eq)]
enum Next<T> {
    Message(T),
    End(End),
    Gone,
}

/// A connected pair.
#[must_use]
pub fn feed<T>() -> (Publisher<T>, Outlet<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            queue: VecDeque::new(),
            end: None,
            gone: false,
        }),
        waker: AtomicWaker::new(),
    });
    (Publisher(Arc::clone(&shared)), Outlet(shared))
}

impl<T> Publisher<T> {
    /// Queues a message; a reader that is too far behind loses the stream.
    pub fn send(&self, message: T) {
        let mut state = self.0.state.lock();
        if state.end.is_some() || state.gone {
            return;
        }
        if state.queue.len() >= BOUND {
            state.queue.clear();
            state.end = Some(End::Lagged);
        } else {
            state.queue.push_back(message);
        }
        drop(state);
        self.0.waker.wake();
    }

    /// Whether nobody reads any more.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let state = self.0.state.lock();
        state.gone || state.end.is_some()
    }
}

impl<T> Drop for Publisher<T> {
    fn drop(&mut self) {
        self.0.state.lock().end.get_or_insert(End::Closed);
        self.0.waker.wake();
    }
}

impl<T> Drop for Outlet<T> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.gone = true;
        state.queue.clear();
    }
}

impl<T> Outlet<T> {
    fn poll_next(&self, context: &Context<'_>) -> Poll<Next<T>> {
        self.0.waker.register(context.waker());
        let mut state = self.0.state.lock();
        match (state.queue.pop_front(), state.end) {
            (Some(message), _) => Poll::Ready(Next::Message(message)),
            (None, Some(end)) => Poll::Ready(Next::End(end)),
            (None, None) => Poll::Pending,
        }
    }

    /// Sends what is published until either side ends the stream.
    pub async fn run(self, mut sink: ServerStreamingSink<T>) {
        loop {
            let next = poll_fn(|context| {
                // Fails as soon as the call is cancelled or its connection is
                // lost, which is how the end of a silent stream is noticed.
                if let Poll::Ready(Err(_)) = Pin::new(&mut sink).poll_ready(context) {
                    return Poll::Ready(Next::Gone);
                }
                self.poll_next(context)
            })
            .await;
            let sent = match next {
                Next::Message(message) => sink.send((message, WriteFlags::default())).await,
                Next::End(End::Closed) => return log_end(sink.close().await),
                Next::End(End::Lagged) => {
                    let text = format!("the reader fell more than {BOUND} messages behind");
                    let status = RpcStatus::with_message(Code::RESOURCE_EXHAUSTED, text);
                    return log_end(sink.fail(status).await);
                }
                Next::Gone => return,
            };
            if let Err(error) = sent {
                return log_end(Err(error));
            }
        }
    }
}

fn log_end(ended: grpcio::Result<()>) {
    if let Err(error) = ended {
        debug!("a monitor stream ended: {error}");
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::task::Waker;

    use super::*;

    /// What is queued, and whether the stream ended.
    pub fn drain<T>(outlet: &Outlet<T>) -> (Vec<T>, bool) {
        let context = Context::from_waker(Waker::noop());
        let mut messages = Vec::new();
        loop {
            match outlet.poll_next(&context) {
                Poll::Ready(Next::Message(message)) => messages.push(message),
                Poll::Ready(_) => return (messages, true),
                Poll::Pending => return (messages, false),
            }
        }
    }

    #[test]
    fn ends_in_order_and_notices_a_lost_reader() {
        let (publisher, outlet) = feed();
        publisher.send(1);
        publisher.send(2);
        assert_eq!(drain(&outlet), (vec![1, 2], false));
        publisher.send(3);
        drop(publisher);
        assert_eq!(drain(&outlet), (vec![3], true), "what was sent arrives");

        let (publisher, outlet) = feed::<u8>();
        assert!(!publisher.is_gone());
        drop(outlet);
        publisher.send(1);
        assert!(publisher.is_gone());
        assert!(publisher.0.state.lock().queue.is_empty());
    }

    #[test]
    fn a_reader_that_falls_behind_loses_the_stream() {
        let (publisher, outlet) = feed();
        for n in 0..=BOUND {
            publisher.send(n);
        }
        assert!(publisher.is_gone());
        let context = Context::from_waker(Waker::noop());
        assert_eq!(
            outlet.poll_next(&context),
            Poll::Ready(Next::End(End::Lagged))
        );
    }
}
