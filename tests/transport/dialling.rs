//! What a connector makes of its resolver, and what it says of failures.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::bounded;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::transport::client::{
    Address, Connector, ConnectorOptions, ConnectorState, Resolve, close_all,
};

use crate::lines;
use crate::rig::{CLIENT_ID, HOUR, Rig, soon};

/// Connects to `name:1`, which `resolve` knows.
fn connect(
    rig: &Rig,
    name: &'static str,
    dial_timeout: Duration,
    svid: SvidCell,
    resolve: impl Fn() -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
) -> Connector {
    let options = ConnectorOptions {
        name,
        address: Address::Tcp {
            host: name.to_owned(),
            port: 1,
        },
        authority: "localhost".to_owned(),
        dial_timeout,
        backoff_max: Duration::from_millis(20),
    };
    let resolve: Arc<Resolve> = Arc::new(move |host: &str, port| {
        assert_eq!((host, port), (name, 1));
        resolve()
    });
    Connector::start_with(&rig.threads, &rig.rpc, svid, options, resolve).unwrap()
}

fn port(address: &Address) -> u16 {
    match address {
        Address::Tcp { port, .. } => *port,
        Address::Unix(_) => panic!("{address}"),
    }
}

/// With a dead server in resolv.conf each name takes five seconds.
#[test]
fn a_slow_resolver_takes_no_time_from_the_peer() {
    lines::start();
    let rig = Rig::new();
    let (_server, address) = rig.serve_tcp(rig.server_cell());
    let at = SocketAddr::from(([127, 0, 0, 1], port(&address)));
    let (_stopper, pause) = stop_pair();
    let limit = Duration::from_millis(1100);
    let connector = connect(&rig, "slow", limit, rig.client_cell(), move || {
        let _ = pause.wait(Duration::from_millis(1300));
        Ok(vec![at])
    });
    let connection = rig.acquire(&connector);
    rig.echo(&connection, "n", &[]).unwrap();
    let said = lines::of("slow");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("resolving the name in slow:1 took 1."));
}

#[test]
fn each_reason_is_said_once_though_the_old_connection_is_good() {
    lines::start();
    let rig = Rig::new();
    let (_server, address) = rig.serve_tcp(rig.server_cell());
    let good = SocketAddr::from(([127, 0, 0, 1], port(&address)));
    let resolved = Arc::new(AtomicUsize::new(0));
    let (tx, dialled) = bounded(100);
    let svid = rig.client_cell();
    let connector = connect(&rig, "turns", Duration::from_secs(5), svid.clone(), {
        let resolved = Arc::clone(&resolved);
        move || {
            let _ = tx.try_send(());
            Ok(vec![match resolved.fetch_add(1, Ordering::Relaxed) {
                0 => good,
                // Nobody listens there.
                odd if odd % 2 == 1 => SocketAddr::from(([127, 0, 0, 2], 1)),
                _ => SocketAddr::from(([127, 0, 0, 3], 1)),
            }])
        }
    });
    let old = rig.acquire(&connector);
    rig.pki.refill(&svid, CLIENT_ID, HOUR);
    for _ in 0..8 {
        dialled.recv_deadline(soon()).unwrap();
    }
    rig.echo(&old, "n", &[]).unwrap();
    assert_eq!(connector.state().get(), ConnectorState::Ready);
    let said = lines::of("turns");
    assert_eq!(said.len(), 2, "{said:#?}");
    assert!(said[0].contains("127.0.0.2:1") && said[1].contains("127.0.0.3:1"));
}

/// One that cannot be stopped leaves no less time to the others.
#[test]
fn connections_are_closed_at_the_same_time() {
    let rig = Rig::new();
    let (release, held) = bounded::<()>(0);
    let (tx, resolving) = bounded(100);
    let nothing = || Err(io::Error::other("no such name"));
    let limit = Duration::from_secs(5);
    let deaf = connect(&rig, "deaf", limit, rig.client_cell(), move || {
        let _ = tx.try_send(());
        let _ = held.recv_timeout(Duration::from_secs(20));
        nothing()
    });
    let others = ["one", "two"].map(|name| connect(&rig, name, limit, rig.client_cell(), nothing));
    resolving.recv_deadline(soon()).unwrap();
    let [one, two] = others;
    let begun = clock::now();
    let late = close_all(&[deaf, one, two], begun + Duration::from_secs(1));
    assert_eq!(late, ["conn-deaf"]);
    assert!(begun.elapsed() < Duration::from_secs(3));
    drop(release);
}

/// What a path can be before nsmgr makes its socket there, or when somebody
/// has written the wrong one.
#[test]
fn a_path_without_a_listener_says_why_and_is_dialled_until_there_is_one() {
    let rig = Rig::new();
    let path = rig.path("peer.sock");
    type Make = fn(&Path) -> io::Result<()>;
    let nothing: Make = |_| Ok(());
    let directory: Make = |path| std::fs::create_dir(path);
    let file: Make = |path| std::fs::write(path, "precious");
    let stale: Make = |path| UnixListener::bind(path).map(drop);
    for (make, why) in [
        (nothing, "No such file or directory"),
        (directory, "Connection refused"),
        (file, "Connection refused"),
        (stale, "Connection refused"),
    ] {
        make(&path).unwrap();
        let connector = rig.connect_unix(rig.client_cell(), &path);
        let said = rig.refusal(&connector);
        assert!(said.contains("peer.sock") && said.contains(why), "{said}");
        let moved = path.with_extension("old");
        if path.exists() {
            std::fs::rename(&path, &moved).unwrap();
        }
        let server = rig.serve(rig.server_cell(), &path);
        let connection = rig.acquire(&connector);
        rig.echo(&connection, "n", &[]).unwrap();
        if moved.is_file() {
            assert_eq!(std::fs::read_to_string(&moved).unwrap(), "precious");
        }
        drop((connection, connector));
        assert!(server.stop(soon()).is_empty());
        if moved.is_dir() {
            std::fs::remove_dir(&moved).unwrap();
        }
    }
    let long = rig.path(&"x".repeat(108));
    let connector = rig.connect_unix(rig.client_cell(), &long);
    let said = rig.refusal(&connector);
    assert!(said.contains("1 to 107 bytes"), "{said}");
}
