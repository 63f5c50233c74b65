//! One hop of a path: a name and an identity that signs its tokens.

use std::sync::Arc;
use std::time::Duration;

use meridio_proxy::proto::connection::Connection;
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::spiffe::jwt::{self, Token};
use meridio_proxy::spiffe::{Identity, PeerIdentity, SvidCell};
use meridio_proxy::sync::clock;

use super::{Refused, authorize};
use crate::path;
use crate::pki::Pki;

/// How long the SVIDs of lab peers live.
const SVID_TTL: Duration = Duration::from_secs(3600);

/// nsmgr, registry, forwarder, an LB or a target.
#[derive(Clone)]
pub struct Hop {
    /// The name of its path segments.
    pub name: String,
    /// Its SVID; refill it to rotate.
    pub svid: SvidCell,
    /// Lifetime of the tokens that it signs.
    pub lifetime: Duration,
}

impl Hop {
    /// A hop with an SVID of its own, `spiffe://<td>/<path>`.
    pub fn new(trust: &Pki, path: &str, name: &str, lifetime: Duration) -> Self {
        Self {
            name: name.to_owned(),
            svid: trust.cell(&trust.id(path), SVID_TTL),
            lifetime,
        }
    }

    pub fn identity(&self) -> Arc<Identity> {
        self.svid
            .get()
            .expect("lab hops have an SVID from the start")
    }

    /// How the others see it, where no TLS lies between.
    pub fn as_peer(&self) -> PeerIdentity {
        let own = self.identity();
        PeerIdentity {
            id: own.svid.id.clone(),
            not_after: own.svid.not_after,
            leaf: own.svid.chain[0].clone(),
        }
    }

    /// A token of `own` for `peer`.
    pub fn token_as(&self, own: &Identity, peer: &PeerIdentity) -> Result<Token, RpcError> {
        jwt::sign(&own.svid, peer, self.lifetime, clock::wall())
            .map_err(|error| RpcError::status(Code::UNKNOWN, format!("token: {error}")))
    }

    /// A token for `peer`.
    pub fn token(&self, peer: &PeerIdentity) -> Result<Token, RpcError> {
        self.token_as(&self.identity(), peer)
    }

    /// The start of a hop's chain: path, tokens, policies. `own` is what was
    /// presented to the caller.
    pub fn admit(
        &self,
        connection: &mut Connection,
        caller: &PeerIdentity,
        token: &Token,
        own: &Identity,
    ) -> Result<(), RpcError> {
        path::enter(connection, &self.name).map_err(unknown)?;
        self.admit_entered(connection, caller, Some(token), own)
    }

    /// [`Hop::admit`] for a path that was entered already; a call without a
    /// token leaves the one that is in the path.
    pub fn admit_entered(
        &self,
        connection: &mut Connection,
        caller: &PeerIdentity,
        token: Option<&Token>,
        own: &Identity,
    ) -> Result<(), RpcError> {
        let answer = self.token_as(own, caller)?;
        path::update_tokens(connection, token, &answer).map_err(unknown)?;
        let index = connection.path.index as usize;
        authorize(
            &path::tokens(connection),
            index,
            &caller.leaf,
            clock::wall(),
        )
        .map_err(refused)
    }
}

/// An error of the chain, as Go's plain errors arrive.
pub fn unknown(reason: impl Into<String>) -> RpcError {
    RpcError::status(Code::UNKNOWN, reason)
}

/// A policy's answer, in nsmgr's words.
pub fn refused(refused: Refused) -> RpcError {
    match refused {
        Refused::No(reason) => denied(reason),
        Refused::Conflict(reason) => RpcError::status(Code::INTERNAL, reason),
    }
}

/// A refusal by a policy, in nsmgr's words.
pub fn denied(reason: impl std::fmt::Display) -> RpcError {
    RpcError::status(
        Code::PERMISSION_DENIED,
        format!("no sufficient privileges: {reason}"),
    )
}
