//! A queue from any thread to a future on gRPC's poll thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Poll;

use futures_util::future::poll_fn;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

/// Items that may wait; a peer that does not read loses the oldest.
const BOUND: usize = 1024;

pub(crate) struct Feed<T>(Arc<Inner<T>>);

struct Inner<T> {
    queue: Mutex<Queue<T>>,
    waker: AtomicWaker,
}

struct Queue<T> {
    items: VecDeque<T>,
    is_closed: bool,
}

impl<T> Clone for Feed<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Feed<T> {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Inner {
            queue: Mutex::new(Queue {
                items: VecDeque::new(),
                is_closed: false,
            }),
            waker: AtomicWaker::new(),
        }))
    }

    pub(crate) fn push(&self, item: T) {
        let mut queue = self.0.queue.lock();
        if queue.items.len() == BOUND {
            queue.items.pop_front();
        }
        queue.items.push_back(item);
        drop(queue);
        self.0.waker.wake();
    }

    /// What is queued still arrives; then `next` says `None`.
    pub(crate) fn close(&self) {
        self.0.queue.lock().is_closed = true;
        self.0.waker.wake();
    }

    pub(crate) async fn next(&self) -> Option<T> {
        poll_fn(|context| {
            self.0.waker.register(context.waker());
            let mut queue = self.0.queue.lock();
            match queue.items.pop_front() {
                Some(item) => Poll::Ready(Some(item)),
                None if queue.is_closed => Poll::Ready(None),
                None => Poll::Pending,
            }
        })
        .await
    }
}
