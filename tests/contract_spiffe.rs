//! Identities: parsing, verification and tokens against certificates of the
//! lab's authorities, and the `svid-watch` thread against the lab's agent.
#![allow(missing_docs)]

use std::time::{Duration, SystemTime};

use meridio_lab::pki::{KeyKind, Pki, Recipe, Svid as Issued};
use meridio_proxy::spiffe::{Bundles, PeerIdentity, Svid, TrustDomain, jwt, verify};
use meridio_proxy::sync::clock;
use openssl::x509::X509;

const HOUR: Duration = Duration::from_secs(3600);

fn bundles(trusted: &[&Pki]) -> Bundles {
    let mut bundles = Bundles::default();
    for pki in trusted {
        bundles
            .insert_der(
                TrustDomain::parse(pki.trust_domain()).unwrap(),
                &pki.bundle_der(),
            )
            .unwrap();
    }
    bundles
}

fn chain(svid: &Issued) -> Vec<X509> {
    let mut parsed = Bundles::default();
    let domain = TrustDomain::parse("x").unwrap();
    parsed.insert_der(domain.clone(), &svid.chain_der).unwrap();
    parsed.0.remove(&domain).unwrap()
}

fn peer(svid: &Issued, trusted: &[&Pki]) -> Result<PeerIdentity, String> {
    verify::verify_peer(&chain(svid), &bundles(trusted), clock::wall())
        .map_err(|error| error.to_string())
}

fn recipe(pki: &Pki, change: impl FnOnce(&mut Recipe)) -> Issued {
    let mut recipe = Recipe::good(&pki.id("ns/a"), HOUR);
    change(&mut recipe);
    pki.issue_with(&recipe)
}

#[test]
fn accepts_good_peers() {
    let pki = Pki::new("td");
    let other = Pki::new("other");
    let good = peer(&pki.issue("spiffe://td/ns/a", HOUR), &[&pki]).unwrap();
    assert_eq!(good.id.as_str(), "spiffe://td/ns/a");
    let left = good.not_after.duration_since(clock::wall()).unwrap();
    assert!(left > HOUR - Duration::from_secs(30) && left <= HOUR);
    for svid in [
        recipe(&pki, |r| r.key = KeyKind::Rsa2048),
        recipe(&pki, |r| r.key = KeyKind::P384),
        recipe(&pki, |r| r.intermediate = true),
        // Only the own SVID needs these two.
        recipe(&pki, |r| r.digital_signature = false),
        pki.issue("spiffe://td", HOUR),
        // A federated trust domain.
        other.issue("spiffe://other/b", HOUR),
    ] {
        peer(&svid, &[&pki, &other]).unwrap();
    }
}

#[test]
fn refuses_bad_peers() {
    let pki = Pki::new("td");
    let namesake = Pki::new("td");
    let other = Pki::new("other");
    let table = [
        (pki.issue_expired("spiffe://td/a"), "expired"),
        (recipe(&pki, |r| r.not_before = 60), "not yet valid"),
        (namesake.issue("spiffe://td/a", HOUR), "certificate chain"),
        // An authority vouches only for its own trust domain.
        (pki.issue("spiffe://other/a", HOUR), "certificate chain"),
        (pki.issue("spiffe://third/a", HOUR), "no trust bundle"),
        (pki.issue_uris(&[]), "without a URI SAN"),
        (
            pki.issue_uris(&["spiffe://td/a", "spiffe://td/b"]),
            "2 URI SANs",
        ),
        (pki.issue_uris(&["https://td/a"]), "scheme"),
        (pki.issue_uris(&["spiffe://TD/a"]), "trust domain"),
        (recipe(&pki, |r| r.ca = true), "CA's"),
        (recipe(&pki, |r| r.key_cert_sign = true), "keyCertSign"),
        (recipe(&pki, |r| r.crl_sign = true), "cRLSign"),
        (
            recipe(&pki, |r| {
                r.intermediate = true;
                r.hide_intermediate = true;
            }),
            "certificate chain",
        ),
    ];
    for (svid, reason) in table {
        let error = match peer(&svid, &[&pki, &other]) {
            Ok(peer) => panic!("{} was accepted, expected {reason:?}", peer.id),
            Err(error) => error,
        };
        assert!(error.contains(reason), "{error:?} lacks {reason:?}");
    }
    let empty = verify::verify_peer(&[], &bundles(&[&pki]), clock::wall());
    assert!(empty.is_err());
}

#[test]
fn checks_the_own_svid() {
    let pki = Pki::new("td");
    let own = |svid: &Issued| {
        Svid::from_der(&svid.chain_der, &svid.key_pkcs8_der)
            .map(|svid| svid.chain.len())
            .map_err(|error| error.to_string())
    };
    assert_eq!(own(&pki.issue("spiffe://td/a", HOUR)).unwrap(), 1);
    assert_eq!(own(&recipe(&pki, |r| r.intermediate = true)).unwrap(), 2);
    let mut stolen = pki.issue("spiffe://td/a", HOUR);
    stolen.key_pkcs8_der = pki.issue("spiffe://td/a", HOUR).key_pkcs8_der;
    let mut no_key = pki.issue("spiffe://td/a", HOUR);
    no_key.key_pkcs8_der.truncate(20);
    let mut cut = pki.issue("spiffe://td/a", HOUR);
    cut.chain_der.pop();
    let mut two_leaves = pki.issue("spiffe://td/a", HOUR);
    two_leaves.chain_der.extend(two_leaves.chain_der.clone());
    let mut nothing = pki.issue("spiffe://td/a", HOUR);
    nothing.chain_der.clear();
    let table = [
        (stolen, "not the one of the certificate"),
        (no_key, "reading the key"),
        (cut, "cut short"),
        (two_leaves, "no CA"),
        (nothing, "without a certificate"),
        (pki.issue("spiffe://td", HOUR), "without a path"),
        (pki.issue_uris(&[]), "without a URI SAN"),
        (recipe(&pki, |r| r.ca = true), "CA's"),
        (
            recipe(&pki, |r| r.digital_signature = false),
            "digitalSignature",
        ),
        (recipe(&pki, |r| r.key_cert_sign = true), "keyCertSign"),
    ];
    for (svid, reason) in table {
        let error = own(&svid).unwrap_err();
        assert!(error.contains(reason), "{error:?} lacks {reason:?}");
    }
}

fn own(svid: &Issued) -> Svid {
    Svid::from_der(&svid.chain_der, &svid.key_pkcs8_der).unwrap()
}

#[test]
fn tokens_are_signed_claimed_and_bounded() {
    let pki = Pki::new("td");
    let issued = pki.issue("spiffe://td/us", HOUR);
    let us = own(&issued);
    let our_leaf = us.chain[0].clone();
    let short = peer(&pki.issue("spiffe://td/nsmgr", HOUR / 4), &[&pki]).unwrap();
    let now = clock::wall();
    let seconds = |at: SystemTime| {
        i64::try_from(at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap()
    };

    let token = jwt::sign(&us, &short, HOUR / 2, now).unwrap();
    jwt::verify(&token.jwt, &our_leaf).unwrap();
    let claims = jwt::claims(&token.jwt).unwrap();
    assert_eq!(claims.sub, "spiffe://td/us");
    assert_eq!(claims.aud.unwrap(), ["spiffe://td/nsmgr"]);
    // The peer's certificate bounds the header, not the claim.
    assert_eq!(claims.exp.unwrap(), seconds(now + HOUR / 2));
    assert_eq!(token.expires, short.not_after);

    let long = jwt::sign(&us, &short, HOUR * 24, now).unwrap();
    assert_eq!(
        jwt::claims(&long.jwt).unwrap().exp.unwrap(),
        seconds(us.not_after)
    );

    assert!(jwt::verify(&token.jwt, &short.leaf).is_err(), "other key");
    let (signed, signature) = token.jwt.rsplit_once('.').unwrap();
    let (header, payload) = signed.split_once('.').unwrap();
    let swapped = jwt::sign(&us, &short, HOUR / 3, now).unwrap().jwt;
    let other_payload = swapped.split('.').nth(1).unwrap();
    assert!(jwt::verify(&format!("{header}.{other_payload}.{signature}"), &our_leaf).is_err());
    // {"alg":"none"} and {"alg":"HS256"}
    for header in ["eyJhbGciOiJub25lIn0", "eyJhbGciOiJIUzI1NiJ9"] {
        assert!(jwt::verify(&format!("{header}.{payload}.{signature}"), &our_leaf).is_err());
    }
    assert!(jwt::verify(&format!("{signed}."), &our_leaf).is_err());
}

#[test]
fn signatures_have_a_fixed_length() {
    // One in 128 has a leading zero byte in r or s.
    let pki = Pki::new("td");
    let us = own(&pki.issue("spiffe://td/us", HOUR));
    let nsmgr = peer(&pki.issue("spiffe://td/nsmgr", HOUR), &[&pki]).unwrap();
    for _ in 0..600 {
        let token = jwt::sign(&us, &nsmgr, HOUR, clock::wall()).unwrap();
        assert_eq!(token.jwt.rsplit_once('.').unwrap().1.len(), 86);
        jwt::verify(&token.jwt, &us.chain[0]).unwrap();
    }
}

#[test]
fn only_p256_signs_tokens() {
    let pki = Pki::new("td");
    let nsmgr = peer(&pki.issue("spiffe://td/nsmgr", HOUR), &[&pki]).unwrap();
    for kind in [KeyKind::P384, KeyKind::Rsa2048] {
        let us = own(&pki.issue_key("spiffe://td/us", HOUR, kind));
        let error = jwt::sign(&us, &nsmgr, HOUR, clock::wall()).unwrap_err();
        assert!(error.to_string().contains("P-256"), "{error}");
    }
}
