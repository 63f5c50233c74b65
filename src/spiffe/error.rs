//! What can be wrong with identities and tokens.

/// Why a certificate chain was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyError(pub String);

/// Why a token could not be made or was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenError(pub String);
