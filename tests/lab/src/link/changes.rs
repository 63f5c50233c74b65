//! Waiting for the kernel's state to become something, without polling it.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use meridio_proxy::sync::clock;
use meridio_proxy::sync::poll::{self, Interest};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use crate::netns::Netns;

/// Links, addresses, routes and rules of both families (`enum
/// rtnetlink_groups` of the kernel's uapi header).
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

/// Asks `is_so` at first and after each change of the namespace's links,
/// addresses, routes or rules, until it says yes; false when that did not
/// happen within `limit`.
pub fn wait_until(
    netns: &Netns,
    limit: Duration,
    mut is_so: impl FnMut() -> io::Result<bool>,
) -> io::Result<bool> {
    let deadline = clock::now() + limit;
    let mut socket = netns.try_run(|| Socket::new(NETLINK_ROUTE))?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    let readable = Interest {
        fd: socket.as_raw_fd(),
        read: true,
        write: false,
    };
    loop {
        if is_so()? {
            return Ok(true);
        }
        if clock::now() >= deadline {
            return Ok(false);
        }
        poll::wait(&[readable], Some(deadline))?;
        // What changed, or how much was missed, does not matter: the question
        // is asked again in any case.
        while !matches!(socket.recv_from_full(), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
        {
        }
    }
}
