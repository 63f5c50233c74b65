//! Bytes between a TLS session and gRPC's end of a socket pair.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use meridio_proxy::sync::poll::{self, Interest};
use openssl::ssl::{Error, ErrorCode, SslStream};

use super::socket::FdSocket;
use crate::nsmgr::parts::Gate;

const CHUNK: usize = 16 * 1024;

/// Bytes on their way in one direction.
struct Lane {
    buf: Box<[u8]>,
    from: usize,
    to: usize,
    /// The source has ended.
    ended: bool,
}

impl Lane {
    fn new() -> Self {
        Self {
            buf: vec![0; CHUNK].into_boxed_slice(),
            from: 0,
            to: 0,
            ended: false,
        }
    }

    fn is_empty(&self) -> bool {
        self.from == self.to
    }
}

/// What one attempt to move bytes came to.
enum Moved {
    Some,
    /// Nothing now; the socket has to become readable.
    WantRead,
    /// Nothing now; the socket has to become writable.
    WantWrite,
    /// End of stream.
    End,
}

/// Relays until one side ends; returns why. Stands still while `gate` is shut.
pub fn run(mut tls: SslStream<FdSocket>, mut local: UnixStream, gate: &Gate) -> String {
    let (mut inward, mut outward) = (Lane::new(), Lane::new());
    let raw = tls.get_ref().raw();
    loop {
        gate.open();
        let mut tls_interest = interest(raw);
        let mut local_interest = interest(local.as_raw_fd());
        let mut progress = false;
        if inward.is_empty() && !inward.ended {
            let result = from_tls(tls.ssl_read(&mut inward.buf), &mut inward);
            match note(result, &mut tls_interest, &mut inward.ended) {
                Ok(moved) => progress |= moved,
                Err(error) => return format!("TLS read: {error}"),
            }
        }
        if !inward.is_empty() {
            match step(local.write(&inward.buf[inward.from..inward.to])) {
                Ok(Some(count)) => {
                    inward.from += count;
                    progress = true;
                }
                Ok(None) => local_interest.write = true,
                Err(error) => return format!("gRPC closed its end: {error}"),
            }
        } else if inward.ended {
            return "the peer ended the connection".to_owned();
        }
        if outward.is_empty() && !outward.ended {
            match step(local.read(&mut outward.buf)) {
                Ok(Some(0)) => outward.ended = true,
                Ok(Some(count)) => {
                    (outward.from, outward.to) = (0, count);
                    progress = true;
                }
                Ok(None) => local_interest.read = true,
                Err(error) => return format!("reading from gRPC: {error}"),
            }
        }
        if !outward.is_empty() {
            let result = tls.ssl_write(&outward.buf[outward.from..outward.to]);
            let result = to_tls(result, &mut outward);
            let mut ended = false;
            match note(result, &mut tls_interest, &mut ended) {
                Ok(moved) => progress |= moved,
                Err(error) => return format!("TLS write: {error}"),
            }
        } else if outward.ended {
            let _ = tls.shutdown();
            return "gRPC ended the connection".to_owned();
        }
        if !progress
            && let Err(error) = poll::wait(&[quiet(tls_interest), quiet(local_interest)], None)
        {
            return format!("poll: {error}");
        }
    }
}

fn interest(fd: i32) -> Interest {
    Interest {
        fd,
        read: false,
        write: false,
    }
}

/// poll(2) reports a hang-up even where nothing is waited for, and would spin;
/// it passes over a negative descriptor.
fn quiet(mut interest: Interest) -> Interest {
    if !interest.read && !interest.write {
        interest.fd = -1;
    }
    interest
}

fn from_tls(result: Result<usize, Error>, lane: &mut Lane) -> Result<Moved, Error> {
    match result {
        Ok(count) => {
            (lane.from, lane.to) = (0, count);
            Ok(Moved::Some)
        }
        Err(error) => wants(error),
    }
}

fn to_tls(result: Result<usize, Error>, lane: &mut Lane) -> Result<Moved, Error> {
    match result {
        Ok(count) => {
            lane.from += count;
            Ok(Moved::Some)
        }
        Err(error) => wants(error),
    }
}

fn wants(error: Error) -> Result<Moved, Error> {
    match error.code() {
        ErrorCode::WANT_READ => Ok(Moved::WantRead),
        ErrorCode::WANT_WRITE => Ok(Moved::WantWrite),
        ErrorCode::ZERO_RETURN => Ok(Moved::End),
        // A peer that goes away without close_notify.
        ErrorCode::SYSCALL if error.io_error().is_none() => Ok(Moved::End),
        _ => Err(error),
    }
}

fn note(
    moved: Result<Moved, Error>,
    interest: &mut Interest,
    ended: &mut bool,
) -> Result<bool, Error> {
    match moved? {
        Moved::Some => return Ok(true),
        Moved::WantRead => interest.read = true,
        Moved::WantWrite => interest.write = true,
        Moved::End => {
            *ended = true;
            return Ok(true);
        }
    }
    Ok(false)
}

fn step(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
