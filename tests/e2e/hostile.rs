//! Bad input on the line, with running traffic: each is refused with a clear
//! word, nobody else notices, and nothing stays behind.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use grpcio::{GrpcSlice, Marshaller, MessageReader, Method, MethodType};
use meridio_lab::client::NsmClient;
use meridio_lab::datapath::LocalEndpoint;
use meridio_lab::netns::Netns;
use meridio_lab::pki::{Pki, Svid, fill_unchecked};
use meridio_lab::policy::Hop;
use meridio_lab::tls::{Alpn, Dialer};
use meridio_lab::topology::{LIMIT, TABLE, Topology, TopologyOptions};
use meridio_proxy::proto::connection::{Connection, PathSegment};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::proto::workload::{X509SVID, X509SVIDResponse};
use meridio_proxy::rpc::call::{self, Options};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::pump::{self, Item, StreamError};
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::sync::watch::Watch;

use super::{during, in_good_order, lab, lost, steady};

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(5);

/// What the daemon and its pod hold: a leak of any of these shows.
#[derive(Debug)]
pub(super) struct Held {
    descriptors: Vec<String>,
    threads: Vec<String>,
    links: Vec<String>,
    rules: usize,
    routes: usize,
    leases: usize,
}

impl Held {
    /// Nothing has come to what was `before`. Descriptors and threads may have
    /// become fewer: some of a start take a while to end.
    fn adds_nothing_to(&self, before: &Self) -> bool {
        let state = |held: &Self| (held.rules, held.routes, held.leases);
        self.descriptors.len() <= before.descriptors.len()
            && self.threads.len() <= before.threads.len()
            && self.links == before.links
            && state(self) == state(before)
    }
}

/// The pools of gRPC's C core, which grow and shrink as it likes.
const GRPC_THREADS: [&str; 5] = [
    "default-executo",
    "event_engine",
    "grpc_global_tim",
    "resolver-execut",
    "timer_manager",
];

pub(super) fn held(lab: &Topology) -> Held {
    let pid = lab.daemon().unwrap().pid();
    let sorted = |what: &str, name: &dyn Fn(PathBuf) -> io::Result<String>| {
        let entries = std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap();
        let names = entries.filter_map(|entry| name(entry.unwrap().path()).ok());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    };
    let mut links: Vec<String> = (lab.rtnl.links().unwrap().into_iter())
        .map(|link| {
            // A connection that is made anew has another random end.
            let name = link
                .name
                .rsplit_once('-')
                .map_or(&*link.name, |(name, _)| name);
            format!("{name} {:?}", link.master)
        })
        .collect();
    links.sort();
    let rules = lab.vips().iter();
    Held {
        // What it is, without its number.
        descriptors: sorted("fd", &|path| {
            let target = std::fs::read_link(path)?.display().to_string();
            Ok(target.split(":[").next().unwrap_or_default().to_owned())
        }),
        threads: {
            let name = |path: PathBuf| std::fs::read_to_string(path.join("comm"));
            let mut names = sorted("task", &|path| Ok(name(path)?.trim().to_owned()));
            names.retain(|name| !GRPC_THREADS.contains(&name.as_str()));
            names
        },
        links,
        rules: rules.map(|vip| lab.rtnl.rules(*vip).unwrap().len()).sum(),
        routes: lab.rtnl.routes(TABLE).unwrap().len(),
        leases: lab.ipam.allocations().len(),
    }
}

/// What is held comes back to what it was.
pub(super) fn assert_held(lab: &Topology, before: &Held) {
    // Addresses whose interface may still be there are kept for 20 s.
    let deadline = clock::now() + 2 * LIMIT;
    let (_stopper, pause) = stop_pair();
    loop {
        let now = held(lab);
        if now.adds_nothing_to(before) {
            return;
        }
        assert!(clock::now() < deadline, "{before:#?} became {now:#?}");
        let _ = pause.wait(Duration::from_millis(50));
    }
}

/// The daemon writes a line with all of `words` after `since`.
pub(super) fn says(lab: &Topology, since: usize, words: &[&str]) {
    let daemon = lab.daemon().unwrap();
    let all = |line: &str| words.iter().all(|word| line.contains(word));
    let line = daemon.wait_line(since, all, LIMIT);
    assert!(
        line.is_some(),
        "no line with {words:?}:\n{}",
        daemon.tail(20)
    );
}

pub(super) fn lines(lab: &Topology) -> usize {
    lab.daemon().unwrap().line_count()
}

#[test]
fn wrong_settings_are_all_reported_and_end_the_start() {
    let wrong = [
        ("NSM_MTU", "1500.5"),
        ("NSM_IPAM_SERVICE", "ipam:0"),
        ("NSM_NSP_SERVICE_PORT", "70000"),
        ("NSM_DIAL_TIMEOUT", "soon"),
        ("NSM_CONNECT_TO", "tcp://nsmgr"),
    ];
    let mut lab = Topology::peers(TopologyOptions {
        env: BTreeMap::from(wrong.map(|(name, value)| (name.to_owned(), value.to_owned()))),
        ..TopologyOptions::default()
    })
    .unwrap();
    lab.start_daemon().unwrap();
    let daemon = lab.daemon().unwrap();
    let status = daemon.wait_exit(LIMIT).unwrap();
    assert_eq!(status.code(), Some(1), "{}", daemon.tail(20));
    // The end may be known before the last line is read.
    for (name, _) in wrong {
        let said = |line: &str| line.contains(&format!("{name}="));
        let line = daemon.wait_line(0, said, SOON);
        assert!(line.is_some(), "{name}: {}", daemon.tail(20));
        let times = daemon.lines().iter().filter(|line| said(line)).count();
        assert_eq!(times, 1, "{name}: {}", daemon.tail(20));
    }
    assert!(lab.rtnl.find("bridge0").unwrap().is_none());
    assert!(lab.ipam.calls().is_empty());
}

fn bad_certificates(pki: &Pki) -> [(Svid, &'static str); 4] {
    let id = pki.id("ns/red/sa/stranger");
    [
        (pki.issue_expired(&id), "expired"),
        (
            Pki::new("elsewhere.org").issue("spiffe://elsewhere.org/a", HOUR),
            "elsewhere.org",
        ),
        (
            Pki::new("example.org").issue(&id, HOUR),
            "certificate chain",
        ),
        (pki.issue_uris(&[]), "without a URI SAN"),
    ]
}

#[test]
fn strangers_at_the_endpoint_are_refused() {
    let lab = lab(2, 2);
    let traffic = steady(&lab);
    let before = held(&lab);
    let step = during(&traffic, || {
        let socket = lab.endpoint_socket().unwrap();
        let silent: Vec<UnixStream> = (0..20)
            .map(|_| UnixStream::connect(&socket).unwrap())
            .collect();
        for (svid, reason) in bad_certificates(lab.pki()) {
            let since = lines(&lab);
            let cell = Watch::new(None);
            fill_unchecked(&cell, &svid, &[lab.pki()]);
            let dialer = Dialer {
                rpc: Rpc::new(),
                svid: cell,
                alpn: Alpn::H2,
            };
            // With TLS 1.3 the client is through before the server looks.
            let dialed = dialer.dial(&socket, clock::now() + SOON);
            says(&lab, since, &["connection refused", reason]);
            drop(dialed);
        }
        drop(silent);
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    assert_held(&lab, &before);
    in_good_order(&lab);
}

#[allow(clippy::ptr_arg, reason = "the signature that grpcio asks for")]
fn put(bytes: &Vec<u8>, out: &mut GrpcSlice) -> grpcio::Result<()> {
    *out = GrpcSlice::from(bytes.clone());
    Ok(())
}

fn take(_: MessageReader) -> grpcio::Result<Vec<u8>> {
    Ok(Vec::new())
}

/// The method of that path, with bytes that are sent as they are.
fn raw(ty: MethodType, name: &'static str) -> Method<Vec<u8>, Vec<u8>> {
    Method {
        ty,
        name,
        req_mar: Marshaller { ser: put, de: take },
        resp_mar: Marshaller { ser: put, de: take },
    }
}

/// Requests that a good NSM would not send, each with a word of the answer.
fn bad_requests() -> Vec<(NetworkServiceRequest, &'static str)> {
    let with_path = |index: u32, segments: usize| {
        let mut request = NetworkServiceRequest::default();
        let connection = request.connection.mut_or_insert_default();
        let path = connection.path.mut_or_insert_default();
        path.index = index;
        path.path_segments = vec![PathSegment::default(); segments];
        request
    };
    vec![
        (NetworkServiceRequest::default(), ""),
        (with_path(7, 1), "index"),
        (with_path(u32::MAX, 2), "index"),
        (with_path(0, 100_000), ""),
    ]
}

#[test]
fn a_known_peer_that_sends_nonsense_is_refused() {
    let lab = lab(2, 2);
    let traffic = steady(&lab);
    let before = held(&lab);
    let step = during(&traffic, || {
        let hop = Hop::new(lab.pki(), "ns/red/sa/forwarder", "forwarder", HOUR);
        let client = NsmClient::new(hop, Rpc::new());
        let session = client.dial(&lab.endpoint_socket().unwrap()).unwrap();
        let channel = &session.dialed.channel;
        let (_stopper, stop) = stop_pair();
        let options = || Options {
            headers: session.headers().unwrap(),
            ..Options::with_timeout(SOON)
        };
        // Rubbish, cut short, no wire type, groups in groups, too long.
        for garbage in [
            vec![0xff; 64],
            vec![0x0a, 0x05, 0xff],
            vec![0x0f],
            vec![0x0b; 10_000],
            vec![0x0a; 200_000],
        ] {
            for name in [method::REQUEST.name, method::CLOSE.name] {
                let method = raw(MethodType::Unary, name);
                let error = call::unary(channel, &method, &garbage, &options(), &stop);
                assert_ended(&error.map(drop).unwrap_err(), name);
            }
            let name = method::MONITOR_CONNECTIONS.name;
            let method = raw(MethodType::ServerStreaming, name);
            let pump = pump::open(channel, &method, &garbage, &options()).unwrap();
            match pump.items().recv_timeout(SOON).unwrap() {
                Item::Ended(Err(StreamError::Rpc(error))) => assert_ended(&error, name),
                other => panic!("{name} {:?}: {other:?}", &garbage[..1]),
            }
        }
        for (request, reason) in bad_requests() {
            let error = session.request(&request, &[], SOON).unwrap_err();
            assert_ended(&error, reason);
            assert!(error.to_string().contains(reason), "{reason}: {error}");
        }
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    assert_held(&lab, &before);
    in_good_order(&lab);
}

/// An answer of the daemon's, not the end of the wait for one.
fn assert_ended(error: &RpcError, what: &str) {
    let code = error.code();
    assert!(
        code.is_some() && code != Some(Code::DEADLINE_EXCEEDED) && !error.is_unavailable(),
        "{what}: {error}"
    );
}

#[test]
fn nonsense_from_nsp_and_spire_changes_nothing() {
    let lab = lab(2, 2);
    let traffic = steady(&lab);
    let before = held(&lab);
    let step = during(&traffic, || {
        let since = lines(&lab);
        let wrong = [
            "",
            "rubbish",
            "20.0.0.300/32",
            "1.2.3.4/33",
            "0.0.0.0/0",
            "::/0",
        ];
        let covering = ["172.16.0.0/24", "fd00::/64"];
        let right = lab.vips().iter().map(|vip| meridio_lab::link::host(*vip));
        let right: Vec<String> = right.map(|vip| vip.to_string()).collect();
        let all = wrong.iter().chain(&covering).copied();
        lab.nsp
            .set_vips(all.chain(right.iter().map(String::as_str)));
        for text in wrong {
            says(&lab, since, &["is refused", &format!("VIP \\\"{text}\\\"")]);
        }
        for text in covering {
            says(&lab, since, &[text, "covers"]);
        }
        lab.nsp.set_vips(right.iter().map(String::as_str));

        let since = lines(&lab);
        let mut rubbish = X509SVIDResponse::default();
        rubbish.svids.push(X509SVID {
            spiffe_id: "spiffe://example.org/a".to_owned(),
            x509_svid: vec![0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
            x509_svid_key: vec![0; 3],
            bundle: b"rubbish".to_vec(),
            ..X509SVID::default()
        });
        for response in [X509SVIDResponse::default(), rubbish] {
            lab.agent.push(response);
            says(&lab, since, &["update dropped, the old one stays"]);
        }
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    lab.agent.rotate();
    assert_held(&lab, &before);
    in_good_order(&lab);
}

/// A load balancer whose answers nobody can use.
pub(super) struct Hostile {
    name: String,
    netns: Netns,
    ifname: String,
}

impl Hostile {
    /// An endpoint that names its interface so.
    pub(super) fn endpoint(name: &str, ifname: &str) -> Arc<dyn LocalEndpoint> {
        Arc::new(Self {
            name: name.to_owned(),
            netns: Netns::new(name).unwrap(),
            ifname: ifname.to_owned(),
        })
    }
}

impl LocalEndpoint for Hostile {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn netns(&self) -> Arc<OwnedFd> {
        self.netns.fd()
    }

    fn request(&self, mut connection: Connection) -> Result<Connection, String> {
        let mechanism = connection.mechanism.mut_or_insert_default();
        mechanism
            .parameters
            .insert("name".to_owned(), self.ifname.clone());
        Ok(connection)
    }

    fn connected(&self, _connection: &Connection) {}

    fn close(&self, _connection: &Connection) {}
}

#[test]
fn a_load_balancer_that_cannot_be_connected_disturbs_nobody() {
    let lab = lab(2, 1);
    let traffic = steady(&lab);
    let before = held(&lab);
    let step = during(&traffic, || {
        let ifnames = ["", "../../proc", "a name much longer than the kernel takes"];
        for (number, ifname) in ifnames.into_iter().enumerate() {
            let since = lines(&lab);
            let name = format!("lb-hostile-{number}");
            lab.nsmgr
                .add_endpoint(&lab.lb_service(), Hostile::endpoint(&name, ifname));
            says(&lab, since, &[&name, "Request failed", "data path"]);
            lab.nsmgr.remove_endpoint(&name);
        }
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    assert_held(&lab, &before);
    assert_eq!(lab.infra.leaked().unwrap(), 0);
}
