//! Many distinct flows at once, each of which must be answered.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use meridio_proxy::sync::clock;
use meridio_proxy::sync::poll::{self, Interest};

use crate::netns::Netns;
use crate::{sock, traffic};

/// Threads that make TCP connections one after the other.
const TCP_THREADS: usize = 4;
/// UDP flows that wait for an answer at the same time.
const UDP_BATCH: usize = 50;
/// How long one flow may wait for its answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// TCP flows come from these ports in turn, below those that the kernel chooses
/// itself: of its own choice it uses one again as soon as the flow is over, and
/// flows would not differ.
const TCP_PORTS: std::ops::Range<u16> = 10_000..30_000;

static NEXT_PORT: AtomicUsize = AtomicUsize::new(0);

/// What became of the flows.
#[derive(Debug, Clone, Default)]
pub struct Burst {
    pub flows: usize,
    pub answered: usize,
    /// Pairs of addresses and ports that differ from each other.
    pub distinct: usize,
    pub by_target: BTreeMap<String, usize>,
    /// UDP only: answers that came over each load balancer.
    pub by_lb: BTreeMap<u8, usize>,
    /// The first reasons of failures.
    pub failures: Vec<String>,
}

impl Burst {
    /// Whether every flow was answered.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.answered == self.flows && self.distinct == self.flows
    }

    fn fail(&mut self, reason: String) {
        if self.failures.len() < 5 {
            self.failures.push(reason);
        }
    }

    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        for (target, count) in other.by_target {
            *self.by_target.entry(target).or_default() += count;
        }
        for reason in other.failures {
            self.fail(reason);
        }
    }
}

impl fmt::Display for Burst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} flows answered", self.answered, self.flows)?;
        for (target, count) in &self.by_target {
            write!(f, ", {target} {count}")?;
        }
        for reason in &self.failures {
            write!(f, "; {reason}")?;
        }
        Ok(())
    }
}

/// Makes `flows` TCP connections; each sends a line and must get it back with
/// the name of a target.
pub fn tcp(netns: &Netns, to: SocketAddr, flows: usize) -> io::Result<Burst> {
    let mut total = Burst {
        flows,
        ..Burst::default()
    };
    let mut ports = BTreeSet::new();
    let parts = std::thread::scope(|scope| {
        let started: Vec<_> = (0..TCP_THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    let share = (thread..flows).step_by(TCP_THREADS);
                    netns.run(|| tcp_share(to, share))
                })
            })
            .collect();
        started
            .into_iter()
            .map(|thread| thread.join().expect("a lab thread does not panic"))
            .collect::<Vec<_>>()
    });
    for part in parts {
        let (burst, used) = part?;
        total.add(burst);
        ports.extend(used);
    }
    total.distinct = ports.len();
    Ok(total)
}

fn tcp_share(to: SocketAddr, numbers: impl Iterator<Item = usize>) -> (Burst, Vec<u16>) {
    let (mut burst, mut ports) = (Burst::default(), Vec::new());
    for number in numbers {
        match tcp_flow(to, number) {
            Ok((target, port)) => {
                burst.answered += 1;
                *burst.by_target.entry(target).or_default() += 1;
                ports.push(port);
            }
            Err(error) => burst.fail(format!("TCP flow {number} to {to}: {error}")),
        }
        if burst.failures.len() >= 5 {
            break;
        }
    }
    (burst, ports)
}

fn tcp_flow(to: SocketAddr, number: usize) -> io::Result<(String, u16)> {
    let turn = NEXT_PORT.fetch_add(1, Ordering::Relaxed) % TCP_PORTS.len();
    let mut stream = sock::connect_tcp(TCP_PORTS.start + turn as u16, to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let sent = format!("{number:08}:");
    stream.write_all(sent.as_bytes())?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let target = line
        .strip_prefix(&sent)
        .ok_or_else(|| io::Error::other(format!("sent {sent:?}, got {line:?}")))?;
    Ok((target.trim_end().to_owned(), stream.local_addr()?.port()))
}

/// Sends one datagram on each of `flows` ports; each must be answered.
pub fn udp(netns: &Netns, to: SocketAddr, flows: usize) -> io::Result<Burst> {
    let mut burst = Burst {
        flows,
        ..Burst::default()
    };
    sock::raise_descriptor_limit()?;
    let mut sockets = Vec::new();
    for _ in 0..flows {
        sockets.push(traffic::connect(netns, to)?);
    }
    let ports: io::Result<BTreeSet<u16>> = (sockets.iter())
        .map(|socket| Ok(socket.local_addr()?.port()))
        .collect();
    burst.distinct = ports?.len();
    for batch in sockets.chunks(UDP_BATCH) {
        udp_batch(batch, to, &mut burst)?;
    }
    Ok(burst)
}

fn udp_batch(sockets: &[UdpSocket], to: SocketAddr, burst: &mut Burst) -> io::Result<()> {
    for socket in sockets {
        if let Err(error) = socket.send(b"12345678") {
            burst.fail(format!("UDP flow to {to}: {error}"));
        }
    }
    let deadline = clock::now() + PATIENCE;
    let mut waiting: Vec<&UdpSocket> = sockets.iter().collect();
    while !waiting.is_empty() && clock::now() < deadline {
        let interests: Vec<Interest> = (waiting.iter())
            .map(|socket| Interest {
                fd: socket.as_raw_fd(),
                read: true,
                write: false,
            })
            .collect();
        let mut ready = poll::wait(&interests, Some(deadline))?.into_iter();
        waiting.retain(|socket| {
            let readable = ready.next().is_some_and(|found| found.read);
            !(readable && udp_answer(socket, to, burst))
        });
    }
    if !waiting.is_empty() {
        burst.fail(format!("{} UDP flows to {to}: no answer", waiting.len()));
    }
    Ok(())
}

/// True when the flow is done, well or badly.
fn udp_answer(socket: &UdpSocket, to: SocketAddr, burst: &mut Burst) -> bool {
    let mut buffer = [0; 128];
    match sock::receive(socket, &mut buffer) {
        Ok(got) => {
            let name = String::from_utf8_lossy(buffer.get(9..got.length).unwrap_or_default());
            burst.answered += 1;
            *burst.by_target.entry(name.into_owned()).or_default() += 1;
            *burst.by_lb.entry(got.dscp).or_default() += 1;
            true
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(error) => {
            burst.fail(format!("UDP flow to {to}: {error}"));
            true
        }
    }
}
