//! The line between a server of the lab and its clients: it can hold bytes
//! back, deliver answers late, cut all connections, and go away and come back,
//! without the server's knowledge.
//!
//! Threads: `lab-wire-accept` for each line, two `lab-wire` for each connection.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use meridio_proxy::sync::clock;
use meridio_proxy::sync::poll::{self, Interest, WakeFd};
use meridio_proxy::sync::stop::Stop;
use meridio_proxy::sync::thread::{STACK_SMALL, ThreadHandle, Threads};
use parking_lot::{Condvar, Mutex};

use crate::fault::Fault;
use crate::netns::check;

/// Waiting connections while a line is held up.
const BACKLOG: i32 = 128;
const CHUNK: usize = 16 * 1024;

/// A line; dropping it cuts everything.
pub struct Wire {
    shared: Arc<Shared>,
    _accept: ThreadHandle,
}

struct Shared {
    door: Door,
    server: Server,
    wake: WakeFd,
    state: Mutex<State>,
    changed: Condvar,
}

enum Door {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Where the server really listens.
enum Server {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Default)]
struct State {
    held: bool,
    late: Duration,
    /// Nobody listens.
    down: bool,
    over: bool,
    /// Both ends of each connection.
    open: Vec<[Arc<Socket>; 2]>,
}

/// A stream socket, whatever its family: only what all of them can is used.
struct Socket(UnixStream);

impl Wire {
    /// From `listener` to a server of this process, for which a second
    /// listener, on this host's loopback, is returned.
    pub fn tcp(listener: TcpListener) -> io::Result<(Self, TcpListener)> {
        let inner = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let server = Server::Tcp(inner.local_addr()?);
        listener.set_nonblocking(true)?;
        Ok((Self::start(Door::Tcp(listener), server)?, inner))
    }

    /// From the socket `path`, which is made, to that of the server.
    pub fn unix(path: &Path, server: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Self::start(Door::Unix(listener), Server::Unix(server.to_owned()))
    }

    fn start(door: Door, server: Server) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            door,
            server,
            wake: WakeFd::new()?,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let line = Arc::clone(&shared);
        let accept =
            Threads::unsupervised().spawn("lab-wire-accept", STACK_SMALL, move |stop| {
                accept_all(&line, &stop);
            })?;
        Ok(Self {
            shared,
            _accept: accept,
        })
    }

    /// The faults that the server itself has no part in.
    pub(crate) fn inflict(&self, fault: &Fault) -> Result<(), String> {
        let done = match fault {
            Fault::Pause => {
                self.hold(true);
                Ok(())
            }
            Fault::Late(delay) => {
                self.set_late(*delay);
                Ok(())
            }
            Fault::DropStreams => {
                self.cut();
                Ok(())
            }
            Fault::Kill => self.kill(),
            Fault::Restart => self.kill().and_then(|()| self.revive()),
            other => return Err(format!("{other} is not of the line")),
        };
        done.map_err(|error| format!("{fault}: {error}"))
    }

    /// Accepts, and lets no byte pass, until `false`.
    pub fn hold(&self, held: bool) {
        self.shared.change(|state| state.held = held);
    }

    /// Everything that the server sends arrives so much later.
    pub fn set_late(&self, late: Duration) {
        self.shared.change(|state| state.late = late);
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.shared.change(State::cut);
    }

    /// Cuts all connections and refuses new ones, until [`Wire::revive`].
    pub fn kill(&self) -> io::Result<()> {
        self.shared.change(|state| {
            state.down = true;
            state.cut();
        });
        self.shared.wake.wake();
        // SAFETY: takes no pointers; the descriptor is open while `self` lives.
        check(unsafe { libc::shutdown(self.shared.door.fd(), libc::SHUT_RDWR) })
    }

    /// Undoes everything. A killed unix socket cannot be revived, nor can a
    /// TCP socket whose port the kernel chose.
    pub fn revive(&self) -> io::Result<()> {
        let mut was_down = false;
        self.shared.change(|state| {
            was_down = std::mem::take(&mut state.down);
            state.held = false;
            state.late = Duration::ZERO;
        });
        if was_down {
            // SAFETY: as above. The socket is still bound to its address.
            check(unsafe { libc::listen(self.shared.door.fd(), BACKLOG) })?;
            self.shared.wake.wake();
        }
        Ok(())
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.change(|state| {
            state.over = true;
            state.cut();
        });
        self.shared.wake.wake();
    }
}

impl State {
    fn cut(&mut self) {
        for socket in self.open.drain(..).flatten() {
            socket.shutdown(Shutdown::Both);
        }
    }
}

impl Door {
    fn fd(&self) -> i32 {
        match self {
            Self::Tcp(listener) => listener.as_raw_fd(),
            Self::Unix(listener) => listener.as_raw_fd(),
        }
    }

    fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => Socket::tcp(listener.accept()?.0),
            Self::Unix(listener) => Socket::unix(listener.accept()?.0),
        }
    }
}

impl Socket {
    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Self::unix(OwnedFd::from(stream).into())
    }

    fn unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Self(stream))
    }

    fn shutdown(&self, how: Shutdown) {
        // One that is no longer connected is shut down already.
        let _ = self.0.shutdown(how);
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }

    /// Waits until bytes may pass; false when the line is over.
    fn pass(&self, from_server: bool) -> bool {
        let mut state = self.state.lock();
        if from_server && !state.late.is_zero() {
            let until = clock::now() + state.late;
            while !state.over && !self.changed.wait_until(&mut state, until).timed_out() {}
        }
        while state.held && !state.over {
            self.changed.wait(&mut state);
        }
        !state.over
    }

    fn dial(&self) -> io::Result<Socket> {
        match &self.server {
            Server::Tcp(address) => Socket::tcp(TcpStream::connect(address)?),
            Server::Unix(path) => Socket::unix(UnixStream::connect(path)?),
        }
    }
}

fn accept_all(line: &Arc<Shared>, stop: &Stop) {
    while !stop.is_set() && !line.state.lock().over {
        while let Ok(client) = line.door.accept() {
            if let Ok(server) = line.dial() {
                join(line, Arc::new(client), Arc::new(server));
            }
        }
        // poll(2) reports a socket that is shut down for ever.
        let down = line.state.lock().down;
        let door = Interest {
            fd: if down { -1 } else { line.door.fd() },
            read: true,
            write: false,
        };
        if poll::wait(&[door, line.wake.interest()], None).is_err() {
            return;
        }
        line.wake.drain();
    }
}

fn join(line: &Arc<Shared>, client: Arc<Socket>, server: Arc<Socket>) {
    let ends = [Arc::clone(&client), Arc::clone(&server)];
    line.change(|state| state.open.push(ends));
    for (from, to, from_server) in [
        (Arc::clone(&client), Arc::clone(&server), false),
        (server, client, true),
    ] {
        let shared = Arc::clone(line);
        let thread = Threads::unsupervised().spawn("lab-wire", STACK_SMALL, move |_| {
            copy(&shared, &from, &to, from_server);
        });
        match thread {
            Ok(thread) => thread.abandon(),
            Err(error) => log::warn!("lab-wire: {error}"),
        }
    }
}

fn copy(line: &Shared, from: &Arc<Socket>, to: &Arc<Socket>, from_server: bool) {
    let mut buffer = [0; CHUNK];
    while let Ok(length) = (&from.0).read(&mut buffer) {
        let passes = length > 0 && line.pass(from_server);
        if !passes || (&to.0).write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // The other direction ends, too: gRPC uses no half-open connections.
    from.shutdown(Shutdown::Both);
    to.shutdown(Shutdown::Both);
    line.state
        .lock()
        .open
        .retain(|ends| !ends.iter().any(|end| Arc::ptr_eq(end, from)));
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// A line, its address, and a server that answers each byte.
    fn line() -> (Wire, SocketAddr) {
        // A port that the kernel chose would not be kept by a dead listener.
        let chosen = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = chosen.local_addr().unwrap();
        drop(chosen);
        let outer = TcpListener::bind(address).unwrap();
        let (wire, inner) = Wire::tcp(outer).unwrap();
        let thread = Threads::unsupervised().spawn("echo", STACK_SMALL, move |_| {
            while let Ok((mut stream, _)) = inner.accept() {
                let mut byte = [0];
                while stream.read_exact(&mut byte).is_ok() {
                    stream.write_all(&byte).unwrap();
                }
            }
        });
        thread.unwrap().abandon();
        (wire, address)
    }

    fn dial(address: SocketAddr, limit: Duration) -> TcpStream {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(limit)).unwrap();
        stream
    }

    fn echo(mut stream: &TcpStream) -> io::Result<()> {
        stream.write_all(&[7])?;
        stream.read_exact(&mut [0])
    }

    #[test]
    fn held_late_cut_killed_and_back() {
        let (wire, address) = line();
        let stream = dial(address, LIMIT);
        echo(&stream).unwrap();
        wire.set_late(Duration::from_millis(30));
        let begun = clock::now();
        echo(&stream).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(30));
        wire.set_late(Duration::ZERO);
        wire.hold(true);
        let held = dial(address, Duration::from_millis(50));
        drop(stream);
        let error = echo(&held).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        wire.kill().unwrap();
        let error = TcpStream::connect(address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
        wire.revive().unwrap();
        let stream = dial(address, LIMIT);
        echo(&stream).unwrap();
        wire.cut();
        assert!(echo(&stream).is_err());
    }
}
