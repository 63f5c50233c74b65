//! Network namespaces without names.
//!
//! A namespace is made by a thread that leaves its own, and is held by a
//! descriptor. It ends with the last descriptor, socket and process in it, so
//! nothing is left behind, whatever becomes of the test.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::link::Rtnl;

/// A network namespace; clones refer to the same one.
#[derive(Clone, Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    label: Arc<str>,
}

impl Netns {
    /// Makes a namespace and sets its loopback interface up. The label is for
    /// error messages only.
    pub fn new(label: &str) -> io::Result<Self> {
        let fd = on_a_thread(|| {
            // SAFETY: unshare takes no pointers; it moves this thread alone.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
            File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
        })
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!(
                    "network namespace {label}: {error} (run as root, or with scripts/netns-run.sh)"
                ),
            )
        })?;
        let netns = Self {
            fd: Arc::new(fd),
            label: label.into(),
        };
        // Otherwise the host's settings decide what the lab's packets do.
        for family in ["ipv4", "ipv6"] {
            netns.sysctl(&format!("net.{family}.conf.all.forwarding"), "0")?;
        }
        for conf in ["all", "default"] {
            netns.sysctl(&format!("net.ipv4.conf.{conf}.rp_filter"), "0")?;
            // Until an interface's link-local address is past duplicate
            // address detection (1 to 2 s), no neighbour can be asked for on
            // behalf of forwarded IPv6 packets: peers of the lab would lose
            // packets that are counted against the daemon.
            netns.sysctl(&format!("net.ipv6.conf.{conf}.accept_dad"), "0")?;
        }
        let rtnl = Rtnl::open(&netns)?;
        rtnl.set_up(1, true)?;
        Ok(netns)
    }

    /// The namespace behind a descriptor that was received from elsewhere.
    #[must_use]
    pub fn from_fd(fd: Arc<OwnedFd>, label: &str) -> Self {
        Self {
            fd,
            label: label.into(),
        }
    }

    /// The descriptor that holds the namespace.
    #[must_use]
    pub fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// The raw descriptor, valid while `self` lives.
    #[must_use]
    pub fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// What error messages call it.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Runs `body` on a thread inside the namespace and waits for it. Sockets
    /// that it makes stay in the namespace wherever they are used.
    pub fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> io::Result<R> {
        let fd = self.raw();
        on_a_thread(move || {
            enter(fd)?;
            Ok(body())
        })
        .map_err(|error| io::Error::new(error.kind(), format!("enter {}: {error}", self.label)))
    }

    /// Runs `body` inside; its own error and that of entering are one.
    pub fn try_run<R: Send>(&self, body: impl FnOnce() -> io::Result<R> + Send) -> io::Result<R> {
        self.run(body).and_then(|result| result)
    }

    /// Writes a sysctl (`net.ipv4.conf.all.forwarding`) of the namespace.
    pub fn sysctl(&self, key: &str, value: &str) -> io::Result<()> {
        let path = sysctl_path(key);
        self.try_run(|| fs::write(&path, value))
            .map_err(|error| self.explain(&format!("set {key}={value}"), &error))
    }

    /// Reads a sysctl of the namespace.
    pub fn read_sysctl(&self, key: &str) -> io::Result<String> {
        let path = sysctl_path(key);
        self.try_run(|| fs::read_to_string(&path))
            .map(|text| text.trim().to_owned())
            .map_err(|error| self.explain(&format!("read {key}"), &error))
    }

    /// Makes the namespace a router that knows no direction.
    pub fn route_packets(&self) -> io::Result<()> {
        self.sysctl("net.ipv4.conf.all.forwarding", "1")?;
        self.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        self.sysctl("net.ipv4.fib_multipath_hash_policy", "1")?;
        self.sysctl("net.ipv6.fib_multipath_hash_policy", "1")
    }

    fn explain(&self, what: &str, error: &io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("{what} in {}: {error}", self.label))
    }
}

fn sysctl_path(key: &str) -> String {
    format!("/proc/sys/{}", key.replace('.', "/"))
}

/// Moves the calling thread into the namespace. Async-signal-safe.
pub(crate) fn enter(fd: RawFd) -> io::Result<()> {
    // SAFETY: setns takes no pointers; a wrong descriptor is refused.
    check(unsafe { libc::setns(fd, libc::CLONE_NEWNET) })
}

pub(crate) fn check(status: libc::c_int) -> io::Result<()> {
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn on_a_thread<R: Send>(body: impl FnOnce() -> io::Result<R> + Send) -> io::Result<R> {
    std::thread::scope(|scope| {
        scope
            .spawn(body)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
