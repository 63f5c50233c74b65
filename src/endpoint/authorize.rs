//! Whether a call may be made: the four policies that NSM's endpoints apply to
//! the tokens of a path (sdk pkg/tools/opa, `common` and `server`).

use std::time::{SystemTime, UNIX_EPOCH};

use super::session::Session;
use crate::proto::connection::PathSegment;
use crate::rpc::status::{Code, RpcError};
use crate::spiffe::jwt::Claims;

/// Judges the segments up to and including our own, which is at `own`.
///
/// # Errors
///
/// PERMISSION_DENIED with the policy that failed and why.
pub fn authorize(
    segments: &[PathSegment],
    own: usize,
    session: &dyn Session,
    now: SystemTime,
) -> Result<(), RpcError> {
    judge(segments, own, session, now).map_err(|why| {
        let peer = session.peer();
        let text = format!("no sufficient privileges: {why} (the caller is {peer})");
        RpcError::status(Code::PERMISSION_DENIED, text)
    })
}

fn judge(
    segments: &[PathSegment],
    own: usize,
    session: &dyn Session,
    now: SystemTime,
) -> Result<(), String> {
    let segments = segments.get(..=own).unwrap_or(segments);
    let claims = valid(segments, session)?;
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    });
    not_expired(&claims, seconds)?;
    chained(&claims)?;
    let previous = own
        .checked_sub(1)
        .and_then(|index| segments.get(index))
        .ok_or("prev_token_signed: the path has no segment before this endpoint's")?;
    session
        .verify(&previous.token)
        .map_err(|error| format!("prev_token_signed: {}", error.0))
}

fn valid(segments: &[PathSegment], session: &dyn Session) -> Result<Vec<Claims>, String> {
    let one = |(index, segment): (usize, &PathSegment)| {
        session
            .claims(&segment.token)
            .map_err(|error| format!("tokens_valid: segment {index}: {}", error.0))
    };
    segments.iter().enumerate().map(one).collect()
}

fn not_expired(claims: &[Claims], now: i64) -> Result<(), String> {
    for (index, claims) in claims.iter().enumerate() {
        match claims.exp {
            Some(exp) if now < exp => {}
            Some(exp) => {
                let ago = now.saturating_sub(exp);
                return Err(format!(
                    "tokens_expired: segment {index} expired {ago} s ago"
                ));
            }
            None => return Err(format!("tokens_expired: segment {index} has no expiry")),
        }
    }
    Ok(())
}

fn chained(claims: &[Claims]) -> Result<(), String> {
    for (index, pair) in claims.windows(2).enumerate() {
        let [left, right] = pair else { continue };
        // A single string as audience is refused as NSM refuses it.
        let audience = left.aud.as_deref().unwrap_or_default();
        if !audience.contains(&right.sub) {
            return Err(format!(
                "tokens_chained: segment {index} is for {audience:?}, the next one is {:?}'s",
                right.sub
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use parking_lot::Mutex;

    use super::*;
    use crate::spiffe::error::TokenError;
    use crate::spiffe::jwt::Token;

    /// A session whose tokens are readable: `sub>aud[,aud]@exp`, signed by
    /// `sub`; no `>` means that there is no audience.
    pub struct Plain {
        pub us: &'static str,
        pub peer: &'static str,
        pub attached: Mutex<Vec<OwnedFd>>,
    }

    impl Plain {
        pub fn new(us: &'static str, peer: &'static str) -> Self {
            Self {
                us,
                peer,
                attached: Mutex::default(),
            }
        }
    }

    impl Session for Plain {
        fn sign(&self, now: SystemTime) -> Result<Token, TokenError> {
            let expires = now + Duration::from_secs(600);
            let exp = expires.duration_since(UNIX_EPOCH).unwrap().as_secs();
            Ok(Token {
                jwt: format!("{}>{}@{exp}", self.us, self.peer),
                expires,
            })
        }

        fn claims(&self, jwt: &str) -> Result<Claims, TokenError> {
            let (head, exp) = jwt
                .split_once('@')
                .ok_or_else(|| TokenError("no token".to_owned()))?;
            let (sub, aud) = match head.split_once('>') {
                Some((sub, aud)) => (sub, Some(aud.split(',').map(str::to_owned).collect())),
                None => (head, None),
            };
            Ok(Claims {
                sub: sub.to_owned(),
                aud,
                exp: exp.parse().ok(),
            })
        }

        fn verify(&self, jwt: &str) -> Result<(), TokenError> {
            let signer = self.claims(jwt)?.sub;
            if signer == self.peer {
                Ok(())
            } else {
                Err(TokenError(format!("signed by {signer}")))
            }
        }

        fn attach(&self, fd: OwnedFd) {
            self.attached.lock().push(fd);
        }

        fn peer(&self) -> &str {
            self.peer
        }
    }

    fn segments(tokens: &[&str]) -> Vec<PathSegment> {
        let segment = |token: &&str| PathSegment {
            token: (*token).to_owned(),
            ..PathSegment::default()
        };
        tokens.iter().map(segment).collect()
    }

    #[test]
    fn policies() {
        let session = Plain::new("us", "fwd");
        let now = UNIX_EPOCH + Duration::from_secs(1_000);
        let good = [
            "tapa>mgr@1001",
            "mgr>x,fwd@1001",
            "fwd>us@1001",
            "us>fwd@1600",
        ];
        for (tokens, own, expected) in [
            (&good[..], 3, None),
            (&["fwd>us@1001", "us>fwd@1600"], 1, None),
            (
                &["us>fwd@1600"],
                0,
                Some("prev_token_signed: the path has no"),
            ),
            (&[], 0, Some("prev_token_signed: the path has no")),
            (&["", "us>fwd@1600"], 1, Some("tokens_valid: segment 0")),
            (
                &["fwd>us@1000", "us>fwd@1600"],
                1,
                Some("tokens_expired: segment 0 expired 0 s"),
            ),
            (
                &["fwd>us@", "us>fwd@1600"],
                1,
                Some("tokens_expired: segment 0 has no"),
            ),
            (
                &["fwd@1001", "us>fwd@1600"],
                1,
                Some("tokens_chained: segment 0 is for []"),
            ),
            (
                &["a>b@1001", "fwd>us@1001", "us>fwd@1600"],
                2,
                Some("tokens_chained: segment 0"),
            ),
            (
                &["mgr>us@1001", "us>fwd@1600"],
                1,
                Some("prev_token_signed: signed by mgr"),
            ),
            // What is right of our own segment is not looked at.
            (&["fwd>us@1001", "us>fwd@1600", "rubbish"], 1, None),
            (
                &["fwd>us@1001"],
                usize::MAX,
                Some("prev_token_signed: the path has no"),
            ),
        ] {
            let judged = authorize(&segments(tokens), own, &session, now);
            match (judged, expected) {
                (Ok(()), None) => {}
                (Err(error), Some(text)) => {
                    assert_eq!(error.code(), Some(Code::PERMISSION_DENIED));
                    assert!(error.to_string().contains(text), "{error}");
                    assert!(error.to_string().contains("no sufficient privileges"));
                }
                (judged, expected) => panic!("{tokens:?}: {judged:?}, not {expected:?}"),
            }
        }
    }
}
