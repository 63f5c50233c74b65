//! Thread `conn-<name>`: keeps one connection of a connector.

use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, never, select};
use grpcio::Channel;
use log::{debug, info, warn};

use super::client::{Address, Connection, ConnectorOptions, ConnectorState, DRAIN_LIMIT};
use super::complaints::Said;
use super::dial::{self, DialError, Limits, Resolve, Target};
use super::link::{Link, LinkHandle, LinkState};
use super::relay::Relay;
use super::tls::{Contexts, Handshake, Role, Session};
use crate::rpc::env::Rpc;
use crate::spiffe::{Identity, SvidCell};
use crate::sync::clock::{self, Now};
use crate::sync::poll::WakeFd;
use crate::sync::stop::Stop;
use crate::sync::thread::Threads;
use crate::sync::watch::Watch;

/// A connection that ends sooner counts as a failure of the peer, or one that
/// accepts and closes at once would be dialled without a pause.
const SETTLED: Duration = Duration::from_secs(1);
/// Least time between two dials for the sake of a certificate's age.
const RENEW_MIN: Duration = Duration::from_secs(30);
/// A resolver that takes longer has a dead server in its list, or is dying.
const RESOLVED_SLOWLY: Duration = Duration::from_secs(1);
/// Time for the relay to send the last bytes at the end.
const RELAY_LIMIT: Duration = Duration::from_millis(500);

pub(super) struct Dialer {
    rpc: Rpc,
    svid: SvidCell,
    options: ConnectorOptions,
    resolve: Arc<Resolve>,
    state: Watch<ConnectorState>,
    published: Watch<Option<Arc<Connection>>>,
    wake: Arc<WakeFd>,
    relay: Relay,
    contexts: Contexts,
    current: Option<Current>,
    superseded: Vec<Superseded>,
    failures: u32,
    /// No attempt before this, unless there is another identity.
    retry_at: Option<Instant>,
    /// The generation of the last attempt's identity.
    attempted: u64,
    /// Why attempts have failed since the last one that did not.
    failures_said: Said,
    /// The name was resolved slowly, which was said.
    slow_said: bool,
}

struct Current {
    connection: Arc<Connection>,
    changed: Receiver<()>,
    since: Instant,
    /// When a new connection is due for the sake of the certificates' age.
    renew_at: Instant,
}

/// An old connection whose calls may still end.
struct Superseded {
    link: Arc<LinkHandle>,
    until: Instant,
}

impl Dialer {
    pub(super) fn new(
        threads: &Threads,
        rpc: Rpc,
        svid: SvidCell,
        options: ConnectorOptions,
        resolve: Arc<Resolve>,
        state: Watch<ConnectorState>,
        published: Watch<Option<Arc<Connection>>>,
    ) -> io::Result<Self> {
        let relay = Relay::start(threads, &format!("tls-{}", options.name))?;
        Ok(Self {
            rpc,
            svid,
            options,
            resolve,
            state,
            published,
            wake: Arc::new(WakeFd::new()?),
            relay,
            contexts: Contexts::new(Role::Client),
            current: None,
            superseded: Vec::new(),
            failures: 0,
            retry_at: None,
            attempted: 0,
            failures_said: Said::default(),
            slow_said: false,
        })
    }

    /// Given after the thread was told to stop.
    pub(super) fn wake(&self) -> &Arc<WakeFd> {
        &self.wake
    }

    pub(super) fn run(mut self, stop: &Stop) {
        let rotated = self.svid.subscribe();
        while !stop.is_set() {
            let now = clock::now();
            self.check_current(now);
            self.retire(now);
            if let Some(identity) = self.wanted(now)
                && self.may_dial(&identity, now)
            {
                self.attempted = identity.generation;
                match self.connect(&identity, stop) {
                    Ok(connection) => self.replace(connection),
                    Err(DialError::Stopped) => break,
                    Err(DialError::Failed(error)) => self.failed(error),
                }
                continue;
            }
            self.wait(stop, &rotated, now);
        }
        self.end();
    }

    /// The identity to dial with, if a connection has to be made.
    fn wanted(&self, now: Instant) -> Option<Arc<Identity>> {
        let identity = self.svid.get()?;
        match &self.current {
            Some(current)
                if Arc::ptr_eq(current.connection.identity(), &identity)
                    && now < current.renew_at =>
            {
                None
            }
            _ => Some(identity),
        }
    }

    /// A new identity does not wait: the old one may be why attempts failed.
    fn may_dial(&self, identity: &Identity, now: Instant) -> bool {
        identity.generation != self.attempted || self.retry_at.is_none_or(|at| at <= now)
    }

    /// Gives up the present connection when it has ended or takes no calls.
    fn check_current(&mut self, now: Instant) {
        let Some(current) = &self.current else {
            return;
        };
        let link = current.connection.link();
        let reason = match link.state().get() {
            LinkState::Opening | LinkState::Open => return,
            LinkState::Draining(reason) => reason.to_owned(),
            LinkState::Ended(reason) => reason,
        };
        info!(connection = self.options.name; "connection to {} lost: {reason}", self.options.address);
        if now.saturating_duration_since(current.since) >= SETTLED {
            self.failures = 0;
            self.retry_at = None;
        } else {
            // The first one is dialled anew at once all the same.
            self.retry_at = self
                .failures
                .checked_sub(1)
                .map(|before| now + self.pause(before));
            self.failures = self.failures.saturating_add(1);
        }
        self.published.set(None);
        self.supersede(now);
        self.state.set(ConnectorState::Connecting {
            last_error: Some(reason),
        });
    }

    /// Lets go of the present connection: it ends with its last call.
    fn supersede(&mut self, now: Instant) {
        if let Some(old) = self.current.take() {
            self.superseded.push(Superseded {
                link: Arc::clone(old.connection.link()),
                until: now + DRAIN_LIMIT,
            });
        }
    }

    /// Ends what has outlived its replacement for too long, and forgets what
    /// has ended.
    fn retire(&mut self, now: Instant) {
        self.superseded.retain(|old| {
            if matches!(old.link.state().get(), LinkState::Ended(_)) {
                return false;
            }
            if old.until <= now {
                old.link.request_close();
            }
            old.until > now
        });
    }

    fn replace(&mut self, connection: Connection) {
        let now = clock::now();
        let connection = Arc::new(connection);
        info!(
            connection = self.options.name, generation = connection.identity().generation;
            "connected to {} at {}", connection.peer().id, self.options.address
        );
        self.published.set(Some(Arc::clone(&connection)));
        self.supersede(now);
        self.current = Some(Current {
            changed: connection.link().state().subscribe(),
            renew_at: renew_at(
                [
                    connection.identity().svid.not_after,
                    connection.peer().not_after,
                ],
                Now::read(),
            ),
            connection,
            since: now,
        });
        self.retry_at = None;
        self.failures_said = Said::default();
        self.state.set_if_changed(ConnectorState::Ready);
    }

    fn failed(&mut self, error: String) {
        let pause = self.pause(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(clock::now() + pause);
        if self.failures_said.is_new(&error) {
            warn!(connection = self.options.name; "{error}; next attempt in {pause:?}");
        } else {
            debug!(connection = self.options.name; "{error}; next attempt in {pause:?}");
        }
        if self.current.is_none() {
            self.state.set_if_changed(ConnectorState::Connecting {
                last_error: Some(error),
            });
        }
    }

    fn pause(&self, failures: u32) -> Duration {
        let mut random = [0; 4];
        // Without randomness the pause is merely not spread.
        let _ = openssl::rand::rand_bytes(&mut random);
        dial::pause(
            failures,
            self.options.backoff_max,
            u32::from_ne_bytes(random),
        )
    }

    /// Waits for a reason to look again after the look at `now`.
    fn wait(&self, stop: &Stop, rotated: &Receiver<()>, now: Instant) {
        let none = never();
        let changed = self
            .current
            .as_ref()
            .map_or(&none, |current| &current.changed);
        let dial_at = if self.wanted(now).is_some() {
            self.retry_at
        } else {
            self.current.as_ref().map(|current| current.renew_at)
        };
        let due = self
            .superseded
            .iter()
            .map(|old| old.until)
            .chain(dial_at)
            .min();
        let timer = due.map_or_else(never, crossbeam_channel::at);
        select! {
            recv(stop.receiver()) -> _ => {}
            recv(rotated) -> _ => {}
            recv(changed) -> _ => {}
            recv(timer) -> _ => {}
        }
    }

    /// Dials, shakes hands, and waits for the peer's SETTINGS.
    fn connect(&mut self, identity: &Arc<Identity>, stop: &Stop) -> Result<Connection, DialError> {
        let address = self.options.address.clone();
        self.attempt(&address, identity, stop)
            .map_err(|error| match error {
                DialError::Failed(text) => DialError::Failed(format!("{address}: {text}")),
                DialError::Stopped => DialError::Stopped,
            })
    }

    fn attempt(
        &mut self,
        address: &Address,
        identity: &Arc<Identity>,
        stop: &Stop,
    ) -> Result<Connection, DialError> {
        let (target, took) = Target::of(address, &*self.resolve)?;
        self.note_resolved(took);
        let wake = Arc::clone(&self.wake);
        let limits = Limits {
            // From here: nothing bounds what the resolver takes, and a peer that
            // is well must not be taken for one that does not answer.
            deadline: clock::now() + self.options.dial_timeout,
            wake: &wake,
            stop,
        };
        let session = self.establish(target, identity, limits)?;
        let (ours, grpcs) = pair().map_err(|error| format!("making a socket pair: {error}"))?;
        let channel = self.channel(grpcs);
        let link = Link::new(session.stream, ours, true, Arc::clone(self.relay.wake()));
        let handle = Arc::clone(link.handle());
        let connection =
            Connection::new(channel, session.peer, session.identity, Arc::clone(&handle));
        self.relay.add(link);
        // An early return drops the connection, which ends the link.
        await_settings(&handle, limits)?;
        Ok(connection)
    }

    fn establish(
        &mut self,
        target: Target<'_>,
        identity: &Arc<Identity>,
        limits: Limits<'_>,
    ) -> Result<Session, DialError> {
        let socket = dial::dial(target, limits)?;
        let mut handshake = Handshake::new(&mut self.contexts, identity, socket)?;
        while !handshake.step()? {
            limits.wait(handshake.interest(), "TLS handshake")?;
        }
        Ok(handshake.finish(clock::wall())?)
    }

    /// Says once that the resolver is slow.
    fn note_resolved(&mut self, took: Duration) {
        let is_slow = took > RESOLVED_SLOWLY;
        if is_slow && !self.slow_said {
            warn!(
                connection = self.options.name;
                "resolving the name in {} took {took:.1?}", self.options.address
            );
        }
        self.slow_said = is_slow;
    }

    fn channel(&self, grpcs: UnixStream) -> Channel {
        let builder = self
            .rpc
            .channel(self.options.backoff_max)
            .default_authority(self.options.authority.as_str());
        // The text only labels the channel; gRPC wants none with a NUL.
        let label = self.options.address.to_string().replace('\0', "?");
        // SAFETY: `grpcs` is one end of a connected stream socket pair, and
        // its descriptor is given away here: nobody else has it.
        unsafe { builder.connect_from_fd(&label, grpcs.into_raw_fd()) }
    }

    fn end(mut self) {
        self.published.set(None);
        self.state.set_if_changed(ConnectorState::Connecting {
            last_error: Some("the connection was closed by this side".to_owned()),
        });
        self.current = None;
        let _ = self.relay.stop_by(clock::now() + RELAY_LIMIT);
    }
}

/// When a connection made `now` is due to be replaced, if its certificates
/// expire at `not_after`: after half the time. Tokens on it expire with them,
/// and NSM would have everything refreshed ever faster.
fn renew_at(not_after: [SystemTime; 2], now: Now) -> Instant {
    let left = now.until(not_after[0].min(not_after[1]));
    now.mono + (left / 2).max(RENEW_MIN)
}

/// gRPC's socket pair: both ends non-blocking, closed on exec.
pub(super) fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, grpcs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    grpcs.set_nonblocking(true)?;
    Ok((ours, grpcs))
}

/// With TLS 1.3 a client that the server refuses sees a successful handshake
/// first; the SETTINGS are the first sign that it was accepted.
fn await_settings(link: &LinkHandle, limits: Limits<'_>) -> Result<(), DialError> {
    let changed = link.state().subscribe();
    loop {
        match link.state().get() {
            LinkState::Opening => {}
            LinkState::Open => return Ok(()),
            LinkState::Draining(reason) => {
                return Err(DialError::Failed(format!(
                    "the connection ended after the TLS handshake: {reason}"
                )));
            }
            LinkState::Ended(reason) => {
                return Err(DialError::Failed(format!(
                    "the connection ended after the TLS handshake: {reason}"
                )));
            }
        }
        let left = limits.deadline.saturating_duration_since(clock::now());
        select! {
            recv(changed) -> _ => {}
            recv(limits.stop.receiver()) -> _ => return Err(DialError::Stopped),
            default(left) => {
                return Err(DialError::Failed(
                    "no HTTP/2 SETTINGS came after the TLS handshake".to_owned(),
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_renewed_before_its_certificates_are_old() {
        let now = Now::read();
        let after = |own: u64, peer: u64| {
            let at = |seconds| now.wall + Duration::from_secs(seconds);
            (renew_at([at(own), at(peer)], now) - now.mono).as_secs()
        };
        assert_eq!(after(3600, 3600), 1800);
        assert_eq!(after(3600, 600), 300);
        assert_eq!(after(600, 3600), 300);
        // Not ever faster, where the peer keeps an old certificate.
        assert_eq!(after(3600, 10), 30);
        let past = now.wall - Duration::from_secs(5);
        assert_eq!(renew_at([past, past], now) - now.mono, RENEW_MIN);
    }
}
