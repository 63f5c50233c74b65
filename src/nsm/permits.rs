//! How many Requests are under way at once: nsmgr and the forwarder of a node
//! are shared with all its pods, and after a restart of nsmgr all connections
//! are told again at the same moment.

use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, at, bounded, select};

use crate::sync::stop::Stop;

/// A number of permits.
#[derive(Debug, Clone)]
pub(super) struct Permits {
    free: Receiver<()>,
    give_back: Sender<()>,
}

/// One of them; dropping it gives it back.
#[derive(Debug)]
#[must_use = "dropping it gives it back"]
pub(super) struct Permit(Sender<()>);

impl Permits {
    pub(super) fn new(count: usize) -> Self {
        let (give_back, free) = bounded(count);
        for _ in 0..count {
            // There is room for all.
            let _ = give_back.try_send(());
        }
        Self { free, give_back }
    }

    /// Waits for a permit, until `deadline` or `stop`; `None` without one. Who
    /// asks first gets one first.
    pub(super) fn take(&self, deadline: Instant, stop: &Stop) -> Option<Permit> {
        select! {
            recv(self.free) -> free => free.ok().map(|()| Permit(self.give_back.clone())),
            recv(stop.receiver()) -> _ => None,
            recv(at(deadline)) -> _ => None,
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        // There is room for all; without a reader nobody wants it.
        let _ = self.0.try_send(());
    }
}
