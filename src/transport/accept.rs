//! Thread `tls-accept`: accepts connections and shakes hands, with all peers at
//! once, so that one that says nothing delays nobody.

use std::io;
use std::os::fd::IntoRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use grpcio::Server;
use log::{debug, error, info, warn};
use parking_lot::Mutex;

use super::allowance::Allowance;
use super::complaints::Complaints;
use super::descriptors::{self, Bounds};
use super::dialer::pair;
use super::fd_socket::Socket;
use super::link::Link;
use super::listener::Listener;
use super::relay::Relay;
use super::server::{PeerConnection, PeerTable};
use super::tls::{Contexts, Handshake, Role, Session};
use crate::spiffe::SvidCell;
use crate::sync::clock;
use crate::sync::poll::{self, Interest, WakeFd};
use crate::sync::stop::Stop;

/// Bound of one handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Connections that this process itself may make beyond the bound, at a time:
/// its probe must not take the others' number for its own death. One probe
/// follows the other, while the former one's connection ends.
const OWN_MAX: usize = 4;
/// Connections accepted in one turn.
const BATCH: usize = 32;
/// Pause after accept(2) failed, e.g. since no descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Acceptor {
    pub listener: Listener,
    pub svid: SvidCell,
    pub peers: PeerTable,
    pub server: Arc<Mutex<Option<Server>>>,
    pub relay: Arc<Relay>,
    pub wake: Arc<WakeFd>,
    contexts: Contexts,
    bounds: Bounds,
    /// Connections refused since there were too many.
    refused: u64,
    /// Oldest first.
    pending: Vec<Pending>,
    paused_until: Option<Instant>,
    complaints: Complaints,
}

struct Pending {
    handshake: Handshake,
    until: Instant,
    /// The peer has sent something.
    has_spoken: bool,
    /// The peer is this process.
    is_own: bool,
}

impl Acceptor {
    pub(super) fn new(
        listener: Listener,
        svid: SvidCell,
        peers: PeerTable,
        server: Arc<Mutex<Option<Server>>>,
        relay: Arc<Relay>,
        wake: Arc<WakeFd>,
    ) -> Self {
        Self {
            listener,
            svid,
            peers,
            server,
            relay,
            wake,
            contexts: Contexts::new(Role::Server),
            bounds: Bounds::of_process(),
            refused: 0,
            pending: Vec::new(),
            paused_until: None,
            complaints: Complaints::default(),
        }
    }

    pub(super) fn run(mut self, stop: &Stop) {
        while !stop.is_set() {
            let (accept, ready) = match self.wait() {
                Ok(found) => found,
                Err(error) => {
                    error!("tls-accept cannot wait: {error}");
                    return;
                }
            };
            let now = clock::now();
            self.advance(&ready, now);
            if accept {
                self.accept(now);
            }
        }
    }

    /// Whether to accept, and which handshakes can go on.
    fn wait(&mut self) -> io::Result<(bool, Vec<bool>)> {
        let now = clock::now();
        self.paused_until = self.paused_until.filter(|&until| until > now);
        let mut interests = vec![
            self.wake.interest(),
            Interest {
                fd: if self.paused_until.is_some() {
                    -1
                } else {
                    self.listener.raw()
                },
                read: true,
                write: false,
            },
        ];
        interests.extend(self.pending.iter().map(|one| one.handshake.interest()));
        let due = self
            .pending
            .iter()
            .map(|one| one.until)
            .chain(self.paused_until)
            .min();
        let found = poll::wait(&interests, due)?;
        if found.first().is_some_and(|wake| wake.read) {
            self.wake.drain();
        }
        let accept = found.get(1).is_some_and(|listener| listener.read);
        let ready = found.iter().skip(2).map(|one| one.read || one.write);
        Ok((accept, ready.collect()))
    }

    /// Takes the ready handshakes further; drops those that are over or late.
    fn advance(&mut self, ready: &[bool], now: Instant) {
        let pending = std::mem::take(&mut self.pending);
        for (index, one) in pending.into_iter().enumerate() {
            if ready.get(index).copied().unwrap_or(false) {
                self.step(one, now);
            } else if one.until > now {
                self.pending.push(one);
            } else {
                self.complain(&format!("no TLS handshake within {HANDSHAKE_LIMIT:?}"), now);
            }
        }
    }

    fn step(&mut self, mut one: Pending, now: Instant) {
        let ended = match one.handshake.step() {
            Ok(false) => {
                one.has_spoken = true;
                self.pending.push(one);
                return;
            }
            Ok(true) => one
                .handshake
                .finish(clock::wall())
                .and_then(|session| self.admit(session, one.is_own)),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            self.complain(&error, now);
        }
    }

    fn complain(&mut self, why: &str, now: Instant) {
        if let Some(more) = self.complaints.admit(now) {
            warn!("connection refused: {why}{more}");
        }
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..BATCH {
            match self.listener.accept() {
                Ok(socket) => self.begin(socket, now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_of_one_peer(&error) => debug!("accepting: {error}"),
                Err(error) => {
                    if let Some(more) = self.complaints.admit(now) {
                        warn!("accepting: {error}; next attempt in {ACCEPT_PAUSE:?}{more}");
                    }
                    self.paused_until = Some(now + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    fn begin(&mut self, socket: Socket, now: Instant) {
        let Some(identity) = self.svid.get() else {
            debug!("a peer connected before there was an identity; closed");
            return;
        };
        let is_own = matches!(&socket, Socket::Unix(socket) if descriptors::is_own(socket));
        if !self.has_room(is_own) {
            self.refuse();
            return;
        }
        self.note_room();
        // One makes room for the newcomer: the oldest that has said nothing,
        // or else the oldest.
        if self.pending.len() >= self.bounds.handshakes {
            self.make_room(now);
        }
        match Handshake::new(&mut self.contexts, &identity, socket) {
            Ok(handshake) => self.pending.push(Pending {
                handshake,
                until: now + HANDSHAKE_LIMIT,
                has_spoken: false,
                is_own,
            }),
            Err(error) => self.complain(&error, now),
        }
    }

    fn has_room(&self, is_own: bool) -> bool {
        let own = if is_own { OWN_MAX } else { 0 };
        self.peers.len() < self.bounds.connections + own
    }

    /// Says once that connections are refused.
    fn refuse(&mut self) {
        if self.refused == 0 {
            warn!(
                "too many connections: there are {}, which is what the limit of descriptors \
                 allows; more are refused",
                self.peers.len()
            );
        }
        self.refused = self.refused.saturating_add(1);
    }

    /// Says that there is room again, once it is more than for the next one.
    fn note_room(&mut self) {
        let enough = self.bounds.connections - self.bounds.connections / 8;
        if self.refused > 0 && self.peers.len() < enough {
            info!(
                "connections are accepted again; {} were refused",
                self.refused
            );
            self.refused = 0;
        }
    }

    fn make_room(&mut self, now: Instant) {
        // One accepted in this turn had no chance to be heard yet.
        let is_silent = |one: &Pending| !one.has_spoken && one.until < now + HANDSHAKE_LIMIT;
        let index = self.pending.iter().position(is_silent).unwrap_or(0);
        self.pending.remove(index);
        self.complain(
            &format!(
                "{} TLS handshakes at a time; one was given up",
                self.bounds.handshakes
            ),
            now,
        );
    }

    /// Gives a verified connection to gRPC, if there is room for it.
    fn admit(&mut self, session: Session, is_own: bool) -> Result<(), String> {
        // Others may have come since the handshake began.
        if !self.has_room(is_own) {
            self.refuse();
            return Ok(());
        }
        let (ours, grpcs) = pair().map_err(|error| format!("making a socket pair: {error}"))?;
        let mut link = Link::new(session.stream, ours, false, Arc::clone(self.relay.wake()));
        link.set_allowance(Allowance::new(session.peer.id.as_str()));
        let connection = Arc::new(PeerConnection::new(
            session.peer,
            session.identity,
            Arc::clone(link.handle()),
        ));
        debug!(peer = connection.peer.id.as_str(); "accepted a connection");
        let mut server = self.server.lock();
        let Some(server) = server.as_mut() else {
            return Err("the server is stopping".to_owned());
        };
        let fd = grpcs.into_raw_fd();
        // The entry comes first: a call may arrive before the next line ends.
        self.peers.insert(fd, Arc::clone(&connection));
        let peers = self.peers.clone();
        link.set_on_end(Box::new(move || peers.remove(fd, &connection)));
        // SAFETY: `fd` is one end of a connected stream socket pair, and is
        // given away here: nobody else has it.
        unsafe { server.add_channel_from_fd(fd) };
        self.relay.add(link);
        Ok(())
    }
}

/// Failures that say nothing about the next connection (accept(2)).
fn is_of_one_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::NotConnected
            | io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
    )
}
