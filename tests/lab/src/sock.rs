//! UDP sockets that can be bound before their address exists, and that tell
//! the DSCP field of what they receive; TCP connections from a chosen port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

/// A datagram's length, where it came from and its DSCP field.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    pub length: usize,
    pub from: SocketAddr,
    pub dscp: u8,
}

/// A non-blocking socket bound to `local`, which need not be an address of
/// this namespace yet.
pub fn bind(local: SocketAddr) -> io::Result<UdpSocket> {
    let family = match local {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by socket and is owned by nobody.
    let socket = unsafe { UdpSocket::from_raw_fd(fd) };
    match local {
        SocketAddr::V4(_) => {
            set(&socket, libc::SOL_IP, libc::IP_FREEBIND, 1)?;
            set(&socket, libc::SOL_IP, libc::IP_RECVTOS, 1)?;
        }
        SocketAddr::V6(_) => {
            set(&socket, libc::SOL_IPV6, libc::IPV6_FREEBIND, 1)?;
            set(&socket, libc::SOL_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        }
    }
    let (storage, length) = to_raw(local);
    // SAFETY: `storage` is a live socket address of at least `length` bytes.
    crate::netns::check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const storage).cast(), length)
    })?;
    Ok(socket)
}

/// A TCP connection to `to` from the port `from`; connecting and each write may
/// take `patience`.
pub fn connect_tcp(from: u16, to: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    let (family, any) = match to {
        SocketAddr::V4(_) => (libc::AF_INET, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        SocketAddr::V6(_) => (libc::AF_INET6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
    };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by socket and is owned by nobody.
    let stream = unsafe { TcpStream::from_raw_fd(fd) };
    // It bounds connect, too (socket(7)).
    stream.set_write_timeout(Some(patience))?;
    set(&stream, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    let (local, length) = to_raw(SocketAddr::new(any, from));
    // SAFETY: `local` is a live socket address of at least `length` bytes.
    crate::netns::check(unsafe { libc::bind(fd, (&raw const local).cast(), length) })?;
    let (remote, length) = to_raw(to);
    // SAFETY: `remote` is a live socket address of at least `length` bytes.
    crate::netns::check(unsafe { libc::connect(fd, (&raw const remote).cast(), length) })?;
    Ok(stream)
}

/// Lets this process open as many descriptors as it may: a thousand flows are
/// more than the usual limit.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit writes, and setrlimit reads, the live `limit`.
    unsafe {
        crate::netns::check(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit))?;
        limit.rlim_cur = limit.rlim_max;
        crate::netns::check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit))
    }
}

/// Asks for a receive buffer of that many bytes; the kernel may give less.
pub fn set_receive_buffer(socket: &UdpSocket, bytes: i32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, bytes)
}

fn set(socket: &impl AsRawFd, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the option is read from `value`, whose size is given.
    crate::netns::check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    })
}

/// Receives one datagram; `WouldBlock` when there is none.
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Received> {
    // SAFETY: an all-zero sockaddr_storage is a valid value.
    let mut name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    // Aligned for the control messages' headers.
    let mut control = [0u64; 16];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: an all-zero msghdr is a valid, empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = size_of_val(&name) as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: all pointers in `message` refer to live buffers whose sizes are
    // given beside them.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    Ok(Received {
        length,
        from: from_raw(&name)?,
        dscp: traffic_class(&message) >> 2,
    })
}

fn traffic_class(message: &libc::msghdr) -> u8 {
    // SAFETY: `message` was filled by recvmsg; the macros stay within its
    // control buffer, which outlives the call.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            let (level, kind) = ((*header).cmsg_level, (*header).cmsg_type);
            if level == libc::IPPROTO_IP && kind == libc::IP_TOS {
                return *libc::CMSG_DATA(header);
            }
            if level == libc::IPPROTO_IPV6 && kind == libc::IPV6_TCLASS {
                return libc::CMSG_DATA(header).cast::<i32>().read_unaligned() as u8;
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    0
}

fn to_raw(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: an all-zero sockaddr_storage is a valid value.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let length = match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from(*v4.ip()).to_be(),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is large and aligned enough for any
            // socket address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(raw) };
            size_of_val(&raw)
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(raw) };
            size_of_val(&raw)
        }
    };
    (storage, length as libc::socklen_t)
}

fn from_raw(storage: &libc::sockaddr_storage) -> io::Result<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which address the storage holds.
            let raw = unsafe { (&raw const *storage).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
            Ok(SocketAddr::new(IpAddr::V4(ip), u16::from_be(raw.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says which address the storage holds.
            let raw = unsafe { (&raw const *storage).cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            Ok(SocketAddr::new(IpAddr::V6(ip), u16::from_be(raw.sin6_port)))
        }
        other => Err(io::Error::other(format!("address family {other}"))),
    }
}
