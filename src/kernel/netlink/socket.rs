//! The two netlink sockets: one for requests and dumps, one for events.
//!
//! One of the few files with `unsafe`: netlink-sys has no SO_RCVBUFFORCE.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::frame::{DUMP_INTR, Frame, Reply, frames, reply};
use crate::kernel::error::{KernelError, OpError};
use crate::sync::clock;
use crate::sync::poll::{self, Interest};

/// Larger than any datagram that the kernel makes: dumps are cut at 32 KiB
/// (net/netlink/af_netlink.c, netlink_dump).
const BUFFER: usize = 64 * 1024;
/// Receive buffer of the event socket, as long as it may be had.
const EVENT_QUEUE: i32 = 8 * 1024 * 1024;
/// How long the kernel may take for an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How often a dump that was overtaken by a change is repeated.
const DUMP_TRIES: usize = 5;

/// linux/rtnetlink.h, `enum rtnetlink_groups`: links; addresses, routes and
/// rules of IPv4 and IPv6.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

/// A bound socket with its receive buffer. Never cloned: the crate's socket
/// closes its descriptor with every clone that is dropped.
struct Endpoint {
    socket: Socket,
    port: u32,
    buffer: Vec<u8>,
}

impl Endpoint {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        socket.set_non_blocking(true)?;
        Ok(Self {
            socket,
            port,
            buffer: vec![0; BUFFER],
        })
    }

    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Reads the next datagram of the kernel and returns its length;
    /// `WouldBlock` when there is none.
    fn receive(&mut self) -> io::Result<usize> {
        loop {
            let (length, from) = match self
                .socket
                .recv_from(&mut self.buffer.as_mut_slice(), libc::MSG_TRUNC)
            {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            // Any process may send to our port; only the kernel's counts.
            if from.port_number() != 0 {
                continue;
            }
            if length > self.buffer.len() {
                return Err(io::Error::other(format!(
                    "a datagram of {length} bytes is larger than the buffer of {BUFFER}"
                )));
            }
            return Ok(length);
        }
    }

    /// What [`Endpoint::receive`] has read.
    fn datagram(&self, length: usize) -> &[u8] {
        self.buffer.get(..length).unwrap_or_default()
    }
}

/// The socket for requests. Used by the thread `net` alone.
pub struct RequestSocket {
    endpoint: Endpoint,
    sequence: u32,
}

impl RequestSocket {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn open() -> Result<Self, KernelError> {
        Self::try_open().map_err(|error| KernelError::io("netlink request socket", &error))
    }

    fn try_open() -> io::Result<Self> {
        let endpoint = Endpoint::open()?;
        endpoint.socket.connect(&SocketAddr::new(0, 0))?;
        endpoint.socket.set_ext_ack(true)?;
        endpoint.socket.set_cap_ack(true)?;
        endpoint.socket.set_netlink_get_strict_chk(true)?;
        Ok(Self {
            endpoint,
            sequence: 0,
        })
    }

    /// The port id under which our own changes are told in events.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.endpoint.port
    }

    /// The first of `count` numbers in a row that no recent request had. Never
    /// 0, which events carry.
    pub fn sequences(&mut self, count: u32) -> u32 {
        let first = self.sequence.checked_add(1).unwrap_or(1);
        let (first, last) = match first.checked_add(count) {
            Some(last) => (first, last),
            None => (1, count.saturating_add(1)),
        };
        self.sequence = last;
        first
    }

    /// Sends messages that have the sequences `first..=last`, the last of
    /// which asks for an acknowledgement, and calls `refused` for each that
    /// the kernel refuses. It executes them in order and goes on after a
    /// refusal.
    ///
    /// # Errors
    ///
    /// When it is not known what became of the messages.
    pub fn batch(
        &mut self,
        messages: &[u8],
        first: u32,
        last: u32,
        mut refused: impl FnMut(u32, OpError),
    ) -> Result<(), KernelError> {
        let deadline = clock::now() + PATIENCE;
        self.send(messages)?;
        loop {
            let datagram = self.receive_by(deadline)?;
            for frame in frames(datagram) {
                // Answers to earlier requests that we gave up on.
                if !(first..=last).contains(&frame.sequence) {
                    continue;
                }
                match reply(&frame) {
                    Reply::Refused { errno, text } => {
                        refused(frame.sequence, OpError::Refused { errno, text });
                    }
                    Reply::Done => {}
                    _ => continue,
                }
                if frame.sequence == last {
                    return Ok(());
                }
            }
        }
    }

    /// Sends a dump request with the sequence `sequence` and calls `each` for
    /// every message of the answer. False when the state changed in between,
    /// and the dump may lack something.
    ///
    /// # Errors
    ///
    /// What the kernel, or the lack of an answer, says.
    pub fn dump(
        &mut self,
        request: &[u8],
        sequence: u32,
        mut each: impl FnMut(&Frame<'_>),
    ) -> Result<bool, OpError> {
        let unknown = |error: KernelError| OpError::Unknown(error.0);
        let deadline = clock::now() + PATIENCE;
        self.send(request).map_err(unknown)?;
        let mut consistent = true;
        loop {
            let datagram = self.receive_by(deadline).map_err(unknown)?;
            for frame in frames(datagram) {
                if frame.sequence != sequence {
                    continue;
                }
                consistent &= frame.flags & DUMP_INTR == 0;
                match reply(&frame) {
                    Reply::Data(frame) => each(&frame),
                    Reply::Done => return Ok(consistent),
                    Reply::Refused { errno, text } => {
                        return Err(OpError::Refused { errno, text });
                    }
                    Reply::Noop | Reply::Garbled => {}
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), KernelError> {
        loop {
            match self.endpoint.socket.send(bytes, 0) {
                Ok(sent) if sent == bytes.len() => return Ok(()),
                Ok(sent) => {
                    return Err(KernelError(format!(
                        "netlink took {sent} of {} bytes",
                        bytes.len()
                    )));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(KernelError::io("netlink send", &error)),
            }
        }
    }

    fn receive_by(&mut self, deadline: Instant) -> Result<&[u8], KernelError> {
        let interest = [Interest {
            fd: self.endpoint.fd(),
            read: true,
            write: false,
        }];
        loop {
            let ready = poll::wait(&interest, Some(deadline))
                .map_err(|error| KernelError::io("poll of the netlink request socket", &error))?;
            if !ready.iter().any(|readiness| readiness.read) {
                return Err(KernelError(format!(
                    "the kernel did not answer within {} s",
                    PATIENCE.as_secs()
                )));
            }
            match self.endpoint.receive() {
                Ok(length) => return Ok(self.endpoint.datagram(length)),
                // It was not the kernel's.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(KernelError::io("netlink receive", &error)),
            }
        }
    }
}

/// How often a dump is tried.
#[must_use]
pub fn dump_tries() -> std::ops::Range<usize> {
    0..DUMP_TRIES
}

/// The socket for events. Used by the thread `link-monitor` alone.
pub struct EventSocket {
    endpoint: Endpoint,
}

impl EventSocket {
    /// Opens it and joins all groups, so that no change after this call is
    /// missed.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn open() -> Result<Self, KernelError> {
        Self::try_open().map_err(|error| KernelError::io("netlink event socket", &error))
    }

    fn try_open() -> io::Result<Self> {
        let endpoint = Endpoint::open()?;
        if let Err(error) = force_receive_queue(endpoint.fd(), EVENT_QUEUE) {
            // Not permitted within a user namespace: then as much as the
            // system-wide limit gives.
            log::debug!("SO_RCVBUFFORCE: {error}; using SO_RCVBUF");
            endpoint.socket.set_rx_buf_sz(EVENT_QUEUE)?;
        }
        for group in GROUPS {
            endpoint.socket.add_membership(group)?;
        }
        Ok(Self { endpoint })
    }

    /// The interest to wait for.
    #[must_use]
    pub fn interest(&self) -> Interest {
        Interest {
            fd: self.endpoint.fd(),
            read: true,
            write: false,
        }
    }

    /// The next datagram; `WouldBlock` when there is none, ENOBUFS when some
    /// were lost.
    ///
    /// # Errors
    ///
    /// As said, and whatever else the system says.
    pub fn receive(&mut self) -> io::Result<&[u8]> {
        let length = self.endpoint.receive()?;
        Ok(self.endpoint.datagram(length))
    }

    /// Makes the queue so small that it overflows.
    #[cfg(test)]
    pub fn shrink_queue(&self, bytes: i32) {
        self.endpoint.socket.set_rx_buf_sz(bytes).unwrap();
    }
}

/// SO_RCVBUFFORCE: not bounded by net.core.rmem_max.
fn force_receive_queue(fd: RawFd, bytes: i32) -> io::Result<()> {
    // SAFETY: `bytes` is a live i32, which is what the option takes, and its
    // size is passed with it; the caller keeps `fd` open.
    let result = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            libc::socklen_t::try_from(size_of::<i32>()).unwrap_or(4),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
