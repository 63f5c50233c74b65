//! Thread `nsm-conn-log`: writes to the log what nsmgr tells of all
//! connections in whose path this process is, towards LBs and targets.

use std::time::Duration;

use crossbeam_channel::select;
use log::{debug, info, warn};

use super::caller::NsmCaller;
use super::client::Nsmgr;
use crate::proto::connection::{
    ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment, State,
};
use crate::rpc::pump::Item;
use crate::sync::clock;
use crate::sync::stop::Stop;
use crate::sync::thread::{STACK_SMALL, ThreadHandle, Threads};

/// Pause before the stream is opened again.
const REOPEN_PAUSE: Duration = Duration::from_secs(5);
/// Bound of waiting for a connection to nsmgr.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// The log of connection events.
pub struct ConnectionLog;

impl ConnectionLog {
    /// Starts `nsm-conn-log`; `name` is `NSM_NAME`, by which nsmgr knows the
    /// connections. The log is all that the thread changes.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub fn start(
        threads: &Threads,
        caller: NsmCaller,
        name: String,
    ) -> std::io::Result<ThreadHandle> {
        threads.spawn("nsm-conn-log", STACK_SMALL, move |stop| {
            run(&caller, &name, &stop);
        })
    }
}

fn run<N: Nsmgr>(nsmgr: &N, name: &str, stop: &Stop) {
    let selector = MonitorScopeSelector {
        path_segments: vec![PathSegment {
            name: name.to_owned(),
            ..PathSegment::default()
        }],
        ..MonitorScopeSelector::default()
    };
    let mut is_garbled = false;
    loop {
        match nsmgr.monitor(&selector, clock::now() + OPEN_TIMEOUT, stop) {
            Ok(stream) => loop {
                select! {
                    recv(stream.items()) -> item => match item {
                        Ok(Item::Message(event)) => write(&event),
                        Ok(Item::Ended(Err(error))) if error.is_undecodable() => {
                            if !std::mem::replace(&mut is_garbled, true) {
                                warn!(
                                    "nsmgr's stream of connection events is given up: {error}; \
                                     it is opened again every {REOPEN_PAUSE:?}"
                                );
                            }
                            break;
                        }
                        Ok(Item::Ended(Err(error))) => {
                            is_garbled = false;
                            debug!("stream of connection events over: {error}");
                            break;
                        }
                        Ok(Item::Ended(Ok(()))) | Err(_) => break,
                    },
                    recv(stop.receiver()) -> _ => return,
                }
            },
            Err(error) => debug!("no stream of connection events: {error}"),
        }
        if stop.wait(REOPEN_PAUSE) {
            return;
        }
    }
}

fn write(event: &ConnectionEvent) {
    for (id, connection) in &event.connections {
        let endpoint = connection.network_service_endpoint_name.as_str();
        let first = connection.path.path_segments.first();
        let first = first.map_or("", |segment| segment.id.as_str());
        let words = match (event.type_.enum_value(), connection.state.enum_value()) {
            (Ok(ConnectionEventType::DELETE), _) => "Connection monitor received delete event",
            (_, Ok(State::DOWN)) => "Connection monitor received down event",
            (_, Ok(State::UP)) => {
                debug!(id, first, endpoint; "nsmgr: connection up");
                continue;
            }
            _ => "Connection monitor received event",
        };
        info!(id, first, endpoint; "{words}");
    }
}
