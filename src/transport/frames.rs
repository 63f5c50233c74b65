//! As much of HTTP/2 as the relay looks at: the headers of frames (RFC 9113,
//! 4.1). Of what a server sends, the first SETTINGS tells that it has accepted
//! our certificate, and a GOAWAY that it takes no new calls.

const HEADER: usize = 9;
const TYPE_SETTINGS: u8 = 4;
const TYPE_GOAWAY: u8 = 7;
const FLAG_ACK: u8 = 1;

/// The header of a frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    /// Bytes of its payload.
    pub length: usize,
    pub kind: u8,
    pub flags: u8,
    /// The call that it belongs to; 0 for the connection.
    pub stream: u32,
}

/// Finds the headers of frames in bytes that come in pieces.
#[derive(Debug)]
pub(super) struct Frames {
    header: [u8; HEADER],
    /// Bytes of the header that are there.
    have: usize,
    /// Bytes still to be skipped.
    skip: usize,
}

impl Frames {
    /// The first frame comes after `preface` bytes.
    pub(super) fn after(preface: usize) -> Self {
        Self {
            header: [0; HEADER],
            have: 0,
            skip: preface,
        }
    }

    /// Takes of `bytes` what comes before the end of the next header; `None`
    /// when that is all of them.
    pub(super) fn next(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        let rest = &bytes[skipped..];
        let take = (HEADER - self.have).min(rest.len());
        self.header[self.have..self.have + take].copy_from_slice(&rest[..take]);
        self.have += take;
        *bytes = &rest[take..];
        if self.have < HEADER {
            return None;
        }
        let [high, middle, low, kind, flags, stream @ ..] = self.header;
        let length = (usize::from(high) << 16) | (usize::from(middle) << 8) | usize::from(low);
        self.have = 0;
        self.skip = length;
        Some(Frame {
            length,
            kind,
            flags,
            // The first bit is reserved.
            stream: u32::from_be_bytes(stream) & (u32::MAX >> 1),
        })
    }
}

/// What the bytes seen so far amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Seen {
    /// No whole frame yet.
    Nothing,
    /// The server's SETTINGS: calls are welcome.
    Settings,
    /// GOAWAY: running calls may end, new ones are not taken.
    GoAway,
    /// The first frame is no SETTINGS, so this is no HTTP/2.
    Other,
}

/// Walks over the frames that a server sends on one connection.
#[derive(Debug)]
pub(super) struct Walker {
    frames: Frames,
    seen: Seen,
}

impl Walker {
    pub(super) fn new() -> Self {
        Self {
            frames: Frames::after(0),
            seen: Seen::Nothing,
        }
    }

    /// The furthest that was seen so far.
    pub(super) fn seen(&self) -> Seen {
        self.seen
    }

    /// Takes the next bytes; returns the furthest that was seen so far.
    pub(super) fn scan(&mut self, mut bytes: &[u8]) -> Seen {
        while self.seen < Seen::GoAway
            && let Some(frame) = self.frames.next(&mut bytes)
        {
            self.seen = match (self.seen, frame.kind) {
                (Seen::Nothing, TYPE_SETTINGS) if frame.flags & FLAG_ACK == 0 => Seen::Settings,
                (Seen::Nothing, _) => Seen::Other,
                (_, TYPE_GOAWAY) => Seen::GoAway,
                (seen, _) => seen,
            };
        }
        self.seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut bytes = length[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, 0]);
        bytes.extend(vec![7; payload]);
        bytes
    }

    #[test]
    fn sees_settings_and_goaway_however_the_bytes_are_cut() {
        let mut bytes = frame(TYPE_SETTINGS, 0, 18);
        bytes.extend(frame(TYPE_SETTINGS, FLAG_ACK, 0));
        bytes.extend(frame(0, 0, 70_000));
        let before = bytes.len();
        bytes.extend(frame(TYPE_GOAWAY, 0, 8));
        for size in [1, 2, 8, 9, 10, 1000, bytes.len()] {
            let mut walker = Walker::new();
            let mut at = 0;
            for piece in bytes.chunks(size) {
                let seen = walker.scan(piece);
                at += piece.len();
                let expected = match at {
                    at if at < HEADER => Seen::Nothing,
                    at if at < before + HEADER => Seen::Settings,
                    _ => Seen::GoAway,
                };
                assert_eq!(seen, expected, "{at} bytes in pieces of {size}");
            }
        }
    }

    #[test]
    fn sees_what_is_no_http2() {
        assert_eq!(Walker::new().scan(b"HTTP/1.1 400 Bad Request"), Seen::Other);
        assert_eq!(
            Walker::new().scan(&frame(TYPE_SETTINGS, FLAG_ACK, 0)),
            Seen::Other
        );
        assert_eq!(Walker::new().scan(&frame(TYPE_GOAWAY, 0, 8)), Seen::Other);
    }
}
