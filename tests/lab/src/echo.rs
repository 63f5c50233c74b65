//! What runs in a target: one thread that answers TCP and UDP on every VIP
//! with what it was sent, its name, and the load balancer that sent it.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use meridio_proxy::sync::poll::{self, Interest, WakeFd};
use meridio_proxy::sync::stop::Stop;
use meridio_proxy::sync::thread::{STACK_LARGE, ThreadHandle, Threads};
use parking_lot::Mutex;

use crate::netns::Netns;
use crate::sock;

/// The port on every VIP, both protocols.
pub const PORT: u16 = 5000;
/// The longest message that is answered whole.
pub const MESSAGE: usize = 64;
/// TCP connections open at once; more are closed at once.
const CONNECTIONS: usize = 1024;

/// A running server; dropping it ends the thread.
pub struct Echo {
    shared: Arc<Shared>,
    _thread: ThreadHandle,
}

struct Shared {
    name: String,
    wake: WakeFd,
    stopping: Mutex<bool>,
    sockets: Mutex<BTreeMap<IpAddr, Arc<UdpSocket>>>,
    datagrams: AtomicU64,
    connections: AtomicU64,
}

impl Echo {
    /// Starts the server in the namespace, without VIPs.
    pub fn start(netns: &Netns, name: &str) -> io::Result<Self> {
        let any = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), PORT);
        let listener = netns.try_run(|| TcpListener::bind(any))?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            wake: WakeFd::new()?,
            stopping: Mutex::new(false),
            sockets: Mutex::new(BTreeMap::new()),
            datagrams: AtomicU64::new(0),
            connections: AtomicU64::new(0),
        });
        let server = Arc::clone(&shared);
        let thread = Threads::unsupervised().spawn("echo", STACK_LARGE, move |_: Stop| {
            if let Err(error) = serve(&server, &listener) {
                log::error!("server of {}: {error}", server.name);
            }
        })?;
        Ok(Self {
            shared,
            _thread: thread,
        })
    }

    /// Answers on these VIPs and no others. They need not exist yet.
    pub fn set_vips(&self, netns: &Netns, vips: &[IpAddr]) -> io::Result<()> {
        let mut sockets = self.shared.sockets.lock();
        sockets.retain(|vip, _| vips.contains(vip));
        for vip in vips {
            if !sockets.contains_key(vip) {
                let socket = netns.try_run(|| sock::bind(SocketAddr::new(*vip, PORT)))?;
                sock::set_receive_buffer(&socket, 4 << 20)?;
                sockets.insert(*vip, Arc::new(socket));
            }
        }
        drop(sockets);
        self.shared.wake.wake();
        Ok(())
    }

    /// Datagrams and connections answered so far.
    #[must_use]
    pub fn answered(&self) -> (u64, u64) {
        let count = |number: &AtomicU64| number.load(Ordering::SeqCst);
        (
            count(&self.shared.datagrams),
            count(&self.shared.connections),
        )
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        *self.shared.stopping.lock() = true;
        self.shared.wake.wake();
    }
}

/// The thread: waits for whatever comes next, for ever, until it is told.
fn serve(shared: &Shared, listener: &TcpListener) -> io::Result<()> {
    let mut streams: Vec<TcpStream> = Vec::new();
    loop {
        let sockets: Vec<Arc<UdpSocket>> = shared.sockets.lock().values().cloned().collect();
        let mut interests = vec![shared.wake.interest(), readable(listener.as_raw_fd())];
        interests.extend(sockets.iter().map(|socket| readable(socket.as_raw_fd())));
        interests.extend(streams.iter().map(|stream| readable(stream.as_raw_fd())));
        let ready = poll::wait(&interests, None)?;
        shared.wake.drain();
        if *shared.stopping.lock() {
            return Ok(());
        }
        for (socket, found) in sockets.iter().zip(&ready[2..]) {
            if found.read {
                answer_datagrams(shared, socket);
            }
        }
        let mut found = ready[2 + sockets.len()..].iter();
        streams.retain_mut(|stream| {
            let waiting = found.next().is_some_and(|found| found.read);
            !waiting || answer_stream(shared, stream)
        });
        if ready[1].read {
            accept(listener, &mut streams);
        }
    }
}

fn readable(fd: i32) -> Interest {
    Interest {
        fd,
        read: true,
        write: false,
    }
}

fn accept(listener: &TcpListener, streams: &mut Vec<TcpStream>) {
    while let Ok((stream, _)) = listener.accept() {
        if streams.len() < CONNECTIONS && stream.set_nonblocking(true).is_ok() {
            streams.push(stream);
        }
    }
}

fn answer_datagrams(shared: &Shared, socket: &UdpSocket) {
    let mut buffer = [0; MESSAGE];
    loop {
        match sock::receive(socket, &mut buffer) {
            Ok(got) => {
                let mut answer = buffer[..got.length].to_vec();
                answer.push(got.dscp);
                answer.extend_from_slice(shared.name.as_bytes());
                // Failing here is a lost packet, which the client counts.
                let _ = socket.send_to(&answer, got.from);
                shared.datagrams.fetch_add(1, Ordering::SeqCst);
            }
            // Anything but "nothing there" is a late ICMP error of an
            // earlier answer.
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(_) => {}
        }
    }
}

/// Answers what a client wrote; false when the connection has ended.
fn answer_stream(shared: &Shared, stream: &mut TcpStream) -> bool {
    let mut buffer = [0; MESSAGE];
    match stream.read(&mut buffer) {
        Ok(0) => false,
        Ok(length) => {
            let mut answer = buffer[..length].to_vec();
            answer.extend_from_slice(shared.name.as_bytes());
            answer.push(b'\n');
            shared.connections.fetch_add(1, Ordering::SeqCst);
            stream.write_all(&answer).is_ok()
        }
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}
