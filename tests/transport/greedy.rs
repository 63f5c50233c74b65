//! A verified peer that wants all the memory that the server has for calls:
//! many calls at a time, each with a message that never comes whole.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use meridio_proxy::rpc::env::REQUEST_MAX;
use meridio_proxy::sync::clock;
use openssl::ssl::{SslStream, SslVersion};

use crate::calls::open;
use crate::hostile::verified;
use crate::rig::{Rig, soon};

const CHUNK: i64 = 16 * 1024;
/// Rounds in which it gets nothing more, each of some 20 ms.
const QUIET: usize = 25;

/// An HTTP/2 client that knows no more than it needs.
struct Greedy {
    stream: SslStream<UnixStream>,
    /// Bytes that came and are no whole frame yet.
    came: Vec<u8>,
    initial: i64,
    connection: i64,
    /// Window and bytes left of each stream.
    streams: BTreeMap<u32, (i64, i64)>,
    is_over: bool,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The headers of a call to Register (RFC 7541: indexed, and literals that are
/// not).
fn headers() -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    let mut literal = |name: &[u8], value: &str| {
        block.extend(name);
        block.push(u8::try_from(value.len()).unwrap());
        block.extend(value.as_bytes());
    };
    literal(&[0x04], "/registry.NetworkServiceRegistry/Register");
    literal(&[0x01], "localhost");
    literal(&[0x0f, 0x10], "application/grpc");
    literal(&[0x00, 2, b't', b'e'], "trailers");
    block
}

impl Greedy {
    fn connect(rig: &Rig, path: &Path) -> Self {
        let mut stream = verified(rig, path, SslVersion::TLS1_3).unwrap();
        let socket = stream.get_ref();
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        socket
            .set_write_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        hello.extend(frame(4, 0, 0, &[]));
        stream.write_all(&hello).unwrap();
        Self {
            stream,
            came: Vec::new(),
            initial: 65_535,
            connection: 65_535,
            streams: BTreeMap::new(),
            is_over: false,
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        self.is_over |= self.stream.write_all(bytes).is_err();
    }

    /// Begins a call with a message of `length`, of which `left` bytes will come.
    fn call(&mut self, number: u32, length: u32, left: i64) {
        let id = 2 * number + 1;
        self.write(&frame(1, 4, id, &headers()));
        let mut prefix = vec![0];
        prefix.extend(length.to_be_bytes());
        self.write(&frame(0, 0, id, &prefix));
        self.connection -= 5;
        self.streams.insert(id, (self.initial - 5, left));
    }

    /// Sends what the windows allow; whether that was anything.
    fn push(&mut self) -> bool {
        let mut has_sent = false;
        for id in self.streams.keys().copied().collect::<Vec<_>>() {
            while let Some((window, left)) = self.streams.get_mut(&id) {
                let count = (*window).min(self.connection).min(*left).min(CHUNK);
                if count <= 0 || self.is_over {
                    break;
                }
                *window -= count;
                *left -= count;
                self.connection -= count;
                let payload = vec![0x0a; usize::try_from(count).unwrap()];
                self.write(&frame(0, 0, id, &payload));
                has_sent = true;
            }
        }
        has_sent
    }

    /// Reads what has come.
    fn pull(&mut self) {
        let mut buffer = [0; 65_536];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.is_over = true,
            Ok(count) => self.came.extend(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => self.is_over = true,
        }
        while self.came.len() >= 9 {
            let length = u32::from_be_bytes([0, self.came[0], self.came[1], self.came[2]]) as usize;
            if self.came.len() < 9 + length {
                return;
            }
            let whole: Vec<u8> = self.came.drain(..9 + length).collect();
            let id = u32::from_be_bytes(whole[5..9].try_into().unwrap());
            self.take(whole[3], whole[4], id, &whole[9..]);
        }
    }

    fn take(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8]) {
        let number = |bytes: &[u8]| i64::from(u32::from_be_bytes(bytes.try_into().unwrap()));
        match kind {
            3 => {
                self.streams.remove(&id);
            }
            4 if flags & 1 == 0 => {
                for setting in payload.chunks(6).filter(|s| s[..2] == [0, 4]) {
                    let initial = number(&setting[2..]);
                    for (window, _) in self.streams.values_mut() {
                        *window += initial - self.initial;
                    }
                    self.initial = initial;
                }
                self.write(&frame(4, 1, 0, &[]));
            }
            6 if flags & 1 == 0 => self.write(&frame(6, 1, 0, payload)),
            8 if id == 0 => self.connection += number(payload),
            8 => {
                if let Some((window, _)) = self.streams.get_mut(&id) {
                    *window += number(payload);
                }
            }
            _ => {}
        }
    }
}

/// Calls of this many, each with a message that says it has `length` bytes and
/// of which `left` come; meanwhile another peer's calls and stream go on.
/// Whether the greedy one is still connected.
fn stays(calls: u32, length: u32, left: i64) -> bool {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    let stream = open(&connection, 1);
    stream.items().recv_deadline(soon()).unwrap();
    let mut greedy = Greedy::connect(&rig, &path);
    greedy.pull();
    for number in 0..calls {
        greedy.call(number, length, left);
    }
    let mut quiet = 0;
    while quiet < QUIET && !greedy.is_over {
        greedy.pull();
        quiet = if greedy.push() { 0 } else { quiet + 1 };
        rig.echo(&connection, "n", &[]).unwrap();
    }
    rig.echo(&connection, "n", &[]).unwrap();
    assert!(stream.items().is_empty(), "{:?}", stream.items().try_recv());
    let late = rig.connect_unix(rig.client_cell(), &path);
    rig.echo(&rig.acquire(&late), "n", &[]).unwrap();
    !greedy.is_over
}

#[test]
fn a_greedy_peer_starves_nobody() {
    let most = u32::try_from(REQUEST_MAX).unwrap();
    // As much as it may, in calls that do not end.
    assert!(stays(3, most, i64::from(most) - 1));
    assert!(stays(256, most, 16_000));
    // More than that, though no call is too long.
    assert!(!stays(256, most, i64::from(most) - 1));
    // Calls that are answered, and go on.
    stays(256, 10, 1 << 24);
    // Messages that will be refused, in as many calls, and in one.
    assert!(!stays(256, 4 << 20, 4 << 20));
    assert!(!stays(1, u32::MAX, 1 << 30));
    // More calls than there may be.
    assert!(!stays(300, most, 10));
}

/// Calls that do not end, on more connections than one may have them on, take
/// nothing from others; a patient peer with few is left alone.
#[test]
fn calls_without_an_end_on_many_connections_starve_nobody() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let mut patient = Greedy::connect(&rig, &path);
    patient.pull();
    patient.call(0, 10, 10);
    let mut many: Vec<_> = (0..4).map(|_| Greedy::connect(&rig, &path)).collect();
    for greedy in &mut many {
        greedy.pull();
        for number in 0..200 {
            greedy.call(number, 10, 10);
        }
    }
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    for _ in 0..20 {
        rig.echo(&connection, "n", &[]).unwrap();
    }
    let deadline = soon();
    while clock::now() < deadline && many.iter().filter(|one| one.is_over).count() < 3 {
        many.iter_mut().for_each(Greedy::pull);
    }
    assert_eq!(many.iter().filter(|one| one.is_over).count(), 3);
    patient.pull();
    assert!(!patient.is_over);
}
