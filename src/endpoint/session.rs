//! The TLS session that a call came on, as far as tokens and descriptors are
//! concerned.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::spiffe::error::TokenError;
use crate::spiffe::jwt::{self, Claims, Token};
use crate::transport::server::PeerConnection;

/// What one call needs of its session. A trait, so that what happens to a
/// request can be tested without TLS.
pub trait Session: Send + Sync {
    /// A fresh token of ours for the peer.
    ///
    /// # Errors
    ///
    /// When our key cannot sign it.
    fn sign(&self, now: SystemTime) -> Result<Token, TokenError>;

    /// Reads a token's claims.
    ///
    /// # Errors
    ///
    /// When it is no token.
    fn claims(&self, jwt: &str) -> Result<Claims, TokenError>;

    /// Verifies that the peer's key signed a token.
    ///
    /// # Errors
    ///
    /// When it did not.
    fn verify(&self, jwt: &str) -> Result<(), TokenError>;

    /// Passes a descriptor to the peer, not later than the call's answer.
    fn attach(&self, fd: OwnedFd);

    /// The peer's SPIFFE ID, for log lines.
    fn peer(&self) -> &str;
}

/// A session of our server.
pub struct TlsSession {
    connection: Arc<PeerConnection>,
    lifetime: Duration,
}

impl TlsSession {
    /// `lifetime` is `NSM_MAX_TOKEN_LIFETIME`.
    #[must_use]
    pub fn new(connection: Arc<PeerConnection>, lifetime: Duration) -> Self {
        Self {
            connection,
            lifetime,
        }
    }
}

impl Session for TlsSession {
    fn sign(&self, now: SystemTime) -> Result<Token, TokenError> {
        let svid = &self.connection.identity.svid;
        jwt::sign(svid, &self.connection.peer, self.lifetime, now)
    }

    fn claims(&self, jwt: &str) -> Result<Claims, TokenError> {
        jwt::claims(jwt)
    }

    fn verify(&self, jwt: &str) -> Result<(), TokenError> {
        jwt::verify(jwt, &self.connection.peer.leaf)
    }

    fn attach(&self, fd: OwnedFd) {
        self.connection.attach(fd);
    }

    fn peer(&self) -> &str {
        self.connection.peer.id.as_str()
    }
}
