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

use crate::proto::health::HealthCheckResponse;
use crate::rpc::status::Code;

/// Messages that may wait for a slow reader; one that falls further behind
/// gets RESOURCE_EXHAUSTED, and the full state when it comes back.
const BOUND: usize = 1024;
/// Bytes that may wait for one reader, those on their way included: two messages
/// of the size that grpc-go takes.
pub(super) const BYTES_MAX: usize = 8 * 1024 * 1024;

/// What a feed carries.
pub trait Entry {
    /// What gRPC sends.
    type Message;

    /// A copy for gRPC.
    fn message(&self) -> Self::Message;

    /// Bytes that it holds.
    fn size(&self) -> usize;

    /// Whether `earlier`, which was not sent yet, need not be sent now that
    /// there is this one.
    fn replaces(&self, earlier: &Self) -> bool;
}

impl Entry for HealthCheckResponse {
    type Message = Self;

    fn message(&self) -> Self {
        self.clone()
    }

    fn size(&self) -> usize {
        std::mem::size_of::<Self>()
    }

    fn replaces(&self, _: &Self) -> bool {
        true
    }
}

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
    /// Bytes of the queue, and of the message on its way.
    queued: usize,
    sending: usize,
    end: Option<End>,
    gone: bool,
}

impl<T: Entry> State<T> {
    fn push(&mut self, entry: T) {
        let mut freed = 0;
        self.queue.retain(|earlier| {
            let stays = !entry.replaces(earlier);
            if !stays {
                freed += earlier.size();
            }
            stays
        });
        self.queued = self.queued.saturating_sub(freed) + entry.size();
        if self.queue.len() >= BOUND || self.queued + self.sending > BYTES_MAX {
            self.give_up();
        } else {
            self.queue.push_back(entry);
        }
    }

    fn give_up(&mut self) {
        self.queue.clear();
        self.queued = 0;
        self.end.get_or_insert(End::Lagged);
    }
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
pub fn feed<T: Entry>() -> (Publisher<T>, Outlet<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            queue: VecDeque::new(),
            queued: 0,
            sending: 0,
            end: None,
            gone: false,
        }),
        waker: AtomicWaker::new(),
    });
    (Publisher(Arc::clone(&shared)), Outlet(shared))
}

impl<T: Entry> Publisher<T> {
    /// Queues an entry in the place of those that it replaces; a reader that is
    /// too far behind loses the stream.
    pub fn send(&self, entry: T) {
        let mut state = self.0.state.lock();
        if state.end.is_some() || state.gone {
            return;
        }
        state.push(entry);
        drop(state);
        self.0.waker.wake();
    }

    /// Ends the stream as that of a reader that is too far behind.
    pub fn give_up(&self) {
        self.0.state.lock().give_up();
        self.0.waker.wake();
    }

    /// Bytes that wait for the reader, those on their way included.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let state = self.0.state.lock();
        state.queued + state.sending
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

impl<T: Entry> Outlet<T> {
    fn poll_next(&self, context: &Context<'_>) -> Poll<Next<T>> {
        self.0.waker.register(context.waker());
        let mut state = self.0.state.lock();
        state.sending = 0;
        match (state.queue.pop_front(), state.end) {
            (Some(entry), _) => {
                state.sending = entry.size();
                state.queued = state.queued.saturating_sub(entry.size());
                Poll::Ready(Next::Message(entry))
            }
            (None, Some(end)) => Poll::Ready(Next::End(end)),
            (None, None) => Poll::Pending,
        }
    }

    fn has_lagged(&self, context: &Context<'_>) -> bool {
        self.0.waker.register(context.waker());
        self.0.state.lock().end == Some(End::Lagged)
    }

    /// Sends what is published until either side ends the stream.
    pub async fn run(self, mut sink: ServerStreamingSink<T::Message>) {
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
                // The entry lives until its bytes have left, since it counts
                // them.
                Next::Message(entry) => self.write(&entry, &mut sink).await,
                Next::End(End::Closed) => return log_end(sink.close().await),
                Next::End(End::Lagged) => {
                    let text = "the reader fell too far behind".to_owned();
                    let status = RpcStatus::with_message(Code::RESOURCE_EXHAUSTED, text);
                    return log_end(sink.fail(status).await);
                }
                Next::Gone => return,
            };
            match sent {
                Some(Ok(())) => {}
                Some(Err(error)) => return log_end(Err(error)),
                // No status leaves behind a message that the reader does not
                // take; dropping the sink cancels the call, and frees it.
                None => return debug!("a monitor stream was cut: nobody reads it"),
            }
        }
    }

    /// `None` when the reader fell too far behind meanwhile.
    async fn write(
        &self,
        entry: &T,
        sink: &mut ServerStreamingSink<T::Message>,
    ) -> Option<grpcio::Result<()>> {
        let mut sent = sink.send((entry.message(), WriteFlags::default()));
        poll_fn(|context| {
            if let Poll::Ready(result) = Pin::new(&mut sent).poll(context) {
                return Poll::Ready(Some(result));
            }
            if self.has_lagged(context) {
                return Poll::Ready(None);
            }
            Poll::Pending
        })
        .await
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
    pub fn drain<T: Entry>(outlet: &Outlet<T>) -> (Vec<T>, bool) {
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

    /// What it is about, and its size.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Note(usize, usize);

    impl Entry for Note {
        type Message = usize;

        fn message(&self) -> usize {
            self.0
        }

        fn size(&self) -> usize {
            self.1
        }

        fn replaces(&self, earlier: &Self) -> bool {
            self.0 == earlier.0
        }
    }

    #[test]
    fn ends_in_order_and_notices_a_lost_reader() {
        let (publisher, outlet) = feed();
        publisher.send(Note(1, 1));
        publisher.send(Note(2, 1));
        assert_eq!(drain(&outlet), (vec![Note(1, 1), Note(2, 1)], false));
        publisher.send(Note(3, 1));
        drop(publisher);
        assert_eq!(
            drain(&outlet),
            (vec![Note(3, 1)], true),
            "what was sent arrives"
        );

        let (publisher, outlet) = feed::<Note>();
        assert!(!publisher.is_gone());
        drop(outlet);
        publisher.send(Note(1, 1));
        assert!(publisher.is_gone());
        assert!(publisher.0.state.lock().queue.is_empty());
    }

    fn has_lagged(outlet: &Outlet<Note>) -> bool {
        let context = Context::from_waker(Waker::noop());
        outlet.has_lagged(&context)
            && outlet.poll_next(&context) == Poll::Ready(Next::End(End::Lagged))
    }

    #[test]
    fn a_reader_that_falls_behind_loses_the_stream() {
        let (publisher, outlet) = feed();
        for n in 0..=BOUND {
            assert!(!publisher.is_gone());
            publisher.send(Note(n, 1));
        }
        assert!(publisher.is_gone() && has_lagged(&outlet));
    }

    #[test]
    fn what_waits_is_bounded_in_bytes() {
        let (publisher, outlet) = feed();
        publisher.send(Note(1, BYTES_MAX / 2));
        publisher.send(Note(2, BYTES_MAX / 2));
        assert_eq!(publisher.waiting(), BYTES_MAX);
        assert!(!publisher.is_gone());
        // On its way it still counts.
        let context = Context::from_waker(Waker::noop());
        assert!(outlet.poll_next(&context).is_ready());
        assert_eq!(publisher.waiting(), BYTES_MAX);
        publisher.send(Note(3, 1));
        assert!(publisher.is_gone() && has_lagged(&outlet));
        assert_eq!(publisher.waiting(), 0);
    }

    #[test]
    fn a_newer_entry_takes_the_place_of_an_unsent_one() {
        let (publisher, outlet) = feed();
        for round in 1..=10 * BOUND {
            publisher.send(Note(1, round % 7));
            publisher.send(Note(2, 5));
        }
        assert_eq!(publisher.waiting(), (10 * BOUND) % 7 + 5);
        let last = vec![Note(1, (10 * BOUND) % 7), Note(2, 5)];
        assert_eq!(drain(&outlet), (last, false));
        assert_eq!(publisher.waiting(), 0);
    }
}
