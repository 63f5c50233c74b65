//! A Request from its turn to its answer.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use log::{debug, info, warn};

use super::super::jobs::{Call, Job};
use super::super::mechanism::{self, Chosen, Link};
use super::super::path::{self, Place};
use super::super::random::interface_name;
use super::super::{convert, descriptor, error};
use super::{Asked, Desk, Wanted, admit};
use crate::core::event::Event;
use crate::core::ids::{IfName, PortKey, SegmentId};
use crate::core::ip_context;
use crate::core::lease::Addresses;
use crate::core::targets::Claim;
use crate::ipam::IpamError;
use crate::proto::connection::{Connection, State};
use crate::proto::networkservice::NetworkServiceRequest;
use crate::rpc::status::{Code, RpcError};
use crate::sync::clock::Now;

/// Connections that are up or being made.
const CONNECTIONS_MAX: usize = 4096;
/// A connection that outlives this without refresh has a peer without clock.
const LIFE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Pause before IPAM is asked again after its queue was full.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Draws of an interface name before a Request is given up.
const DRAWS: usize = 16;

impl Desk {
    /// Everything before IPAM. On success the connection's claim is held.
    pub(super) fn start_request(
        &mut self,
        id: &SegmentId,
        mut request: NetworkServiceRequest,
        place: Place,
        call: &Call,
        now: Now,
    ) -> Result<Wanted, RpcError> {
        if (call.is_over)() {
            let text = "the deadline passed before its turn came";
            return Err(RpcError::status(Code::DEADLINE_EXCEEDED, text));
        }
        if self.targets.up(id).is_none() && self.targets.len() > CONNECTIONS_MAX {
            let text = format!("more than {CONNECTIONS_MAX} connections");
            return Err(RpcError::status(Code::RESOURCE_EXHAUSTED, text));
        }
        admit(request.connection.mut_or_insert_default(), place, call, now)?;
        let Chosen { mechanism, link } = mechanism::choose(&request)?;
        let mut connection = request.connection.take().unwrap_or_default();
        if path::previous_expires(&connection, place).is_none() {
            let text = "the previous path segment has no expiry";
            return Err(RpcError::status(Code::UNKNOWN, text));
        }
        path::trim(&mut connection, place);
        let claim = Claim {
            lease: path::lease_id(&connection)?,
            ifname: self.interface(id, &link, &connection.network_service)?,
        };
        if !self.targets.ask(id, claim.clone()) {
            let name = claim.ifname.as_ref().map_or("", IfName::as_str);
            let text = format!("interface {name} belongs to another connection");
            return Err(RpcError::status(Code::ALREADY_EXISTS, text));
        }
        if connection.state.enum_value() == Ok(State::RESELECT_REQUESTED) {
            self.close(id, "its peer selects anew");
        }
        connection.state = State::UP.into();
        Ok(Wanted {
            connection,
            mechanism,
            claim,
        })
    }

    fn interface(
        &mut self,
        id: &SegmentId,
        link: &Link,
        service: &str,
    ) -> Result<Option<IfName>, RpcError> {
        match link {
            Link::None => return Ok(None),
            Link::Named(name) => return Ok(Some(name.clone())),
            Link::Preferred(name) if !self.targets.is_taken(id, name) => {
                return Ok(Some(name.clone()));
            }
            Link::Preferred(_) | Link::Unnamed => {}
        }
        for _ in 0..DRAWS {
            let name = interface_name(service, self.parts.random.as_mut())
                .map_err(|error| internal("naming an interface", &error))?;
            if !self.targets.is_taken(id, &name) {
                return Ok(Some(name));
            }
        }
        let error = io::Error::other(format!("{DRAWS} random names were all in use"));
        Err(internal("naming an interface", &error))
    }

    pub(super) fn ask_ipam(&mut self, id: &SegmentId) {
        let Some(asked) = self.asked.get(id) else {
            return;
        };
        let queue = Arc::clone(&self.parts.queue);
        let own = id.clone();
        let answer = move |answer| queue.push(Job::Addresses(own, answer));
        let lease = asked.wanted.claim.lease.clone();
        self.parts
            .leases
            .acquire(lease, asked.deadline, Box::new(answer));
    }

    pub(super) fn addresses_arrived(
        &mut self,
        id: &SegmentId,
        answer: Result<Addresses, IpamError>,
        now: Now,
    ) {
        let Some(asked) = self.asked.remove(id) else {
            return;
        };
        match answer {
            Ok(addresses) => self.complete(id, asked, &addresses, now),
            // All targets come at once after a restart; the queue is short,
            // but it moves fast.
            Err(IpamError::Busy) if now.mono < asked.deadline => {
                self.asked.insert(id.clone(), asked);
                self.busy.push(id.clone());
                self.busy_until.get_or_insert(now.mono + BUSY_PAUSE);
                return;
            }
            Err(error) => self.failed(id, asked, error::from_ipam(&error), now),
        }
        self.finish(id, now);
    }

    fn failed(&mut self, id: &SegmentId, asked: Asked, error: RpcError, now: Now) {
        let lease = &asked.wanted.claim.lease;
        if let Some(lease) = self.targets.give_up(id) {
            self.parts.leases.release_later(lease);
        } else if !self.targets.is_held(lease) {
            self.parts.leases.abandon(lease.clone());
        }
        self.refuse(now, asked.reply, "Request", &asked.call, error);
    }

    fn complete(&mut self, id: &SegmentId, mut asked: Asked, addresses: &Addresses, now: Now) {
        if (asked.call.is_over)() {
            // Not established: the caller knows nothing of it and will ask
            // again, maybe by another path.
            let error = RpcError::status(Code::DEADLINE_EXCEEDED, "IPAM answered too late");
            return self.failed(id, asked, error, now);
        }
        let netns = match self.fill_in(&mut asked.wanted, addresses) {
            Ok(netns) => netns,
            Err(error) => return self.failed(id, asked, error, now),
        };
        self.establish(id, &asked.wanted, asked.place, addresses, now);
        let mut connection = asked.wanted.connection;
        path::leave(&mut connection, asked.place);
        if let Some(netns) = netns {
            asked.call.session.attach(netns.fd);
        }
        asked.reply.answer(Ok(connection));
    }

    /// Fills in the rest of the answer; returns the namespace's descriptor if
    /// the mechanism has an interface.
    fn fill_in(
        &self,
        wanted: &mut Wanted,
        addresses: &Addresses,
    ) -> Result<Option<descriptor::Named>, RpcError> {
        let connection = &mut wanted.connection;
        let context = convert::ip_context(connection);
        let answer = ip_context::answer(context, addresses);
        convert::set_ip_context(connection, answer, self.parts.mtu);
        let Some(ifname) = &wanted.claim.ifname else {
            mechanism::set(connection, wanted.mechanism.clone(), None);
            return Ok(None);
        };
        let netns = descriptor::open(&self.parts.netns)
            .map_err(|error| internal("naming the network namespace", &error))?;
        let link = Some((ifname, netns.url.clone()));
        mechanism::set(connection, wanted.mechanism.clone(), link);
        Ok(Some(netns))
    }

    /// Tells everybody that the connection is up.
    fn establish(
        &mut self,
        id: &SegmentId,
        wanted: &Wanted,
        place: Place,
        addresses: &Addresses,
        now: Now,
    ) {
        let Wanted {
            connection, claim, ..
        } = wanted;
        // NSM's timeout comes earlier by what is left of the call's deadline,
        // so that its Close still carries valid tokens. That deadline cannot
        // be read here and our Close needs no token: the connection is closed
        // when the token before ours expires, never before NSM would.
        let life = path::previous_expires(connection, place)
            .map_or(Duration::ZERO, |at| now.until(at).min(LIFE_MAX));
        self.warn_of_unused(id, connection, claim);
        let before = self.targets.up(id).map(|up| up.claim.clone());
        let release = self
            .targets
            .establish(id, connection.clone(), now.mono + life);
        let had_port = before.as_ref().is_some_and(|claim| claim.ifname.is_some());
        let key = PortKey::Target(id.clone());
        match &claim.ifname {
            Some(ifname) => {
                let peers: BTreeSet<_> = addresses.leases.values().map(|l| l.src.ip()).collect();
                self.parts.net.tell(Event::PortExpected {
                    key,
                    ifname: ifname.clone(),
                    peers,
                });
            }
            None if had_port => self.parts.net.tell(Event::PortReleased { key }),
            None => {}
        }
        if let Some(lease) = release {
            self.parts.leases.release_later(lease);
        }
        self.monitors.update(connection);
        log_up(id, claim, addresses, before.is_none());
    }

    /// What a target has that is of no use here is passed through, since the
    /// rest of it works; that it is there is worth one line.
    fn warn_of_unused(&self, id: &SegmentId, connection: &Connection, claim: &Claim) {
        let context = convert::ip_context(connection);
        let mut odd = ip_context::unused(&context, self.parts.families).peekable();
        if odd.peek().is_none() {
            return;
        }
        let odd: Vec<&str> = odd.collect();
        let before = self
            .targets
            .up(id)
            .map(|up| convert::ip_context(&up.connection));
        let known = before.is_some_and(|before| {
            ip_context::unused(&before, self.parts.families).eq(odd.iter().copied())
        });
        if known {
            return;
        }
        // The texts are a peer's: bounded, and escaped.
        let shown: String = odd
            .iter()
            .flat_map(|text| text.chars().chain([' ']))
            .take(256)
            .collect();
        warn!(
            connection = id.as_str(), target = claim.lease.as_str();
            "a target has {} addresses that are none, or of a family that this trench does not \
             use; they are passed on as they are: {:?}",
            odd.len(), shown.trim_end()
        );
    }
}

fn internal(what: &str, error: &io::Error) -> RpcError {
    RpcError::status(Code::INTERNAL, format!("{what}: {error}"))
}

fn log_up(id: &SegmentId, claim: &Claim, addresses: &Addresses, new: bool) {
    let ifname = claim.ifname.as_ref().map_or("", IfName::as_str);
    let target = claim.lease.as_str();
    let leases = addresses.leases.values().map(|lease| lease.src.to_string());
    let leases = leases.collect::<Vec<_>>().join(", ");
    if new {
        info!(
            connection = id.as_str(), target = target, interface = ifname;
            "a target is connected with {leases}"
        );
    } else {
        debug!(
            connection = id.as_str(), target = target, interface = ifname;
            "a target refreshed its connection with {leases}"
        );
    }
}
