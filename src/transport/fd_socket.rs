//! The socket beneath TLS: it attaches queued descriptors to the bytes that it
//! writes, in the way that NSM's peers expect (grpcfd, `connwrap.go`): each
//! descriptor rides alone on one byte.
//!
//! One of the few files with `unsafe`: one sendmsg(2).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;

/// Descriptors that may wait on one connection. NSM sends one or two a call.
const QUEUE_MAX: usize = 256;
/// Descriptors that leave with one write, as in grpcfd.
const PER_WRITE: usize = 64;

/// A connected, non-blocking socket.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => (&mut &*socket).write(bytes),
            Self::Tcp(socket) => (&mut &*socket).write(bytes),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }
}

/// The descriptors that wait for the next bytes of a connection.
#[derive(Debug, Clone)]
pub(super) struct FdQueue(Arc<Mutex<Queue>>);

#[derive(Debug)]
struct Queue {
    open: bool,
    fds: VecDeque<OwnedFd>,
}

impl FdQueue {
    fn new(open: bool) -> Self {
        Self(Arc::new(Mutex::new(Queue {
            open,
            fds: VecDeque::new(),
        })))
    }

    /// False when the queue is full. On a connection that cannot pass
    /// descriptors, or has ended, the descriptor is closed and nobody misses
    /// it: peers look for it only where it can arrive.
    pub(super) fn push(&self, fd: OwnedFd) -> bool {
        let mut queue = self.0.lock();
        if !queue.open {
            return true;
        }
        if queue.fds.len() >= QUEUE_MAX {
            return false;
        }
        queue.fds.push_back(fd);
        true
    }

    fn pop(&self) -> Option<OwnedFd> {
        self.0.lock().fds.pop_front()
    }

    fn put_back(&self, fd: OwnedFd) {
        self.0.lock().fds.push_front(fd);
    }

    /// Closes what waits and whatever comes.
    fn close(&self) {
        let waiting = {
            let mut queue = self.0.lock();
            queue.open = false;
            std::mem::take(&mut queue.fds)
        };
        drop(waiting);
    }
}

/// The stream that OpenSSL reads from and writes to.
#[derive(Debug)]
pub(super) struct FdSocket {
    socket: Socket,
    queue: FdQueue,
}

impl FdSocket {
    pub(super) fn new(socket: Socket) -> Self {
        let queue = FdQueue::new(matches!(socket, Socket::Unix(_)));
        Self { socket, queue }
    }

    pub(super) fn queue(&self) -> &FdQueue {
        &self.queue
    }

    pub(super) fn raw(&self) -> RawFd {
        self.socket.as_fd().as_raw_fd()
    }

    /// Tells the peer that nothing more will come.
    pub(super) fn end_writing(&self) {
        // An error means that the peer has gone, which is what comes next.
        let _ = match &self.socket {
            Socket::Unix(socket) => socket.shutdown(Shutdown::Write),
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Write),
        };
    }
}

impl Drop for FdSocket {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl Read for FdSocket {
    /// A plain read: descriptors that the peer attaches are dropped by the
    /// kernel, as Meridio's proxy has no use for them.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        retry(|| match &mut self.socket {
            Socket::Unix(socket) => socket.read(buffer),
            Socket::Tcp(socket) => socket.read(buffer),
        })
    }
}

impl Write for FdSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len().min(PER_WRITE) {
            let Some(fd) = self.queue.pop() else { break };
            let attached = retry(|| send_attached(self.socket.as_fd(), bytes[sent], fd.as_fd()));
            match attached {
                Ok(()) => sent += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.put_back(fd);
                    return if sent > 0 { Ok(sent) } else { Err(error) };
                }
                Err(error) => return Err(error),
            }
        }
        if sent == bytes.len() {
            return Ok(sent);
        }
        match retry(|| self.socket.send(&bytes[sent..])) {
            Ok(more) => Ok(sent + more),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && sent > 0 => Ok(sent),
            Err(error) => Err(error),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Repeats an operation that a signal interrupted.
fn retry<T>(mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Bytes of a descriptor in a control message.
const FD_BYTES: u32 = 4;

/// Sends one byte with one descriptor.
fn send_attached(socket: BorrowedFd<'_>, byte: u8, fd: BorrowedFd<'_>) -> io::Result<()> {
    let payload = [byte];
    let mut part = libc::iovec {
        iov_base: payload.as_ptr().cast_mut().cast(),
        iov_len: payload.len(),
    };
    // Eight-byte units, for the alignment of a control message's header.
    let mut control = [0u64; 4];
    // SAFETY: CMSG_SPACE only computes.
    let space = unsafe { libc::CMSG_SPACE(FD_BYTES) };
    let space = usize::try_from(space).unwrap_or(usize::MAX);
    debug_assert!(space <= std::mem::size_of_val(&control));
    // SAFETY: all zeroes are a valid msghdr: null pointers with length zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space;
    // SAFETY: `message` points to `control`, which is aligned and has room for
    // `space` bytes, so the first header exists and its data has room for one
    // descriptor. sendmsg reads `payload` and `control`, both alive until it
    // returns.
    let sent = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = usize::try_from(libc::CMSG_LEN(FD_BYTES)).unwrap_or(usize::MAX);
        libc::CMSG_DATA(header)
            .cast::<RawFd>()
            .write_unaligned(fd.as_raw_fd());
        libc::sendmsg(
            socket.as_raw_fd(),
            &raw const message,
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        )
    };
    match sent {
        1 => Ok(()),
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A descriptor, and what tells that it is closed.
    fn watched() -> (UnixStream, OwnedFd) {
        let (witness, fd) = UnixStream::pair().unwrap();
        witness.set_nonblocking(true).unwrap();
        (witness, fd.into())
    }

    fn is_closed(mut witness: UnixStream) -> bool {
        witness.read(&mut [0]).is_ok_and(|count| count == 0)
    }

    #[test]
    fn what_waits_is_bounded_and_closed_with_the_connection() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        let socket = FdSocket::new(Socket::Unix(socket));
        let queue = socket.queue().clone();
        let waiting: Vec<_> = (0..QUEUE_MAX)
            .map(|number| {
                let (witness, fd) = watched();
                assert!(queue.push(fd), "{number}");
                witness
            })
            .collect();
        // One more is refused, and not kept.
        let (witness, fd) = watched();
        assert!(!queue.push(fd));
        assert!(is_closed(witness));
        drop(socket);
        assert!(waiting.into_iter().all(is_closed));
        // What comes after the end is no fault, and not kept either.
        let (witness, fd) = watched();
        assert!(queue.push(fd));
        assert!(is_closed(witness));
    }
}
