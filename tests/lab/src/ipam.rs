//! The IPAM service with the real allocation rules, over mTLS on TCP, and with
//! the ways in which it can be slow, broken or away.

mod faults;
mod store;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never, select};
use grpcio::{RpcContext, RpcStatus, RpcStatusCode, Service, ServiceBuilder, UnarySink};
use ipnetwork::IpNetwork;
use meridio_proxy::core::family::PerFamily;
use meridio_proxy::core::lease::Verb;
use meridio_proxy::proto::ipam::{Child, Prefix};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::Stop;
use meridio_proxy::sync::thread::{STACK_LARGE, ThreadHandle, Threads};
use meridio_proxy::transport::server::{PeerTable, TlsServer};
use parking_lot::{Condvar, Mutex};
use protobuf::well_known_types::empty::Empty;

use crate::nsp::feed::Feed;
use crate::nsp::health_service;
use crate::spoil::Spoils;
use crate::wire::Wire;
pub use store::Key;
use store::{Refusal, Store};

/// Calls that may wait for the worker; more are refused.
const JOBS_MAX: usize = 8192;
/// How long a stop waits for running calls.
const STOP_LIMIT: Duration = Duration::from_millis(200);

/// What IPAM manages.
#[derive(Debug, Clone)]
pub struct IpamOptions {
    pub trench: String,
    pub conduits: Vec<String>,
    /// The trench's prefixes; the operator's defaults are 172.16.0.0/16 and
    /// fd00::/48.
    pub pools: PerFamily<IpNetwork>,
}

impl IpamOptions {
    /// One conduit in the default prefixes.
    pub fn new(trench: &str, conduit: &str) -> Self {
        Self {
            trench: trench.to_owned(),
            conduits: vec![conduit.to_owned()],
            pools: PerFamily {
                v4: "172.16.0.0/16".parse().unwrap(),
                v6: "fd00::/48".parse().unwrap(),
            },
        }
    }
}

/// A call as it arrived.
#[derive(Debug, Clone)]
pub struct Call {
    pub verb: Verb,
    pub child: Child,
    pub arrived: Instant,
    /// When it was executed, if it was.
    pub executed: Option<Instant>,
}

/// IPAM; clones refer to the same. Its table outlives its server.
#[derive(Clone)]
pub struct Ipam(Arc<Shared>);

struct Shared {
    core: Arc<Core>,
    jobs: Sender<Job>,
    wake: Sender<()>,
    // The line ends before the server.
    server: Mutex<Option<(Wire, TlsServer)>>,
    /// Holds the core alone, so that the last clone of `Ipam` ends it.
    _worker: ThreadHandle,
}

/// What handlers and worker share.
struct Core {
    spoils: Spoils,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    store: Store,
    delay: BTreeMap<&'static str, Duration>,
    child_delay: BTreeMap<String, Duration>,
    /// How long each call keeps the table, and until when it is kept.
    turn: Duration,
    kept_until: Option<Instant>,
    failure: Option<RpcStatus>,
    answers: Option<Answers>,
    calls: Vec<Call>,
}

/// What is told in place of what was allocated.
type Answers = Box<dyn Fn(&Child) -> Option<(String, i32)> + Send>;

/// A call on its way to the worker.
struct Job {
    number: usize,
    verb: Verb,
    child: Child,
    due: Instant,
    answer: Feed<Result<Prefix, RpcStatus>>,
}

impl Ipam {
    /// An IPAM with an empty table, not serving yet.
    pub fn new(threads: &Threads, options: &IpamOptions) -> Result<Self, String> {
        let mut store = Store::new(&options.trench, options.pools);
        for conduit in &options.conduits {
            store.add_conduit(conduit);
        }
        let (jobs, queue) = bounded(JOBS_MAX);
        let (wake, woken) = bounded(1);
        let core = Arc::new(Core {
            spoils: Spoils::default(),
            state: Mutex::new(State {
                store,
                delay: BTreeMap::new(),
                child_delay: BTreeMap::new(),
                turn: Duration::ZERO,
                kept_until: None,
                failure: None,
                answers: None,
                calls: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let executor = Arc::clone(&core);
        let worker = threads
            .spawn("lab-ipam", STACK_LARGE, move |stop| {
                work(&queue, &woken, &stop, |job| executor.execute(job));
            })
            .map_err(|error| format!("thread lab-ipam: {error}"))?;
        Ok(Self(Arc::new(Shared {
            core,
            jobs,
            wake,
            server: Mutex::new(None),
            _worker: worker,
        })))
    }

    /// Serves on `listener`, which the caller bound in the namespace it wants.
    pub fn serve(
        &self,
        threads: &Threads,
        rpc: &Rpc,
        svid: SvidCell,
        listener: TcpListener,
    ) -> Result<(), String> {
        let services = vec![self.service(), health_service()];
        let peers = PeerTable::default();
        let (wire, listener) = Wire::tcp(listener).map_err(|error| format!("IPAM: {error}"))?;
        let server = TlsServer::start_tcp(threads, rpc, svid, listener, peers, services)
            .map_err(|error| format!("IPAM: {error:?}"))?;
        *self.0.server.lock() = Some((wire, server));
        Ok(())
    }

    /// Ends the server; the table stays.
    pub fn stop(&self) {
        let server = self.0.server.lock().take();
        if let Some((wire, server)) = server {
            drop(wire);
            server.stop(clock::now() + STOP_LIMIT);
        }
    }

    /// Executes and answers calls of `verb` only after `delay`; each waits for
    /// itself alone.
    pub fn set_delay(&self, verb: Verb, delay: Duration) {
        self.0.core.state.lock().delay.insert(name(verb), delay);
    }

    /// Executes and answers the calls of one child only after `delay`.
    pub fn set_child_delay(&self, child: &str, delay: Duration) {
        let mut state = self.0.core.state.lock();
        state.child_delay.insert(child.to_owned(), delay);
    }

    /// Works the calls off one after the other, each in this time, as the real
    /// one does behind the lock of its table.
    pub fn set_turn(&self, turn: Duration) {
        self.0.core.state.lock().turn = turn;
    }

    /// Allocates without a call, for others than the proxy.
    pub fn allocate(&self, child: &Child) -> Result<IpNetwork, String> {
        let given = self.0.core.state.lock().store.allocate(child);
        self.0.core.changed.notify_all();
        given.map_err(|refusal| format!("{refusal:?}"))
    }

    /// Answers all calls with UNKNOWN and this text, executing none.
    pub fn set_failure(&self, text: Option<&str>) {
        let unknown = |text: &str| RpcStatus::with_message(RpcStatusCode::UNKNOWN, text.to_owned());
        self.refuse(text.map(unknown));
    }

    fn refuse(&self, failure: Option<RpcStatus>) {
        self.0.core.state.lock().failure = failure;
    }

    /// Answers each Allocate with this, whatever was allocated.
    pub fn set_answer(&self, answer: Option<(&str, i32)>) {
        let answer = answer.map(|(address, length)| (address.to_owned(), length));
        self.set_answers(move |_| answer.clone());
    }

    /// Answers each Allocate with the address and prefix length that this says
    /// for the child, if any, whatever was allocated.
    pub fn set_answers<F>(&self, answers: F)
    where
        F: Fn(&Child) -> Option<(String, i32)> + Send + 'static,
    {
        self.0.core.state.lock().answers = Some(Box::new(answers));
    }

    /// Which answers are spoilt, by the path of their method: Allocate's.
    pub fn spoils(&self) -> &Spoils {
        &self.0.core.spoils
    }

    /// Loses the table.
    pub fn forget(&self) {
        self.0.core.state.lock().store.forget();
    }

    /// Makes a conduit known; calls that wait for it go on.
    pub fn add_conduit(&self, name: &str) {
        self.0.core.state.lock().store.add_conduit(name);
        let _ = self.0.wake.try_send(());
    }

    /// The table.
    pub fn allocations(&self) -> BTreeMap<Key, IpNetwork> {
        self.0.core.state.lock().store.children().clone()
    }

    /// All calls since the start, in the order of their arrival.
    pub fn calls(&self) -> Vec<Call> {
        self.0.core.state.lock().calls.clone()
    }

    /// Waits until `is_so` holds of the table and the calls.
    pub fn wait(
        &self,
        deadline: Instant,
        is_so: impl Fn(&BTreeMap<Key, IpNetwork>, &[Call]) -> bool,
    ) -> Result<(), String> {
        let mut state = self.0.core.state.lock();
        while !is_so(state.store.children(), &state.calls) {
            if self
                .0
                .core
                .changed
                .wait_until(&mut state, deadline)
                .timed_out()
            {
                return Err(format!(
                    "IPAM is not as awaited: table {:?}, {} calls",
                    state.store.children(),
                    state.calls.len()
                ));
            }
        }
        Ok(())
    }

    fn service(&self) -> Service {
        let (core, jobs) = (Arc::clone(&self.0.core), self.0.jobs.clone());
        let allocate = move |context: RpcContext<'_>, child: Child, sink: UnarySink<Prefix>| {
            let answer = core.enqueue(&jobs, Verb::Allocate, child);
            context.spawn(async move {
                let _ = match answer.next().await {
                    Some(Ok(prefix)) => sink.success(prefix).await,
                    Some(Err(status)) => sink.fail(status).await,
                    None => return,
                };
            });
        };
        let (core, jobs) = (Arc::clone(&self.0.core), self.0.jobs.clone());
        let release = move |context: RpcContext<'_>, child: Child, sink: UnarySink<Empty>| {
            let answer = core.enqueue(&jobs, Verb::Release, child);
            context.spawn(async move {
                let _ = match answer.next().await {
                    Some(Ok(_)) => sink.success(Empty::new()).await,
                    Some(Err(status)) => sink.fail(status).await,
                    None => return,
                };
            });
        };
        ServiceBuilder::new()
            .add_unary_handler(&method::IPAM_ALLOCATE, allocate)
            .add_unary_handler(&method::IPAM_RELEASE, release)
            .build()
    }
}

impl Core {
    fn enqueue(
        &self,
        jobs: &Sender<Job>,
        verb: Verb,
        child: Child,
    ) -> Feed<Result<Prefix, RpcStatus>> {
        let now = clock::now();
        let answer = Feed::new();
        let mut state = self.state.lock();
        let delays = [
            state.delay.get(name(verb)),
            state.child_delay.get(&child.name),
        ];
        let delay = delays
            .into_iter()
            .flatten()
            .max()
            .copied()
            .unwrap_or_default();
        let free = state.kept_until.map_or(now, |until| until.max(now));
        let due = free + state.turn + delay;
        state.kept_until = Some(free + state.turn);
        let number = state.calls.len();
        state.calls.push(Call {
            verb,
            child: child.clone(),
            arrived: now,
            executed: None,
        });
        drop(state);
        self.changed.notify_all();
        let job = Job {
            number,
            verb,
            child,
            due,
            answer: answer.clone(),
        };
        if jobs.try_send(job).is_err() {
            let text = "too many calls".to_owned();
            let code = RpcStatusCode::RESOURCE_EXHAUSTED;
            answer.push(Err(RpcStatus::with_message(code, text)));
        }
        answer
    }

    /// Executes a job; false when it has to wait for its conduit.
    fn execute(&self, job: &Job) -> bool {
        let mut state = self.state.lock();
        let unknown = |text: String| RpcStatus::with_message(RpcStatusCode::UNKNOWN, text);
        let mut result = match (&state.failure, job.verb) {
            (Some(status), _) => Err(status.clone()),
            (None, Verb::Release) => {
                state.store.release(&job.child);
                Ok(Prefix::default())
            }
            (None, Verb::Allocate) => match state.store.allocate(&job.child) {
                Err(Refusal::Wait) => return false,
                Err(Refusal::Error(text)) => Err(unknown(text)),
                Ok(address) => {
                    let told = state.answers.as_ref().and_then(|told| told(&job.child));
                    let right = || (address.ip().to_string(), address.prefix().into());
                    let (address, length) = told.unwrap_or_else(right);
                    Ok(Prefix {
                        address,
                        prefixLength: length,
                        ..Prefix::default()
                    })
                }
            },
        };
        if state.failure.is_none() {
            state.calls[job.number].executed = Some(clock::now());
        }
        drop(state);
        self.changed.notify_all();
        if let (Ok(prefix), Verb::Allocate) = (&mut result, job.verb) {
            self.spoils.apply(method::IPAM_ALLOCATE.name, prefix);
        }
        job.answer.push(result);
        true
    }
}

/// The worker: executes each job when it is due.
fn work(queue: &Receiver<Job>, woken: &Receiver<()>, stop: &Stop, execute: impl Fn(&Job) -> bool) {
    let mut timers: BTreeMap<(Instant, usize), Job> = BTreeMap::new();
    let mut parked: Vec<Job> = Vec::new();
    loop {
        let next = timers.first_key_value().map(|((due, _), _)| *due);
        let timer = next.map_or_else(never, at);
        select! {
            recv(stop.receiver()) -> _ => return,
            recv(queue) -> job => match job {
                Ok(job) => {
                    timers.insert((job.due, job.number), job);
                }
                Err(_) => return,
            },
            recv(woken) -> _ => parked.retain(|job| !execute(job)),
            recv(timer) -> _ => {}
        }
        let now = clock::now();
        while let Some(entry) = timers.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let job = entry.remove();
            if !execute(&job) {
                parked.push(job);
            }
        }
    }
}

fn name(verb: Verb) -> &'static str {
    match verb {
        Verb::Allocate => "Allocate",
        Verb::Release => "Release",
    }
}
