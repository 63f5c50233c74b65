//! Waiting for descriptors, with a wake-up that other threads can give.
//!
//! One of the few files with `unsafe`: each block is one system call on
//! memory that the function itself owns.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use super::clock;

/// What to wait for on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// The descriptor; the caller keeps it open during the wait.
    pub fd: RawFd,
    /// Wake when it can be read (or the peer has hung up).
    pub read: bool,
    /// Wake when it can be written.
    pub write: bool,
}

/// What was found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Readiness {
    /// A read will not block: data, end of stream, or an error to collect.
    pub read: bool,
    /// A write will not block.
    pub write: bool,
    /// The peer has hung up, or the descriptor has an error.
    pub hangup: bool,
}

/// Waits until one of `interests` is ready or `deadline` has passed (`None`:
/// no limit). Returns a readiness for each, in order; all of them empty after
/// the deadline. Interrupted waits are resumed.
///
/// # Errors
///
/// What poll(2) says, except EINTR.
pub fn wait(interests: &[Interest], deadline: Option<Instant>) -> io::Result<Vec<Readiness>> {
    let mut fds: Vec<libc::pollfd> = interests
        .iter()
        .map(|interest| {
            let mut events = 0;
            if interest.read {
                events |= libc::POLLIN;
            }
            if interest.write {
                events |= libc::POLLOUT;
            }
            libc::pollfd {
                fd: interest.fd,
                events,
                revents: 0,
            }
        })
        .collect();
    loop {
        let timeout = deadline.map_or(-1, |at| {
            millis_up(at.saturating_duration_since(clock::now()))
        });
        // SAFETY: `fds` is a live, initialised vector and its length is passed
        // with it; poll writes only the `revents` of its elements.
        let found = unsafe {
            libc::poll(
                fds.as_mut_ptr(),
                libc::nfds_t::try_from(fds.len()).unwrap_or(libc::nfds_t::MAX),
                timeout,
            )
        };
        if found >= 0 {
            return Ok(fds.iter().map(readiness).collect());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn readiness(fd: &libc::pollfd) -> Readiness {
    let has = |bits: libc::c_short| fd.revents & bits != 0;
    let hangup = has(libc::POLLHUP | libc::POLLERR | libc::POLLNVAL);
    Readiness {
        read: has(libc::POLLIN) || hangup,
        write: has(libc::POLLOUT),
        hangup,
    }
}

/// Rounds up, so that a wait never ends just before its deadline and spins.
fn millis_up(duration: Duration) -> libc::c_int {
    let millis = duration.as_nanos().div_ceil(1_000_000);
    libc::c_int::try_from(millis).unwrap_or(libc::c_int::MAX)
}

/// A descriptor that other threads make readable (eventfd(2)).
#[derive(Debug)]
pub struct WakeFd(OwnedFd);

impl WakeFd {
    /// A new wake-up, not given yet.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes no pointers; a non-negative result is a new
        // descriptor that nobody else owns.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by eventfd and is owned by nobody.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes the descriptor readable.
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: `one` is eight readable bytes, which is what eventfd wants.
        // The only failure is EAGAIN at the counter's maximum, where the
        // descriptor is readable anyway.
        let _ = unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Takes the wake-ups given so far.
    pub fn drain(&self) {
        let mut count = [0u8; 8];
        // SAFETY: `count` is eight writable bytes. EAGAIN means there was
        // nothing to take.
        let _ = unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }

    /// The interest to pass to [`wait`].
    #[must_use]
    pub fn interest(&self) -> Interest {
        Interest {
            fd: self.0.as_raw_fd(),
            read: true,
            write: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_and_times_out() {
        let wake = WakeFd::new().unwrap();
        let soon = || Some(clock::now() + Duration::from_millis(5));
        assert!(!wait(&[wake.interest()], soon()).unwrap()[0].read);
        wake.wake();
        wake.wake();
        assert!(wait(&[wake.interest()], None).unwrap()[0].read);
        wake.drain();
        assert!(!wait(&[wake.interest()], soon()).unwrap()[0].read);
    }

    #[test]
    fn rounds_a_wait_up() {
        assert_eq!(millis_up(Duration::from_nanos(1)), 1);
        assert_eq!(millis_up(Duration::ZERO), 0);
        assert_eq!(millis_up(Duration::MAX), libc::c_int::MAX);
    }
}
