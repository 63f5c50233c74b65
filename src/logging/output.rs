//! The queue of lines, the thread that empties it, and writing that cannot
//! take for ever.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded, select};
use serde_json::Map;

use super::{Count, entry};
use crate::sync::clock;
use crate::sync::poll::{self, Interest};
use crate::sync::stop::Stop;

/// Lines that may wait for the thread `log`.
const BOUND: usize = 4096;
/// `PIPE_BUF` of Linux: a pipe that poll(2) calls writable takes this much
/// without blocking.
const CHUNK: usize = 4096;

/// What the thread `log` takes.
pub(super) enum Item {
    /// A line, with its line feed.
    Line(Vec<u8>),
    /// Dropped when all before it is written, which its receiver sees.
    Flush(Sender<Infallible>),
}

/// The queue's sending end, as the formatter's sink: each write is a line.
#[derive(Clone)]
pub(super) struct Queue {
    lines: Sender<Item>,
    dropped: Count,
}

/// A queue, and its receiving end.
pub(super) fn queue() -> (Queue, Receiver<Item>) {
    let (lines, receiver) = bounded(BOUND);
    let dropped = Count::default();
    (Queue { lines, dropped }, receiver)
}

impl Queue {
    /// How many lines were dropped since somebody last took the number.
    pub(super) fn dropped(&self) -> Count {
        Arc::clone(&self.dropped)
    }

    /// Puts `line` last and waits until all is written; false when that was
    /// not done by `deadline`.
    pub(super) fn write_through(&self, line: Vec<u8>, deadline: Instant) -> bool {
        let (tx, written) = bounded(0);
        [Item::Line(line), Item::Flush(tx)]
            .into_iter()
            .all(|item| self.lines.send_deadline(item, deadline).is_ok())
            && written.recv_deadline(deadline) == Err(RecvTimeoutError::Disconnected)
    }
}

impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Err(TrySendError::Full(_)) = self.lines.try_send(Item::Line(line.to_vec())) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where lines go, without standard output's lock: the panic hook must be able
/// to write while the thread `log` is at it.
#[derive(Clone)]
pub(super) struct Output(Arc<File>);

impl Output {
    pub(super) fn stdout() -> io::Result<Self> {
        let fd = io::stdout().as_fd().try_clone_to_owned()?;
        Ok(Self(Arc::new(File::from(fd))))
    }

    #[cfg(test)]
    pub(super) fn to(file: File) -> Self {
        Self(Arc::new(file))
    }

    /// Writes all of `bytes`, waiting for the reader until `deadline`.
    pub(super) fn write(&self, bytes: &[u8], deadline: Option<Instant>) -> io::Result<()> {
        let interest = Interest {
            fd: self.0.as_raw_fd(),
            read: false,
            write: true,
        };
        let mut rest = bytes;
        while !rest.is_empty() {
            let ready = poll::wait(&[interest], deadline)?;
            if !ready.iter().any(|ready| ready.write || ready.hangup) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let chunk = &rest[..rest.len().min(CHUNK)];
            match (&*self.0).write(chunk) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The thread `log`: writes lines until stopped, then what is left.
pub(super) fn run(output: &Output, lines: &Receiver<Item>, dropped: &Count, stop: &Stop) {
    let take = |item| match item {
        Item::Line(line) => write(output, &line, dropped),
        Item::Flush(written) => drop(written),
    };
    loop {
        select! {
            recv(lines) -> item => match item {
                Ok(item) => take(item),
                Err(_) => return,
            },
            recv(stop.receiver()) -> _ => break,
        }
    }
    lines.try_iter().for_each(take);
}

fn write(output: &Output, line: &[u8], dropped: &Count) {
    // Where standard output cannot be written, there is nowhere to say so.
    let _ = output.write(line, None);
    let count = dropped.swap(0, Ordering::Relaxed);
    if count > 0 {
        let mut extra = Map::new();
        extra.insert("dropped".to_owned(), count.into());
        let message = "Log lines dropped: standard output is not read fast enough";
        let line = entry("warning", clock::wall(), message.to_owned(), extra);
        let _ = output.write(&line, None);
    }
}
