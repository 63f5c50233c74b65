//! Each thing that is refused, or noted although it is not, once. That the real
//! nsmgr answers the same is what `make interop` checks.

use std::sync::Arc;

use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::proto::registry::NetworkServiceEndpointQuery;
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::pump::Item;

use super::endpoint::network_service;
use super::rig::{LIMIT, Rig, soon};
use super::*;
use crate::client::{Headers, NsmClient};
use crate::forwarder::mechanism;
use crate::policy::{EXPIRES_HEADER, TOKEN_HEADER};
use crate::tls::Alpn;

const SHORT: Duration = Duration::from_millis(300);

fn tampered(rig: &Rig, tamper: impl Fn(&mut Headers) + Send + Sync + 'static) -> NsmClient {
    NsmClient {
        tamper: Some(Arc::new(tamper)),
        ..rig.client.clone()
    }
}

/// Something was refused for this reason.
fn assert_refused(rig: &Rig, text: &str) {
    rig.nsmgr.wait_refusal(text, soon()).unwrap();
}

/// Clients with a wrong envelope each, what is said of it, and whether a policy
/// refuses it.
fn wrong_envelopes(rig: &Rig) -> Vec<(&'static str, bool, NsmClient)> {
    let other = Hop::new(&rig.pki, "other", "other", LIMIT);
    let nsmgr = rig.nsmgr.inner().hop.clone();
    let expired = Hop {
        lifetime: Duration::ZERO,
        ..rig.client.hop.clone()
    };
    let set = |name: &'static str, value: String| {
        move |headers: &mut Headers| {
            headers
                .iter_mut()
                .find(|(n, _)| n == name)
                .unwrap()
                .1
                .clone_from(&value);
        }
    };
    let foreign = other.token(&nsmgr.as_peer()).unwrap().jwt;
    let elsewhere = rig.client.hop.token(&other.as_peer()).unwrap().jwt;
    let late = expired.token(&nsmgr.as_peer()).unwrap().jwt;
    // Rotated after the handshake: right ID, other key.
    let rotated = Hop::new(&rig.pki, "ns/default/sa/meridio-proxy", "client", LIMIT);
    let rotated = rotated.token(&nsmgr.as_peer()).unwrap().jwt;
    vec![
        (
            "nsm-client-token is there 0",
            true,
            tampered(rig, |h| h.retain(|(n, _)| n != TOKEN_HEADER)),
        ),
        (
            "expires is there 0",
            true,
            tampered(rig, |h| h.retain(|(n, _)| n != EXPIRES_HEADER)),
        ),
        ("is there 2", true, tampered(rig, |h| h.push(h[0].clone()))),
        (
            "RFC 3339",
            true,
            tampered(rig, set(EXPIRES_HEADER, "soon".into())),
        ),
        (
            "later than a certificate",
            false,
            tampered(rig, set(EXPIRES_HEADER, "2100-01-01T00:00:00Z".into())),
        ),
        (
            "in the past",
            false,
            tampered(rig, set(EXPIRES_HEADER, "2001-01-01T00:00:00Z".into())),
        ),
        (
            "three parts",
            true,
            tampered(rig, set(TOKEN_HEADER, "x".into())),
        ),
        ("sub", true, tampered(rig, set(TOKEN_HEADER, foreign))),
        ("aud", true, tampered(rig, set(TOKEN_HEADER, elsewhere))),
        (
            "tokens_expired",
            true,
            tampered(rig, set(TOKEN_HEADER, late)),
        ),
        (
            "not signed by the TLS peer",
            true,
            tampered(rig, set(TOKEN_HEADER, rotated)),
        ),
    ]
}

#[test]
fn envelopes() {
    let rig = Rig::new();
    for (want, refused, client) in wrong_envelopes(&rig) {
        let session = client.dial(&rig.socket()).unwrap();
        let answer = rig.request(&session, rig.new_connection("c1", "lb-1"));
        if refused {
            let error = answer.unwrap_err();
            let code = error.code();
            assert_eq!(code, Some(Code::PERMISSION_DENIED), "{want}: {error}");
        } else {
            session.close(&answer.unwrap(), LIMIT).unwrap();
        }
        assert_refused(&rig, want);
    }
    assert!(rig.nsmgr.connections().is_empty());
}

#[test]
fn streams_are_noted_only() {
    let rig = Rig::new();
    let client = tampered(&rig, |h| h.retain(|(n, _)| n != TOKEN_HEADER));
    let session = client.dial(&rig.socket()).unwrap();
    let monitor = session.monitor(&rig.selector("c1")).unwrap();
    let first = monitor.items().recv_timeout(LIMIT).unwrap();
    assert!(matches!(first, Item::Message(_)), "{first:?}");
    assert_refused(&rig, "MonitorConnections: header nsm-client-token");
}

/// A token for two is one that the policy cannot be evaluated for.
#[test]
fn a_token_for_two() {
    let rig = Rig::new();
    let own = rig.client.hop.identity().svid.id.as_str().to_owned();
    let nsmgr = rig.nsmgr.inner().hop.identity().svid.id.as_str().to_owned();
    let claims = serde_json::json!({"sub": own, "aud": [nsmgr, "x"], "exp": 4_000_000_000_u64});
    let token = crate::policy::tests::unsigned(&claims);
    let client = tampered(&rig, move |headers| {
        let found = headers.iter_mut().find(|(n, _)| n == TOKEN_HEADER);
        found.unwrap().1.clone_from(&token);
    });
    let session = client.dial(&rig.socket()).unwrap();
    let error = rig
        .request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap_err();
    assert_eq!(error.code(), Some(Code::INTERNAL), "{error}");
    assert_refused(&rig, "eval_conflict_error");
}

#[test]
fn sessions() {
    let rig = Rig::new();
    let client = NsmClient {
        alpn: Alpn::Absent,
        ..rig.client.clone()
    };
    let session = client.dial(&rig.socket()).unwrap();
    rig.request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap_err();
    assert_refused(&rig, "ALPN");

    // Same name, another authority; it trusts nsmgr, which does not trust it.
    let stranger = Pki::new("td");
    let svid = stranger.issue(&stranger.id("ns/default/sa/meridio-proxy"), LIMIT);
    let hop = Hop::new(&rig.pki, "x", "client", LIMIT);
    crate::pki::fill(&hop.svid, &svid, &[&rig.pki]);
    let session = NsmClient::new(hop, Rpc::new()).dial(&rig.socket()).unwrap();
    rig.request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap_err();
    assert_refused(&rig, "peer certificate");

    // And a client refuses a server that it does not trust.
    let hop = Hop::new(&stranger, "x", "client", LIMIT);
    let refused = NsmClient::new(hop, Rpc::new())
        .dial(&rig.socket())
        .err()
        .unwrap();
    assert!(
        refused.to_string().contains("peer certificate"),
        "{refused}"
    );
}

type Change = fn(&mut NetworkServiceRequest);

fn connection(request: &mut NetworkServiceRequest) -> &mut Connection {
    request.connection.mut_or_insert_default()
}

/// What is said, with which code, of a Request that was changed so; with OK it
/// is noted only.
const WRONG_REQUESTS: [(&str, Code, Change); 14] = [
    ("prev_token_signed", Code::PERMISSION_DENIED, |r| {
        r.connection.clear();
    }),
    ("prev_token_signed", Code::PERMISSION_DENIED, |r| {
        connection(r).path.clear();
    }),
    ("should be equal", Code::UNKNOWN, |r| {
        connection(r).id = "x".into();
    }),
    ("should be less", Code::UNKNOWN, |r| {
        connection(r).path.mut_or_insert_default().index = 7;
    }),
    ("is not found", Code::UNKNOWN, |r| {
        connection(r).network_service = "x".into();
    }),
    ("is not found", Code::UNKNOWN, |r| {
        connection(r).payload = "IP".into();
    }),
    ("lb-9 is not found", Code::UNKNOWN, |r| {
        connection(r).network_service_endpoint_name = "lb-9".into();
    }),
    ("collapse", Code::OK, |r| {
        connection(r).network_service_endpoint_name.clear();
    }),
    ("cannot support", Code::UNKNOWN, |r| {
        r.mechanism_preferences.clear();
    }),
    ("cannot support", Code::UNKNOWN, |r| {
        r.mechanism_preferences[0].type_ = "VXLAN".into();
    }),
    ("cls", Code::OK, |r| {
        r.mechanism_preferences[0].cls = "REMOTE".into();
    }),
    ("interface name", Code::UNKNOWN, |r| {
        let name = "sixteen-bytes-xx".to_owned();
        r.mechanism_preferences[0]
            .parameters
            .insert("name".into(), name);
    }),
    ("is not inode://", Code::UNKNOWN, |r| {
        let url = "file:///proc/self/ns/net".to_owned();
        r.mechanism_preferences[0]
            .parameters
            .insert("inodeURL".into(), url);
    }),
    ("", Code::DEADLINE_EXCEEDED, |r| {
        r.mechanism_preferences[0] = mechanism("nsm-1", "inode://1/1");
    }),
];

#[test]
fn requests() {
    let rig = Rig::new();
    let session = rig.session();
    for (want, code, change) in WRONG_REQUESTS {
        let mut request = NetworkServiceRequest {
            connection: Some(rig.new_connection("c1", "lb-1")).into(),
            mechanism_preferences: rig.preferences(),
            ..Default::default()
        };
        change(&mut request);
        let waits = code == Code::DEADLINE_EXCEEDED;
        let limit = if waits { SHORT } else { LIMIT };
        let answer = session.request(&request, &[&rig.netns], limit);
        if code == Code::OK {
            session.close(&answer.unwrap(), LIMIT).unwrap();
            assert_refused(&rig, want);
            continue;
        }
        let error = answer.unwrap_err();
        assert_eq!(error.code(), Some(code), "{want}: {error}");
        assert!(error.to_string().contains(want), "{want}: {error}");
    }
    assert!(rig.nsmgr.connections().is_empty());
}

#[test]
fn a_call_without_a_deadline() {
    let rig = Rig::new();
    let session = rig.session();
    let mut metadata = grpcio::MetadataBuilder::new();
    for (name, value) in session.headers().unwrap() {
        metadata.add_str(&name, &value).unwrap();
    }
    let option = grpcio::CallOption::default().headers(metadata.build());
    let client = grpcio::Client::new(session.dialed.channel.clone());
    let connection = rig.new_connection("c1", "lb-1");
    let mut call = client
        .unary_call_async(&method::CLOSE, &connection, option)
        .unwrap();
    call.receive_sync().unwrap();
    assert_refused(&rig, "without a deadline");
}

#[test]
fn a_descriptor_that_never_comes() {
    let rig = Rig::new();
    let session = rig.session();
    let request = NetworkServiceRequest {
        connection: Some(rig.new_connection("c1", "lb-1")).into(),
        mechanism_preferences: rig.preferences(),
        ..Default::default()
    };
    let limit = Duration::from_secs(1);
    let error = session.request(&request, &[], limit).unwrap_err();
    assert_eq!(error.code(), Some(Code::DEADLINE_EXCEEDED), "{error}");
    assert_refused(&rig, "timeout in recvfd");
    rig.request(&session, rig.new_connection("c2", "lb-1"))
        .unwrap();
    // From now on it is there, for calls of this connection only.
    let up = session.request(&request, &[], LIMIT).unwrap();
    session.close(&up, LIMIT).unwrap();
    // It counts for the connection that it came on only.
    let other = rig.session();
    let error = other.request(&request, &[], SHORT).unwrap_err();
    assert_eq!(error.code(), Some(Code::DEADLINE_EXCEEDED), "{error}");
}

#[test]
fn violations_are_noted() {
    let rig = Rig::new();
    let session = rig.session();
    let up = rig
        .request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap();
    let mut moved = up.clone();
    let ip = moved
        .context
        .mut_or_insert_default()
        .ip_context
        .mut_or_insert_default();
    ip.src_ip_addrs.push("10.0.0.1/32".to_owned());
    let up = rig.request(&session, moved).unwrap();
    assert_refused(&rig, "other addresses");
    let mut changed = up.clone();
    changed.mechanism.clear();
    changed.mechanism = Some(mechanism("other", "")).into();
    changed.mechanism.mut_or_insert_default().parameters = rig.preferences()[0].parameters.clone();
    let name = "other".to_owned();
    changed
        .mechanism
        .mut_or_insert_default()
        .parameters
        .insert("name".into(), name);
    rig.request(&session, changed).unwrap();
    assert_refused(&rig, "mechanism was not sent again");
    rig.request(&session, rig.new_connection("c1", "lb-1"))
        .unwrap();
    assert_refused(&rig, "second connection");
}

type ChangeEndpoint = fn(&mut meridio_proxy::proto::registry::NetworkServiceEndpoint);

/// What is said of an endpoint that was changed so, and whether it is refused.
const WRONG_ENDPOINTS: [(&str, bool, ChangeEndpoint); 9] = [
    ("DNS-1123", false, |e| e.name = "Proxy_1".into()),
    ("without a name", true, |e| e.name.clear()),
    ("with passed URL", true, |e| e.url.clear()),
    ("with passed URL", true, |e| e.url = "%".into()),
    ("is not inode://", false, |e| {
        e.url = "unix:///tmp/listen.on".into();
    }),
    ("is not inode://", true, |e| e.url = "inode://x/y".into()),
    ("no network service", false, |e| {
        e.network_service_names.clear();
    }),
    ("no labels", false, |e| e.network_service_labels.clear()),
    ("DEADLINE", true, |e| e.url = "inode://1/1".into()),
];

#[test]
fn registrations() {
    let rig = Rig::new();
    let proxy = rig.proxy();
    let good = proxy.registration();
    let session = rig.session();
    session.register_service(&network_service(), LIMIT).unwrap();
    let file = [&proxy.file];

    // The path header.
    for bad in ["no JSON", "[]"] {
        let client = tampered(&rig, move |h| h.push(("path".into(), bad.into())));
        let session = client.dial(&rig.socket()).unwrap();
        let error = session.register_endpoint(&good, &file, LIMIT).unwrap_err();
        assert_eq!(error.code(), Some(Code::PERMISSION_DENIED), "{error}");
        assert_refused(&rig, "path is absent or no JSON");
    }

    // The message.
    for (want, refused, change) in WRONG_ENDPOINTS {
        let mut endpoint = good.clone();
        change(&mut endpoint);
        let limit = if want == "DEADLINE" { SHORT } else { LIMIT };
        let answer = session.register_endpoint(&endpoint, &file, limit);
        if refused {
            let error = answer.unwrap_err().to_string();
            assert!(error.contains(want), "{want}: {error}");
        } else {
            answer.unwrap();
            assert_refused(&rig, want);
            session
                .unregister_endpoint(&endpoint, &file, limit)
                .unwrap();
        }
    }

    // A descriptor that leads to no endpoint.
    let mut wrong = good.clone();
    wrong.url = crate::forwarder::netns_url(&rig.netns).unwrap();
    session
        .register_endpoint(&wrong, &[&rig.netns], LIMIT)
        .unwrap();
    assert_refused(&rig, "socket of endpoint");
    session
        .unregister_endpoint(&wrong, &[&rig.netns], LIMIT)
        .unwrap();

    // Somebody else's names.
    session.register_endpoint(&good, &file, LIMIT).unwrap();
    let other = NsmClient::new(Hop::new(&rig.pki, "other", "other", LIMIT), Rpc::new());
    let other = other.dial(&rig.socket()).unwrap();
    let errors = [
        other.register_service(&network_service(), LIMIT).map(drop),
        other.register_endpoint(&good, &file, LIMIT).map(drop),
        other.unregister_endpoint(&good, &file, LIMIT),
    ];
    for error in errors {
        assert_eq!(error.unwrap_err().code(), Some(Code::PERMISSION_DENIED));
        assert_refused(&rig, "client_allowed");
    }
    assert_eq!(rig.nsmgr.registered(super::rig::PROXY_SERVICE), ["proxy-1"]);
}

#[test]
fn find_without_a_filter() {
    let rig = Rig::new();
    let session = rig.session();
    let finds = session
        .find_endpoints(&NetworkServiceEndpointQuery::new())
        .unwrap();
    let end = finds.items().recv_timeout(LIMIT).unwrap();
    assert!(matches!(end, Item::Ended(Ok(()))), "{end:?}");
    assert_refused(&rig, "without a filter");
}
