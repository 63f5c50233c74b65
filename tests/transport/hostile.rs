use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use meridio_lab::pki::{Pki, Recipe, Svid, fill_unchecked};
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::poll::{self, Interest};
use meridio_proxy::sync::thread::STACK_SMALL;
use meridio_proxy::sync::watch::Watch;
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};
use openssl::pkey::PKey;
use openssl::ssl::{
    HandshakeError, Ssl, SslContext, SslMethod, SslStream, SslVerifyMode, SslVersion,
};
use openssl::x509::X509;

use crate::rig::{CLIENT_ID, HOUR, Rig, SERVER_ID, soon};

/// Certificates that must be refused, each with a word of the reason.
fn bad(rig: &Rig) -> Vec<(Svid, &'static str)> {
    let pki = &rig.pki;
    let with = |change: &dyn Fn(&mut Recipe)| {
        let mut recipe = Recipe::good("spiffe://td/ns/bad", HOUR);
        change(&mut recipe);
        pki.issue_with(&recipe)
    };
    vec![
        (pki.issue_expired("spiffe://td/ns/bad"), "expired"),
        (with(&|r| r.not_before = 600), "not yet valid"),
        (
            Pki::new("foreign").issue("spiffe://foreign/a", HOUR),
            "no trust bundle",
        ),
        (
            Pki::new("td").issue("spiffe://td/ns/bad", HOUR),
            "certificate chain",
        ),
        (pki.issue_uris(&[]), "without a URI SAN"),
        (
            pki.issue_uris(&["spiffe://td/a", "spiffe://td/b"]),
            "2 URI SANs",
        ),
        (with(&|r| r.ca = true), "CA's"),
        (
            with(&|r| {
                r.intermediate = true;
                r.hide_intermediate = true;
            }),
            "certificate chain",
        ),
    ]
}

fn cell_of(rig: &Rig, svid: &Svid) -> SvidCell {
    let cell = Watch::new(None);
    fill_unchecked(&cell, svid, &[&rig.pki]);
    cell
}

#[test]
fn bad_clients_are_refused_and_good_ones_served() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    for (svid, reason) in bad(&rig) {
        let connector = rig.connect_unix(cell_of(&rig, &svid), &path);
        // The server does not tell a stranger why; that it ends the session
        // before its SETTINGS is what counts.
        let refusal = rig.refusal(&connector);
        assert!(refusal.contains("handshake"), "{reason}: {refusal}");
        connector.close(soon());
    }
    for change in [
        |_: &mut Recipe| {},
        |r: &mut Recipe| r.key = meridio_lab::pki::KeyKind::Rsa2048,
        |r: &mut Recipe| r.intermediate = true,
    ] {
        let mut recipe = Recipe::good(CLIENT_ID, HOUR);
        change(&mut recipe);
        let svid = rig.pki.issue_with(&recipe);
        let connector = rig.connect_unix(cell_of(&rig, &svid), &path);
        let connection = rig.acquire(&connector);
        assert_eq!(
            rig.echo(&connection, "n", &[]).unwrap().message.payload,
            CLIENT_ID
        );
    }
}

#[test]
fn bad_servers_are_refused_with_the_reason() {
    let rig = Rig::new();
    for (svid, reason) in bad(&rig) {
        let path = rig.path("s.sock");
        let server = rig.serve(cell_of(&rig, &svid), &path);
        let connector = rig.connect_unix(rig.client_cell(), &path);
        let refusal = rig.refusal(&connector);
        assert!(refusal.contains(reason), "{refusal:?} lacks {reason:?}");
        assert!(connector.acquire(clock::now(), &rig.stop).is_err());
        connector.close(soon());
        server.stop(soon());
    }
}

fn parts(svid: &Svid) -> (X509, PKey<openssl::pkey::Private>) {
    (
        X509::from_der(&svid.chain_der).unwrap(),
        PKey::private_key_from_pkcs8(&svid.key_pkcs8_der).unwrap(),
    )
}

/// A session of the `openssl` crate alone, without ALPN and without checks.
fn bare(rig: &Rig, socket: UnixStream, server: bool) -> SslStream<UnixStream> {
    let (leaf, key) = parts(&rig.pki.issue(SERVER_ID, HOUR));
    let mut builder = SslContext::builder(SslMethod::tls()).unwrap();
    builder.set_certificate(&leaf).unwrap();
    builder.set_private_key(&key).unwrap();
    builder.set_verify(SslVerifyMode::NONE);
    let ssl = Ssl::new(&builder.build()).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut stream = SslStream::new(ssl, socket).unwrap();
    let done = if server {
        stream.accept()
    } else {
        stream.connect()
    };
    done.unwrap();
    stream
}

/// Nothing comes but the end.
fn ends(mut stream: impl Read) {
    let mut buffer = [0; 100];
    match stream.read(&mut buffer) {
        Ok(0) => {}
        Ok(count) => panic!("{count} bytes came"),
        Err(error) => assert!(
            !matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
            ),
            "the session stays open"
        ),
    }
}

#[test]
fn a_client_without_alpn_is_refused() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    ends(bare(&rig, UnixStream::connect(&path).unwrap(), false));
}

#[test]
fn a_server_without_alpn_is_refused() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let (socket, _) = listener.accept().unwrap();
    ends(bare(&rig, socket, true));
    let refusal = rig.refusal(&connector);
    assert!(refusal.contains("ALPN"), "{refusal}");
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let mut builder = SslContext::builder(SslMethod::tls()).unwrap();
    builder.set_verify(SslVerifyMode::NONE);
    builder.set_alpn_protos(b"\x02h2").unwrap();
    let socket = UnixStream::connect(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut stream = SslStream::new(Ssl::new(&builder.build()).unwrap(), socket).unwrap();
    if stream.connect().is_ok() {
        ends(stream);
    }
}

#[test]
fn plaintext_is_refused() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let mut socket = UnixStream::connect(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    socket
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .unwrap();
    // An alert, then the end; no SETTINGS.
    let mut all = Vec::new();
    let _ = socket.read_to_end(&mut all);
    assert!(all.len() < 9, "{all:?}");
}

#[test]
fn silent_strangers_delay_nobody() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    // More than there are handshakes at a time.
    let strangers: Vec<UnixStream> = (0..150)
        .map(|_| connect_when_there_is_room(&path))
        .collect();
    let start = clock::now();
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    rig.echo(&connection, "n", &[]).unwrap();
    assert!(clock::now() - start < Duration::from_secs(2));
    drop(strangers);
}

/// A socket that reads nothing until it is told to.
#[derive(Debug)]
struct Hesitant {
    socket: UnixStream,
    reads: bool,
}

impl Read for Hesitant {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if !self.reads {
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        self.socket.read(buffer)
    }
}

impl Write for Hesitant {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Silence makes room before a peer that is slow to answer does.
#[test]
fn strangers_do_not_push_out_a_handshake_under_way() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let socket = Hesitant {
        socket: UnixStream::connect(&path).unwrap(),
        reads: false,
    };
    let ssl = client_ssl(&rig, SslVersion::TLS1_3);
    let Err(HandshakeError::WouldBlock(mut begun)) = ssl.connect(socket) else {
        panic!("the handshake ended without an answer");
    };
    // The server has answered, so it knows that this one speaks.
    let answered = Interest {
        fd: begun.get_ref().socket.as_raw_fd(),
        read: true,
        write: false,
    };
    assert!(poll::wait(&[answered], Some(soon())).unwrap()[0].read);
    let strangers: Vec<UnixStream> = (0..150)
        .map(|_| connect_when_there_is_room(&path))
        .collect();
    // The first of them was given up.
    ends(&strangers[0]);
    begun.get_mut().reads = true;
    let mut stream = begun.handshake().unwrap();
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "the first frame is SETTINGS");
}

/// Blocks while the listener's queue is full.
fn connect_when_there_is_room(path: &Path) -> UnixStream {
    UnixStream::connect(path).unwrap()
}

#[test]
fn servers_that_say_nothing_or_nonsense_are_given_up() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let options = ConnectorOptions {
        name: "peer",
        address: Address::Unix(path),
        authority: "localhost".to_owned(),
        dial_timeout: Duration::from_millis(200),
        backoff_max: Duration::from_secs(60),
    };
    let silent =
        Connector::start(&rig.threads, &rig.rpc, rig.client_cell(), options.clone()).unwrap();
    let _held = listener.accept().unwrap();
    let refusal = rig.refusal(&silent);
    assert!(refusal.contains("timed out"), "{refusal}");
    silent.close(soon());

    let nonsense = Connector::start(&rig.threads, &rig.rpc, rig.client_cell(), options).unwrap();
    let (mut socket, _) = listener.accept().unwrap();
    socket
        .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        .unwrap();
    let refusal = rig.refusal(&nonsense);
    assert!(refusal.contains("TLS handshake"), "{refusal}");
}

/// A verified server whose first frame is no SETTINGS, and one that never
/// sends any.
#[test]
fn servers_that_speak_no_http2_are_given_up() {
    let rig = Rig::new();
    for (sent, reason) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "HTTP/2"),
        (&b""[..], "SETTINGS"),
    ] {
        let path = rig.path(if sent.is_empty() { "a" } else { "b" });
        let listener = UnixListener::bind(&path).unwrap();
        let (leaf, key) = parts(&rig.pki.issue(SERVER_ID, HOUR));
        let peer = rig
            .threads
            .spawn("bad-server", STACK_SMALL, move |stop| {
                let mut builder = SslContext::builder(SslMethod::tls()).unwrap();
                builder.set_certificate(&leaf).unwrap();
                builder.set_private_key(&key).unwrap();
                builder.set_alpn_select_callback(|_, offered| {
                    openssl::ssl::select_next_proto(b"\x02h2", offered)
                        .ok_or(openssl::ssl::AlpnError::ALERT_FATAL)
                });
                let (socket, _) = listener.accept().unwrap();
                let ssl = Ssl::new(&builder.build()).unwrap();
                let mut stream = SslStream::new(ssl, socket).unwrap();
                stream.accept().unwrap();
                if !sent.is_empty() {
                    stream.write_all(sent).unwrap();
                }
                let _ = stop.wait(Duration::from_secs(10));
            })
            .unwrap();
        let options = ConnectorOptions {
            name: "peer",
            address: Address::Unix(path),
            authority: "localhost".to_owned(),
            dial_timeout: Duration::from_millis(500),
            backoff_max: Duration::from_secs(60),
        };
        let connector =
            Connector::start(&rig.threads, &rig.rpc, rig.client_cell(), options).unwrap();
        let refusal = rig.refusal(&connector);
        assert!(refusal.contains(reason), "{refusal:?} lacks {reason:?}");
        drop(peer);
    }
}

/// A client of the `openssl` crate alone with a good certificate, at one
/// version of TLS.
fn client_ssl(rig: &Rig, version: SslVersion) -> Ssl {
    let (leaf, key) = parts(&rig.pki.issue(CLIENT_ID, HOUR));
    let mut builder = SslContext::builder(SslMethod::tls()).unwrap();
    builder.set_min_proto_version(Some(version)).unwrap();
    builder.set_max_proto_version(Some(version)).unwrap();
    builder.set_cipher_list("ALL:@SECLEVEL=0").unwrap();
    builder.set_certificate(&leaf).unwrap();
    builder.set_private_key(&key).unwrap();
    builder.set_verify(SslVerifyMode::NONE);
    builder.set_alpn_protos(b"\x02h2").unwrap();
    Ssl::new(&builder.build()).unwrap()
}

/// Its session; `None` when the handshake fails.
pub fn verified(rig: &Rig, path: &Path, version: SslVersion) -> Option<SslStream<UnixStream>> {
    let socket = UnixStream::connect(path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    client_ssl(rig, version).connect(socket).ok()
}

/// grpc-go's minimum; older ones are refused.
#[test]
fn tls_1_2_is_served_and_tls_1_1_refused() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    assert!(verified(&rig, &path, SslVersion::TLS1_1).is_none());
    let mut stream = verified(&rig, &path, SslVersion::TLS1_2).unwrap();
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "the first frame is SETTINGS");
}

#[test]
fn a_verified_peer_that_sends_nonsense_loses_only_its_own_connection() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    for nonsense in [
        &[0; 100_000][..],
        b"GET / HTTP/1.1\r\n\r\n",
        // A frame of 16 MB that never comes whole.
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x00\0\0\0\0\x01",
    ] {
        let mut stream = verified(&rig, &path, SslVersion::TLS1_3).unwrap();
        // It may be closed before all is written.
        let _ = stream.write_all(nonsense);
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        rig.echo(&connection, "n", &[]).unwrap();
    }
}
