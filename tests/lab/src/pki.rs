//! A certificate authority per trust domain, and the SVIDs it issues: good
//! ones, and each kind of bad one that a peer must refuse.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meridio_proxy::spiffe::{Bundles, Identity, Svid as OwnSvid, SvidCell, TrustDomain};
use meridio_proxy::sync::watch::Watch;
use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, KeyUsage, SubjectAlternativeName,
    SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509Name, X509Ref};

/// An SVID in the form in which the Workload API hands it out.
#[derive(Clone, Debug)]
pub struct Svid {
    /// The ID that the agent names beside the certificate.
    pub id: String,
    /// Certificates back to back, leaf first.
    pub chain_der: Vec<u8>,
    /// PKCS#8, unencrypted.
    pub key_pkcs8_der: Vec<u8>,
    /// The authorities of the issuing trust domain, back to back.
    pub bundle_der: Vec<u8>,
}

/// The kind of an SVID's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    P256,
    P384,
    Rsa2048,
}

/// Everything that can be chosen about a leaf; [`Recipe::good`] is what SPIRE
/// issues.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// URI SANs in order.
    pub uris: Vec<String>,
    /// Seconds from now (negative: in the past).
    pub not_before: i64,
    /// Seconds from now (negative: expired).
    pub not_after: i64,
    pub key: KeyKind,
    /// CA flag of the basic constraints.
    pub ca: bool,
    pub digital_signature: bool,
    pub key_cert_sign: bool,
    pub crl_sign: bool,
    /// Issue through an intermediate CA, which is part of the chain.
    pub intermediate: bool,
    /// Leave the intermediate out of the chain.
    pub hide_intermediate: bool,
}

impl Recipe {
    #[must_use]
    pub fn good(id: &str, ttl: Duration) -> Self {
        Self {
            uris: vec![id.to_owned()],
            not_before: -10,
            not_after: i64::try_from(ttl.as_secs()).unwrap(),
            key: KeyKind::P256,
            ca: false,
            digital_signature: true,
            key_cert_sign: false,
            crl_sign: false,
            intermediate: false,
            hide_intermediate: false,
        }
    }
}

/// The authority of one trust domain. Two of the same name are strangers to
/// each other: right ID, wrong CA.
#[derive(Clone)]
pub struct Pki {
    trust_domain: String,
    key: PKey<Private>,
    root: X509,
}

impl Pki {
    #[must_use]
    pub fn new(trust_domain: &str) -> Self {
        let key = new_key(KeyKind::P256);
        let root = ca_certificate(&format!("{trust_domain} root"), &key, None);
        Self {
            trust_domain: trust_domain.to_owned(),
            key,
            root,
        }
    }

    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// `spiffe://<trust domain>/<path>`.
    #[must_use]
    pub fn id(&self, path: &str) -> String {
        format!("spiffe://{}/{path}", self.trust_domain)
    }

    /// The authorities, back to back.
    #[must_use]
    pub fn bundle_der(&self) -> Vec<u8> {
        self.root.to_der().unwrap()
    }

    /// A good P-256 SVID for a whole SPIFFE ID.
    #[must_use]
    pub fn issue(&self, id: &str, ttl: Duration) -> Svid {
        self.issue_with(&Recipe::good(id, ttl))
    }

    /// An SVID that has been expired for a minute.
    #[must_use]
    pub fn issue_expired(&self, id: &str) -> Svid {
        let mut recipe = Recipe::good(id, Duration::ZERO);
        recipe.not_before = -3600;
        recipe.not_after = -60;
        self.issue_with(&recipe)
    }

    /// An SVID with these URI SANs: none, several, or no SPIFFE ID.
    #[must_use]
    pub fn issue_uris(&self, uris: &[&str]) -> Svid {
        let mut recipe = Recipe::good("", Duration::from_secs(3600));
        recipe.uris = uris.iter().map(|&uri| uri.to_owned()).collect();
        self.issue_with(&recipe)
    }

    /// An SVID with another kind of key, with which NSM tokens cannot be
    /// signed.
    #[must_use]
    pub fn issue_key(&self, id: &str, ttl: Duration, key: KeyKind) -> Svid {
        let mut recipe = Recipe::good(id, ttl);
        recipe.key = key;
        self.issue_with(&recipe)
    }

    /// Whatever `recipe` says.
    #[must_use]
    pub fn issue_with(&self, recipe: &Recipe) -> Svid {
        let key = new_key(recipe.key);
        let mut chain_der = Vec::new();
        if recipe.intermediate {
            let ca_key = new_key(KeyKind::P256);
            let ca = ca_certificate(
                &format!("{} intermediate", self.trust_domain),
                &ca_key,
                Some((&self.root, &self.key)),
            );
            chain_der.extend(leaf(recipe, &key, &ca, &ca_key).to_der().unwrap());
            if !recipe.hide_intermediate {
                chain_der.extend(ca.to_der().unwrap());
            }
        } else {
            chain_der.extend(leaf(recipe, &key, &self.root, &self.key).to_der().unwrap());
        }
        Svid {
            id: recipe.uris.first().cloned().unwrap_or_default(),
            chain_der,
            key_pkcs8_der: key.private_key_to_pkcs8().unwrap(),
            bundle_der: self.bundle_der(),
        }
    }

    /// A cell with a good identity, for a peer that shall have nothing to do
    /// with the Workload API.
    #[must_use]
    pub fn cell(&self, id: &str, ttl: Duration) -> SvidCell {
        let cell = Watch::new(None);
        self.refill(&cell, id, ttl);
        cell
    }

    /// Puts a new SVID for `id` into the cell, as a rotation does.
    pub fn refill(&self, cell: &SvidCell, id: &str, ttl: Duration) {
        fill(cell, &self.issue(id, ttl), &[self]);
    }
}

/// Puts `svid` into the cell, with the bundles of `trusted`. The generation is
/// one more than before.
pub fn fill(cell: &SvidCell, svid: &Svid, trusted: &[&Pki]) {
    let own = OwnSvid::from_der(&svid.chain_der, &svid.key_pkcs8_der).unwrap();
    fill_own(cell, own, trusted);
}

/// [`fill`] without the checks that the daemon makes of its own SVID: for
/// hostile peers, whose certificates break the rules.
pub fn fill_unchecked(cell: &SvidCell, svid: &Svid, trusted: &[&Pki]) {
    // The ID is only a label here; the certificate is what the peer sees.
    let label = trusted
        .first()
        .map_or_else(|| Pki::new("label"), |&pki| pki.clone());
    let stand_in = label.issue(&label.id("hostile"), Duration::from_secs(3600));
    let mut own = OwnSvid::from_der(&stand_in.chain_der, &stand_in.key_pkcs8_der).unwrap();
    own.chain = certificates(&svid.chain_der);
    own.key = PKey::private_key_from_pkcs8(&svid.key_pkcs8_der).unwrap();
    fill_own(cell, own, trusted);
}

fn fill_own(cell: &SvidCell, svid: OwnSvid, trusted: &[&Pki]) {
    let mut bundles = Bundles::default();
    for pki in trusted {
        let domain = TrustDomain::parse(&pki.trust_domain).unwrap();
        bundles.insert_der(domain, &pki.bundle_der()).unwrap();
    }
    let generation = cell.get().map_or(1, |identity| identity.generation + 1);
    cell.set(Some(Arc::new(Identity {
        svid,
        bundles,
        generation,
    })));
}

fn certificates(mut der: &[u8]) -> Vec<X509> {
    let mut all = Vec::new();
    while !der.is_empty() {
        // All certificates here are longer than 255 bytes: 0x30 0x82 and two
        // bytes of length.
        assert_eq!(&der[..2], &[0x30, 0x82]);
        let end = 4 + usize::from(u16::from_be_bytes([der[2], der[3]]));
        all.push(X509::from_der(&der[..end]).unwrap());
        der = &der[end..];
    }
    all
}

fn new_key(kind: KeyKind) -> PKey<Private> {
    let ec = |nid| {
        let group = EcGroup::from_curve_name(nid).unwrap();
        PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
    };
    match kind {
        KeyKind::P256 => ec(Nid::X9_62_PRIME256V1),
        KeyKind::P384 => ec(Nid::SECP384R1),
        KeyKind::Rsa2048 => PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap(),
    }
}

fn name(organisation: &str, common: &str) -> X509Name {
    let mut name = X509Name::builder().unwrap();
    name.append_entry_by_nid(Nid::ORGANIZATIONNAME, organisation)
        .unwrap();
    name.append_entry_by_nid(Nid::COMMONNAME, common).unwrap();
    name.build()
}

/// A certificate without its extensions; valid from `not_before` to
/// `not_after`, in seconds from now.
fn begin(
    subject: &X509Name,
    issuer: &X509Name,
    key: &PKey<Private>,
    not_before: i64,
    not_after: i64,
) -> X509Builder {
    let mut serial = BigNum::new().unwrap();
    serial.rand(159, MsbOption::MAYBE_ZERO, false).unwrap();
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let at = |offset| Asn1Time::from_unix(i64::try_from(now).unwrap() + offset).unwrap();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    builder
        .set_serial_number(&serial.to_asn1_integer().unwrap())
        .unwrap();
    builder.set_subject_name(subject).unwrap();
    builder.set_issuer_name(issuer).unwrap();
    builder.set_pubkey(key).unwrap();
    builder.set_not_before(&at(not_before)).unwrap();
    builder.set_not_after(&at(not_after)).unwrap();
    builder
}

fn add_key_ids(builder: &mut X509Builder, issuer: Option<&X509Ref>) {
    let context = builder.x509v3_context(issuer, None);
    let subject = SubjectKeyIdentifier::new().build(&context).unwrap();
    let authority = issuer.map(|_| {
        AuthorityKeyIdentifier::new()
            .keyid(true)
            .build(&context)
            .unwrap()
    });
    builder.append_extension(subject).unwrap();
    if let Some(authority) = authority {
        builder.append_extension(authority).unwrap();
    }
}

fn ca_certificate(
    common: &str,
    key: &PKey<Private>,
    issuer: Option<(&X509, &PKey<Private>)>,
) -> X509 {
    // A leaf with its issuer's subject would be taken for self-signed by
    // OpenSSL, so the CA's organisation is not that of the leaves.
    let subject = name("SPIFFE", common);
    let issuer_name = issuer.map_or_else(
        || subject.to_owned().unwrap(),
        |(certificate, _)| certificate.subject_name().to_owned().unwrap(),
    );
    let mut builder = begin(&subject, &issuer_name, key, -7200, 86_400);
    builder
        .append_extension(BasicConstraints::new().critical().ca().build().unwrap())
        .unwrap();
    let usage = KeyUsage::new()
        .critical()
        .key_cert_sign()
        .crl_sign()
        .build()
        .unwrap();
    builder.append_extension(usage).unwrap();
    add_key_ids(&mut builder, issuer.map(|(certificate, _)| &**certificate));
    let signer = issuer.map_or(key, |(_, key)| key);
    builder.sign(signer, MessageDigest::sha256()).unwrap();
    builder.build()
}

fn leaf(recipe: &Recipe, key: &PKey<Private>, ca: &X509, ca_key: &PKey<Private>) -> X509 {
    let subject = name("SPIRE", "workload");
    let mut builder = begin(
        &subject,
        &ca.subject_name().to_owned().unwrap(),
        key,
        recipe.not_before,
        recipe.not_after,
    );
    let mut constraints = BasicConstraints::new();
    constraints.critical();
    if recipe.ca {
        constraints.ca();
    }
    builder
        .append_extension(constraints.build().unwrap())
        .unwrap();
    let mut usage = KeyUsage::new();
    usage.critical().key_agreement();
    if recipe.digital_signature {
        usage.digital_signature();
    }
    if recipe.key_cert_sign {
        usage.key_cert_sign();
    }
    if recipe.crl_sign {
        usage.crl_sign();
    }
    builder.append_extension(usage.build().unwrap()).unwrap();
    add_key_ids(&mut builder, Some(ca));
    let mut names = SubjectAlternativeName::new();
    // Names of other kinds are to be ignored.
    names.dns("workload.example");
    for uri in &recipe.uris {
        names.uri(uri);
    }
    let names = names
        .build(&builder.x509v3_context(Some(ca), None))
        .unwrap();
    builder.append_extension(names).unwrap();
    builder.sign(ca_key, MessageDigest::sha256()).unwrap();
    builder.build()
}
