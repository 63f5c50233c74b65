//! A cell that holds the latest value of something, with subscribers that are
//! woken on each change. What lies between two reads is lost on purpose: the
//! readers care for the present.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;

/// The shared cell; clones refer to the same value.
#[derive(Debug)]
pub struct Watch<T> {
    inner: Arc<Mutex<Inner<T>>>,
}

#[derive(Debug)]
struct Inner<T> {
    value: T,
    subscribers: Vec<Sender<()>>,
    /// How many subscribers there may be before the gone ones are looked for.
    prune_at: usize,
}

/// Few enough never to be looked through in vain.
const PRUNE_MIN: usize = 16;

impl<T> Clone for Watch<T> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<T: Clone> Watch<T> {
    /// A cell that holds `value`.
    #[must_use]
    pub fn new(value: T) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                value,
                subscribers: Vec::new(),
                prune_at: PRUNE_MIN,
            })),
        }
    }

    /// The present value.
    #[must_use]
    pub fn get(&self) -> T {
        self.inner.lock().value.clone()
    }

    /// Replaces the value and wakes the subscribers.
    pub fn set(&self, value: T) {
        let mut inner = self.inner.lock();
        inner.value = value;
        inner.wake();
    }

    /// Replaces the value only if it differs; true when it did.
    pub fn set_if_changed(&self, value: T) -> bool
    where
        T: PartialEq,
    {
        let mut inner = self.inner.lock();
        if inner.value == value {
            return false;
        }
        inner.value = value;
        inner.wake();
        true
    }

    /// A channel that carries one token after one or more changes; read the
    /// value with [`Watch::get`] after each token. A token is there already,
    /// so that the first read needs no special case. Now and then one comes
    /// without a change.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<()> {
        let (tx, rx) = bounded(1);
        let _ = tx.try_send(());
        let mut inner = self.inner.lock();
        if inner.subscribers.len() >= inner.prune_at {
            // That a receiver is gone shows only when something is sent. The
            // value may never change again, so it cannot wait for that.
            inner.wake();
            inner.prune_at = PRUNE_MIN.max(2 * inner.subscribers.len());
        }
        inner.subscribers.push(tx);
        rx
    }
}

impl<T> Inner<T> {
    fn wake(&mut self) {
        // A full channel already holds the token; a closed one is forgotten.
        self.subscribers
            .retain(|tx| !matches!(tx.try_send(()), Err(TrySendError::Disconnected(()))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_coalesce_and_wake() {
        let cell = Watch::new(1);
        let rx = cell.subscribe();
        rx.try_recv().unwrap();
        cell.set(2);
        cell.set(3);
        rx.try_recv().unwrap();
        assert!(rx.try_recv().is_err());
        assert_eq!(cell.get(), 3);
        assert!(!cell.set_if_changed(3));
        assert!(rx.try_recv().is_err());
        drop(rx);
        cell.set(4);
        assert!(cell.inner.lock().subscribers.is_empty());
    }

    #[test]
    fn forgets_subscribers_without_a_change() {
        let cell = Watch::new(1);
        let held: Vec<_> = (0..100).map(|_| cell.subscribe()).collect();
        for _ in 0..10_000 {
            let _ = cell.subscribe();
        }
        assert!(cell.inner.lock().subscribers.len() <= 2 * held.len() + PRUNE_MIN);
        for rx in &held {
            let _ = rx.try_recv();
        }
        cell.set(2);
        assert!(held.iter().all(|rx| rx.try_recv().is_ok()));
    }
}
