//! Ending a connection at nsmgr.

use std::time::{Duration, Instant};

use log::{debug, info, warn};

use super::LbWorker;
use crate::core::lb_session::Closed;
use crate::nsm::client::{Leases, Nsmgr};
use crate::nsm::path;
use crate::nsm::patience::{LAST_PASSAGE, PASSAGE, Patience};
use crate::nsm::permits::Permit;
use crate::proto::connection::Connection;
use crate::rpc::status::RpcError;
use crate::sync::clock;
use crate::sync::stop::Stop;

/// Bound of the Close before a reselect. A live peer answers long before; what a
/// dead one does not answer, nsmgr and forwarder forget all the same.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(3);

impl<N: Nsmgr, L: Leases> LbWorker<N, L> {
    /// Ends the connection at nsmgr. An answer proves little: nsmgr says OK of
    /// what it does not know, too.
    pub(super) fn close(&mut self, connection: Connection, stop: &Stop) {
        self.watch = None;
        self.leased = true;
        let connection = self.template.close(connection);
        let deadline = self.bounded(clock::now() + self.shared.request_timeout);
        let result = self.call_close(&connection, deadline, (None, LAST_PASSAGE), stop);
        let closed = match &result {
            Ok(()) => Closed::Answered,
            // Interrupted by the order to stop: it is made again then.
            Err(RpcError::Cancelled) if !self.stopping && stop.is_set() => return,
            // Cut off by the end of the stop's time for it, or by the LB's return.
            Err(RpcError::Cancelled) => Closed::GivenUp,
            Err(_) if self.is_out_of_time() => Closed::GivenUp,
            Err(_) => Closed::Failed,
        };
        let again = self.session.closed(closed, clock::now());
        self.say_closed(&connection, result, closed, again);
    }

    fn say_closed(
        &mut self,
        connection: &Connection,
        result: Result<(), RpcError>,
        closed: Closed,
        again: bool,
    ) {
        let id = self.template.id.as_str();
        match (result, self.unanswered.take()) {
            (Ok(()), None) => info!(id = id; "connection closed"),
            (Ok(()), Some(before)) => info!(
                id = id, path = path::text(connection);
                "connection closed; of an earlier Close it is not known whether it reached the forwarder: {before}"
            ),
            (Err(error), _) if again => {
                info!(id = id; "Close failed, it will be made again: {error}");
                self.unanswered = Some(error);
            }
            (Err(error), _) if closed == Closed::GivenUp => {
                info!(id = id; "Close is not waited for any longer: {error}");
            }
            (Err(error), _) => warn!(
                id = id, path = path::text(connection);
                "Close failed: {error}; an interface may be left here and at the forwarder, until the tokens of its path expire"
            ),
        }
    }

    /// Whether the daemon stops, and has no more time for calls.
    fn is_out_of_time(&self) -> bool {
        let by = self.shared.close_by.get();
        self.shared.cut.is_set() || by.is_some_and(|by| *by <= clock::now())
    }

    /// Ends at nsmgr what a reselect would find there.
    pub(super) fn clear(&mut self, connection: Connection, stop: &Stop) {
        self.watch = None;
        let connection = self.template.close(connection);
        let permit = self.turn(stop);
        let timeout = CLEAR_TIMEOUT.min(self.shared.request_timeout);
        let deadline = self.bounded(clock::now() + timeout);
        if let Err(error) = self.call_close(&connection, deadline, (permit, PASSAGE), stop) {
            debug!(id = self.template.id; "Close before the reselect failed: {error}");
            self.unanswered = Some(error);
        }
        self.session.cleared();
    }

    fn call_close(
        &mut self,
        connection: &Connection,
        deadline: Instant,
        (permit, passage): (Option<Permit>, Duration),
        stop: &Stop,
    ) -> Result<(), RpcError> {
        let mut patience = Patience::until(&self.shared.cut)
            .or_stop(stop, Some(&self.shared.close_by))
            .or_news(&self.news)
            .of_close(passage)
            .with(permit);
        let netns = &self.shared.netns;
        let result = self
            .shared
            .nsmgr
            .close(connection, netns, deadline, &mut patience);
        self.replaced |= patience.has_heard();
        result
    }
}
