//! The tokens that NSM puts into every segment of a path: JWTs signed with
//! ES256 by the key of the TLS session that carries them.

use std::time::{Duration, SystemTime};

use openssl::x509::X509;

use super::error::TokenError;
use super::svid::Svid;
use super::verify::PeerIdentity;

/// A signed token with the time that goes into the `expires` header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Compact serialization.
    pub jwt: String,
    /// min(now + lifetime, own NotAfter, peer NotAfter).
    pub expires: SystemTime,
}

/// The claims of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Who made it.
    pub sub: String,
    /// For whom; `None` when the claim is absent or no array of strings.
    pub aud: Option<Vec<String>>,
    /// Expiry in seconds since 1970; `None` when absent or no number.
    pub exp: Option<i64>,
}

/// Signs a token for `peer`.
///
/// # Errors
///
/// When the key is not EC P-256, the only one that NSM accepts.
pub fn sign(
    _svid: &Svid,
    _peer: &PeerIdentity,
    _lifetime: Duration,
    _now: SystemTime,
) -> Result<Token, TokenError> {
    todo!()
}

/// Reads the claims without verifying the signature.
///
/// # Errors
///
/// When the text is no JWT.
pub fn claims(_jwt: &str) -> Result<Claims, TokenError> {
    todo!()
}

/// Verifies the ES256 signature with the key of `leaf`.
///
/// # Errors
///
/// When the token does not parse, is not ES256, or was signed by another key.
pub fn verify(_jwt: &str, _leaf: &X509) -> Result<(), TokenError> {
    todo!()
}
