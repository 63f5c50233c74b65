//! Flows of packets that are known one by one: which were answered, by whom,
//! and over which load balancers they went and came. A bounded number of flows
//! sends at a steady pace until it is stopped or its time is over; a step of a
//! test is the window of packets sent between two moments.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use meridio_proxy::sync::clock;
use meridio_proxy::sync::poll::{self, Interest, WakeFd};
use meridio_proxy::sync::thread::{STACK_LARGE, ThreadHandle, Threads};
use parking_lot::{Condvar, Mutex};

use crate::backlog;
use crate::netns::Netns;
use crate::sock;

/// Parts of an interval in which a part of the flows sends: no bursts.
const SLOTS: usize = 5;
/// How long an answer may take before its packet counts as lost.
const LATE: Duration = Duration::from_millis(1500);
/// The most flows of one run.
const FLOWS: usize = 4096;

/// How steady traffic is made.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Every flow sends one packet in each interval.
    pub interval: Duration,
    /// The traffic ends by itself after this time.
    pub limit: Duration,
}

/// The way of one packet and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// The load balancer that it came through.
    pub there: u8,
    /// The load balancer that its answer came through.
    pub back: u8,
    /// Who answered: an index of [`Flows::targets`].
    pub target: u16,
}

/// A moment between two packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    tick: usize,
    /// What the machine had discarded by then.
    discarded: u64,
}

/// Steady flows; dropping stops them.
pub struct Flows {
    netns: Netns,
    shared: Arc<Shared>,
    thread: ThreadHandle,
}

struct Shared {
    table: Mutex<Table>,
    answered: Condvar,
    wake: WakeFd,
}

#[derive(Default)]
struct Table {
    flows: Vec<Flow>,
    /// Intervals begun so far.
    tick: usize,
    targets: Vec<String>,
    last_error: Option<String>,
    duplicates: usize,
    over: bool,
}

struct Flow {
    socket: Arc<UdpSocket>,
    to: SocketAddr,
    active: bool,
    first: usize,
    ways: Vec<Option<Way>>,
}

/// What became of the packets of a window.
#[derive(Debug, Clone, Default)]
pub struct Step {
    pub flows: usize,
    pub sent: usize,
    pub lost: usize,
    /// Lost packets of flows that kept their target and both load balancers.
    pub lost_steady: usize,
    /// Lost packets of flows that were given other ones.
    pub lost_moved: usize,
    /// Flows that were answered over another load balancer than before.
    pub moved_back: usize,
    /// Flows that arrived over another load balancer than before.
    pub moved_there: usize,
    /// Flows that another target answered.
    pub moved_target: usize,
    /// The most packets in a row that one steady flow lost.
    pub worst_run: usize,
    /// Where the first of the lost packets went to, and after how many
    /// intervals of the window.
    pub first_lost: Vec<(SocketAddr, usize)>,
    /// How many of the lost packets may be those that the machine's kernel
    /// discarded, of whomever, between hardware and network stack.
    pub discarded: usize,
    /// The last error that sending or receiving met.
    pub error: Option<String>,
}

impl Flows {
    /// Starts sending from the namespace, without flows yet.
    pub fn start(netns: &Netns, pace: &Pace) -> io::Result<Self> {
        sock::raise_descriptor_limit()?;
        let shared = Arc::new(Shared {
            table: Mutex::new(Table::default()),
            answered: Condvar::new(),
            wake: WakeFd::new()?,
        });
        let (sender, pace) = (Arc::clone(&shared), pace.clone());
        let thread = Threads::unsupervised().spawn("traffic", STACK_LARGE, move |stop| {
            let end = clock::now() + pace.limit;
            let slot = pace.interval / SLOTS as u32;
            let mut next = clock::now();
            for number in 0.. {
                if stop.is_set() || clock::now() >= end {
                    break;
                }
                sender.send(number);
                // After a hold-up of this process it goes on at its pace and
                // does not catch up with a burst.
                next = (next + slot).max(clock::now());
                if let Err(error) = sender.receive_until(next) {
                    sender.table.lock().last_error = Some(error.to_string());
                }
            }
            sender.table.lock().over = true;
            sender.answered.notify_all();
        })?;
        Ok(Self {
            netns: netns.clone(),
            shared,
            thread,
        })
    }

    /// Adds flows to a destination, each with a port of its own.
    pub fn add(&self, to: SocketAddr, number: usize) -> io::Result<()> {
        let mut sockets = Vec::new();
        for _ in 0..number {
            sockets.push(Arc::new(connect(&self.netns, to)?));
        }
        let mut table = self.shared.table.lock();
        if table.flows.len() + number > FLOWS {
            return Err(io::Error::other(format!("more than {FLOWS} flows")));
        }
        // Their first packets are those of the next whole interval.
        let first = table.tick + 1;
        table.flows.extend(sockets.into_iter().map(|socket| Flow {
            socket,
            to,
            active: true,
            first,
            ways: Vec::new(),
        }));
        drop(table);
        self.shared.wake.wake();
        Ok(())
    }

    /// No more packets to that destination.
    pub fn end_flows(&self, to: SocketAddr) {
        for flow in &mut self.shared.table.lock().flows {
            flow.active &= flow.to != to;
        }
    }

    /// The names that [`Way::target`] stands for.
    #[must_use]
    pub fn targets(&self) -> Vec<String> {
        self.shared.table.lock().targets.clone()
    }

    /// This moment: the packets of the next interval are after it.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            tick: self.shared.table.lock().tick + 1,
            discarded: backlog::discarded(),
        }
    }

    /// Waits until every flow has got an answer to a packet sent after `mark`;
    /// false when that did not happen within `limit`.
    #[must_use]
    pub fn all_answered_since(&self, mark: Mark, limit: Duration) -> bool {
        self.wait(limit, |table| {
            let fresh = |flow: &Flow| {
                let from = mark.tick.saturating_sub(flow.first).min(flow.ways.len());
                flow.ways[from..].iter().any(Option::is_some)
            };
            table.flows.iter().filter(|f| f.active).all(fresh)
        })
    }

    /// Waits until `intervals` more have begun.
    #[must_use]
    pub fn run_for(&self, intervals: usize, limit: Duration) -> bool {
        let until = self.shared.table.lock().tick + intervals;
        self.wait(limit, |table| table.tick >= until)
    }

    /// Ends the window that began at `mark` and says what became of its
    /// packets. Waits for late answers for a bounded time.
    #[must_use]
    pub fn step(&self, mark: Mark) -> Step {
        let end = self.mark();
        let complete = |table: &Table| {
            table.tick > end.tick
                && (table.flows.iter())
                    .all(|flow| flow.window(mark, end).iter().all(Option::is_some))
        };
        let _ = self.wait(LATE, complete);
        let mut table = self.shared.table.lock();
        let mut step = Step {
            error: table.last_error.take(),
            ..Step::default()
        };
        for flow in &table.flows {
            flow.judge(mark, end, &mut step);
        }
        drop(table);
        step.discarded = backlog::excused(mark.discarded, backlog::discarded(), step.lost);
        step
    }

    /// How many flows are answered over each load balancer now.
    #[must_use]
    pub fn shares_back(&self) -> BTreeMap<u8, usize> {
        let mut shares = BTreeMap::new();
        for flow in self.shared.table.lock().flows.iter().filter(|f| f.active) {
            if let Some(way) = flow.ways.iter().rev().flatten().next() {
                *shares.entry(way.back).or_default() += 1;
            }
        }
        shares
    }

    /// Answers that came twice.
    #[must_use]
    pub fn duplicates(&self) -> usize {
        self.shared.table.lock().duplicates
    }

    /// Stops sending; what was counted stays readable.
    pub fn stop(&mut self) {
        self.thread.stop();
        self.shared.wake.wake();
    }

    fn wait(&self, limit: Duration, done: impl Fn(&Table) -> bool) -> bool {
        let deadline = clock::now() + limit;
        let mut table = self.shared.table.lock();
        loop {
            if done(&table) {
                return true;
            }
            let late = self.shared.answered.wait_until(&mut table, deadline);
            if table.over || late.timed_out() {
                return done(&table);
            }
        }
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn send(&self, number: usize) {
        let mut guard = self.table.lock();
        let table = &mut *guard;
        table.tick = number / SLOTS;
        let tick = table.tick;
        for (id, flow) in table.flows.iter_mut().enumerate() {
            if id % SLOTS != number % SLOTS || !flow.active || tick < flow.first {
                continue;
            }
            // An interval that was missed when the flow was added late.
            flow.ways.resize(tick - flow.first, None);
            flow.ways.push(None);
            let packet = [(id as u32).to_be_bytes(), (tick as u32).to_be_bytes()].concat();
            if let Err(error) = flow.socket.send(&packet) {
                table.last_error = Some(format!("send to {}: {error}", flow.to));
            }
        }
        drop(guard);
        self.answered.notify_all();
    }

    fn receive_until(&self, deadline: Instant) -> io::Result<()> {
        let sockets: Vec<Arc<UdpSocket>> = {
            let table = self.table.lock();
            table.flows.iter().map(|f| Arc::clone(&f.socket)).collect()
        };
        let mut interests = vec![self.wake.interest()];
        interests.extend(sockets.iter().map(|socket| Interest {
            fd: socket.as_raw_fd(),
            read: true,
            write: false,
        }));
        loop {
            let ready = poll::wait(&interests, Some(deadline))?;
            self.wake.drain();
            let mut table = self.table.lock();
            for (id, _) in (ready[1..].iter().enumerate()).filter(|(_, found)| found.read) {
                table.collect(id, &sockets[id]);
            }
            drop(table);
            self.answered.notify_all();
            if clock::now() >= deadline || ready[0].read {
                return Ok(());
            }
        }
    }
}

impl Table {
    fn collect(&mut self, id: usize, socket: &UdpSocket) {
        let mut buffer = [0; 128];
        loop {
            match sock::receive(socket, &mut buffer) {
                Ok(got) => self.note(id, &buffer[..got.length], got.dscp),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.last_error = Some(format!("flow to {}: {error}", self.flows[id].to));
                }
            }
        }
    }

    fn note(&mut self, id: usize, answer: &[u8], back: u8) {
        let Some((tick, there, name)) = parse(answer, id) else {
            self.last_error = Some(format!("answer {answer:?} to flow {id}"));
            return;
        };
        let known = self.targets.iter().position(|target| target == name);
        let target = known.unwrap_or_else(|| {
            self.targets.push(name.to_owned());
            self.targets.len() - 1
        });
        let way = Way {
            there,
            back,
            target: target as u16,
        };
        let flow = &mut self.flows[id];
        let place = tick.checked_sub(flow.first);
        match place.and_then(|place| flow.ways.get_mut(place)) {
            Some(Some(_)) => self.duplicates += 1,
            Some(place) => *place = Some(way),
            None => self.last_error = Some(format!("answer to a packet never sent: {tick}")),
        }
    }
}

/// Reads an answer: its tick, the load balancer there, the target's name.
fn parse(answer: &[u8], id: usize) -> Option<(usize, u8, &str)> {
    let flow = u32::from_be_bytes(answer.get(..4)?.try_into().ok()?);
    let tick = u32::from_be_bytes(answer.get(4..8)?.try_into().ok()?);
    let name = std::str::from_utf8(answer.get(9..)?).ok()?;
    (flow as usize == id).then_some((tick as usize, answer[8], name))
}

impl Flow {
    fn window(&self, from: Mark, to: Mark) -> &[Option<Way>] {
        let place = |mark: Mark| mark.tick.saturating_sub(self.first).min(self.ways.len());
        &self.ways[place(from)..place(to)]
    }

    fn judge(&self, from: Mark, to: Mark, step: &mut Step) {
        let window = self.window(from, to);
        if window.is_empty() {
            return;
        }
        let start = from.tick.saturating_sub(self.first).min(self.ways.len());
        let before = self.ways[..start].iter().rev().flatten().next();
        let after = self.ways[start..].iter().flatten();
        let before = before.or_else(|| after.clone().next()).copied();
        let (mut there, mut back, mut target) = (false, false, false);
        for (way, old) in after.filter_map(|way| before.map(|old| (way, old))) {
            there |= way.there != old.there;
            back |= way.back != old.back;
            target |= way.target != old.target;
        }
        let lost = window.iter().filter(|way| way.is_none()).count();
        if step.first_lost.len() < 8 {
            let holes = window.iter().enumerate().filter(|(_, way)| way.is_none());
            step.first_lost
                .extend(holes.take(2).map(|(n, _)| (self.to, n)));
        }
        step.flows += 1;
        step.sent += window.len();
        step.lost += lost;
        step.moved_there += usize::from(there);
        step.moved_back += usize::from(back);
        step.moved_target += usize::from(target);
        if there || back || target {
            step.lost_moved += lost;
        } else {
            step.lost_steady += lost;
            let run = window.split(Option::is_some).map(<[_]>::len).max();
            step.worst_run = step.worst_run.max(run.unwrap_or_default());
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} flows, {} packets, lost {} (steady flows {}, moved flows {}); \
             moved: {} return LB, {} ingress LB, {} target",
            self.flows,
            self.sent,
            self.lost,
            self.lost_steady,
            self.lost_moved,
            self.moved_back,
            self.moved_there,
            self.moved_target
        )?;
        if self.discarded > 0 {
            write!(
                f,
                "; {} of them maybe discarded by the machine",
                self.discarded
            )?;
        }
        for (to, interval) in &self.first_lost {
            write!(f, "; one to {to} in interval {interval}")?;
        }
        match &self.error {
            Some(error) if self.lost > 0 => write!(f, "; last error: {error}"),
            _ => Ok(()),
        }
    }
}

/// A connected socket of the namespace with a port of its own.
pub(crate) fn connect(netns: &Netns, to: SocketAddr) -> io::Result<UdpSocket> {
    let any = match to {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    netns.try_run(|| {
        let socket = sock::bind(SocketAddr::new(any, 0))?;
        socket.connect(to)?;
        Ok(socket)
    })
}
