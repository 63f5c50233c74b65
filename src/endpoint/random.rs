//! Ids and interface names that nobody else has.

use std::fs::File;
use std::io::{self, Read};

use crate::core::ids::IfName;

/// Letters of generated interface names, as in NSM (tools/nanoid).
const ALPHABET: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// Bytes of the service's name in a generated interface name
/// (networkservice/common/mechanisms/kernel/server.go).
const PREFIX: usize = 10;

/// Where randomness comes from.
pub trait Random: Send {
    /// Fills `bytes`.
    ///
    /// # Errors
    ///
    /// When the source fails.
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()>;
}

/// The kernel's generator.
#[derive(Debug)]
pub struct SystemRandom(File);

impl SystemRandom {
    /// Opens the generator.
    ///
    /// # Errors
    ///
    /// When `/dev/urandom` cannot be opened.
    pub fn open() -> io::Result<Self> {
        File::open("/dev/urandom").map(Self)
    }
}

impl Random for SystemRandom {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact(bytes)
    }
}

/// A random UUID (RFC 9562, version 4).
///
/// # Errors
///
/// When the source fails.
pub fn uuid(random: &mut dyn Random) -> io::Result<String> {
    let mut bytes = [0u8; 16];
    random.fill(&mut bytes)?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let hex = hex(&bytes);
    let part = |from, to| hex.get(from..to).unwrap_or_default();
    Ok(format!(
        "{}-{}-{}-{}-{}",
        part(0, 8),
        part(8, 12),
        part(12, 16),
        part(16, 20),
        part(20, 32)
    ))
}

/// Lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An interface name as NSM generates it: the beginning of the service's name,
/// `-`, and random letters up to the longest name. Bytes that no interface
/// name may have become `-`.
///
/// # Errors
///
/// When the source fails.
pub fn interface_name(service: &str, random: &mut dyn Random) -> io::Result<IfName> {
    let mut name: String = service
        .bytes()
        .take(PREFIX)
        .map(char::from)
        .map(|letter| {
            if letter.is_ascii_alphanumeric() || "._-".contains(letter) {
                letter
            } else {
                '-'
            }
        })
        .collect();
    name.push('-');
    while name.len() < IfName::MAX {
        let mut byte = [0u8; 1];
        random.fill(&mut byte)?;
        // Bytes beyond the last whole alphabet are drawn again, so that all
        // letters are equally likely.
        let letter = usize::from(byte[0]);
        if letter < ALPHABET.len() * 4 {
            name.push(char::from(ALPHABET[letter % ALPHABET.len()]));
        }
    }
    IfName::parse(&name).map_err(io::Error::other)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Counts up from 0.
    #[derive(Default)]
    pub struct Counting(pub u8);

    impl Random for Counting {
        fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
            for byte in bytes {
                *byte = self.0;
                self.0 = self.0.wrapping_add(1);
            }
            Ok(())
        }
    }

    #[test]
    fn uuids_are_of_version_4() {
        let text = uuid(&mut Counting::default()).unwrap();
        assert_eq!(text, "00010203-0405-4607-8809-0a0b0c0d0e0f");
        let mut system = SystemRandom::open().unwrap();
        assert_ne!(uuid(&mut system).unwrap(), uuid(&mut system).unwrap());
    }

    #[test]
    fn interface_names_are_valid_whatever_the_service() {
        for (service, expected) in [
            ("proxy.load-balancer.t.ns", "proxy.load-0123"),
            ("p", "p-0123456789abc"),
            ("", "-0123456789abcd"),
            ("../../etc", "..-..-etc-01234"),
            ("é%d:x\n", "---d-x--0123456"),
        ] {
            let name = interface_name(service, &mut Counting::default()).unwrap();
            assert_eq!(name.as_str(), expected);
            // Near the end of a byte's range letters are drawn again.
            interface_name(service, &mut Counting(250)).unwrap();
        }
    }
}
