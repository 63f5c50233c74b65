//! What nsmgr, registry and forwarder demand of a caller: the envelope of each
//! call, and the OPA policies of the NSM SDK (tools/opa/policies) as functions.
//! Every refusal is written to [`Notes`], so that a test can say which, or that
//! there was none.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use grpcio::Metadata;
use meridio_proxy::spiffe::jwt::{self, Token};
use openssl::x509::X509;
use parking_lot::{Condvar, Mutex};

use crate::path::parse_rfc3339;
use crate::tls::Peer;

pub use hop::{Hop, denied, refused, unknown};

mod hop;

/// Header with the token.
pub const TOKEN_HEADER: &str = "nsm-client-token";
/// Header with its time of expiry.
pub const EXPIRES_HEADER: &str = "nsm-client-token-expires";
/// Header with the registry's path.
pub const PATH_HEADER: &str = "path";

/// Refusals kept.
const NOTES_MAX: usize = 10_000;

/// What was refused, and what was answered although it should not have been
/// asked (`violation: …`).
#[derive(Clone, Default)]
pub struct Notes(Arc<(Mutex<Vec<String>>, Condvar)>);

impl Notes {
    pub fn refuse(&self, what: &str, reason: &str) {
        self.push(format!("{what}: {reason}"));
    }

    /// For what real peers put up with, but a good client does not do.
    pub fn violation(&self, what: &str, reason: &str) {
        self.push(format!("violation: {what}: {reason}"));
    }

    pub fn all(&self) -> Vec<String> {
        self.0.0.lock().clone()
    }

    /// Waits for a note that contains `text`: a client may learn of its refusal
    /// a moment before it is written down.
    pub fn wait(&self, text: &str, deadline: Instant) -> Result<String, String> {
        let (lines, changed) = &*self.0;
        let mut lines = lines.lock();
        loop {
            if let Some(line) = lines.iter().find(|line| line.contains(text)) {
                return Ok(line.clone());
            }
            if changed.wait_until(&mut lines, deadline).timed_out() {
                return Err(format!("no refusal says {text:?}: {lines:?}"));
            }
        }
    }

    fn push(&self, line: String) {
        let (lines, changed) = &*self.0;
        let mut lines = lines.lock();
        if lines.len() < NOTES_MAX {
            lines.push(line);
        }
        drop(lines);
        changed.notify_all();
    }
}

/// The values of a header.
pub fn header_values(headers: &Metadata, name: &str) -> Vec<String> {
    headers
        .iter()
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
        .collect()
}

/// Why a policy refuses.
#[derive(Debug)]
pub enum Refused {
    /// It says no.
    No(String),
    /// It cannot be evaluated.
    Conflict(String),
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::No(reason) | Self::Conflict(reason) => f.write_str(reason),
        }
    }
}

/// Reads the two token headers of a call (tools/token `FromContext`): a call
/// without one of them has none.
pub fn read_token(headers: &Metadata) -> Result<Token, String> {
    let single = |name: &str| {
        let mut values = header_values(headers, name);
        match values.len() {
            1 => Ok(values.remove(0)),
            count => Err(format!("header {name} is there {count} times")),
        }
    };
    Ok(Token {
        jwt: single(TOKEN_HEADER)?,
        expires: parse_rfc3339(&single(EXPIRES_HEADER)?)?,
    })
}

/// What a good client's token is like. nsmgr looks at it through its policies
/// only, and not at all where it has none: streams, and headers' times.
pub fn envelope(headers: &Metadata, peer: &Peer, now: SystemTime) -> Result<Token, String> {
    let token = read_token(headers)?;
    let claims = jwt::claims(&token.jwt).map_err(|error| format!("token: {}", error.0))?;
    let (us, them) = (peer.own.svid.id.as_str(), peer.identity.id.as_str());
    match &claims.aud {
        Some(aud) if aud.len() == 1 && aud[0] == us => {}
        other => return Err(format!("token: aud {other:?} is not [{us:?}]")),
    }
    if claims.sub != them {
        return Err(format!(
            "token: sub {:?} is not the TLS peer {them:?}",
            claims.sub
        ));
    }
    tokens_expired(std::slice::from_ref(&token.jwt), now).map_err(|refused| refused.to_string())?;
    jwt::verify(&token.jwt, &peer.identity.leaf)
        .map_err(|error| format!("token is not signed by the TLS peer's key: {}", error.0))?;
    let limit = peer.identity.not_after.min(peer.own.svid.not_after);
    if token.expires > limit + Duration::from_secs(1) {
        return Err(format!(
            "header {EXPIRES_HEADER} is later than a certificate of the session"
        ));
    }
    if token.expires <= now {
        return Err(format!("header {EXPIRES_HEADER} is in the past"));
    }
    Ok(token)
}

/// Every token decodes.
pub fn tokens_valid(tokens: &[String]) -> Result<(), Refused> {
    for (n, token) in tokens.iter().enumerate() {
        jwt::claims(token)
            .map_err(|error| Refused::No(format!("tokens_valid: segment {n}: {}", error.0)))?;
    }
    Ok(())
}

/// Every token has an expiry, in the future.
pub fn tokens_expired(tokens: &[String], now: SystemTime) -> Result<(), Refused> {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    for (n, token) in tokens.iter().enumerate() {
        let exp = jwt::claims(token).ok().and_then(|claims| claims.exp);
        if exp.is_none_or(|exp| now >= exp) {
            return Err(Refused::No(format!(
                "tokens_expired: segment {n}: exp {exp:?}, now {now}"
            )));
        }
    }
    Ok(())
}

/// Each token was made for the maker of the next one.
pub fn tokens_chained(tokens: &[String]) -> Result<(), Refused> {
    for (n, pair) in tokens.windows(2).enumerate() {
        let (Ok(left), Ok(right)) = (jwt::claims(&pair[0]), jwt::claims(&pair[1])) else {
            return Err(Refused::No(format!(
                "tokens_chained: segment {n}: no token"
            )));
        };
        let aud = left.aud.as_deref().unwrap_or_default();
        let matching = aud.iter().filter(|is| **is == right.sub).count();
        let text = format!(
            "tokens_chained: segment {n}: aud {:?}, next sub {:?}",
            left.aud, right.sub
        );
        // The policy is a function with several outputs when one of several
        // elements matches, which OPA answers with an error.
        if matching > 0 && matching < aud.len() {
            return Err(Refused::Conflict(format!("eval_conflict_error: {text}")));
        }
        if matching == 0 {
            return Err(Refused::No(text));
        }
    }
    Ok(())
}

/// The token before this hop's was signed by the TLS peer.
pub fn prev_token_signed(tokens: &[String], index: usize, leaf: &X509) -> Result<(), Refused> {
    let token = index
        .checked_sub(1)
        .and_then(|previous| tokens.get(previous))
        .ok_or_else(|| Refused::No(format!("prev_token_signed: nothing before index {index}")))?;
    jwt::verify(token, leaf).map_err(|error| Refused::No(format!("prev_token_signed: {}", error.0)))
}

/// The four policies of a server, over the segments up to its own.
pub fn authorize(
    tokens: &[String],
    index: usize,
    leaf: &X509,
    now: SystemTime,
) -> Result<(), Refused> {
    tokens_valid(tokens)?;
    tokens_expired(tokens, now)?;
    tokens_chained(tokens)?;
    prev_token_signed(tokens, index, leaf)
}

/// Who registered which name: the policy `client_allowed`.
#[derive(Default)]
pub struct Owners(BTreeMap<String, String>);

impl Owners {
    pub fn client_allowed(&self, name: &str, client: &str) -> Result<(), String> {
        match self.0.get(name) {
            Some(owner) if owner != client => Err(format!(
                "client_allowed: {name} belongs to {owner}, not {client}"
            )),
            _ => Ok(()),
        }
    }

    pub fn set(&mut self, name: &str, client: &str) {
        self.0.insert(name.to_owned(), client.to_owned());
    }

    pub fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }
}

#[cfg(test)]
pub mod tests;
