//! What a verified peer may send in calls on one connection (RFC 9113).
//!
//! gRPC's C core buffers a message to its end before it compares its size with
//! the limit, heeds the limit of concurrent streams only once the peer has
//! acknowledged it, and, when the memory that all connections share runs out,
//! ends calls of whichever peer (1.56: `message_size_filter.cc`,
//! `chttp2/transport/parsing.cc`, `resource_quota/memory_quota.cc`). So one peer
//! could starve the others; what goes beyond is found here, before it reaches
//! the C core.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use super::frames::{Frame, Frames};
use crate::rpc::env::{REQUEST_MAX, STREAMS_MAX, UNFINISHED_MAX};

/// The preface of a connection, before its first frame.
const PREFACE: usize = 24;
const TYPE_DATA: u8 = 0;
const TYPE_HEADERS: u8 = 1;
const TYPE_RST_STREAM: u8 = 3;
const FLAG_END_STREAM: u8 = 1;
/// Payload of all DATA of a call: one message and its prefix. What is a little
/// longer gRPC refuses in better words.
const CALL_MAX: usize = 2 * REQUEST_MAX;

/// What a peer did beyond its allowance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Excess {
    /// The request of one call is too long.
    Bytes,
    /// All requests that are not complete are too long together.
    Sum,
    /// Too many calls wait for the rest of their request.
    Calls,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes => write!(f, "a call with more than {CALL_MAX} bytes"),
            Self::Sum => write!(
                f,
                "more than {UNFINISHED_MAX} bytes in calls without their end"
            ),
            Self::Calls => write!(f, "more than {STREAMS_MAX} calls without their end"),
        }
    }
}

/// Walks over the frames that a client sends on one connection.
#[derive(Debug)]
pub(super) struct Allowance {
    peer: String,
    frames: Frames,
    /// The bytes of DATA of each call whose end has not come.
    unfinished: BTreeMap<u32, usize>,
    /// Their sum.
    held: usize,
    /// Since when there has been a call without its end.
    since: Option<Instant>,
}

impl Allowance {
    /// For a new connection of `peer`, which only the log uses.
    pub(super) fn new(peer: &str) -> Self {
        Self {
            peer: peer.to_owned(),
            frames: Frames::after(PREFACE),
            unfinished: BTreeMap::new(),
            held: 0,
            since: None,
        }
    }

    /// How many calls have no end yet, and since when there have been some.
    pub(super) fn unfinished(&self) -> (usize, Option<Instant>) {
        (self.unfinished.len(), self.since)
    }

    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    ///
    /// When the peer goes beyond what it may; then the connection shall end.
    pub(super) fn scan(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), Excess> {
        while let Some(frame) = self.frames.next(&mut bytes) {
            self.take(frame)?;
            if self.unfinished.is_empty() {
                self.since = None;
            } else {
                self.since.get_or_insert(now);
            }
        }
        Ok(())
    }

    fn take(&mut self, frame: Frame) -> Result<(), Excess> {
        let id = frame.stream;
        match frame.kind {
            TYPE_HEADERS => {
                self.unfinished.entry(id).or_default();
            }
            TYPE_DATA => {
                let sent = self.unfinished.entry(id).or_default();
                *sent += frame.length;
                self.held += frame.length;
                if *sent > CALL_MAX {
                    return Err(Excess::Bytes);
                }
                if self.held > UNFINISHED_MAX {
                    return Err(Excess::Sum);
                }
            }
            TYPE_RST_STREAM => {}
            _ => return Ok(()),
        }
        if frame.kind == TYPE_RST_STREAM || frame.flags & FLAG_END_STREAM != 0 {
            self.held -= self.unfinished.remove(&id).unwrap_or_default();
        }
        if self.unfinished.len() > STREAMS_MAX {
            return Err(Excess::Calls);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::clock;

    const END: u8 = FLAG_END_STREAM;

    fn frame(kind: u8, flags: u8, id: u32, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut bytes = length[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(id.to_be_bytes());
        bytes.extend(vec![0; payload]);
        bytes
    }

    /// A call with so many bytes of DATA in each frame.
    fn call(id: u32, sizes: &[usize]) -> Vec<Vec<u8>> {
        let mut frames = vec![frame(TYPE_HEADERS, 4, id, 60)];
        frames.extend(sizes.iter().map(|size| frame(TYPE_DATA, 0, id, *size)));
        frames
    }

    /// What comes of these frames, however the bytes are cut.
    fn scan(frames: &[Vec<u8>]) -> Result<(), Excess> {
        let now = clock::now();
        let mut bytes = vec![b'P'; PREFACE];
        bytes.extend(frames.concat());
        let results = [1, 8, 9, 10, 1000, bytes.len()].map(|size| {
            let mut allowance = Allowance::new("spiffe://td/a");
            bytes
                .chunks(size)
                .try_for_each(|piece| allowance.scan(piece, now))
        });
        assert!(results.iter().all(|result| *result == results[0]));
        results[0]
    }

    #[test]
    fn a_call_is_bounded() {
        let half = CALL_MAX / 2;
        let good = [call(1, &[half, half]), call(3, &[half, half])].concat();
        assert_eq!(scan(&good), Ok(()));
        assert_eq!(scan(&call(1, &[half, half, 1])), Err(Excess::Bytes));
        // The reserved bit makes it no other call.
        let bit = [call(1, &[half]), call((1 << 31) | 1, &[half + 1])].concat();
        assert_eq!(scan(&bit), Err(Excess::Bytes));
    }

    #[test]
    fn all_unfinished_calls_are_bounded_together() {
        let piece = UNFINISHED_MAX / 4;
        let begun = |id| call(id, &[piece]);
        let full = [begun(1), begun(3), begun(5), begun(7)].concat();
        assert_eq!(scan(&full), Ok(()));
        assert_eq!(
            scan(&[full.clone(), call(9, &[1])].concat()),
            Err(Excess::Sum)
        );
        for end in [frame(TYPE_DATA, END, 3, 0), frame(TYPE_RST_STREAM, 0, 3, 4)] {
            let freed = [full.clone(), vec![end], begun(9)].concat();
            assert_eq!(scan(&freed), Ok(()));
            assert_eq!(scan(&[freed, call(11, &[1])].concat()), Err(Excess::Sum));
        }
    }

    #[test]
    fn unfinished_calls_are_bounded() {
        let ids = || (0..=u32::try_from(STREAMS_MAX).unwrap()).map(|n| 2 * n + 1);
        let open: Vec<_> = ids().map(|id| frame(TYPE_HEADERS, 4, id, 60)).collect();
        assert_eq!(scan(&open), Err(Excess::Calls));
        assert_eq!(scan(&open[1..]), Ok(()));
        for end in [
            frame(TYPE_DATA, END, 1, 10),
            frame(TYPE_HEADERS, END, 1, 0),
            frame(TYPE_RST_STREAM, 0, 1, 4),
        ] {
            let mut ended = open.clone();
            ended.insert(1, end);
            assert_eq!(scan(&ended), Ok(()));
        }
        let whole: Vec<_> = ids()
            .flat_map(|id| [frame(TYPE_HEADERS, 4, id, 60), frame(TYPE_DATA, END, id, 9)])
            .collect();
        assert_eq!(scan(&[whole.clone(), whole].concat()), Ok(()));
    }
}
