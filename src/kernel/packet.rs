//! A packet socket that only sends: announcements have no other way out, since
//! they are made in a target's name.
//!
//! One of the few files with `unsafe`: netlink-sys has no packet sockets.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::core::ids::IfIndex;

/// Where an Ethernet header ends.
const HEADER: usize = 14;

/// Sends whole Ethernet frames. Used by the thread `net` alone.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens it. With protocol 0 it receives nothing.
    ///
    /// # Errors
    ///
    /// EPERM without CAP_NET_RAW, EAFNOSUPPORT where the kernel has no packet
    /// sockets.
    pub fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends a frame out of an interface; a full queue is an error, not a
    /// wait.
    ///
    /// # Errors
    ///
    /// What sendto(2) says, and that the frame has no header.
    pub fn send(&self, link: IfIndex, frame: &[u8]) -> io::Result<()> {
        let [_, _, _, _, _, _, _, _, _, _, _, _, high, low] = *frame
            .first_chunk::<HEADER>()
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: an all-zero sockaddr_ll is a valid value of the plain struct.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = u16::try_from(libc::AF_PACKET).unwrap_or_default();
        // In network order, as in the frame.
        to.sll_protocol = u16::from_ne_bytes([high, low]);
        to.sll_ifindex = i32::try_from(link.get()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: frame and address are live for the call, and their sizes are
        // passed with them; the descriptor is owned.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                libc::socklen_t::try_from(size_of_val(&to)).unwrap_or_default(),
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
