//! A unix socket that attaches descriptors to what it writes and keeps those
//! that arrive with what it reads, both beneath TLS.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// Device and inode of a file: how NSM names a passed descriptor.
pub type FileId = (u64, u64);

/// Descriptors taken with one read, and sent with one write, at most: grpcfd's.
const AT_ONCE: usize = 64;
/// Room for the control messages of [`AT_ONCE`] descriptors, in words.
const CONTROL_WORDS: usize = 64;

/// Device and inode behind a descriptor.
pub fn file_id(fd: OwnedFd) -> io::Result<(FileId, OwnedFd)> {
    let file = File::from(fd);
    let meta = file.metadata()?;
    Ok(((meta.dev(), meta.ino()), OwnedFd::from(file)))
}

/// `inode://<dev>/<ino>`.
pub fn inode_url(file: FileId) -> String {
    format!("inode://{}/{}", file.0, file.1)
}

/// Reads `inode://<dev>/<ino>`, both decimal; nothing else is accepted.
pub fn parse_inode_url(url: &str) -> Result<FileId, String> {
    let bad = || format!("URL {url:?} is not inode://<dev>/<ino>");
    let rest = url.strip_prefix("inode://").ok_or_else(bad)?;
    let (dev, ino) = rest.split_once('/').ok_or_else(bad)?;
    let number = |text: &str| {
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        text.parse::<u64>().map_err(|_| bad())
    };
    Ok((number(dev)?, number(ino)?))
}

/// Descriptors that wait to leave with the next bytes.
#[derive(Clone, Default)]
pub struct FdQueue(Arc<Mutex<VecDeque<OwnedFd>>>);

impl FdQueue {
    /// Queues a descriptor; it leaves before anything that is written later.
    pub fn attach(&self, fd: OwnedFd) {
        self.0.lock().push_back(fd);
    }

    fn pop(&self) -> Option<OwnedFd> {
        self.0.lock().pop_front()
    }

    fn put_back(&self, fd: OwnedFd) {
        self.0.lock().push_front(fd);
    }
}

/// The descriptors that one connection brought, kept until it ends.
#[derive(Default)]
pub struct FdTable {
    held: Mutex<Held>,
    changed: Condvar,
}

#[derive(Default)]
struct Held {
    files: BTreeMap<FileId, Arc<OwnedFd>>,
    closed: bool,
}

impl FdTable {
    /// The descriptor of `file`; waits for its arrival until `deadline`.
    pub fn wait(&self, file: FileId, deadline: Instant) -> Result<Arc<OwnedFd>, String> {
        let mut held = self.held.lock();
        loop {
            if let Some(fd) = held.files.get(&file) {
                return Ok(Arc::clone(fd));
            }
            let url = inode_url(file);
            if held.closed {
                return Err(format!("connection ended while waiting for {url}"));
            }
            if self.changed.wait_until(&mut held, deadline).timed_out() {
                return Err(format!("timeout in recvfd waiting for {url}"));
            }
        }
    }

    /// How many descriptors are held.
    pub fn count(&self) -> usize {
        self.held.lock().files.len()
    }

    fn add(&self, fd: OwnedFd) -> io::Result<()> {
        let (id, fd) = file_id(fd)?;
        // A second descriptor of the same file is closed, as grpcfd does.
        self.held
            .lock()
            .files
            .entry(id)
            .or_insert_with(|| Arc::new(fd));
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn close(&self) {
        let mut held = self.held.lock();
        held.closed = true;
        held.files.clear();
        drop(held);
        self.changed.notify_all();
    }
}

/// The socket that TLS runs on.
pub struct FdSocket {
    stream: UnixStream,
    queue: FdQueue,
    table: Arc<FdTable>,
}

impl FdSocket {
    pub fn new(stream: UnixStream, queue: FdQueue, table: Arc<FdTable>) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            queue,
            table,
        })
    }

    pub fn raw(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Read for FdSocket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let (count, fds) = receive(self.raw(), buf)?;
        for fd in fds {
            self.table.add(fd)?;
        }
        Ok(count)
    }
}

impl Write for FdSocket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < buf.len().min(AT_ONCE) {
            let Some(fd) = self.queue.pop() else { break };
            match send(self.raw(), &buf[sent..=sent], Some(&fd)) {
                Ok(count) => sent += count,
                Err(error) => {
                    self.queue.put_back(fd);
                    return if sent > 0 { Ok(sent) } else { Err(error) };
                }
            }
        }
        if sent == buf.len() {
            return Ok(sent);
        }
        match send(self.raw(), &buf[sent..], None) {
            Ok(count) => Ok(sent + count),
            Err(_) if sent > 0 => Ok(sent),
            Err(error) => Err(error),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn message(iov: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: msghdr is a C struct of integers and pointers, for which zero
    // is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message
}

fn receive(fd: RawFd, buf: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let mut message = message(&mut iov);
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = std::mem::size_of_val(&control);
    // SAFETY: `message` refers to `iov`, `buf` and `control`, all alive and of
    // the lengths that it says.
    let count = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut fds = Vec::new();
    // SAFETY: the kernel filled `control` with well-formed messages and set
    // their total length; the CMSG functions walk within it.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data: *const RawFd = libc::CMSG_DATA(header).cast();
                for n in 0..bytes / std::mem::size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(n).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok((count as usize, fds))
}

fn send(fd: RawFd, buf: &[u8], pass: Option<&OwnedFd>) -> io::Result<usize> {
    let mut control = [0u64; 4];
    let mut iov = libc::iovec {
        iov_base: buf.as_ptr().cast_mut().cast(),
        iov_len: buf.len(),
    };
    let mut message = message(&mut iov);
    if let Some(pass) = pass {
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: `control` has room for one descriptor (CMSG_SPACE(4) is 24
        // bytes), so the first header and its data lie within it.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(4) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
            let data: *mut RawFd = libc::CMSG_DATA(header).cast();
            data.write_unaligned(pass.as_raw_fd());
        }
    }
    // SAFETY: `message` refers to `iov`, `buf` and `control`, all alive.
    let count = unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(count as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use meridio_proxy::sync::clock;
    use std::time::Duration;

    #[test]
    fn inode_urls() {
        assert_eq!(parse_inode_url("inode://4/4026531833"), Ok((4, 4026531833)));
        for bad in [
            "inode://4",
            "inode://4/",
            "inode://4/5/",
            "inode://+4/5",
            "inode://0x4/5",
            "file:///proc/self/ns/net",
            "inode://4/99999999999999999999",
            "",
        ] {
            assert!(parse_inode_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn descriptors_ride_on_the_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let queue = FdQueue::default();
        let table = Arc::new(FdTable::default());
        let mut sender = FdSocket::new(a, queue.clone(), Arc::default()).unwrap();
        let mut receiver = FdSocket::new(b, FdQueue::default(), Arc::clone(&table)).unwrap();
        let mut want = Vec::new();
        for path in ["/proc/self/ns/net", "/dev/null", "/proc/self/ns/net"] {
            let (id, fd) = file_id(File::open(path).unwrap().into()).unwrap();
            want.push(id);
            queue.attach(fd);
        }
        assert_eq!(sender.write(b"hello").unwrap(), 5);
        let (mut got, mut buf) = (Vec::new(), [0; 16]);
        while got.len() < 5 {
            let count = receiver.read(&mut buf).unwrap();
            got.extend_from_slice(&buf[..count]);
        }
        assert_eq!(got, b"hello");
        let soon = clock::now() + Duration::from_millis(20);
        for id in &want {
            table.wait(*id, soon).unwrap();
        }
        assert_eq!(table.count(), 2, "the duplicate is closed");
        assert!(table.wait((1, 1), soon).unwrap_err().contains("timeout"));
        table.close();
        assert!(table.wait(want[0], soon).unwrap_err().contains("ended"));
    }
}
