//! Connecting a socket within a time, and so that it can be broken off.
//!
//! One of the few files with `unsafe`: socket(2), connect(2), setsockopt(2).

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::client::Address;
use super::fd_socket::Socket;
use crate::sync::clock;
use crate::sync::poll::{self, Interest, WakeFd};
use crate::sync::stop::Stop;

/// How long sent bytes may stay unacknowledged before a peer counts as dead.
const USER_TIMEOUT_MS: libc::c_int = 20_000;
/// An idle connection is probed after this many seconds, then this often, this
/// many times. HTTP/2 pings would be held against us by grpc-go.
const KEEPALIVE_IDLE_S: libc::c_int = 30;
const KEEPALIVE_INTERVAL_S: libc::c_int = 5;
const KEEPALIVE_COUNT: libc::c_int = 3;

/// Why there is no socket, or no session over it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DialError {
    /// The thread shall stop.
    Stopped,
    /// What was attempted and what went wrong.
    Failed(String),
}

impl From<String> for DialError {
    fn from(text: String) -> Self {
        Self::Failed(text)
    }
}

/// What ends a wait early.
#[derive(Clone, Copy)]
pub(super) struct Limits<'a> {
    pub deadline: Instant,
    /// Given when `stop` is set.
    pub wake: &'a WakeFd,
    pub stop: &'a Stop,
}

impl Limits<'_> {
    /// Waits until the descriptor is ready.
    pub(super) fn wait(&self, interest: Interest, what: &str) -> Result<(), DialError> {
        loop {
            if self.stop.is_set() {
                return Err(DialError::Stopped);
            }
            let ready = poll::wait(&[interest, self.wake.interest()], Some(self.deadline))
                .map_err(|error| format!("{what}: waiting: {error}"))?;
            if ready[0].read || ready[0].write {
                return Ok(());
            }
            if ready[1].read {
                self.wake.drain();
            } else if clock::now() >= self.deadline {
                return Err(DialError::Failed(format!("{what}: timed out")));
            }
        }
    }
}

/// Finds the addresses of a host name, as getaddrinfo(3) does: it may block,
/// for as long as the system's configuration says. Called on `conn-*`.
pub type Resolve = dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// The system's resolver.
pub(super) fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// Where to connect to, once the name is resolved.
pub(super) enum Target<'a> {
    Unix(&'a Path),
    /// In the order in which to try them.
    Tcp(Vec<SocketAddr>),
}

impl<'a> Target<'a> {
    /// Resolves the name; with the time that it took.
    pub(super) fn of(
        address: &'a Address,
        resolve: &Resolve,
    ) -> Result<(Self, Duration), DialError> {
        let begun = clock::now();
        let target = match address {
            Address::Unix(path) => Self::Unix(path),
            Address::Tcp { host, port } => match resolve(host, *port) {
                Ok(found) if found.is_empty() => {
                    return Err(format!("resolving {host}: no address").into());
                }
                Ok(found) => Self::Tcp(found),
                Err(error) => return Err(format!("resolving {host}: {error}").into()),
            },
        };
        Ok((target, begun.elapsed()))
    }
}

/// Connects; of several addresses to the first that answers, each with an equal
/// share of the time.
pub(super) fn dial(target: Target<'_>, limits: Limits<'_>) -> Result<Socket, DialError> {
    match target {
        Target::Unix(path) => connect_unix(path).map(Socket::Unix).map_err(|error| {
            DialError::Failed(format!("connecting to unix:{}: {error}", path.display()))
        }),
        Target::Tcp(addresses) => dial_tcp(&addresses, limits),
    }
}

fn dial_tcp(addresses: &[SocketAddr], limits: Limits<'_>) -> Result<Socket, DialError> {
    let mut last = DialError::Failed("no address".to_owned());
    let mut left = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    for &address in addresses {
        let now = clock::now();
        let share = limits.deadline.saturating_duration_since(now) / left.max(1);
        left = left.saturating_sub(1);
        let limits = Limits {
            deadline: now + share,
            ..limits
        };
        match connect_tcp(address, limits) {
            Ok(socket) => return Ok(Socket::Tcp(socket)),
            Err(DialError::Stopped) => return Err(DialError::Stopped),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_tcp(address: SocketAddr, limits: Limits<'_>) -> Result<TcpStream, DialError> {
    let what = format!("connecting to {address}");
    let failed = |error: io::Error| DialError::Failed(format!("{what}: {error}"));
    let socket = begin_tcp(address).map_err(failed)?;
    let interest = Interest {
        fd: socket.as_raw_fd(),
        read: false,
        write: true,
    };
    limits.wait(interest, &what)?;
    match socket.take_error() {
        Ok(None) => {}
        Ok(Some(error)) | Err(error) => return Err(failed(error)),
    }
    tune(&socket).map_err(failed)?;
    Ok(socket)
}

/// Options of every TCP connection, dialled or accepted.
pub(super) fn tune(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    for (option, value) in [
        (libc::TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (libc::TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (libc::TCP_KEEPCNT, KEEPALIVE_COUNT),
        (libc::TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
    ] {
        set_option(socket, libc::IPPROTO_TCP, option, value)?;
    }
    Ok(())
}

fn set_option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: `value` is a live integer whose size is passed with it; all the
    // options set here take an integer.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            length_of::<libc::c_int>(),
        )
    };
    check(result)
}

fn begin_tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let family = match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let socket = new_socket(family)?;
    let started = match address {
        SocketAddr::V4(v4) => connect(
            &socket,
            &libc::sockaddr_in {
                sin_family: family_code(family),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            },
        ),
        SocketAddr::V6(v6) => connect(
            &socket,
            &libc::sockaddr_in6 {
                sin6_family: family_code(family),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            },
        ),
    };
    match started {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        result => result?,
    }
    Ok(TcpStream::from(socket))
}

/// A unix socket connects at once or not at all: with a full queue at the
/// listener the kernel says EAGAIN.
fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: all zeroes are a valid sockaddr_un, that of the empty path.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = family_code(libc::AF_UNIX);
    // One byte stays zero.
    if bytes.len() >= address.sun_path.len() || bytes.is_empty() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a socket's path must have 1 to {} bytes, none of them zero",
                address.sun_path.len() - 1
            ),
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let socket = new_socket(libc::AF_UNIX)?;
    connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

fn new_socket(family: libc::c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(family, kind, 0) };
    check(fd.min(0))?;
    // SAFETY: `fd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn connect<T>(socket: &OwnedFd, address: &T) -> io::Result<()> {
    // SAFETY: `address` is a live, initialised socket address structure of one
    // of the families above, and its size is passed with it.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            std::ptr::from_ref(address).cast(),
            length_of::<T>(),
        )
    };
    check(result)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn family_code(family: libc::c_int) -> libc::sa_family_t {
    libc::sa_family_t::try_from(family).unwrap_or_default()
}

fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(std::mem::size_of::<T>()).unwrap_or(0)
}

/// The pause after the `failures`-th failure in a row (from 0), with a spread
/// by `random`: grpc-go's `backoff` package with 1 s, factor 1.6 and 20 %.
pub(super) fn pause(failures: u32, max: Duration, random: u32) -> Duration {
    let base = Duration::from_secs(1).min(max);
    if failures == 0 {
        return base;
    }
    let exponent = i32::try_from(failures.min(64)).unwrap_or(64);
    let grown = base.as_secs_f64() * 1.6f64.powi(exponent);
    let spread = 0.8 + 0.4 * f64::from(random) / f64::from(u32::MAX);
    Duration::from_secs_f64(grown.min(max.as_secs_f64()) * spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_cap_and_are_spread() {
        let max = Duration::from_secs(5);
        assert_eq!(pause(0, max, 7), Duration::from_secs(1));
        assert_eq!(pause(1, max, 0), Duration::from_millis(1280));
        assert_eq!(pause(1, max, u32::MAX), Duration::from_millis(1920));
        assert_eq!(pause(u32::MAX, max, u32::MAX), Duration::from_secs(6));
        let short = Duration::from_millis(10);
        assert_eq!(pause(0, short, 0), short);
        assert_eq!(pause(9, Duration::ZERO, 0), Duration::ZERO);
    }
}
