//! Verification of a peer's certificate chain.

use std::time::SystemTime;

use openssl::x509::X509;

use super::error::VerifyError;
use super::svid::{Bundles, SpiffeId};

/// A peer whose certificate was verified.
#[derive(Clone)]
pub struct PeerIdentity {
    /// The ID in its leaf.
    pub id: SpiffeId,
    /// When its leaf expires.
    pub not_after: SystemTime,
    /// The leaf itself: tokens are verified with its key.
    pub leaf: X509,
}

/// Verifies the chain that a peer presented, leaf first.
///
/// # Errors
///
/// The first rule that the chain breaks.
pub fn verify_peer(
    _chain: &[X509],
    _bundles: &Bundles,
    _now: SystemTime,
) -> Result<PeerIdentity, VerifyError> {
    todo!()
}
