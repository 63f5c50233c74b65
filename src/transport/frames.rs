//! As much of HTTP/2 as the relay looks at: the headers of the frames that a
//! server sends (RFC 9113, 4.1). The first SETTINGS tells that the server has
//! accepted our certificate; a GOAWAY that it takes no new calls.

const HEADER: usize = 9;
const TYPE_SETTINGS: u8 = 4;
const TYPE_GOAWAY: u8 = 7;
const FLAG_ACK: u8 = 1;

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

/// Walks over the frames of one direction of one connection.
#[derive(Debug)]
pub(super) struct Walker {
    header: [u8; HEADER],
    /// Bytes of the header that are there.
    have: usize,
    /// Bytes of the payload still to be skipped.
    skip: usize,
    seen: Seen,
}

impl Walker {
    pub(super) fn new() -> Self {
        Self {
            header: [0; HEADER],
            have: 0,
            skip: 0,
            seen: Seen::Nothing,
        }
    }

    /// The furthest that was seen so far.
    pub(super) fn seen(&self) -> Seen {
        self.seen
    }

    /// Takes the next bytes; returns the furthest that was seen so far.
    pub(super) fn scan(&mut self, mut bytes: &[u8]) -> Seen {
        while !bytes.is_empty() && self.seen < Seen::GoAway {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let take = (HEADER - self.have).min(bytes.len());
            self.header[self.have..self.have + take].copy_from_slice(&bytes[..take]);
            self.have += take;
            bytes = &bytes[take..];
            if self.have == HEADER {
                self.frame();
            }
        }
        self.seen
    }

    fn frame(&mut self) {
        let [high, middle, low, kind, flags, ..] = self.header;
        self.have = 0;
        self.skip = (usize::from(high) << 16) | (usize::from(middle) << 8) | usize::from(low);
        self.seen = match (self.seen, kind) {
            (Seen::Nothing, TYPE_SETTINGS) if flags & FLAG_ACK == 0 => Seen::Settings,
            (Seen::Nothing, _) => Seen::Other,
            (_, TYPE_GOAWAY) => Seen::GoAway,
            (seen, _) => seen,
        };
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
