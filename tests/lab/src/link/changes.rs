//! Waiting for the kernel's state to become something, without polling it.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use meridio_proxy::sync::clock;
use meridio_proxy::sync::poll::{self, Interest};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use super::Rtnl;
use crate::netns::Netns;

/// Links, addresses, routes and rules of both families (`enum
/// rtnetlink_groups` of the kernel's uapi header).
pub(super) const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

/// How long the kernel may take to have a link ready.
const LINK_LIMIT: Duration = Duration::from_secs(10);

/// Waits until the link carries what is sent over it.
pub fn wait_running(netns: &Netns, rtnl: &Rtnl, name: &str) -> io::Result<()> {
    wait_link(netns, name, || {
        Ok(rtnl.find(name)?.is_some_and(|link| link.running))
    })
}

/// Waits until packets can be forwarded over the link: it is running and has
/// its link-local address, which IPv6 asks for neighbours with. A question that
/// is put before that is lost, and the next one follows a second later.
pub fn wait_ready(netns: &Netns, rtnl: &Rtnl, name: &str) -> io::Result<()> {
    wait_link(netns, name, || {
        let Some(link) = rtnl.find(name)?.filter(|link| link.running) else {
            return Ok(false);
        };
        let addresses = rtnl.addresses()?;
        Ok(addresses.iter().any(|address| {
            address.index == link.index
                && !address.tentative
                && matches!(address.network.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local())
        }))
    })
}

fn wait_link(netns: &Netns, name: &str, is_so: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    if wait_until(netns, LINK_LIMIT, is_so)? {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!(
            "link {name} in {}: not ready after {LINK_LIMIT:?}",
            netns.label()
        ),
    ))
}

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
