//! One connection in the relay: a TLS session on one side, the socket pair to
//! gRPC on the other.

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use log::warn;
use openssl::ssl::{ErrorCode, SslStream};

use super::allowance::Allowance;
use super::buffer::Buffer;
use super::fd_socket::{FdQueue, FdSocket};
use super::frames::{Seen, Walker};
use crate::sync::poll::{Interest, WakeFd};
use crate::sync::watch::Watch;

/// How long the last bytes may take after one side has gone.
const LINGER: Duration = Duration::from_secs(1);
/// Rounds of one turn, so that one busy connection does not hold up the others.
const ROUNDS: usize = 16;

/// Where a connection is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LinkState {
    /// The peer has not said anything yet.
    Opening,
    /// Calls can be made.
    Open,
    /// No new calls can be made, and why.
    Draining(&'static str),
    /// It is over, and why.
    Ended(String),
}

/// What the rest of the process sees of a link.
pub(super) struct LinkHandle {
    state: Watch<LinkState>,
    queue: FdQueue,
    wake: Arc<WakeFd>,
    close: AtomicBool,
    closed: Receiver<Infallible>,
}

impl LinkHandle {
    pub(super) fn state(&self) -> &Watch<LinkState> {
        &self.state
    }

    /// Becomes ready (disconnected) at the end of the link.
    pub(super) fn closed(&self) -> &Receiver<Infallible> {
        &self.closed
    }

    pub(super) fn is_open(&self) -> bool {
        self.state.get() == LinkState::Open && !self.close.load(Ordering::Acquire)
    }

    /// Queues a descriptor for the next bytes.
    pub(super) fn attach(&self, fd: OwnedFd) {
        if !self.queue.push(fd) {
            warn!("too many descriptors wait on one connection; one was dropped");
        }
    }

    /// Ends the link; what gRPC wrote before still goes out.
    pub(super) fn request_close(&self) {
        self.close.store(true, Ordering::Release);
        self.wake.wake();
    }
}

/// Runs when a link has ended, on the relay's thread.
pub(super) type OnEnd = Box<dyn FnOnce() + Send>;

enum Phase {
    Open,
    /// gRPC's side has gone, or shall go: its last bytes go out, then the
    /// peer's end is awaited, since closing a socket with unread data would
    /// destroy them.
    Closing {
        until: Instant,
        notified: bool,
    },
    /// The peer has gone: its last bytes go to gRPC.
    PeerGone {
        until: Instant,
    },
    Over,
}

/// The relay's part of a connection.
pub(super) struct Link {
    tls: SslStream<FdSocket>,
    grpc: Option<UnixStream>,
    up: Buffer,
    down: Buffer,
    walker: Option<Walker>,
    /// What a client may send to our server.
    allowance: Option<Allowance>,
    read_wants_write: bool,
    /// Why nothing more can be written; what the peer sent before is still
    /// read. OpenSSL must not be asked to write again.
    write_failed: Option<String>,
    phase: Phase,
    reason: String,
    handle: Arc<LinkHandle>,
    on_end: Option<OnEnd>,
    /// INVARIANT: dropped last, after the state says why.
    _closed: Sender<Infallible>,
}

impl Link {
    /// Joins a session and gRPC's socket pair (both non-blocking). A client's
    /// link is `Opening` until the peer's SETTINGS; a server's is `Open`.
    pub(super) fn new(
        tls: SslStream<FdSocket>,
        grpc: UnixStream,
        is_client: bool,
        wake: Arc<WakeFd>,
    ) -> Self {
        let (sender, closed) = bounded(0);
        let state = if is_client {
            LinkState::Opening
        } else {
            LinkState::Open
        };
        let handle = Arc::new(LinkHandle {
            state: Watch::new(state),
            queue: tls.get_ref().queue().clone(),
            wake,
            close: AtomicBool::new(false),
            closed,
        });
        Self {
            tls,
            grpc: Some(grpc),
            up: Buffer::new(),
            down: Buffer::new(),
            walker: is_client.then(Walker::new),
            allowance: None,
            read_wants_write: false,
            write_failed: None,
            phase: Phase::Open,
            reason: String::new(),
            handle,
            on_end: None,
            _closed: sender,
        }
    }

    pub(super) fn handle(&self) -> &Arc<LinkHandle> {
        &self.handle
    }

    /// Ends the link when the peer sends more than this allows.
    pub(super) fn set_allowance(&mut self, allowance: Allowance) {
        self.allowance = Some(allowance);
    }

    /// How many calls of the peer have no end yet, and since when there have
    /// been some.
    pub(super) fn unfinished(&self) -> (usize, Option<Instant>) {
        (self.allowance.as_ref()).map_or((0, None), Allowance::unfinished)
    }

    pub(super) fn set_on_end(&mut self, on_end: OnEnd) {
        self.on_end = Some(on_end);
    }

    /// Moves what can be moved. True when there may be more to move at once.
    pub(super) fn turn(&mut self, now: Instant) -> bool {
        if self.handle.close.load(Ordering::Acquire) {
            self.close("closed by this side", now);
        }
        for _ in 0..ROUNDS {
            let moved =
                self.fill_up(now) | self.flush_up(now) | self.fill_down(now) | self.flush_down(now);
            if !moved {
                self.settle(now);
                self.up.release();
                self.down.release();
                return false;
            }
        }
        self.settle(now);
        !self.is_over()
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// When [`Link::turn`] is due although nothing is ready.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Closing { until, .. } | Phase::PeerGone { until } => Some(until),
            Phase::Open | Phase::Over => None,
        }
    }

    /// What to wait for: the TLS socket and gRPC's. A descriptor of which
    /// nothing is wanted is -1, or poll would report its hang-up for ever.
    pub(super) fn interests(&self) -> [Interest; 2] {
        let open = matches!(self.phase, Phase::Open);
        let closing = matches!(self.phase, Phase::Closing { .. });
        let tls = interest(
            self.tls.get_ref().raw(),
            (open && self.down.has_room()) || closing,
            (open || closing) && (!self.up.is_empty() || self.read_wants_write),
        );
        let grpc = interest(
            self.grpc.as_ref().map_or(-1, AsRawFd::as_raw_fd),
            self.takes_up() && self.up.has_room(),
            !self.down.is_empty(),
        );
        [tls, grpc]
    }

    /// Whether bytes can go from gRPC to the peer.
    fn takes_up(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Closing { .. }) && self.write_failed.is_none()
    }

    /// gRPC → buffer.
    fn fill_up(&mut self, now: Instant) -> bool {
        if !self.takes_up() {
            return false;
        }
        let Some(grpc) = &mut self.grpc else {
            return false;
        };
        let room = self.up.room();
        if room.is_empty() {
            return false;
        }
        match grpc.read(room) {
            Ok(count) if count > 0 => {
                self.up.filled(count);
                return true;
            }
            Err(error) if is_transient(&error) && matches!(self.phase, Phase::Open) => {}
            // Its end, or all that it wrote before it was to be closed.
            _ => {
                self.grpc = None;
                self.close("closed by gRPC on this side", now);
            }
        }
        false
    }

    /// Buffer → peer.
    fn flush_up(&mut self, now: Instant) -> bool {
        if self.up.is_empty() || !self.takes_up() {
            return false;
        }
        match self.tls.ssl_write(self.up.data()) {
            Ok(count) => {
                self.up.taken(count);
                true
            }
            Err(error) if wants(&error) => false,
            Err(error) => {
                self.up.clear();
                self.write_failed(format!("writing: {error}"), now);
                false
            }
        }
    }

    /// Peer → buffer.
    fn fill_down(&mut self, now: Instant) -> bool {
        if !matches!(self.phase, Phase::Open | Phase::Closing { .. }) || !self.down.has_room() {
            return false;
        }
        match self.tls.ssl_read(self.down.room()) {
            Ok(count) => {
                self.read_wants_write = false;
                self.arrived(count, now);
                true
            }
            Err(error) if wants(&error) => {
                self.read_wants_write = error.code() == ErrorCode::WANT_WRITE;
                if let Some(reason) = self.write_failed.take() {
                    self.peer_gone(&reason, now);
                }
                false
            }
            Err(error) if error.code() == ErrorCode::ZERO_RETURN => {
                self.peer_gone("closed by the peer", now);
                false
            }
            Err(error) => {
                self.peer_gone(&format!("reading: {error}"), now);
                false
            }
        }
    }

    fn arrived(&mut self, count: usize, now: Instant) {
        if matches!(self.phase, Phase::Closing { .. }) {
            // Nobody is left to read it.
            return;
        }
        let bytes = self.down.filled(count);
        if let Some(allowance) = &mut self.allowance
            && let Err(excess) = allowance.scan(bytes, now)
        {
            self.cut(&excess.to_string(), now);
            return;
        }
        let Some(walker) = &mut self.walker else {
            return;
        };
        let before = walker.seen();
        let seen = walker.scan(bytes);
        if seen == before {
            return;
        }
        match seen {
            Seen::Settings => self.handle.state.set(LinkState::Open),
            Seen::GoAway => self
                .handle
                .state
                .set(LinkState::Draining("the peer sent GOAWAY")),
            Seen::Other => {
                self.down.clear();
                self.peer_gone("the peer does not speak HTTP/2", now);
            }
            Seen::Nothing => {}
        }
    }

    /// Buffer → gRPC.
    fn flush_down(&mut self, _now: Instant) -> bool {
        if self.down.is_empty() {
            return false;
        }
        let Some(grpc) = &mut self.grpc else {
            self.down.clear();
            return false;
        };
        match grpc.write(self.down.data()) {
            Ok(count) => {
                self.down.taken(count);
                count > 0
            }
            Err(error) if is_transient(&error) => false,
            Err(_) => {
                // Its end of the pair is closed; the next read says so.
                self.down.clear();
                false
            }
        }
    }

    /// Takes nothing more from the peer; what gRPC wrote before still goes out.
    fn close(&mut self, reason: &'static str, now: Instant) {
        if let Phase::Open = self.phase {
            self.note(reason);
            self.handle
                .state
                .set_if_changed(LinkState::Draining(reason));
            self.down.clear();
            self.phase = Phase::Closing {
                until: now + LINGER,
                notified: false,
            };
        }
    }

    /// Ends the link of a peer that goes beyond what it may.
    pub(super) fn cut(&mut self, why: &str, now: Instant) {
        let peer = self.allowance.take();
        let peer = peer.as_ref().map_or("", Allowance::peer);
        warn!(peer; "the connection is cut: {why}");
        self.down.clear();
        self.peer_gone("the peer sent more than it may", now);
        self.settle(now);
    }

    fn write_failed(&mut self, reason: String, now: Instant) {
        if let Phase::Open = self.phase {
            self.handle
                .state
                .set_if_changed(LinkState::Draining("the peer takes no more bytes"));
            self.write_failed = Some(reason);
        } else {
            self.peer_gone(&reason, now);
        }
    }

    fn peer_gone(&mut self, reason: &str, now: Instant) {
        match self.phase {
            Phase::Open => {
                self.note(reason);
                self.phase = Phase::PeerGone {
                    until: now + LINGER,
                };
            }
            Phase::Closing { .. } => self.phase = Phase::Over,
            Phase::PeerGone { .. } | Phase::Over => {}
        }
    }

    fn note(&mut self, reason: &str) {
        reason.clone_into(&mut self.reason);
    }

    /// Ends a phase whose work is done or whose time is up.
    fn settle(&mut self, now: Instant) {
        match &mut self.phase {
            Phase::Closing { until, notified } => {
                if self.up.is_empty() && self.grpc.is_none() && !*notified {
                    *notified = true;
                    // Without room for it the peer sees the end of the stream
                    // alone, which HTTP/2 does not mind.
                    let _ = self.tls.shutdown();
                    self.tls.get_ref().end_writing();
                }
                if now >= *until {
                    self.phase = Phase::Over;
                }
            }
            Phase::PeerGone { until } => {
                if self.down.is_empty() || self.grpc.is_none() || now >= *until {
                    self.phase = Phase::Over;
                }
            }
            Phase::Open | Phase::Over => {}
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.reason.is_empty() {
            self.note("the relay ended");
        }
        // The state says so before gRPC's calls fail, so that whoever made one
        // can tell a lost connection from a peer's answer.
        let reason = std::mem::take(&mut self.reason);
        self.handle.state.set(LinkState::Ended(reason));
        self.grpc = None;
        if let Some(on_end) = self.on_end.take() {
            on_end();
        }
    }
}

fn interest(fd: i32, read: bool, write: bool) -> Interest {
    Interest {
        fd: if read || write { fd } else { -1 },
        read,
        write,
    }
}

fn wants(error: &openssl::ssl::Error) -> bool {
    matches!(error.code(), ErrorCode::WANT_READ | ErrorCode::WANT_WRITE)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests;
