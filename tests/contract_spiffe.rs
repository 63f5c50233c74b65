//! Identities: parsing, verification and tokens against certificates of the
//! lab's authorities, and the `svid-watch` thread against the lab's agent.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use grpcio::{RpcStatus, RpcStatusCode};
use meridio_lab::agent::{self, Agent};

use meridio_lab::pki::{KeyKind, Pki, Recipe, Svid as Issued};
use meridio_proxy::proto::workload::X509SVIDResponse;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::spiffe::workload::{self, WorkloadAddress};
use meridio_proxy::spiffe::{
    Bundles, Identity, PeerIdentity, Svid, SvidCell, TrustDomain, jwt, verify,
};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{Joined, ThreadHandle, Threads};
use meridio_proxy::sync::watch::Watch;
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

/// A `svid-watch` with its agent.
struct Rig {
    cell: SvidCell,
    thread: ThreadHandle,
    agent: Agent,
    pki: Pki,
    _rpc: Rpc,
}

static NEXT: AtomicUsize = AtomicUsize::new(0);

fn socket() -> PathBuf {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("ms-{}-{number}.sock", std::process::id()))
}

fn soon() -> Instant {
    clock::now() + Duration::from_secs(10)
}

/// Waits until the cell's value is as wanted.
fn until<T: Clone>(cell: &Watch<T>, wanted: impl Fn(&T) -> bool) -> T {
    let changed = cell.subscribe();
    let deadline = soon();
    loop {
        changed.recv_deadline(deadline).unwrap();
        let value = cell.get();
        if wanted(&value) {
            return value;
        }
    }
}

impl Rig {
    fn start(prepare: impl FnOnce(&mut Agent)) -> Self {
        let path = socket();
        let pki = Pki::new("td");
        let mut agent = Agent::start(&path, &pki, "spiffe://td/us", HOUR);
        prepare(&mut agent);
        let cell: SvidCell = Watch::new(None);
        let rpc = Rpc::new();
        let thread = workload::start(
            &Threads::unsupervised(),
            &rpc,
            WorkloadAddress::Unix(path),
            cell.clone(),
        )
        .unwrap();
        Self {
            cell,
            thread,
            agent,
            pki,
            _rpc: rpc,
        }
    }

    fn generation(&self, wanted: u64) -> Arc<Identity> {
        until(&self.cell, |identity| {
            identity.as_ref().is_some_and(|i| i.generation >= wanted)
        })
        .unwrap()
    }

    fn stop(mut self) {
        let start = clock::now();
        assert_eq!(self.thread.join_by(soon()), Joined::Yes);
        assert!(clock::now() - start < Duration::from_millis(200));
        until(self.agent.open_streams(), |&open| open == 0);
    }
}

#[test]
fn every_rotation_replaces_the_identity() {
    let rig = Rig::start(|_| {});
    let first = rig.generation(1);
    assert_eq!(first.svid.id.as_str(), "spiffe://td/us");
    let serial = |identity: &Identity| identity.svid.chain[0].to_der().unwrap();
    for round in 2..20 {
        let before = rig.generation(round - 1);
        rig.agent.rotate();
        let after = rig.generation(round);
        assert_eq!(after.generation, round);
        assert_ne!(serial(&before), serial(&after));
    }
    rig.agent.set_id("spiffe://td/renamed");
    rig.agent.rotate();
    assert_eq!(rig.generation(20).svid.id.as_str(), "spiffe://td/renamed");
    rig.stop();
}

#[test]
fn bundles_are_replaced_as_a_whole() {
    let rig = Rig::start(|_| {});
    let domains = |identity: &Identity| -> Vec<String> {
        identity.bundles.0.keys().map(ToString::to_string).collect()
    };
    assert_eq!(domains(&rig.generation(1)), ["td"]);
    let (friend, guest) = (Pki::new("friend"), Pki::new("guest"));
    rig.agent.set_federated(&[&friend, &guest]);
    let federated = rig.generation(2);
    assert_eq!(domains(&federated), ["friend", "guest", "td"]);
    let from_friend = chain(&friend.issue("spiffe://friend/a", HOUR));
    let judge = |identity: &Identity| {
        verify::verify_peer(&from_friend, &identity.bundles, clock::wall()).is_ok()
    };
    assert!(judge(&federated));
    rig.agent.set_federated(&[&guest]);
    let less = rig.generation(3);
    assert_eq!(domains(&less), ["guest", "td"]);
    assert!(!judge(&less));

    // Another authority of the own trust domain.
    let renewed = Pki::new("td");
    rig.agent.set_pki(&renewed);
    let identity = rig.generation(4);
    let accepts = |pki: &Pki| {
        let presented = chain(&pki.issue("spiffe://td/a", HOUR));
        verify::verify_peer(&presented, &identity.bundles, clock::wall()).is_ok()
    };
    assert!(accepts(&renewed) && !accepts(&rig.pki));

    // An empty bundle is allowed: then nobody is trusted.
    let mut response = rig.agent.current();
    response.svids[0].bundle.clear();
    response.federated_bundles.clear();
    rig.agent.push(response);
    let identity = rig.generation(5);
    assert_eq!(identity.bundles.0.len(), 1);
    assert!(identity.bundles.0.values().all(Vec::is_empty));
    rig.stop();
}

#[test]
fn a_bad_update_keeps_the_old_identity() {
    let rig = Rig::start(|_| {});
    let good = rig.agent.current();
    let first = rig.generation(1);
    let change = |change: &dyn Fn(&mut X509SVIDResponse)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad
    };
    let stolen = rig.pki.issue("spiffe://td/us", HOUR).key_pkcs8_der;
    let second = agent::response(&rig.pki.issue_uris(&[]), &[])
        .svids
        .remove(0);
    for bad in [
        X509SVIDResponse::default(),
        change(&|r| r.svids[0].spiffe_id = "spiffe://td/another".to_owned()),
        change(&|r| r.svids[0].spiffe_id = "td/us".to_owned()),
        change(&|r| r.svids[0].x509_svid.truncate(30)),
        change(&|r| r.svids[0].x509_svid.clear()),
        change(&|r| r.svids[0].x509_svid_key.clear()),
        change(&|r| r.svids[0].x509_svid_key = stolen.clone()),
        change(&|r| r.svids[0].bundle = vec![0x30, 9, 1]),
        change(&|r| {
            r.federated_bundles
                .insert("spiffe://Bad".to_owned(), Vec::new());
        }),
        change(&|r| {
            r.federated_bundles
                .insert("spiffe://friend".to_owned(), vec![1]);
        }),
        // All of them must be good.
        change(&|r| r.svids.push(second.clone())),
    ] {
        rig.agent.push(bad);
    }
    // What comes next in the same stream is taken, and is the second only.
    rig.agent.rotate();
    let next = rig.generation(2);
    assert_eq!(next.generation, 2);
    assert!(!Arc::ptr_eq(&first, &next));
    assert_eq!(rig.agent.calls().get(), 1, "the stream went on");
    rig.stop();
}

#[test]
fn the_first_svid_is_the_identity() {
    let rig = Rig::start(|agent| {
        let other = Pki::new("other");
        let mut response = agent.current();
        let second = other.issue("spiffe://other/second", HOUR);
        response.svids.extend(agent::response(&second, &[]).svids);
        response.svids[0].hint = "x".to_owned();
        // A repeated hint is left out, however bad it is.
        response.svids[1].hint = "x".to_owned();
        response.svids[1].x509_svid.clear();
        let third = other.issue("spiffe://other/third", HOUR);
        response.svids.extend(agent::response(&third, &[]).svids);
        agent.push(response);
    });
    let identity = rig.generation(1);
    assert_eq!(identity.svid.id.as_str(), "spiffe://td/us");
    assert_eq!(identity.bundles.0.len(), 2);
    rig.stop();
}

#[test]
fn an_identity_that_comes_late_is_taken() {
    let rig = Rig::start(|agent| agent.withhold(true));
    until(rig.agent.calls(), |&calls| calls >= 1);
    assert!(rig.cell.get().is_none());
    rig.agent.withhold(false);
    // Tried again after a second.
    rig.generation(1);
    rig.agent.withhold(true);
    until(rig.agent.calls(), |&calls| calls >= 3);
    // What was issued stays in force.
    assert_eq!(rig.cell.get().unwrap().generation, 1);
    rig.stop();
}

#[test]
fn a_broken_stream_or_agent_is_survived() {
    let mut rig = Rig::start(|_| {});
    rig.generation(1);
    rig.agent.drop_streams();
    until(rig.agent.calls(), |&calls| calls >= 2);
    rig.agent.rotate();
    assert_eq!(rig.generation(2).generation, 2);
    rig.agent.stop();
    assert_eq!(rig.cell.get().unwrap().generation, 2);
    rig.agent.restart();
    until(rig.agent.calls(), |&calls| calls >= 3);
    rig.agent.rotate();
    assert_eq!(rig.generation(3).generation, 3);
    rig.stop();
}

/// Each replacement has all connections made anew.
#[test]
fn what_was_said_already_replaces_nothing() {
    let rig = Rig::start(|agent| agent.set_federated(&[&Pki::new("friend")]));
    let (first, said) = (rig.generation(1), rig.agent.current());
    rig.agent.push(said.clone());
    // The same SVID with other bundles is something else.
    let mut alone = said;
    alone.federated_bundles.clear();
    rig.agent.push(alone);
    let second = rig.generation(2);
    assert_eq!(second.bundles.0.len(), 1, "the second is the first again");
    assert!(first.svid.chain == second.svid.chain);
    rig.stop();
}

#[test]
fn starts_before_the_agent_does() {
    let mut rig = Rig::start(Agent::stop);
    assert!(rig.cell.get().is_none());
    rig.agent.restart();
    rig.generation(1);
    rig.stop();
}

#[test]
fn stops_at_once_during_a_pause() {
    let rig = Rig::start(|_| {});
    rig.generation(1);
    // go-spiffe would never call again after this; we pause for long.
    rig.agent.end_streams(RpcStatus::with_message(
        RpcStatusCode::INVALID_ARGUMENT,
        "no".to_owned(),
    ));
    until(rig.agent.open_streams(), |&open| open == 0);
    rig.stop();
}
