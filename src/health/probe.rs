//! Thread `health-probe`: finds out what no other thread knows.
//!
//! - IPAM and NSP: the state of each connection, and on it a health-check call
//!   every `NSM_GRPC_KEEPALIVE_TIME`. HTTP/2 pings that often would make
//!   grpc-go's servers close the connection (too_many_pings); a call does not,
//!   and any answer, even "unimplemented", proves that the peer is alive.
//! - The own endpoint: dialled anew over mTLS, as a forwarder would, at once and
//!   then 5 s after the last probe ended (Meridio pkg/health/probe).

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::{HealthCell, SubService};
use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse};
use crate::rpc::call::{self, CancelGuard, Options, Reply};
use crate::rpc::env::Rpc;
use crate::rpc::method::HEALTH_CHECK;
use crate::rpc::status::{Code, RpcError};
use crate::spiffe::SvidCell;
use crate::sync::clock;
use crate::sync::stop::Stop;
use crate::sync::thread::{STACK_SMALL, ThreadHandle, Threads};
use crate::transport::client::{Address, Connection, Connector, ConnectorOptions, ConnectorState};

/// Pause between probes of the own endpoint.
const ENDPOINT_PERIOD: Duration = Duration::from_secs(5);
/// Bound of a dial of the own endpoint, handshake included.
const ENDPOINT_CONNECT: Duration = Duration::from_secs(1);
/// Bound of the call that shows whether IPAM or NSP is alive: grpc-go's default
/// time for the answer to a keepalive ping.
const ALIVE_LIMIT: Duration = Duration::from_secs(20);
/// Bound of taking down the connection to the own endpoint.
const CLOSE_LIMIT: Duration = Duration::from_millis(100);

/// What the thread watches.
pub struct ProbeOptions {
    /// The connection to IPAM.
    pub ipam: Connector,
    /// The connection to NSP.
    pub nsp: Connector,
    /// `NSM_GRPC_KEEPALIVE_TIME`.
    pub keepalive: Duration,
    /// The socket of the own endpoint.
    pub endpoint: PathBuf,
    /// `NSM_GRPC_PROBE_RPC_TIMEOUT`.
    pub endpoint_timeout: Duration,
}

/// Starts the thread.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn start(
    threads: &Threads,
    rpc: &Rpc,
    svid: SvidCell,
    cell: HealthCell,
    options: ProbeOptions,
) -> io::Result<ThreadHandle> {
    let own = Dial {
        threads: Threads::clone(threads),
        rpc: rpc.clone(),
        svid,
        socket: options.endpoint,
        timeout: options.endpoint_timeout,
    };
    let peers = [
        (SubService::IpamCli, options.ipam),
        (SubService::NspCli, options.nsp),
    ];
    let keepalive = options.keepalive;
    threads.spawn("health-probe", STACK_SMALL, move |stop| {
        let [ipam, nsp] = peers.map(|(service, connector)| Peer::new(service, connector));
        Worker {
            cell,
            keepalive,
            endpoint: own,
            endpoint_due: clock::now(),
        }
        .run([ipam, nsp], &stop);
    })
}

type Alive = Result<(), String>;

/// IPAM or NSP.
struct Peer {
    service: SubService,
    connector: Connector,
    changes: Receiver<()>,
    answers: (Sender<Alive>, Receiver<Alive>),
    call: Option<Call>,
    judge: Judge,
    due: Instant,
}

/// A question under way. It does not keep its connection: a rotation ends both.
struct Call {
    connection: Weak<Connection>,
    _guard: CancelGuard,
}

/// What is known of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Judge {
    connection: ConnectorState,
    /// Why the last call on this connection failed.
    silent: Option<String>,
}

impl Judge {
    /// Takes a state of the connection; a new connection is taken to be alive.
    fn connection(&mut self, state: ConnectorState) {
        if state != ConnectorState::Ready {
            self.silent = None;
        }
        self.connection = state;
    }

    fn verdict(&self) -> (bool, &str) {
        match (&self.connection, &self.silent) {
            (ConnectorState::Ready, None) => (true, "connected"),
            (ConnectorState::Ready, Some(why)) => (false, why),
            (ConnectorState::Connecting { last_error }, _) => {
                (false, last_error.as_deref().unwrap_or("not connected yet"))
            }
        }
    }
}

impl Peer {
    fn new(service: SubService, connector: Connector) -> Self {
        Self {
            service,
            changes: connector.state().subscribe(),
            answers: bounded(1),
            call: None,
            judge: Judge {
                connection: ConnectorState::Connecting { last_error: None },
                silent: None,
            },
            connector,
            due: clock::now(),
        }
    }

    fn changed(&mut self) {
        self.judge.connection(self.connector.state().get());
        if self.judge.silent.is_some() {
            // It may be another connection already.
            self.due = clock::now();
        }
    }

    /// Takes the answer to the last question. That a call failed says nothing
    /// when its connection has been replaced, or is ending: a connection that
    /// is lost, or rotated away, takes the call with it.
    fn answered(&mut self, answer: Alive) {
        let asked = self.call.take().map(|call| call.connection);
        let is_current = self
            .connector
            .current()
            .is_ok_and(|now| asked.is_some_and(|asked| asked.ptr_eq(&Arc::downgrade(&now))));
        if answer.is_err() && !is_current {
            self.judge.silent = None;
            self.due = clock::now();
        } else {
            self.judge.silent = answer.err();
        }
    }

    /// Asks whether the peer is alive, if there is a connection to ask on and
    /// the last question was answered.
    fn ask(&mut self) {
        if self.call.is_some() {
            return;
        }
        let Ok(connection) = self.connector.current() else {
            return;
        };
        let answers = self.answers.0.clone();
        let guard = call::start(
            connection.channel(),
            &HEALTH_CHECK,
            &HealthCheckRequest::new(),
            &Options::with_timeout(ALIVE_LIMIT),
            // One question at a time: the channel has room for its answer.
            move |result| drop(answers.try_send(alive(&result))),
        );
        self.call = Some(Call {
            connection: Arc::downgrade(&connection),
            _guard: guard,
        });
    }
}

/// Every answer that the peer itself gave shows that it is alive.
fn alive<T>(result: &Result<Reply<T>, RpcError>) -> Alive {
    match result {
        Err(error @ RpcError::Status { code, .. })
            if [Code::DEADLINE_EXCEEDED, Code::UNAVAILABLE].contains(code) =>
        {
            Err(format!("no sign of life: {error}"))
        }
        Err(error @ RpcError::Library(_)) => Err(error.to_string()),
        _ => Ok(()),
    }
}

struct Worker {
    cell: HealthCell,
    keepalive: Duration,
    endpoint: Dial,
    endpoint_due: Instant,
}

impl Worker {
    fn run(mut self, [mut ipam, mut nsp]: [Peer; 2], stop: &Stop) {
        loop {
            let due = self.endpoint_due.min(ipam.due).min(nsp.due);
            let wait = due.saturating_duration_since(clock::now());
            select! {
                recv(stop.receiver()) -> _ => return,
                recv(ipam.changes) -> _ => ipam.changed(),
                recv(nsp.changes) -> _ => nsp.changed(),
                recv(ipam.answers.1) -> answer => ipam.answered(answer.unwrap_or(Ok(()))),
                recv(nsp.answers.1) -> answer => nsp.answered(answer.unwrap_or(Ok(()))),
                default(wait) => self.tick([&mut ipam, &mut nsp], stop),
            }
            for peer in [&ipam, &nsp] {
                let (serving, reason) = peer.judge.verdict();
                self.cell.set(peer.service, serving, reason);
            }
        }
    }

    fn tick(&mut self, peers: [&mut Peer; 2], stop: &Stop) {
        let now = clock::now();
        for peer in peers {
            if peer.due <= now {
                peer.ask();
                peer.due = now + self.keepalive;
            }
        }
        if self.endpoint_due <= now {
            let result = self.endpoint.probe(stop);
            // What a stop interrupted says nothing about the endpoint.
            if !stop.is_set() {
                let reason = result.as_ref().err().map_or("answers", String::as_str);
                self.cell
                    .set(SubService::NsmEndpoint, result.is_ok(), reason);
            }
            self.endpoint_due = clock::now() + ENDPOINT_PERIOD;
        }
    }
}

/// How the own endpoint is dialled.
struct Dial {
    threads: Threads,
    rpc: Rpc,
    svid: SvidCell,
    socket: PathBuf,
    timeout: Duration,
}

impl Dial {
    fn probe(&self, stop: &Stop) -> Result<(), String> {
        let options = ConnectorOptions {
            name: "self",
            address: Address::Unix(self.socket.clone()),
            authority: "localhost".to_owned(),
            dial_timeout: ENDPOINT_CONNECT,
            backoff_max: ENDPOINT_CONNECT,
        };
        let connector = Connector::start(&self.threads, &self.rpc, self.svid.clone(), options)
            .map_err(|error| format!("starting a thread: {error}"))?;
        let result = self.ask(&connector, stop);
        connector.close(clock::now() + CLOSE_LIMIT);
        result
    }

    fn ask(&self, connector: &Connector, stop: &Stop) -> Result<(), String> {
        let connection = connector
            .acquire(clock::now() + ENDPOINT_CONNECT, stop)
            .map_err(|error| error.to_string())?;
        let reply = call::unary(
            connection.channel(),
            &HEALTH_CHECK,
            &HealthCheckRequest::new(),
            &Options::with_timeout(self.timeout),
            stop,
        )
        .map_err(|error| error.to_string())?;
        serving(&reply.message)
    }
}

fn serving(answer: &HealthCheckResponse) -> Result<(), String> {
    match answer.status.enum_value() {
        Ok(ServingStatus::SERVING) => Ok(()),
        Ok(other) => Err(format!("answered {other:?}")),
        Err(number) => Err(format!("answered status {number}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_judged_by_connection_and_answers() {
        let mut judge = Judge {
            connection: ConnectorState::Connecting { last_error: None },
            silent: None,
        };
        assert_eq!(judge.verdict(), (false, "not connected yet"));
        judge.connection(ConnectorState::Connecting {
            last_error: Some("refused".to_owned()),
        });
        assert_eq!(judge.verdict(), (false, "refused"));
        judge.connection(ConnectorState::Ready);
        assert_eq!(judge.verdict(), (true, "connected"));
        judge.silent = Some("no sign of life".to_owned());
        assert_eq!(judge.verdict(), (false, "no sign of life"));
        // A new connection starts without the old one's record.
        judge.connection(ConnectorState::Connecting { last_error: None });
        judge.connection(ConnectorState::Ready);
        assert_eq!(judge.verdict(), (true, "connected"));
    }

    #[test]
    fn any_answer_of_the_peer_is_a_sign_of_life() {
        let status = |code| Err::<Reply<()>, _>(RpcError::status(code, "x"));
        for code in [Code::UNIMPLEMENTED, Code::NOT_FOUND, Code::INTERNAL] {
            assert_eq!(alive(&status(code)), Ok(()), "{code:?}");
        }
        for code in [Code::DEADLINE_EXCEEDED, Code::UNAVAILABLE] {
            assert!(alive(&status(code)).is_err(), "{code:?}");
        }
    }
}
