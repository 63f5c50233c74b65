use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use grpcio::ServiceBuilder;
use meridio_proxy::nsm::caller::NsmCaller;
use meridio_proxy::proto::registry::NetworkServiceQuery;
use meridio_proxy::rpc::call::Options;
use meridio_proxy::rpc::method::{NS_FIND, NS_REGISTER};
use meridio_proxy::rpc::pump::{self, Item};
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::{Stop, stop_pair};
use meridio_proxy::sync::watch::Watch;
use meridio_proxy::transport::client::ConnectorState;
use meridio_proxy::transport::error::{ConnectError, ServerError};
use meridio_proxy::transport::server::{PeerTable, TlsServer};

use parking_lot::Mutex;

use crate::rig::{HOUR, Rig, named, soon};
use crate::tap::Tap;

const INSTANT: Duration = Duration::from_millis(500);

#[test]
fn calls_go_on_after_the_server_restarts() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let caller = NsmCaller::new(connector, HOUR);
    for round in 0..10 {
        let server = rig.serve(rig.server_cell(), &path);
        for call in 0..5 {
            caller
                .unary(&NS_REGISTER, &named("n"), &[], &Vec::new, soon(), &rig.stop)
                .unwrap_or_else(|error| panic!("round {round}, call {call}: {error}"));
        }
        // Half of them without time for running calls.
        if round % 2 == 0 {
            server.stop(soon());
        }
    }
}

#[test]
fn parallel_calls_go_on_after_restarts_under_load() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let done = AtomicUsize::new(0);
    let restarts = 12;
    // Outlives the callers.
    let mut server = rig.serve(rig.server_cell(), &path);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let caller = NsmCaller::new(connector.clone(), HOUR);
            let (rig, done) = (&rig, &done);
            scope.spawn(move || {
                while done.load(Ordering::Acquire) == 0 {
                    caller
                        .unary(&NS_REGISTER, &named("n"), &[], &Vec::new, soon(), &rig.stop)
                        .unwrap();
                }
            });
        }
        for _ in 0..restarts {
            rig.acquire(&connector);
            let old = std::mem::replace(&mut server, {
                // The socket's file is taken over, as by a successor.
                rig.serve(rig.server_cell(), &path)
            });
            old.stop(clock::now());
        }
        rig.acquire(&connector);
        done.store(1, Ordering::Release);
    });
}

/// A server that takes calls and never answers.
fn serve_silent(rig: &Rig, path: &Path, taken: Sender<()>) -> TlsServer {
    let held = Arc::new(Mutex::new(Vec::new()));
    let service = ServiceBuilder::new()
        .add_unary_handler(&NS_REGISTER, move |_, _, sink| {
            held.lock().push(sink);
            let _ = taken.try_send(());
        })
        .build();
    TlsServer::start(
        &rig.threads,
        &rig.rpc,
        rig.server_cell(),
        path.to_owned(),
        PeerTable::default(),
        vec![service],
    )
    .unwrap()
}

#[test]
fn a_call_whose_connection_is_lost_is_made_again() {
    let rig = Rig::new();
    let (front, back) = (rig.path("front.sock"), rig.path("back.sock"));
    let (taken, took) = bounded(1);
    let _silent = serve_silent(&rig, &back, taken);
    let tap = Tap::start(&rig.threads, &front, &back);
    let caller = NsmCaller::new(rig.connect_unix(rig.client_cell(), &front), HOUR);
    let attempts = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let call = scope.spawn(|| {
            let descriptors = || {
                attempts.fetch_add(1, Ordering::Relaxed);
                vec![File::open("/proc/version").unwrap().into()]
            };
            caller.unary(
                &NS_REGISTER,
                &named("n"),
                &[],
                &descriptors,
                soon(),
                &rig.stop,
            )
        });
        took.recv_deadline(soon()).unwrap();
        let _answers = rig.serve(rig.server_cell(), &front);
        tap.cut();
        let reply = call.join().unwrap().unwrap();
        assert_eq!(reply.message.name, "n");
    });
    // A new connection wants the descriptors again.
    assert_eq!(attempts.load(Ordering::Relaxed), 2);
}

#[test]
fn a_call_ends_at_its_deadline_and_when_stopped() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let (taken, took) = bounded(1);
    let silent = serve_silent(&rig, &path, taken);
    let caller = NsmCaller::new(rig.connect_unix(rig.client_cell(), &path), HOUR);
    let (stopper, stop) = stop_pair();
    let call = |deadline, stop: &Stop| {
        caller.unary(&NS_REGISTER, &named("n"), &[], &Vec::new, deadline, stop)
    };
    let error = call(clock::now() + INSTANT, &rig.stop).unwrap_err();
    assert_eq!(error.code(), Some(Code::DEADLINE_EXCEEDED));
    took.recv_deadline(soon()).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| call(soon(), &stop));
        took.recv_deadline(soon()).unwrap();
        let start = clock::now();
        stopper.stop();
        assert_eq!(waiting.join().unwrap().unwrap_err(), RpcError::Cancelled);
        assert!(clock::now() - start < INSTANT);
        // That nobody answered them does not keep the server.
        // Nobody answers the second attempt either.
        let call = scope.spawn(|| call(clock::now() + 2 * INSTANT, &rig.stop));
        took.recv_deadline(soon()).unwrap();
        let start = clock::now();
        silent.stop(start);
        assert!(clock::now() - start < INSTANT);
        let code = call.join().unwrap().err().and_then(|error| error.code());
        assert!(
            matches!(code, Some(Code::CANCELLED | Code::UNAVAILABLE)),
            "{code:?}"
        );
    });
}

#[test]
fn acquire_says_what_is_wrong_and_can_be_stopped() {
    let rig = Rig::new();
    let path = rig.path("nobody.sock");
    let connector = rig.connect_unix(rig.client_cell(), &path);
    rig.refusal(&connector);
    let error = connector
        .acquire(clock::now() + Duration::from_millis(20), &rig.stop)
        .err();
    let Some(ConnectError::Deadline(text)) = error else {
        panic!("{error:?}");
    };
    assert!(text.contains("nobody.sock"), "{text}");

    let (stopper, stop) = stop_pair();
    stopper.stop();
    assert_eq!(
        connector.acquire(soon(), &stop).err(),
        Some(ConnectError::Stopped)
    );
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| connector.acquire(soon(), &rig.stop).err());
        connector.close(soon());
        assert_eq!(waiting.join().unwrap(), Some(ConnectError::Stopped));
    });
    let (caller, start) = (NsmCaller::new(connector, HOUR), clock::now());
    let error = caller
        .unary(&NS_REGISTER, &named("n"), &[], &Vec::new, soon(), &rig.stop)
        .unwrap_err();
    assert_eq!(error, RpcError::Cancelled);
    assert!(clock::now() - start < INSTANT);
}

#[test]
fn without_an_identity_nothing_is_dialled() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let cell: SvidCell = Watch::new(None);
    let connector = rig.connect_unix(cell.clone(), &path);
    let caller = NsmCaller::new(connector.clone(), HOUR);
    let deadline = clock::now() + Duration::from_millis(30);
    let error = caller
        .unary(
            &NS_REGISTER,
            &named("n"),
            &[],
            &Vec::new,
            deadline,
            &rig.stop,
        )
        .unwrap_err();
    assert_eq!(error.code(), Some(Code::UNAVAILABLE));
    assert_eq!(
        connector.state().get(),
        ConnectorState::Connecting { last_error: None }
    );
    rig.pki.refill(&cell, "spiffe://td/late", HOUR);
    rig.acquire(&connector);
    assert_eq!(connector.state().get(), ConnectorState::Ready);
}

#[test]
fn closing_is_quick_in_every_state() {
    let rig = Rig::new();
    let path = rig.path("silent.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let served = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &served);
    let connected = rig.connect_unix(rig.client_cell(), &served);
    rig.acquire(&connected);
    let pausing = rig.connect_unix(rig.client_cell(), &rig.path("nobody"));
    rig.refusal(&pausing);
    for connector in [
        connected,
        pausing,
        // In the handshake, for up to 5 s.
        rig.connect_unix(rig.client_cell(), &path),
        // Without an identity.
        rig.connect_unix(Watch::new(None), &served),
    ] {
        let start = clock::now();
        connector.close(soon());
        connector.close(soon());
        drop(connector);
        assert!(clock::now() - start < INSTANT);
    }
    // The last clone does the same.
    let start = clock::now();
    drop(rig.connect_unix(rig.client_cell(), &path));
    assert!(clock::now() - start < INSTANT);
}

#[test]
fn a_server_stops_in_time_with_streams_open() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    let query = NetworkServiceQuery {
        network_service: Some(named("x")).into(),
        ..Default::default()
    };
    let stream = pump::open(connection.channel(), &NS_FIND, &query, &Options::default()).unwrap();
    let item = stream.items().recv_deadline(soon()).unwrap();
    assert!(matches!(item, Item::Message(_)));
    let start = clock::now();
    server.stop(start + Duration::from_millis(200));
    assert!(clock::now() - start < Duration::from_millis(200) + INSTANT);
    assert!(!path.exists());
    let item = stream.items().recv_deadline(soon()).unwrap();
    assert!(matches!(item, Item::Ended(Err(_))), "{item:?}");
    assert!(!connection.is_usable());
}

/// An answer may still lie between gRPC and the relay when the last call ends.
#[test]
fn an_answer_given_before_the_stop_arrives() {
    let rig = Rig::new();
    for round in 0..20 {
        let path = rig.path("s.sock");
        let (taken, took) = bounded(1);
        let service = ServiceBuilder::new()
            .add_unary_handler(&NS_REGISTER, move |context, mut request, sink| {
                let _ = taken.try_send(());
                request.name = request.name.repeat(3);
                let answered = sink.success(request);
                context.spawn(async move {
                    let _ = answered.await;
                });
            })
            .build();
        let peers = PeerTable::default();
        let (cell, at) = (rig.server_cell(), path.clone());
        let server =
            TlsServer::start(&rig.threads, &rig.rpc, cell, at, peers, vec![service]).unwrap();
        let connector = rig.connect_unix(rig.client_cell(), &path);
        let connection = rig.acquire(&connector);
        std::thread::scope(|scope| {
            let name = "n".repeat(100_000);
            let (rig, connection) = (&rig, &connection);
            let call = scope.spawn(move || rig.echo(connection, &name, &[]));
            took.recv_deadline(soon()).unwrap();
            server.stop(soon());
            let reply = call.join().unwrap();
            let reply = reply.unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert_eq!(reply.message.name.len(), 300_000);
        });
    }
}

#[test]
fn an_idle_server_stops_at_once() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    rig.echo(&connection, "n", &[]).unwrap();
    let start = clock::now();
    server.stop(soon());
    assert!(clock::now() - start < INSTANT);
    // Dropped without being stopped, it does the same.
    let server = rig.serve(rig.server_cell(), &path);
    rig.acquire(&connector);
    let start = clock::now();
    drop(server);
    assert!(clock::now() - start < INSTANT);
}

fn listen(rig: &Rig, path: &Path) -> Result<TlsServer, ServerError> {
    TlsServer::start(
        &rig.threads,
        &rig.rpc,
        rig.server_cell(),
        path.to_owned(),
        PeerTable::default(),
        Vec::new(),
    )
}

#[test]
fn the_socket_is_made_as_peers_need_it() {
    let rig = Rig::new();
    let path = rig.path("a/b/s.sock");
    let server = listen(&rig, &path).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o777);
    drop(server);
    assert!(!path.exists());

    // A stale one is replaced.
    drop(UnixListener::bind(&path).unwrap());
    let server = listen(&rig, &path).unwrap();
    // One that a successor made stays.
    fs::remove_file(&path).unwrap();
    let _successor = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
}

#[test]
fn a_bad_path_is_named() {
    let rig = Rig::new();
    let directory = rig.path("directory");
    fs::create_dir(&directory).unwrap();
    let file = rig.path("file");
    File::create(&file).unwrap();
    let long = rig.path(&"x".repeat(150));
    for (path, reason) in [
        (&directory, "no socket"),
        (&file, "no socket"),
        (&file.join("below"), "directory"),
        (&long, "SUN_LEN"),
    ] {
        let error = listen(&rig, path).err().unwrap().to_string();
        assert!(error.contains(reason), "{error:?} lacks {reason:?}");
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    assert!(file.exists());
}
