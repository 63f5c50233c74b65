//! The probe thread's view of a peer whose connection is replaced.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    dead_code,
    reason = "helpers of tests end by panicking too"
)]

#[path = "transport/tap.rs"]
mod tap;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use grpcio::{Service, ServiceBuilder};
use meridio_lab::pki::Pki;
use meridio_proxy::health::probe::{self, ProbeOptions};
use meridio_proxy::health::{HealthCell, ProbeService, SubService};
use meridio_proxy::proto::health::HealthCheckResponse;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method::HEALTH_CHECK;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{Joined, Threads};
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions, ConnectorState};
use meridio_proxy::transport::server::{PeerTable, TlsServer};
use parking_lot::Mutex;

use tap::Tap;

const HOUR: Duration = Duration::from_secs(3600);

fn soon() -> Instant {
    clock::now() + Duration::from_secs(10)
}

/// Leaves the first question unanswered; tells of each.
fn slow(asked: Sender<()>) -> Service {
    let held = Arc::new(Mutex::new(None));
    ServiceBuilder::new()
        .add_unary_handler(&HEALTH_CHECK, move |context, _, sink| {
            let _ = asked.try_send(());
            let mut held = held.lock();
            if held.is_none() {
                *held = Some(sink);
                return;
            }
            let answered = sink.success(HealthCheckResponse::default());
            context.spawn(async move {
                let _ = answered.await;
            });
        })
        .build()
}

fn serve(threads: &Threads, rpc: &Rpc, pki: &Pki, path: &Path, service: Service) -> TlsServer {
    TlsServer::start(
        threads,
        rpc,
        pki.cell("spiffe://td/server", HOUR),
        path.to_owned(),
        PeerTable::default(),
        vec![service],
    )
    .unwrap()
}

fn connect(threads: &Threads, rpc: &Rpc, cell: &SvidCell, path: &Path) -> Connector {
    let options = ConnectorOptions {
        name: "peer",
        address: Address::Unix(path.to_owned()),
        authority: "localhost".to_owned(),
        dial_timeout: Duration::from_secs(5),
        backoff_max: Duration::from_millis(20),
    };
    Connector::start(threads, rpc, cell.clone(), options).unwrap()
}

/// The question that was under way on a connection ends with it; that says
/// nothing about the peer at the end of the next one.
#[test]
fn a_question_that_was_lost_with_its_connection_is_asked_again() {
    let (rpc, threads, pki) = (Rpc::new(), Threads::unsupervised(), Pki::new("td"));
    let directory = std::env::temp_dir().join(format!("probe-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path: PathBuf = directory.join("s.sock");
    let (asked, was_asked) = bounded(10);
    let behind = directory.join("behind.sock");
    let server = serve(&threads, &rpc, &pki, &behind, slow(asked.clone()));
    let tap = Tap::start(&threads, &path, &behind);
    let svid = pki.cell("spiffe://td/client", HOUR);
    let ipam = connect(&threads, &rpc, &svid, &path);
    let changed = ipam.state().subscribe();
    while ipam.state().get() != ConnectorState::Ready {
        changed.recv_deadline(soon()).unwrap();
    }
    let nsp = connect(&threads, &rpc, &SvidCell::new(None), &path);
    let cell = HealthCell::new();
    let mut thread = probe::start(
        &threads,
        &rpc,
        SvidCell::new(None),
        cell.clone(),
        ProbeOptions {
            ipam: ipam.clone(),
            nsp: nsp.clone(),
            keepalive: HOUR,
            endpoint: directory.join("nobody.sock"),
            endpoint_timeout: Duration::from_secs(1),
        },
    )
    .unwrap();
    was_asked.recv_deadline(soon()).unwrap();
    let successor = serve(&threads, &rpc, &pki, &path, slow(asked));
    tap.cut();
    was_asked.recv_deadline(soon()).unwrap();
    // What the thread had found before it asked is in the cell by then.
    assert_eq!(thread.join_by(soon()), Joined::Yes);
    assert!(cell.serving(ProbeService::Sub(SubService::IpamCli)));
    ipam.close(soon());
    nsp.close(soon());
    successor.stop(clock::now());
    server.stop(clock::now());
    let _ = std::fs::remove_dir_all(directory);
}
