//! SPIFFE IDs, own SVIDs and trust bundles.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use openssl::asn1::{Asn1Time, Asn1TimeRef};
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::x509::{X509, X509Ref};

use super::der;
use super::error::IdentityError;

const SCHEME: &str = "spiffe://";

/// The name of a trust domain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(pub(super) String);

impl TrustDomain {
    /// Reads a name (`example.org`) or the trust domain of an ID; like
    /// go-spiffe, takes for an ID whatever contains `:/`.
    ///
    /// # Errors
    ///
    /// When it is empty or holds other characters than `a-z 0-9 - . _`.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        if text.contains(":/") {
            return Ok(SpiffeId::parse(text)?.trust_domain());
        }
        if text.is_empty() {
            return Err(IdentityError("trust domain is missing".to_owned()));
        }
        let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_');
        if !text.bytes().all(allowed) {
            return Err(IdentityError(format!(
                "trust domain {text:?} has other characters than a-z, 0-9, '-', '.' and '_'"
            )));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A checked SPIFFE ID.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId(pub(super) String);

impl SpiffeId {
    /// Reads an ID: `spiffe://`, a trust domain, and a path that is empty or
    /// made of non-empty segments.
    ///
    /// # Errors
    ///
    /// What go-spiffe refuses (its `spiffeid` package), so that both sides of
    /// a connection agree on who is who.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let rest = text
            .strip_prefix(SCHEME)
            .ok_or_else(|| IdentityError(format!("SPIFFE ID {text:?} has another scheme")))?;
        let (domain, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        TrustDomain::parse(domain)
            .and_then(|_| check_path(path))
            .map_err(|error| IdentityError(format!("SPIFFE ID {text:?}: {error}")))?;
        Ok(Self(text.to_owned()))
    }

    /// The ID as text, `spiffe://…`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whose authorities vouch for it.
    #[must_use]
    pub fn trust_domain(&self) -> TrustDomain {
        let rest = self.0.strip_prefix(SCHEME).unwrap_or_default();
        TrustDomain(rest.split('/').next().unwrap_or_default().to_owned())
    }

    fn has_path(&self) -> bool {
        self.0
            .strip_prefix(SCHEME)
            .is_some_and(|rest| rest.contains('/'))
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check_path(path: &str) -> Result<(), IdentityError> {
    let Some(segments) = path.strip_prefix('/') else {
        return Ok(());
    };
    let allowed =
        |byte| matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_');
    for segment in segments.split('/') {
        if segment.is_empty() || segment == "." || segment == ".." {
            return Err(IdentityError(format!(
                "path segment {segment:?} is not allowed"
            )));
        }
        if !segment.bytes().all(allowed) {
            return Err(IdentityError(format!(
                "path segment {segment:?} has other characters than letters, digits, '-', '.' and '_'"
            )));
        }
    }
    Ok(())
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

impl Svid {
    /// Takes certificates back to back in DER, leaf first, and the leaf's key
    /// as unencrypted PKCS#8.
    ///
    /// # Errors
    ///
    /// The first rule for own SVIDs that they break (SPIFFE X509-SVID 4 and 5,
    /// as go-spiffe's `x509svid` reads them).
    pub fn from_der(chain: &[u8], key: &[u8]) -> Result<Self, IdentityError> {
        let chain = certificates(chain)?;
        let (leaf, intermediates) = chain
            .split_first()
            .ok_or_else(|| IdentityError("SVID without a certificate".to_owned()))?;
        let uses = leaf_uses(leaf)?;
        let id = only_id(&uses)?;
        check_own_leaf(&id, &uses)?;
        for certificate in intermediates {
            let uses = leaf_uses(certificate)?;
            if !uses.is_ca || !uses.signs_certificates() {
                return Err(IdentityError(format!(
                    "SVID {id}: an intermediate certificate is no CA that may sign certificates"
                )));
            }
        }
        let key = PKey::private_key_from_pkcs8(key).map_err(|error| {
            IdentityError::library(&format!("SVID {id}: reading the key"), &error)
        })?;
        let public = leaf.public_key().map_err(|error| {
            IdentityError::library(&format!("SVID {id}: reading the public key"), &error)
        })?;
        if !public.public_eq(&key) {
            return Err(IdentityError(format!(
                "SVID {id}: the key is not the one of the certificate"
            )));
        }
        Ok(Self {
            not_after: expiry(leaf)?,
            id,
            key,
            chain,
        })
    }
}

fn check_own_leaf(id: &SpiffeId, uses: &der::Uses) -> Result<(), IdentityError> {
    let refuse = |why: &str| Err(IdentityError(format!("SVID {id}: {why}")));
    if !id.has_path() {
        return refuse("an ID without a path names a trust domain, not a workload");
    }
    if uses.is_ca {
        return refuse("the certificate is a CA's");
    }
    if !uses.signs_digitally() {
        return refuse("the key usage lacks digitalSignature");
    }
    if uses.signs_certificates() || uses.signs_crls() {
        return refuse("the key usage has keyCertSign or cRLSign");
    }
    Ok(())
}

/// The authorities of each trust domain.
#[derive(Clone, Default)]
pub struct Bundles(pub BTreeMap<TrustDomain, Vec<X509>>);

impl Bundles {
    /// Sets the authorities of a trust domain from certificates back to back
    /// in DER; none at all is allowed, and then nobody of it is accepted.
    ///
    /// # Errors
    ///
    /// When they do not parse.
    pub fn insert_der(&mut self, domain: TrustDomain, der: &[u8]) -> Result<(), IdentityError> {
        let authorities = certificates(der)
            .map_err(|error| IdentityError(format!("bundle of {domain}: {error}")))?;
        self.0.insert(domain, authorities);
        Ok(())
    }
}

/// Certificates that lie back to back.
fn certificates(der: &[u8]) -> Result<Vec<X509>, IdentityError> {
    der::split(der)?
        .into_iter()
        .map(|part| {
            X509::from_der(part)
                .map_err(|error| IdentityError::library("reading a certificate", &error))
        })
        .collect()
}

pub(super) fn leaf_uses(certificate: &X509Ref) -> Result<der::Uses, IdentityError> {
    let encoded = certificate
        .to_der()
        .map_err(|error| IdentityError::library("encoding a certificate", &error))?;
    der::uses(&encoded)
}

/// The one URI of a leaf, which must be a SPIFFE ID.
pub(super) fn only_id(uses: &der::Uses) -> Result<SpiffeId, IdentityError> {
    match uses.uris.as_slice() {
        [uri] => SpiffeId::parse(&String::from_utf8_lossy(uri)),
        [] => Err(IdentityError("certificate without a URI SAN".to_owned())),
        several => Err(IdentityError(format!(
            "certificate with {} URI SANs",
            several.len()
        ))),
    }
}

/// When a certificate expires.
pub(super) fn expiry(certificate: &X509Ref) -> Result<SystemTime, IdentityError> {
    system_time(certificate.not_after())
        .map_err(|error| IdentityError::library("reading a certificate's end of validity", &error))
}

fn system_time(time: &Asn1TimeRef) -> Result<SystemTime, ErrorStack> {
    let difference = Asn1Time::from_unix(0)?.diff(time)?;
    let seconds = i64::from(difference.days) * 86_400 + i64::from(difference.secs);
    // Whatever ended before 1970 is as expired as 1970 is.
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_the_ids_that_go_spiffe_accepts() {
        for good in [
            "spiffe://td",
            "spiffe://a-z.0_9/ns/Default/pod/x_y.z-1",
            "spiffe://td/a/...",
        ] {
            assert_eq!(SpiffeId::parse(good).unwrap().as_str(), good);
        }
        assert_eq!(
            SpiffeId::parse("spiffe://td.x/a/b").unwrap().trust_domain(),
            TrustDomain("td.x".to_owned())
        );
    }

    #[test]
    fn refuses_the_ids_that_go_spiffe_refuses() {
        for bad in [
            "",
            "td",
            "SPIFFE://td/a",
            "http://td/a",
            "spiffe:/td/a",
            "spiffe://",
            "spiffe:///a",
            "spiffe://TD/a",
            "spiffe://td:80/a",
            "spiffe://me@td/a",
            "spiffe://td/",
            "spiffe://td/a/",
            "spiffe://td//a",
            "spiffe://td/a/./b",
            "spiffe://td/a/..",
            "spiffe://td/a?b",
            "spiffe://td/a#b",
            "spiffe://td/a%20b",
            "spiffe://td/a b",
            "spiffe://td/ä",
            "spiffe://td/a\0b",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn reads_a_trust_domain_as_name_or_id() {
        for text in ["td", "spiffe://td", "spiffe://td/any"] {
            assert_eq!(TrustDomain::parse(text).unwrap().as_str(), "td", "{text}");
        }
        for bad in ["", "T", "td/", "http://td"] {
            assert!(TrustDomain::parse(bad).is_err(), "{bad:?}");
        }
    }
}
