//! Each thing that is refused, once.

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

#[test]
fn envelopes() {
    let rig = Rig::new();
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
    let cases: Vec<(&str, NsmClient)> = vec![
        (
            "nsm-client-token is there 0",
            tampered(&rig, |h| h.retain(|(n, _)| n != TOKEN_HEADER)),
        ),
        (
            "expires is there 0",
            tampered(&rig, |h| h.retain(|(n, _)| n != EXPIRES_HEADER)),
        ),
        ("is there 2", tampered(&rig, |h| h.push(h[0].clone()))),
        (
            "RFC 3339",
            tampered(&rig, set(EXPIRES_HEADER, "soon".into())),
        ),
        (
            "later than a certificate",
            tampered(&rig, set(EXPIRES_HEADER, "2100-01-01T00:00:00Z".into())),
        ),
        (
            "in the past",
            tampered(&rig, set(EXPIRES_HEADER, "2001-01-01T00:00:00Z".into())),
        ),
        ("three parts", tampered(&rig, set(TOKEN_HEADER, "x".into()))),
        ("sub", tampered(&rig, set(TOKEN_HEADER, foreign))),
        ("aud", tampered(&rig, set(TOKEN_HEADER, elsewhere))),
        ("tokens_expired", tampered(&rig, set(TOKEN_HEADER, late))),
        (
            "not signed by the TLS peer",
            tampered(&rig, set(TOKEN_HEADER, rotated)),
        ),
    ];
    for (want, client) in cases {
        let session = client.dial(&rig.socket()).unwrap();
        let error = rig
            .request(&session, rig.new_connection("c1", "lb-1"))
            .unwrap_err();
        assert_eq!(
            error.code(),
            Some(Code::PERMISSION_DENIED),
            "{want}: {error}"
        );
        assert_refused(&rig, want);
        // Streams carry the same envelope.
        let monitor = session.monitor(&rig.selector("c1")).unwrap();
        let Item::Ended(Err(error)) = monitor.items().recv_timeout(LIMIT).unwrap() else {
            panic!("{want}: monitor accepted");
        };
        assert!(error.to_string().contains("PERMISSION_DENIED"), "{error}");
    }
    assert!(rig.nsmgr.connections().is_empty());
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

#[test]
fn requests() {
    let rig = Rig::new();
    let session = rig.session();
    type Change = fn(&mut NetworkServiceRequest);
    fn connection(request: &mut NetworkServiceRequest) -> &mut Connection {
        request.connection.mut_or_insert_default()
    }
    let cases: [(&str, Code, Change); 14] = [
        ("without a connection", Code::INVALID_ARGUMENT, |r| {
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
        ("collapse", Code::INVALID_ARGUMENT, |r| {
            connection(r).network_service_endpoint_name.clear();
        }),
        ("cannot support", Code::INVALID_ARGUMENT, |r| {
            r.mechanism_preferences.clear();
        }),
        ("cannot support", Code::INVALID_ARGUMENT, |r| {
            r.mechanism_preferences[0].type_ = "VXLAN".into();
        }),
        ("cls", Code::INVALID_ARGUMENT, |r| {
            r.mechanism_preferences[0].cls = "REMOTE".into();
        }),
        ("interface name", Code::INVALID_ARGUMENT, |r| {
            let name = "sixteen-bytes-xx".to_owned();
            r.mechanism_preferences[0]
                .parameters
                .insert("name".into(), name);
        }),
        ("is not inode://", Code::INVALID_ARGUMENT, |r| {
            let url = "file:///proc/self/ns/net".to_owned();
            r.mechanism_preferences[0]
                .parameters
                .insert("inodeURL".into(), url);
        }),
        ("", Code::DEADLINE_EXCEEDED, |r| {
            r.mechanism_preferences[0] = mechanism("nsm-1", "inode://1/1");
        }),
    ];
    for (want, code, change) in cases {
        let mut request = NetworkServiceRequest {
            connection: Some(rig.new_connection("c1", "lb-1")).into(),
            mechanism_preferences: rig.preferences(),
            ..Default::default()
        };
        change(&mut request);
        let waits = code == Code::DEADLINE_EXCEEDED;
        let limit = if waits { SHORT } else { LIMIT };
        let error = session.request(&request, &[&rig.netns], limit).unwrap_err();
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
    let error = RpcError::from(call.receive_sync().unwrap_err());
    assert_eq!(error.code(), Some(Code::INVALID_ARGUMENT), "{error}");
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
    type Change = fn(&mut meridio_proxy::proto::registry::NetworkServiceEndpoint);
    let cases: [(&str, Change); 7] = [
        ("DNS-1123", |e| e.name = "Proxy_1".into()),
        ("DNS-1123", |e| e.name.clear()),
        ("with passed URL", |e| e.url.clear()),
        ("is not inode://", |e| {
            e.url = "unix:///tmp/listen.on".into();
        }),
        ("no network service", |e| e.network_service_names.clear()),
        ("no labels", |e| e.network_service_labels.clear()),
        ("DEADLINE", |e| e.url = "inode://1/1".into()),
    ];
    for (want, change) in cases {
        let mut endpoint = good.clone();
        change(&mut endpoint);
        let limit = if want == "DEADLINE" { SHORT } else { LIMIT };
        let error = session
            .register_endpoint(&endpoint, &file, limit)
            .unwrap_err();
        assert!(error.to_string().contains(want), "{want}: {error}");
    }

    // A descriptor that leads to no endpoint.
    let mut wrong = good.clone();
    wrong.url = crate::forwarder::netns_url(&rig.netns).unwrap();
    let error = session
        .register_endpoint(&wrong, &[&rig.netns], LIMIT)
        .unwrap_err();
    assert!(error.to_string().contains("socket of endpoint"), "{error}");

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
    let Item::Ended(Err(error)) = finds.items().recv_timeout(LIMIT).unwrap() else {
        panic!("Find without a filter accepted");
    };
    assert!(error.to_string().contains("without a filter"), "{error}");
    assert_refused(&rig, "without a filter");
}
