//! Verification of a peer's certificate chain.

use std::time::SystemTime;

use openssl::error::ErrorStack;
use openssl::stack::Stack;
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509Ref, X509StoreContext, X509VerifyResult};

use super::error::VerifyError;
use super::svid::{self, Bundles, SpiffeId};

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

/// Verifies the chain that a peer presented, leaf first, as go-spiffe's
/// `x509svid.Verify` does: exactly one URI SAN, no CA, and a chain to an
/// authority of the leaf's own trust domain. There is no check of names, of
/// extended key usages or of revocation.
///
/// # Errors
///
/// The first rule that the chain breaks.
pub fn verify_peer(
    chain: &[X509],
    bundles: &Bundles,
    now: SystemTime,
) -> Result<PeerIdentity, VerifyError> {
    let (leaf, intermediates) = chain
        .split_first()
        .ok_or_else(|| VerifyError("the peer presented no certificate".to_owned()))?;
    let uses = svid::leaf_uses(leaf)?;
    let id = svid::only_id(&uses)?;
    let refuse = |why: &str| Err(VerifyError(format!("{id}: {why}")));
    if uses.is_ca {
        return refuse("the leaf certificate is a CA's");
    }
    if uses.signs_certificates() || uses.signs_crls() {
        return refuse("the leaf's key usage has keyCertSign or cRLSign");
    }
    let domain = id.trust_domain();
    let Some(authorities) = bundles.0.get(&domain) else {
        return refuse(&format!("no trust bundle for trust domain {domain}"));
    };
    match check_chain(leaf, intermediates, authorities, now) {
        Ok(None) => Ok(PeerIdentity {
            not_after: svid::expiry(leaf)?,
            leaf: leaf.clone(),
            id,
        }),
        Ok(Some(result)) => refuse(&format!("certificate chain: {}", result.error_string())),
        Err(error) => Err(VerifyError::library(
            &format!("{id}: verifying the certificate chain"),
            &error,
        )),
    }
}

/// `None` when the chain leads to one of `authorities`.
fn check_chain(
    leaf: &X509Ref,
    intermediates: &[X509],
    authorities: &[X509],
    now: SystemTime,
) -> Result<Option<X509VerifyResult>, ErrorStack> {
    let mut param = X509VerifyParam::new()?;
    // An authority of a bundle is an anchor even if it is not self-signed.
    param.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
    let seconds = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    param.set_time(libc::time_t::try_from(seconds).unwrap_or(libc::time_t::MAX));
    let mut store = X509StoreBuilder::new()?;
    store.set_param(&param)?;
    for authority in authorities {
        store.add_cert(authority.clone())?;
    }
    let store = store.build();
    let mut untrusted = Stack::new()?;
    for certificate in intermediates {
        untrusted.push(certificate.clone())?;
    }
    let mut context = X509StoreContext::new()?;
    context.init(&store, leaf, &untrusted, |context| {
        let verified = context.verify_cert()?;
        Ok((!verified).then(|| context.error()))
    })
}
