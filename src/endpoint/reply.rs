//! The answer to a call, given from another thread than the one that took it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// Counts calls that wait for an answer.
#[derive(Debug, Default, Clone)]
pub struct Permits(Arc<AtomicUsize>);

/// One call of [`Permits`]; given back when dropped.
#[derive(Debug)]
pub struct Permit(Permits);

impl Permits {
    /// A permit, unless `bound` are taken.
    #[must_use]
    pub fn take(&self, bound: usize) -> Option<Permit> {
        let taken = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| {
                (taken < bound).then_some(taken + 1)
            });
        taken.ok().map(|_| Permit(self.clone()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
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
        let first = permits.take(2);
        let (pending, mut awaited) = reply::<u8>(permits.take(2));
        assert!(first.is_some() && permits.take(2).is_none());
        pending.answer(Ok(0));
        assert_eq!(answered(&mut awaited), Some(Ok(0)));
        assert!(permits.take(2).is_some());
    }
}
