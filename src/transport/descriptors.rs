//! How many descriptors the process may have, and how many connections that is
//! enough for.
//!
//! One of the few files with `unsafe`: getrlimit(2), setrlimit(2) and
//! getsockopt(2).

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use log::{info, warn};

/// What is left for all else: a descriptor for each handshake, and the rest for
/// what the process holds itself, with some to spare. Idle it has about 60.
const RESERVE: u64 = 256;
/// Of an accepted connection: its socket, and both ends of gRPC's pair.
const PER_CONNECTION: u64 = 3;
/// Connections that are accepted at most, however many descriptors there are.
const CONNECTIONS_MAX: u64 = 4096;
/// Handshakes at most; [`RESERVE`] has room for them.
const HANDSHAKES_MAX: u64 = 128;
/// The same for a process with few descriptors.
const HANDSHAKES_MIN: u64 = 8;

/// Raises the soft limit to the hard one and logs both. The soft one is often
/// 1024, for the sake of programs that call select(2). To be called on `main`
/// before anything is started; a failure is logged and the limit stays.
pub fn raise_limit() {
    let raised = limit().and_then(|old| {
        let new = libc::rlimit {
            rlim_cur: old.rlim_max,
            ..old
        };
        // SAFETY: setrlimit reads the live `new`.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const new) })?;
        Ok(old)
    });
    match raised {
        Ok(old) => info!(
            soft = old.rlim_cur, hard = old.rlim_max,
            connections_max = Bounds::of_limit(old.rlim_max).connections;
            "Soft limit of descriptors raised to the hard one"
        ),
        Err(error) => warn!("raising the limit of descriptors: {error}; it stays"),
    }
}

/// How much a server may accept at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Connections with a verified peer.
    pub connections: usize,
    /// TLS handshakes.
    pub handshakes: usize,
}

impl Bounds {
    /// For this process's limit as it is now.
    pub(super) fn of_process() -> Self {
        // getrlimit(2) cannot fail for a limit that exists.
        Self::of_limit(limit().map_or(0, |limit| limit.rlim_cur))
    }

    /// Both shrink with the limit, since the process cannot do without what it
    /// holds itself; nobody at all could not be told from a dead endpoint.
    fn of_limit(limit: u64) -> Self {
        let connections = limit.saturating_sub(RESERVE) / PER_CONNECTION;
        let handshakes = limit / 8;
        let size = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
        Self {
            connections: size(connections.clamp(1, CONNECTIONS_MAX)),
            handshakes: size(handshakes.clamp(HANDSHAKES_MIN, HANDSHAKES_MAX)),
        }
    }
}

/// Whether it is this process that connected the socket (unix(7),
/// `SO_PEERCRED`).
pub(super) fn is_own(socket: &UnixStream) -> bool {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = libc::socklen_t::try_from(std::mem::size_of_val(&peer)).unwrap_or(0);
    // SAFETY: `peer` is live and of the option's type, `length` is its size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    result == 0 && u32::try_from(peer.pid).is_ok_and(|pid| pid == std::process::id())
}

fn limit() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit writes the live `limit`.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    Ok(limit)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_accepted_fits_into_the_limit() {
        for (limit, connections, handshakes) in [
            (0, 1, 8),
            (256, 1, 32),
            (400, 48, 50),
            (1024, 256, 128),
            (20_000, 4096, 128),
            (1 << 20, 4096, 128),
            (u64::MAX, 4096, 128),
        ] {
            let expected = Bounds {
                connections,
                handshakes,
            };
            assert_eq!(Bounds::of_limit(limit), expected, "{limit}");
        }
    }

    #[test]
    fn knows_its_own_connections() {
        let (one, other) = UnixStream::pair().unwrap();
        assert!(is_own(&one) && is_own(&other));
    }
}
