//! What can be wrong with identities and tokens.

use std::fmt;

use openssl::error::ErrorStack;

/// Why a SPIFFE ID, an own SVID or a bundle was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityError(pub String);

/// Why a certificate chain was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyError(pub String);

/// Why a token could not be made or was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenError(pub String);

macro_rules! plain_error {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::error::Error for $name {}

        impl $name {
            /// What was attempted, and what the library said.
            pub(crate) fn library(attempt: &str, error: &ErrorStack) -> Self {
                Self(format!("{attempt}: {error}"))
            }
        }
    };
}

plain_error!(IdentityError);
plain_error!(VerifyError);
plain_error!(TokenError);

impl From<IdentityError> for VerifyError {
    fn from(error: IdentityError) -> Self {
        Self(error.0)
    }
}
