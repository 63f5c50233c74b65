//! Asking nsmgr for a connection of ours.

use std::time::Duration;

use crossbeam_channel::{at, select};
use log::info;

use super::{LOOK_TIMEOUT, LbWorker, cause};
use crate::core::lb_session::Looked;
use crate::nsm::client::{Leases, Nsmgr};
use crate::proto::connection::{Connection, ConnectionEvent};
use crate::rpc::pump::{Item, StreamError};
use crate::sync::clock;
use crate::sync::stop::Stop;

/// Bound of asking while stopping, where every session has to be over soon.
const LAST_LOOK_TIMEOUT: Duration = Duration::from_secs(2);

impl<N: Nsmgr, L: Leases> LbWorker<N, L> {
    /// Finds out whether nsmgr has a connection of ours: the first event of a
    /// monitor lists what there is.
    pub(super) fn look(&mut self, stop: &Stop) -> Looked<Connection> {
        let timeout = if self.stopping {
            LAST_LOOK_TIMEOUT
        } else {
            LOOK_TIMEOUT
        };
        let deadline = self.bounded(clock::now() + timeout);
        let selector = self.template.selector();
        let stream = match self.shared.nsmgr.monitor(&selector, deadline, stop) {
            Ok(stream) => stream,
            Err(error) => return self.not_found(&error.to_string()),
        };
        select! {
            recv(stream.items()) -> item => match item {
                Ok(Item::Message(event)) => self.found(event),
                Ok(Item::Ended(Err(error))) => self.no_list(&error),
                Ok(Item::Ended(Ok(()))) | Err(_) => self.not_found("the stream ended"),
            },
            recv(stop.receiver()) -> _ => Looked::Unreachable,
            // A connected nsmgr that says nothing is not waited for again.
            recv(at(deadline)) -> _ => {
                self.complain(
                    cause::LIST,
                    "nsmgr did not list its connections in time",
                );
                Looked::Absent
            },
        }
    }

    fn no_list(&mut self, error: &StreamError) -> Looked<Connection> {
        match error {
            StreamError::Rpc(rpc) if rpc.is_unavailable() => self.not_found(&rpc.to_string()),
            // Some versions let only those see a connection who have made it.
            _ => {
                self.complain(
                    cause::LIST,
                    &format!("nsmgr does not list its connections: {error}"),
                );
                Looked::Absent
            }
        }
    }

    fn not_found(&mut self, why: &str) -> Looked<Connection> {
        self.complain(
            cause::LOOK,
            &format!("nsmgr cannot be asked for its connections: {why}"),
        );
        Looked::Unreachable
    }

    fn found(&self, event: ConnectionEvent) -> Looked<Connection> {
        let Some(connection) = self.template.find_own(event) else {
            return Looked::Absent;
        };
        let ifname = self.template.interface_of_up(&connection);
        let intact = ifname.is_some_and(|name| (self.shared.is_in_place)(&name, &self.template.id));
        info!(
            id = self.template.id, in_place = intact;
            "nsmgr knows the connection already"
        );
        Looked::Found { connection, intact }
    }
}
