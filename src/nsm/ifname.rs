//! Names of the interfaces that are asked for.

use std::hash::{BuildHasher, RandomState};

use crate::core::ids::IfName;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Bytes of the network service's name that are kept.
const PREFIX_MAX: usize = 10;

/// An unpredictable number from the generator that seeds the standard
/// library's hash maps.
pub(super) fn random() -> u64 {
    RandomState::new().hash_one(0u8)
}

/// A new name in the form that other parts of Meridio know: the service's
/// first ten bytes, `-`, and random letters and digits up to 15 bytes (sdk
/// pkg/tools/nanoid). A service whose name fits no interface gives `nsm-`.
pub(super) fn generate(service: &str, mut random: impl FnMut() -> u64) -> Option<IfName> {
    let prefix = service
        .get(..service.len().min(PREFIX_MAX))
        .filter(|prefix| IfName::parse(&format!("{prefix}-0")).is_ok())
        .unwrap_or("nsm");
    let mut name = format!("{prefix}-");
    while name.len() < IfName::MAX {
        let mut bits = random();
        // Ten letters in 60 of the 64 bits; values beyond the alphabet are
        // thrown away, so that all letters are equally likely.
        for _ in 0..10 {
            let index = usize::try_from(bits & 63).unwrap_or(0);
            bits >>= 6;
            if let (Some(letter), true) = (ALPHABET.get(index), name.len() < IfName::MAX) {
                name.push(char::from(*letter));
            }
        }
    }
    IfName::parse(&name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_have_the_form_of_the_field() {
        let name = |service| generate(service, random).unwrap();
        assert!(
            name("load-balancer.t1.ns")
                .as_str()
                .starts_with("load-balan-")
        );
        assert!(name("lb").as_str().starts_with("lb-"));
        for odd in ["", "a/b", "a%d", "ééééééé", "a b"] {
            let name = name(odd);
            assert_eq!(name.as_str().len(), IfName::MAX, "{odd:?}");
        }
        assert!(name("a/b").as_str().starts_with("nsm-"));
        let many: BTreeSet<IfName> = (0..500).map(|_| name("load-balancer")).collect();
        assert!(many.len() > 495, "62^4 names, {} of 500 differ", many.len());
    }

    #[test]
    fn numbers_beyond_the_alphabet_are_skipped() {
        let mut numbers = [u64::MAX, 0].into_iter();
        let name = generate("load-balancer", || numbers.next().unwrap());
        assert_eq!(name.unwrap().as_str(), "load-balan-0000");
    }
}
