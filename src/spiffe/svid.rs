//! SPIFFE IDs, own SVIDs and trust bundles.

use std::collections::BTreeMap;
use std::time::SystemTime;

use openssl::pkey::{PKey, Private};
use openssl::x509::X509;

/// The name of a trust domain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(pub(super) String);

/// A checked SPIFFE ID.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId(pub(super) String);

impl SpiffeId {
    /// The ID as text, `spiffe://…`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An own X.509-SVID with its key.
pub struct Svid {
    /// The leaf's ID.
    pub id: SpiffeId,
    /// Leaf first, then the intermediates.
    pub chain: Vec<X509>,
    /// The leaf's private key.
    pub key: PKey<Private>,
    /// When the leaf expires.
    pub not_after: SystemTime,
}

/// The authorities of each trust domain.
#[derive(Clone, Default)]
pub struct Bundles(pub BTreeMap<TrustDomain, Vec<X509>>);
