//! The answer to a call, given from another thread than the one that took it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::rpc::status::{Code, RpcError};

/// What a call is answered with.
pub type Answer<T> = Result<T, RpcError>;

/// The answer that a call still waits for. Dropping it answers UNAVAILABLE, so
/// that no call hangs whose job was lost, e.g. because the process stops.
#[must_use = "a call waits for it"]
pub struct Reply<T> {
    slot: Arc<Slot<T>>,
    _permit: Option<Permit>,
}

/// The call's side, a future for the gRPC poll thread.
pub struct Awaited<T>(Arc<Slot<T>>);

struct Slot<T> {
    answer: Mutex<Option<Answer<T>>>,
    waker: AtomicWaker,
}

/// A reply and the future that brings its answer; `permit` is given back with
/// the answer.
pub fn reply<T>(permit: Option<Permit>) -> (Reply<T>, Awaited<T>) {
    let slot = Arc::new(Slot {
        answer: Mutex::new(None),
        waker: AtomicWaker::new(),
    });
    let awaited = Awaited(Arc::clone(&slot));
    let reply = Reply {
        slot,
        _permit: permit,
    };
    (reply, awaited)
}

impl<T> Reply<T> {
    /// Answers the call.
    pub fn answer(self, answer: Answer<T>) {
        self.slot.give(answer);
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        let reason = "the endpoint is stopping, or lost the call";
        self.slot
            .give(Err(RpcError::status(Code::UNAVAILABLE, reason)));
    }
}

impl<T> Slot<T> {
    /// The first answer counts.
    fn give(&self, answer: Answer<T>) {
        self.answer.lock().get_or_insert(answer);
        self.waker.wake();
    }
}

impl<T> Future for Awaited<T> {
    type Output = Answer<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.waker.register(context.waker());
        match self.0.answer.lock().take() {
            Some(answer) => Poll::Ready(answer),
            None => Poll::Pending,
        }
    }
}

/// Counts calls that wait for an answer, and the bytes of their requests.
#[derive(Debug, Default, Clone)]
pub struct Permits(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    calls: usize,
    bytes: usize,
}

/// One call of [`Permits`]; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    permits: Permits,
    bytes: usize,
}

impl Permits {
    /// A permit for a request of so many bytes on the wire, unless with it there
    /// were more calls or bytes than `calls_max` and `bytes_max`.
    #[must_use]
    pub fn take(&self, bytes: usize, calls_max: usize, bytes_max: usize) -> Option<Permit> {
        let mut taken = self.0.lock();
        let sum = taken.bytes.checked_add(bytes)?;
        if taken.calls >= calls_max || sum > bytes_max {
            return None;
        }
        taken.calls += 1;
        taken.bytes = sum;
        Some(Permit {
            permits: self.clone(),
            bytes,
        })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut taken = self.permits.0.lock();
        taken.calls -= 1;
        taken.bytes -= self.bytes;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::task::Waker;

    use super::*;

    /// The answer, if it was given.
    pub fn answered<T>(awaited: &mut Awaited<T>) -> Option<Answer<T>> {
        let mut context = Context::from_waker(Waker::noop());
        match Pin::new(awaited).poll(&mut context) {
            Poll::Ready(answer) => Some(answer),
            Poll::Pending => None,
        }
    }

    #[test]
    fn an_answer_arrives_once_and_a_lost_reply_is_unavailable() {
        let (reply_to, mut awaited) = reply::<u8>(None);
        assert_eq!(answered(&mut awaited), None);
        reply_to.answer(Ok(7));
        assert_eq!(answered(&mut awaited), Some(Ok(7)));

        let (lost, mut awaited) = reply::<u8>(None);
        drop(lost);
        let error = answered(&mut awaited).unwrap().unwrap_err();
        assert_eq!(error.code(), Some(Code::UNAVAILABLE));
    }

    #[test]
    fn permits_are_bounded_and_come_back_with_the_answer() {
        let permits = Permits::default();
        let take = |bytes| permits.take(bytes, 2, 10);
        let first = take(4);
        // Too many bytes, then too many calls.
        assert!(first.is_some() && take(7).is_none() && take(usize::MAX).is_none());
        let (pending, mut awaited) = reply::<u8>(take(6));
        assert!(take(0).is_none());
        pending.answer(Ok(0));
        assert_eq!(answered(&mut awaited), Some(Ok(0)));
        assert!(take(7).is_none() && take(6).is_some());
    }
}
