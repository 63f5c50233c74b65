//! The hardware address of the bridge.
//!
//! Targets and load balancers cache it for minutes, so that an address which
//! changed with each restart of the pod would cut them off (Meridio #466). It
//! is derived from what identifies the bridge in its L2 domain instead.

/// The address for a node's bridge of a conduit: always the same for the same
/// names, locally administered, unicast (IEEE 802, section 8).
#[must_use]
pub fn bridge_mac(namespace: &str, trench: &str, conduit: &str, node: &str) -> [u8; 6] {
    let mut hash = Fnv1a::default();
    for name in [namespace, trench, conduit, node] {
        hash.add(name.as_bytes());
        // No name contains NUL: ("ab", "c") and ("a", "bc") differ.
        hash.add(&[0]);
    }
    let [first, a, b, c, d, e, ..] = hash.finish().to_be_bytes();
    [(first & 0b1111_1100) | 0b10, a, b, c, d, e]
}

/// FNV-1a of 64 bits: what is needed is stability over builds and versions,
/// which the hasher of std does not promise.
struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv1a {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// The hash, its low bits mixed into the high ones, which are used: the
    /// last bytes added have not reached those yet.
    fn finish(&self) -> u64 {
        let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn stable() {
        // A change of this value cuts off every target at the next upgrade.
        assert_eq!(
            bridge_mac("default", "trench-a", "load-balancer", "worker-1"),
            [0x0e, 0xa6, 0x0b, 0xcf, 0x5a, 0xeb]
        );
    }

    #[test]
    fn locally_administered_unicast_and_distinct() {
        let mut seen = BTreeSet::new();
        for node in 0..5_000 {
            for conduit in ["a", "b"] {
                let mac = bridge_mac("ns", "t", conduit, &format!("node-{node}"));
                assert_eq!(mac[0] & 0b11, 0b10, "{mac:02x?}");
                assert!(seen.insert(mac), "{mac:02x?} twice");
            }
        }
        assert_ne!(bridge_mac("ab", "c", "", ""), bridge_mac("a", "bc", "", ""));
    }
}
