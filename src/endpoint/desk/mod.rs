//! What happens to one job of `nse`, from its arrival to its answer, in the
//! order of NSM's endpoint chain (sdk networkservice/chains/endpoint) with
//! Meridio's elements at its end (cmd/proxy/internal/service/server.go).

mod request;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use protobuf::Message;

use super::authorize::authorize;
use super::feed::Publisher;
use super::jobs::{Call, Job, JobQueue};
use super::monitor::Monitors;
use super::path::{self, Place};
use super::random::Random;
use super::reply::Reply;
use crate::core::event::Event;
use crate::core::family::IpFamilies;
use crate::core::ids::{LeaseId, PortKey, SegmentId};
use crate::core::targets::{Claim, Targets, Up};
use crate::ipam::{Answer, IpamHandle};
use crate::kernel::NetHandle;
use crate::logging::repeats::Repeats;
use crate::proto::connection::{Connection, Mechanism};
use crate::proto::health::HealthCheckResponse;
use crate::proto::networkservice::NetworkServiceRequest;
use crate::rpc::status::{Code, RpcError};
use crate::sync::clock::Now;
use crate::sync::stop::Stop;

/// Bound of IPAM's part of a first Request. The caller's deadline cannot be
/// read (grpcio only says whether it has passed), and NSM's callers use 15 s.
const IPAM_TIMEOUT: Duration = Duration::from_secs(15);
/// The same for a connection that is up: its addresses are known, and shall be
/// answered while the caller, whose 15 s began at the target, still listens.
const RENEW_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a connection that are kept: room for ten thousand VIPs with their
/// source routes.
const CONNECTION_MAX: u64 = 2 * 1024 * 1024;
/// Bytes of an error's text.
const ERROR_MAX: usize = 1024;
/// Peers that follow the endpoint's health.
const HEALTH_STREAMS_MAX: usize = 64;

/// What the endpoint asks of IPAM; a trait, so that answers can be scripted.
pub trait Leases: Send {
    /// See [`IpamHandle::acquire`].
    fn acquire(&self, id: LeaseId, deadline: Instant, answer: Answer);
    /// See [`IpamHandle::release_later`].
    fn release_later(&self, id: LeaseId);
    /// See [`IpamHandle::abandon`].
    fn abandon(&self, id: LeaseId);
    /// See [`IpamHandle::addressed`].
    fn addressed(&self) -> Stop;
}

impl Leases for IpamHandle {
    fn acquire(&self, id: LeaseId, deadline: Instant, answer: Answer) {
        IpamHandle::acquire(self, id, deadline, answer);
    }

    fn release_later(&self, id: LeaseId) {
        IpamHandle::release_later(self, id);
    }

    fn abandon(&self, id: LeaseId) {
        IpamHandle::abandon(self, id);
    }

    fn addressed(&self) -> Stop {
        IpamHandle::addressed(self)
    }
}

/// What the desk is made of.
pub struct DeskParts {
    /// `NSM_NAME`, the name of our path segments.
    pub name: String,
    /// `NSM_MTU`.
    pub mtu: u32,
    /// The families of the deployment.
    pub families: IpFamilies,
    /// IPAM.
    pub leases: Box<dyn Leases>,
    /// The owner of the kernel's state.
    pub net: NetHandle,
    /// For ids and interface names.
    pub random: Box<dyn Random>,
    /// Where IPAM's answers go.
    pub queue: Arc<JobQueue>,
    /// The network namespace that peers make links in.
    pub netns: PathBuf,
}

/// The state of thread `nse`.
pub struct Desk {
    parts: DeskParts,
    targets: Targets<Task, Connection>,
    asked: BTreeMap<SegmentId, Asked>,
    /// Those of `asked` for which IPAM's queue had no room.
    busy: Vec<SegmentId>,
    /// When they are asked for again.
    busy_until: Option<Instant>,
    monitors: Monitors,
    health: Vec<Publisher<HealthCheckResponse>>,
    /// Lines about refusals: a target asks again and again.
    refusals: Repeats,
}

/// An operation of one connection.
enum Task {
    Request(NetworkServiceRequest, Place, Call, Reply<Connection>),
    Close(Place, Call, Reply<()>),
    Expire,
}

/// A Request that waits for IPAM.
struct Asked {
    wanted: Wanted,
    place: Place,
    /// Until when IPAM may answer.
    deadline: Instant,
    call: Call,
    reply: Reply<Connection>,
}

/// What a Request comes to but for its addresses.
struct Wanted {
    connection: Connection,
    mechanism: Mechanism,
    claim: Claim,
}

impl Desk {
    /// Without connections: those of a predecessor come back by their
    /// refreshes.
    #[must_use]
    pub fn new(parts: DeskParts) -> Self {
        Self {
            parts,
            targets: Targets::default(),
            asked: BTreeMap::new(),
            busy: Vec::new(),
            busy_until: None,
            monitors: Monitors::default(),
            health: Vec::new(),
            refusals: Repeats::default(),
        }
    }

    /// Does a job, as far as that is possible now.
    pub fn handle(&mut self, job: Job, now: Now) {
        match job {
            Job::Request(request, call, reply) => self.request_arrived(request, call, reply, now),
            Job::Close(connection, call, reply) => self.close_arrived(connection, call, reply, now),
            Job::Monitor(selector, publisher) => {
                let present = self.targets.iter().map(|(_, up)| &up.connection);
                self.monitors.open(selector, publisher, present);
            }
            Job::Health(publisher) => {
                self.health.retain(|publisher| !publisher.is_gone());
                if self.health.len() < HEALTH_STREAMS_MAX {
                    self.health.push(publisher);
                }
            }
            Job::Addresses(id, answer) => self.addresses_arrived(&id, answer, now),
        }
    }

    /// Closes the connections that were not refreshed in time, and asks IPAM
    /// again where its queue was full.
    pub fn tick(&mut self, now: Now) {
        if self.busy_until.is_some_and(|until| until <= now.mono) {
            self.busy_until = None;
            for id in std::mem::take(&mut self.busy) {
                self.ask_ipam(&id);
            }
        }
        for id in self.targets.take_expired(now.mono) {
            self.arrive(&id, Task::Expire, now);
        }
    }

    /// When [`Desk::tick`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.targets
            .next_expiry()
            .into_iter()
            .chain(self.busy_until)
            .min()
    }

    fn request_arrived(
        &mut self,
        mut request: NetworkServiceRequest,
        call: Call,
        reply: Reply<Connection>,
        now: Now,
    ) {
        let connection = request.connection.mut_or_insert_default();
        let entered = check_size(connection)
            .and_then(|()| path::enter(connection, &self.parts.name, self.parts.random.as_mut()));
        match entered {
            Ok(place) => {
                let id = path::own_id(connection);
                self.arrive(&id, Task::Request(request, place, call, reply), now);
            }
            Err(error) => self.refuse(now, reply, "Request", &call, error),
        }
    }

    fn close_arrived(
        &mut self,
        mut connection: Connection,
        call: Call,
        reply: Reply<()>,
        now: Now,
    ) {
        let name = &self.parts.name;
        match path::enter(&mut connection, name, self.parts.random.as_mut()) {
            Ok(place) => {
                let id = path::own_id(&connection);
                self.arrive(&id, Task::Close(place, call, reply), now);
            }
            Err(error) => self.refuse(now, reply, "Close", &call, error),
        }
    }

    /// Runs the task, and those behind it, unless one before it still runs.
    fn arrive(&mut self, id: &SegmentId, task: Task, now: Now) {
        let mut next = self.targets.arrive(id, task);
        while let Some(task) = next {
            if self.run(id, task, now) == Progress::Waits {
                return;
            }
            next = self.targets.finish(id);
        }
    }

    fn finish(&mut self, id: &SegmentId, now: Now) {
        while let Some(task) = self.targets.finish(id) {
            if self.run(id, task, now) == Progress::Waits {
                return;
            }
        }
    }

    fn run(&mut self, id: &SegmentId, task: Task, now: Now) -> Progress {
        match task {
            Task::Request(request, place, call, reply) => {
                let is_up = self.targets.up(id).is_some();
                let patience = if is_up { RENEW_TIMEOUT } else { IPAM_TIMEOUT };
                match self.start_request(id, request, place, &call, now) {
                    Ok(wanted) => {
                        let asked = Asked {
                            wanted,
                            place,
                            deadline: now.mono + patience,
                            call,
                            reply,
                        };
                        self.asked.insert(id.clone(), asked);
                        self.ask_ipam(id);
                        return Progress::Waits;
                    }
                    Err(error) => self.refuse(now, reply, "Request", &call, error),
                }
            }
            Task::Close(place, call, reply) => match self.authorize_close(id, place, &call, now) {
                Ok(()) => {
                    self.close(id, "closed by its peer");
                    reply.answer(Ok(()));
                }
                Err(error) => self.refuse(now, reply, "Close", &call, error),
            },
            Task::Expire => {
                if self.targets.is_expiring(id) {
                    self.close(id, "not refreshed in time");
                }
            }
        }
        Progress::Done
    }

    fn authorize_close(
        &self,
        id: &SegmentId,
        place: Place,
        call: &Call,
        now: Now,
    ) -> Result<(), RpcError> {
        // NSM answers a Close of what it does not know with OK, and judges the
        // others by the path of the last Request.
        let Some(Up { connection, .. }) = self.targets.up(id) else {
            return Ok(());
        };
        let mut connection = connection.clone();
        let segments = connection.path.path_segments.len();
        let own = segments.saturating_sub(1);
        admit(&mut connection, Place { own, ..place }, call, now)
    }

    fn refuse<T>(&mut self, now: Now, reply: Reply<T>, what: &str, call: &Call, error: RpcError) {
        let error = shortened(error);
        let line = format!("{what} of a target refused: {error}");
        if let Some(more) = self.refusals.admit(&line, now.mono) {
            warn!(peer = call.session.peer(); "{line}{more}");
        }
        reply.answer(Err(error));
    }

    fn close(&mut self, id: &SegmentId, why: &str) {
        let Some(closed) = self.targets.close(id) else {
            return;
        };
        if closed.up.claim.ifname.is_some() {
            let key = PortKey::Target(id.clone());
            self.parts.net.tell(Event::PortReleased { key });
        }
        self.monitors.delete(&closed.up.connection);
        info!(
            connection = id.as_str(), target = closed.up.claim.lease.as_str();
            "a target's connection is closed: {why}"
        );
        if let Some(lease) = closed.release {
            self.parts.leases.release_later(lease);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    Waits,
}

/// Renews the tokens and judges the caller.
fn admit(connection: &mut Connection, place: Place, call: &Call, now: Now) -> Result<(), RpcError> {
    let token = call.session.sign(now.wall).map_err(|error| {
        RpcError::status(Code::UNKNOWN, format!("signing a token: {}", error.0))
    })?;
    path::stamp(connection, place, call.token.as_ref(), &token);
    let segments = &connection.path.path_segments;
    authorize(segments, place.own, call.session.as_ref(), now.wall)
}

fn check_size(connection: &Connection) -> Result<(), RpcError> {
    let bytes = connection.compute_size();
    if bytes > CONNECTION_MAX {
        let text = format!("the connection has {bytes} bytes, more than {CONNECTION_MAX}");
        return Err(RpcError::status(Code::INVALID_ARGUMENT, text));
    }
    Ok(())
}

/// Errors quote what the peer sent, which may be megabytes; an answer's text
/// travels in a header, and a log line is read by people.
fn shortened(error: RpcError) -> RpcError {
    match error {
        RpcError::Status { code, message } if message.len() > ERROR_MAX => {
            let mut short = message;
            short.truncate(short.floor_char_boundary(ERROR_MAX));
            RpcError::status(code, short + "…")
        }
        other => other,
    }
}

#[cfg(test)]
mod tests;
