//! How the log names what happens to an LB's connection.

use crate::core::event::Event;
use crate::core::lb_session::{Monitored, Plan};
use crate::proto::connection::Connection;

/// What the line about a fact begins with: words of Meridio's log (cmd/proxy,
/// internal/client/fullmesh.go), which operators search for.
pub(super) fn beginning(event: &Event) -> &'static str {
    match event {
        Event::PortExpected { .. } => "Connected network service endpoint: ",
        Event::PortReleased { .. } => "Closed network service endpoint: ",
        _ => "",
    }
}

/// How a connection is requested.
pub(super) fn plan(plan: &Plan<Connection>) -> &'static str {
    match plan {
        Plan::First => "first",
        Plan::Refresh(_) => "refresh",
        Plan::Adopt(_) => "a predecessor's connection, as it is",
        Plan::Reselect(_) => "reselect",
    }
}

/// What nsmgr says of a connection.
pub(super) fn state(said: Monitored) -> &'static str {
    match said {
        Monitored::Up => "up",
        Monitored::Down => "down",
        Monitored::Deleted => "deleted",
        Monitored::RefreshRequested => "refresh requested",
        Monitored::Absent => "not known",
    }
}
