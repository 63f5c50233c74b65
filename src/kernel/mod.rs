//! The one owner of kernel state: thread `net`.

use crossbeam_channel::Sender;

use crate::core::event::Event;

/// What the `net` thread takes.
#[derive(Debug)]
pub enum NetMsg {
    /// A fact.
    Fact(Event),
    /// Apply all facts told so far, then answer by dropping the sender.
    Quiesce(Sender<std::convert::Infallible>),
}

/// Tells facts to `net`.
#[derive(Debug, Clone)]
pub struct NetHandle(Sender<NetMsg>);

impl NetHandle {
    /// For the owner of the receiving end, and tests that stand in for it.
    #[must_use]
    pub fn new(sender: Sender<NetMsg>) -> Self {
        Self(sender)
    }

    /// Tells a fact; waits while the queue is full, which is safe because
    /// `net` waits for no other thread of ours.
    pub fn tell(&self, event: Event) {
        // After the end of `net` nobody is left to be told.
        let _ = self.0.send(NetMsg::Fact(event));
    }
}
