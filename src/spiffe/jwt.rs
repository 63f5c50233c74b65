//! The tokens that NSM puts into every segment of a path: JWTs signed with
//! ES256 by the key of the TLS session that carries them.

use std::time::{Duration, SystemTime};

use openssl::base64;
use openssl::bn::BigNum;
use openssl::ec::EcKey;
use openssl::ecdsa::EcdsaSig;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{HasParams, Private, Public};
use openssl::sha::sha256;
use openssl::x509::X509;
use serde_json::{Value, json};

use super::error::TokenError;
use super::svid::Svid;
use super::verify::PeerIdentity;

/// Bytes of r and of s in an ES256 signature (RFC 7518, 3.4).
const HALF: usize = 32;

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
/// The `exp` claim is bounded by the own certificate alone, the returned expiry
/// by the peer's as well, as in NSM's sdk (`pkg/tools/spiffejwt`).
///
/// # Errors
///
/// When the key is not EC P-256, the only one that NSM accepts.
pub fn sign(
    svid: &Svid,
    peer: &PeerIdentity,
    lifetime: Duration,
    now: SystemTime,
) -> Result<Token, TokenError> {
    let key = svid
        .key
        .ec_key()
        .ok()
        .filter(is_p256)
        .ok_or_else(|| TokenError(format!("the key of {} is not EC P-256", svid.id)))?;
    let claimed = now
        .checked_add(lifetime)
        .map_or(svid.not_after, |at| at.min(svid.not_after));
    let header = json!({"alg": "ES256", "typ": "JWT"});
    let claims = json!({
        "sub": svid.id.as_str(),
        "aud": [peer.id.as_str()],
        "exp": unix_seconds(claimed),
    });
    let input = format!(
        "{}.{}",
        encode(header.to_string().as_bytes()),
        encode(claims.to_string().as_bytes())
    );
    let signature = signature(&key, input.as_bytes())
        .map_err(|error| TokenError::library("signing a token", &error))?;
    Ok(Token {
        jwt: format!("{input}.{}", encode(&signature)),
        expires: claimed.min(peer.not_after),
    })
}

/// Reads the claims without verifying the signature.
///
/// # Errors
///
/// When the text is no JWT.
pub fn claims(jwt: &str) -> Result<Claims, TokenError> {
    let parts = Parts::split(jwt)?;
    let value = parts.json(parts.claims, "claims")?;
    let strings = |value: &Value| -> Option<Vec<String>> {
        value
            .as_array()?
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect()
    };
    Ok(Claims {
        sub: value["sub"].as_str().unwrap_or_default().to_owned(),
        aud: strings(&value["aud"]),
        exp: value["exp"].as_i64(),
    })
}

/// Verifies the ES256 signature with the key of `leaf`.
///
/// # Errors
///
/// When the token does not parse, is not ES256, or was signed by another key.
pub fn verify(jwt: &str, leaf: &X509) -> Result<(), TokenError> {
    let parts = Parts::split(jwt)?;
    let header = parts.json(parts.header, "header")?;
    if header["alg"].as_str() != Some("ES256") {
        return Err(TokenError(format!(
            "token is signed with {}, not ES256",
            header["alg"]
        )));
    }
    let key = leaf
        .public_key()
        .and_then(|key| key.ec_key())
        .ok()
        .filter(is_p256)
        .ok_or_else(|| TokenError("the key of the certificate is not EC P-256".to_owned()))?;
    let raw = decode(parts.signature)
        .filter(|raw| raw.len() == 2 * HALF)
        .ok_or_else(|| TokenError("signature is not 64 bytes of base64url".to_owned()))?;
    match matches(&key, parts.signed.as_bytes(), &raw) {
        Ok(true) => Ok(()),
        Ok(false) => Err(TokenError("token was signed by another key".to_owned())),
        Err(error) => Err(TokenError::library("verifying a token", &error)),
    }
}

/// The three parts of a compact JWT.
struct Parts<'a> {
    signed: &'a str,
    header: &'a str,
    claims: &'a str,
    signature: &'a str,
}

impl<'a> Parts<'a> {
    fn split(jwt: &'a str) -> Result<Self, TokenError> {
        let parts = || {
            let (signed, signature) = jwt.rsplit_once('.')?;
            let (header, claims) = signed.split_once('.')?;
            (!claims.contains('.')).then_some(Self {
                signed,
                header,
                claims,
                signature,
            })
        };
        parts().ok_or_else(|| TokenError("token does not have three parts".to_owned()))
    }

    fn json(&self, part: &str, what: &str) -> Result<Value, TokenError> {
        decode(part)
            .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok())
            .filter(Value::is_object)
            .ok_or_else(|| TokenError(format!("token {what} are not a JSON object in base64url")))
    }
}

fn is_p256<T: HasParams>(key: &EcKey<T>) -> bool {
    key.group().curve_name() == Some(Nid::X9_62_PRIME256V1)
}

fn signature(key: &EcKey<Private>, input: &[u8]) -> Result<Vec<u8>, ErrorStack> {
    let signature = EcdsaSig::sign(&sha256(input), key)?;
    let half = i32::try_from(HALF).unwrap_or(i32::MAX);
    let mut raw = signature.r().to_vec_padded(half)?;
    raw.extend(signature.s().to_vec_padded(half)?);
    Ok(raw)
}

fn matches(key: &EcKey<Public>, input: &[u8], raw: &[u8]) -> Result<bool, ErrorStack> {
    let (r, s) = raw.split_at(HALF);
    let signature =
        EcdsaSig::from_private_components(BigNum::from_slice(r)?, BigNum::from_slice(s)?)?;
    signature.verify(&sha256(input), key)
}

/// Seconds since 1970, cut off as Go's `NumericDate` does.
fn unix_seconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// base64url without padding (RFC 7515, 2).
fn encode(bytes: &[u8]) -> String {
    base64::encode_block(bytes)
        .trim_end_matches('=')
        .replace('+', "-")
        .replace('/', "_")
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if text.is_empty() || text.len() % 4 == 1 || !text.bytes().all(allowed) {
        return None;
    }
    let mut padded = text.replace('-', "+").replace('_', "/");
    while !padded.len().is_multiple_of(4) {
        padded.push('=');
    }
    base64::decode_block(&padded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64url_of_every_length() {
        for length in 1..50usize {
            let bytes: Vec<u8> = (0..length)
                .map(|n| u8::try_from((n * 89 + 251) % 256).unwrap())
                .collect();
            assert_eq!(decode(&encode(&bytes)).unwrap(), bytes);
        }
        for bad in ["", "a=", "a+b", "a/b", "a b", "a", "ä"] {
            assert!(decode(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn refuses_what_is_no_jwt() {
        for bad in ["", ".", "..", "a.b", "a.b.c.d", "e30.W10.x", "e30.bm8.x"] {
            assert!(claims(bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            claims("e30.e30.x").unwrap(),
            Claims {
                sub: String::new(),
                aud: None,
                exp: None
            }
        );
    }
}
