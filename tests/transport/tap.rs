//! A relay in the middle of a unix connection that looks at descriptors: it
//! receives them beneath TLS as a peer would.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crossbeam_channel::{Receiver, Sender, bounded};
use meridio_proxy::sync::thread::{STACK_SMALL, ThreadHandle, Threads};

/// Which way something went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
}

/// A descriptor that went by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    pub way: Way,
    pub device: u64,
    pub inode: u64,
    /// Descriptors that came with the same read.
    pub together: usize,
}

/// Listens on one socket and connects to another, for one connection.
pub struct Tap {
    pub passed: Receiver<Passed>,
    ends: Receiver<UnixStream>,
    _threads: [ThreadHandle; 2],
}

impl Tap {
    pub fn start(threads: &Threads, from: &Path, to: &Path) -> Self {
        let listener = UnixListener::bind(from).unwrap();
        let to = to.to_owned();
        let (sender, passed) = bounded(1000);
        let (ends_sender, ends) = bounded(2);
        let (back_sender, back_streams) = bounded::<(UnixStream, UnixStream)>(1);
        let backwards = sender.clone();
        let there = threads
            .spawn("tap-there", STACK_SMALL, move |_| {
                let (client, _) = listener.accept().unwrap();
                let server = UnixStream::connect(to).unwrap();
                for end in [&client, &server] {
                    ends_sender.send(end.try_clone().unwrap()).unwrap();
                }
                let ends = (server.try_clone().unwrap(), client.try_clone().unwrap());
                back_sender.send(ends).unwrap();
                copy(&client, &server, Way::ToServer, &sender);
            })
            .unwrap();
        let back = threads
            .spawn("tap-back", STACK_SMALL, move |_| {
                if let Ok((server, client)) = back_streams.recv() {
                    copy(&server, &client, Way::ToClient, &backwards);
                }
            })
            .unwrap();
        Self {
            passed,
            ends,
            _threads: [there, back],
        }
    }
}

impl Tap {
    /// Cuts the connection, as the death of the peer does.
    pub fn cut(&self) {
        for end in self.ends.try_iter() {
            let _ = end.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Device and inode of a file.
pub fn file(path: &str) -> (u64, u64) {
    let meta = std::fs::metadata(path).unwrap();
    (meta.dev(), meta.ino())
}

fn copy(from: &UnixStream, to: &UnixStream, way: Way, passed: &Sender<Passed>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let (count, fds) = match receive(from, &mut buffer) {
            Ok((0, _)) | Err(_) => {
                let _ = to.shutdown(std::net::Shutdown::Write);
                return;
            }
            Ok(found) => found,
        };
        for fd in &fds {
            let meta = std::fs::File::from(fd.try_clone().unwrap())
                .metadata()
                .unwrap();
            passed
                .send(Passed {
                    way,
                    device: meta.dev(),
                    inode: meta.ino(),
                    together: fds.len(),
                })
                .unwrap();
        }
        if (&mut &*to).write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

fn receive(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let mut control = [0u64; 64];
    // SAFETY: all zeroes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = std::mem::size_of_val(&control);
    // SAFETY: `message` points to `buffer` and `control`, both alive and as
    // long as it says.
    let count =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled `control` with whole control messages, over
    // which these macros walk; each descriptor in them is new and ours.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<i32>();
                for index in 0..bytes / 4 {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok((count, fds))
}
