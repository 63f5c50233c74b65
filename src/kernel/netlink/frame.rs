//! The frame around netlink messages: cutting datagrams into messages, and
//! reading what the kernel answers. Pure; every byte is checked, since a
//! mistake here must not end a thread.

use netlink_packet_core::NlasIterator;

/// linux/netlink.h: `struct nlmsghdr`.
pub const HEADER: usize = 16;
/// linux/netlink.h: `NLMSG_NOOP`.
const NOOP: u16 = 1;
/// linux/netlink.h: `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// linux/netlink.h: `NLMSG_DONE`.
const DONE: u16 = 3;
/// linux/netlink.h: `NLMSG_OVERRUN`.
const OVERRUN: u16 = 4;
/// linux/netlink.h: `NLM_F_DUMP_INTR`.
pub const DUMP_INTR: u16 = 0x10;
/// linux/netlink.h: `NLM_F_CAPPED`.
const CAPPED: u16 = 0x100;
/// linux/netlink.h: `NLM_F_ACK_TLVS`.
const ACK_TLVS: u16 = 0x200;
/// linux/netlink.h: `NLMSGERR_ATTR_MSG`.
const ATTR_MSG: u16 = 1;

/// One message of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`: of the request that it answers.
    pub sequence: u32,
    /// `nlmsg_pid`: the socket whose request it answers or was caused by.
    pub port: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

/// What a message is, seen by the one who waits for an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply<'a> {
    /// Part of a dump.
    Data(Frame<'a>),
    /// The request was done, or the dump is over.
    Done,
    /// The request was refused.
    Refused {
        /// The error number, positive.
        errno: i32,
        /// The kernel's explanation.
        text: Option<String>,
    },
    /// Nothing.
    Noop,
    /// Not understood.
    Garbled,
}

/// The messages of a datagram; ends at the first that does not fit.
pub fn frames(mut datagram: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(datagram, 0)?).ok()?;
        let frame = Frame {
            kind: u16_at(datagram, 4)?,
            flags: u16_at(datagram, 6)?,
            sequence: u32_at(datagram, 8)?,
            port: u32_at(datagram, 12)?,
            payload: datagram.get(HEADER..length)?,
        };
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
        Some(frame)
    })
}

/// Reads a message as an answer.
#[must_use]
pub fn reply<'a>(frame: &Frame<'a>) -> Reply<'a> {
    match frame.kind {
        NOOP => Reply::Noop,
        // Not sent by any kernel; told as what its name says.
        OVERRUN => Reply::Refused {
            errno: libc::ENOBUFS,
            text: None,
        },
        ERROR => match i32_at(frame.payload, 0) {
            None => Reply::Garbled,
            Some(0) => Reply::Done,
            Some(code) => Reply::Refused {
                errno: code.saturating_neg(),
                text: explanation(frame, error_tlvs(frame)),
            },
        },
        // A dump that failed half-way says so in its last message; the
        // attributes follow the number directly.
        DONE => match i32_at(frame.payload, 0) {
            Some(code) if code < 0 => Reply::Refused {
                errno: code.saturating_neg(),
                text: explanation(frame, frame.payload.get(4..)),
            },
            _ => Reply::Done,
        },
        _ => Reply::Data(*frame),
    }
}

/// Where the attributes of an error begin: behind the request's header, and
/// behind the rest of the request too where it was not capped.
fn error_tlvs<'a>(frame: &Frame<'a>) -> Option<&'a [u8]> {
    let request = if frame.flags & CAPPED == 0 {
        usize::try_from(u32_at(frame.payload, 4)?).ok()?
    } else {
        HEADER
    };
    frame
        .payload
        .get(4usize.checked_add(request.checked_next_multiple_of(4)?)?..)
}

fn explanation(frame: &Frame<'_>, tlvs: Option<&[u8]>) -> Option<String> {
    if frame.flags & ACK_TLVS == 0 {
        return None;
    }
    NlasIterator::new(tlvs?)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == ATTR_MSG)
        .map(|attribute| text(attribute.value()))
}

/// A NUL-terminated text.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// The four bytes at `at`, in the host's order.
#[must_use]
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(i32::from_ne_bytes(field.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(field.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend(9u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn tlv(text: &str) -> Vec<u8> {
        let mut bytes = u16::try_from(4 + text.len() + 1)
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend(ATTR_MSG.to_ne_bytes());
        bytes.extend(text.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn refused(errno: i32, text: Option<&str>) -> Reply<'static> {
        Reply::Refused {
            errno,
            text: text.map(str::to_owned),
        }
    }

    #[test]
    fn answers_with_and_without_explanation() {
        let request = message(24, 5, &[0; 12]);
        let code = (-libc::ENETUNREACH).to_ne_bytes();
        let capped = [&code[..], &request[..16], &tlv("Nexthop")].concat();
        let whole = [&code[..], &request[..], &tlv("Nexthop")].concat();
        let silent = [&code[..], &request[..16]].concat();
        let done = [&code[..], &tlv("Nexthop")].concat();
        let table = [
            (ERROR, CAPPED | ACK_TLVS, capped, Some("Nexthop")),
            (ERROR, ACK_TLVS, whole, Some("Nexthop")),
            (ERROR, CAPPED, silent, None),
            (DONE, ACK_TLVS, done, Some("Nexthop")),
        ];
        for (kind, flags, payload, text) in table {
            let bytes = message(kind, flags, &payload);
            let frame = frames(&bytes).next().unwrap();
            assert_eq!(reply(&frame), refused(libc::ENETUNREACH, text));
        }
        let ack = message(ERROR, CAPPED, &[0; 20]);
        assert_eq!(reply(&frames(&ack).next().unwrap()), Reply::Done);
        let empty = message(DONE, 0, &[]);
        assert_eq!(reply(&frames(&empty).next().unwrap()), Reply::Done);
        let short = message(ERROR, 0, &[1]);
        assert_eq!(reply(&frames(&short).next().unwrap()), Reply::Garbled);
    }

    #[test]
    fn a_datagram_is_cut_at_four_bytes() {
        let bytes = [message(16, 2, &[1]), message(17, 0, &[2, 3])].concat();
        let found: Vec<_> = frames(&bytes).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].payload, [1]);
        assert_eq!((found[1].kind, found[1].payload), (17, &[2u8, 3][..]));
        assert_eq!((found[1].sequence, found[1].port), (7, 9));
        // A length of less than the header, or of more than there is.
        for length in [0u32, 15, 1000, u32::MAX] {
            let mut bad = bytes.clone();
            bad[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(frames(&bad).count(), 0);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for frame in frames(&bytes) {
                let _ = reply(&frame);
            }
        }

        #[test]
        fn any_error_is_read_without_harm(
            flags in any::<u16>(),
            payload in proptest::collection::vec(any::<u8>(), 0..80),
            kind in ERROR..=DONE,
        ) {
            let bytes = message(kind, flags, &payload);
            for frame in frames(&bytes) {
                let _ = reply(&frame);
            }
        }
    }
}
