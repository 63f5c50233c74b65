//! What goes over the connection to nsmgr, frame by frame.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, after, bounded, select};
use meridio_lab::pki::Pki;
use meridio_proxy::nsm::caller::NsmCaller;
use meridio_proxy::proto::connection::{Connection, MonitorScopeSelector};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::sync::thread::{STACK_SMALL, ThreadHandle, Threads};
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};
use openssl::pkey::PKey;
use openssl::ssl::{
    AlpnError, Ssl, SslContext, SslMethod, SslStream, SslVerifyMode, select_next_proto,
};
use openssl::x509::X509;

use crate::rig::{Directory, HOUR, soon};

const PREFACE: usize = 24;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;
/// `NSM_GRPC_KEEPALIVE_TIME` unless it is set, and a little.
const WATCHED: Duration = Duration::from_secs(32);

struct Frame {
    kind: u8,
    flags: u8,
    payload: Vec<u8>,
}

/// A peer that speaks just enough HTTP/2 to keep a connection: it takes calls
/// and never answers them.
struct Silent {
    tls: SslStream<UnixStream>,
    bytes: Vec<u8>,
}

impl Silent {
    fn accept(listener: &UnixListener, context: &SslContext) -> Self {
        let (socket, _) = listener.accept().unwrap();
        let ssl = Ssl::new(context).unwrap();
        let mut tls = SslStream::new(ssl, socket).unwrap();
        tls.accept().unwrap();
        let pause = Some(Duration::from_millis(100));
        tls.get_ref().set_read_timeout(pause).unwrap();
        tls.write_all(b"\0\0\0\x04\0\0\0\0\0").unwrap();
        let mut silent = Self {
            tls,
            bytes: Vec::new(),
        };
        while silent.bytes.len() < PREFACE {
            silent.read().unwrap();
        }
        silent.bytes.drain(..PREFACE);
        silent
    }

    /// `None` at the end of the connection.
    fn read(&mut self) -> Option<()> {
        let mut buffer = [0; 4096];
        match self.tls.read(&mut buffer) {
            Ok(0) => None,
            Ok(count) => {
                self.bytes.extend_from_slice(&buffer[..count]);
                Some(())
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Some(()),
            Err(_) => None,
        }
    }

    /// The next frame before `until`; SETTINGS and PING are acknowledged.
    fn frame(&mut self, until: Instant) -> Option<Frame> {
        while clock::now() < until {
            if let [a, b, c, kind, flags, _, _, _, _, rest @ ..] = self.bytes.as_slice() {
                let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
                if rest.len() >= length {
                    let frame = Frame {
                        kind: *kind,
                        flags: *flags,
                        payload: rest[..length].to_vec(),
                    };
                    self.bytes.drain(..9 + length);
                    self.acknowledge(&frame);
                    return Some(frame);
                }
            }
            self.read()?;
        }
        None
    }

    fn acknowledge(&mut self, frame: &Frame) {
        if frame.flags & ACK != 0 {
            return;
        }
        match frame.kind {
            SETTINGS => self.tls.write_all(b"\0\0\0\x04\x01\0\0\0\0").unwrap(),
            PING => {
                self.tls.write_all(b"\0\0\x08\x06\x01\0\0\0\0").unwrap();
                self.tls.write_all(&frame.payload).unwrap();
            }
            _ => {}
        }
    }
}

/// Frames that arrive within `during` at a peer at `path`.
fn record(
    threads: &Threads,
    path: &Path,
    context: SslContext,
    during: Duration,
) -> (ThreadHandle, Receiver<Vec<Frame>>) {
    let listener = UnixListener::bind(path).unwrap();
    let (tx, frames) = bounded(1);
    let thread = threads.spawn("silent-nsmgr", STACK_SMALL, move |_| {
        let mut peer = Silent::accept(&listener, &context);
        let until = clock::now() + during;
        let frames = std::iter::from_fn(|| peer.frame(until)).collect();
        let _ = tx.send(frames);
    });
    (thread.unwrap(), frames)
}

/// nsmgr's side of TLS. It issues tickets, and its sessions can be resumed.
fn context(trust: &Pki) -> SslContext {
    let svid = trust.issue(&trust.id("nsmgr"), HOUR);
    let mut context = SslContext::builder(SslMethod::tls()).unwrap();
    let leaf = X509::from_der(&svid.chain_der).unwrap();
    let key = PKey::private_key_from_pkcs8(&svid.key_pkcs8_der).unwrap();
    context.set_certificate(&leaf).unwrap();
    context.set_private_key(&key).unwrap();
    context.set_session_id_context(b"nsmgr").unwrap();
    context.set_verify_callback(SslVerifyMode::PEER, |_, _| true);
    context.set_alpn_select_callback(|_, offered| {
        select_next_proto(b"\x02h2", offered).ok_or(AlpnError::ALERT_FATAL)
    });
    context.build()
}

struct World {
    threads: Threads,
    _rpc: Rpc,
    connector: Connector,
    caller: NsmCaller,
    frames: Receiver<Vec<Frame>>,
    _peer: ThreadHandle,
    _directory: Directory,
}

fn to(path: PathBuf) -> ConnectorOptions {
    ConnectorOptions {
        name: "nsmgr",
        address: Address::Unix(path),
        authority: "localhost".to_owned(),
        dial_timeout: Duration::from_secs(5),
        backoff_max: Duration::from_secs(5),
    }
}

fn world(during: Duration) -> World {
    let (threads, rpc) = (Threads::unsupervised(), Rpc::new());
    let directory = Directory::new();
    let path = directory.path("silent.sock");
    let trust = Pki::new("example.org");
    let cell = trust.cell(&trust.id("proxy"), HOUR);
    let (peer, frames) = record(&threads, &path, context(&trust), during);
    let connector = Connector::start(&threads, &rpc, cell, to(path)).unwrap();
    World {
        caller: NsmCaller::new(connector.clone(), HOUR),
        threads,
        _rpc: rpc,
        connector,
        frames,
        _peer: peer,
        _directory: directory,
    }
}

/// grpc-go without an enforcement policy ends connections that ping more often
/// than every five minutes (`too_many_pings`); the period of Meridio's
/// keepalive, 30 s, is for IPAM and NSP.
#[test]
fn no_pings_go_to_nsmgr() {
    let world = world(WATCHED);
    let (_stopper, stop) = stop_pair();
    let selector = MonitorScopeSelector::default();
    let method = &method::MONITOR_CONNECTIONS;
    let stream = world.caller.stream(method, &selector, soon(), &stop);
    let frames = world.frames.recv_timeout(WATCHED * 2).unwrap();
    drop(stream);
    assert!(frames.iter().any(|frame| frame.kind == HEADERS), "a call");
    let pings = frames.iter().filter(|frame| frame.kind == PING).count();
    assert_eq!(pings, 0, "in {WATCHED:?} with an open stream");
    world.connector.close(soon());
    drop(world.threads);
}

#[test]
fn each_request_and_close_tells_its_deadline() {
    let request = NetworkServiceRequest::default();
    let connection = Connection::default();
    let within = Duration::from_millis(700);
    for close in [false, true] {
        // The header's name is written out on a new connection only.
        let world = world(within * 2);
        let (_stopper, stop) = stop_pair();
        let (caller, deadline) = (&world.caller, clock::now() + within);
        let none = Vec::new;
        let failed = if close {
            caller
                .unary(&method::CLOSE, &connection, &[], &none, deadline, &stop)
                .map(drop)
        } else {
            caller
                .unary(&method::REQUEST, &request, &[], &none, deadline, &stop)
                .map(drop)
        };
        let code = failed.unwrap_err().code();
        assert_eq!(code, Some(Code::DEADLINE_EXCEEDED));
        let ended = clock::now();
        assert!(ended < deadline + within, "it ends by itself");
        assert!(ended > deadline - within / 2, "it has its time");
        let frames = world.frames.recv_timeout(within * 10).unwrap();
        let headers = frames.iter().find(|frame| frame.kind == HEADERS).unwrap();
        let tells = |text: &[u8]| headers.payload.windows(text.len()).any(|part| part == text);
        assert!(tells(b"grpc-timeout"), "as grpc-go reads it");
        world.connector.close(soon());
    }
}

/// nsmgr works on the calls for one connection in their order of arrival, so
/// the end of one has to arrive before the next.
#[test]
fn a_call_that_is_given_up_ends_before_the_next_begins() {
    const CALLS: usize = 20;
    let world = world(Duration::from_secs(3));
    let request = NetworkServiceRequest::default();
    for _ in 0..CALLS {
        let (stopper, stop) = stop_pair();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let moment = after(Duration::from_millis(20));
                select! { recv(moment) -> _ => stopper.stop() }
            });
            let caller = &world.caller;
            let none = Vec::new;
            let given_up = caller.unary(&method::REQUEST, &request, &[], &none, soon(), &stop);
            assert_eq!(given_up.err(), Some(RpcError::Cancelled));
        });
    }
    let frames = world.frames.recv_timeout(WATCHED).unwrap();
    let kinds: Vec<u8> = frames.iter().map(|frame| frame.kind).collect();
    let calls: Vec<u8> = kinds
        .into_iter()
        .filter(|kind| matches!(*kind, HEADERS | RST_STREAM))
        .collect();
    // On a busy machine one may be over before it begins.
    assert!(calls.len() >= CALLS, "{calls:?}");
    for call in calls.chunks(2) {
        assert_eq!(call, [HEADERS, RST_STREAM], "{calls:?}");
    }
    world.connector.close(soon());
}

/// A resumed session would keep the certificate of the one before (grpc-go then
/// verifies tokens with that), and so the key that is no longer ours.
#[test]
fn a_new_svid_brings_a_handshake_of_its_own() {
    let (threads, rpc) = (Threads::unsupervised(), Rpc::new());
    let directory = Directory::new();
    let path = directory.path("tickets.sock");
    let trust = Pki::new("example.org");
    let (id, context) = (trust.id("proxy"), context(&trust));
    let cell = trust.cell(&id, HOUR);
    let listener = UnixListener::bind(&path).unwrap();
    let (tx, sessions) = bounded(2);
    let _peer = threads
        .spawn("silent-nsmgr", STACK_SMALL, move |stop| {
            let mut open = Vec::new();
            for _ in 0..2 {
                let peer = Silent::accept(&listener, &context);
                let ssl = peer.tls.ssl();
                let shown = ssl.peer_certificate().unwrap().to_der().unwrap();
                tx.send((ssl.session_reused(), shown)).unwrap();
                open.push(peer);
            }
            let _ = stop.wait(WATCHED);
        })
        .unwrap();
    let connector = Connector::start(&threads, &rpc, cell.clone(), to(path)).unwrap();
    let session = || {
        let (reused, shown) = sessions.recv_deadline(soon()).unwrap();
        assert!(!reused, "resumed");
        assert_eq!(shown, cell.get().unwrap().svid.chain[0].to_der().unwrap());
        shown
    };
    let first = session();
    let (_stopper, stop) = stop_pair();
    connector.acquire(soon(), &stop).unwrap();
    trust.refill(&cell, &id, HOUR);
    assert_ne!(session(), first);
    connector.close(soon());
}
