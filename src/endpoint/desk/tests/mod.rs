//! What happens to jobs, with readable tokens and a scripted IPAM.

mod life;
mod refusals;

use std::collections::VecDeque;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use crossbeam_channel::{Receiver, bounded};
use parking_lot::Mutex;

use super::super::authorize::tests::Plain;
use super::super::feed::{Outlet, feed};
use super::super::monitor::Told;
use super::super::monitor::tests::events;
use super::super::path::PeerToken;
use super::super::random::tests::Counting;
use super::super::reply::tests::answered;
use super::super::reply::{Awaited, reply};
use super::*;
use crate::core::family::PerFamily;
use crate::core::lease::{Addresses, Lease};
use crate::ipam::IpamError;
use crate::kernel::NetMsg;
use crate::proto::connection::{
    ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment, State,
};
use crate::sync::clock;

/// What IPAM was asked, and the answers that it still owes.
#[derive(Default)]
struct Script {
    log: Vec<String>,
    deadlines: Vec<Instant>,
    owed: VecDeque<(String, Answer)>,
}

#[derive(Clone, Default)]
struct Ipam(Arc<Mutex<Script>>);

impl Leases for Ipam {
    fn acquire(&self, id: LeaseId, deadline: Instant, answer: Answer) {
        let mut script = self.0.lock();
        script.deadlines.push(deadline);
        script.log.push(format!("acquire {id}"));
        script.owed.push_back((id.to_string(), answer));
    }

    fn release_later(&self, id: LeaseId) {
        self.0.lock().log.push(format!("release {id}"));
    }

    fn abandon(&self, id: LeaseId) {
        self.0.lock().log.push(format!("abandon {id}"));
    }

    fn addressed(&self) -> Stop {
        unreachable!("the desk takes what comes")
    }
}

struct Bench {
    desk: Desk,
    queue: Arc<JobQueue>,
    ipam: Ipam,
    net: Receiver<NetMsg>,
    session: Arc<Plain>,
    now: Now,
    over: Arc<AtomicBool>,
}

fn lease(n: u8) -> Addresses {
    let net = |text: String| text.parse().unwrap();
    Addresses {
        leases: PerFamily {
            v4: Some(Lease {
                src: net(format!("172.16.0.{n}/24")),
                dst: net(format!("172.16.0.{}/24", n + 100)),
            }),
            v6: None,
        },
        bridge: PerFamily {
            v4: Some(net("172.16.0.1/24".to_owned())),
            v6: None,
        },
    }
}

impl Bench {
    fn new() -> Self {
        let (queue, _woken) = JobQueue::new();
        let (tx, net) = bounded(1000);
        let ipam = Ipam::default();
        let desk = Desk::new(DeskParts {
            name: "us".to_owned(),
            mtu: 1400,
            families: IpFamilies::V4,
            leases: Box::new(ipam.clone()),
            net: NetHandle::new(tx),
            random: Box::new(Counting::default()),
            queue: Arc::clone(&queue),
            netns: PathBuf::from("/proc/self/ns/net"),
        });
        Self {
            desk,
            queue,
            ipam,
            net,
            session: Arc::new(Plain::new("us", "fwd")),
            now: Now {
                mono: clock::now(),
                wall: UNIX_EPOCH + Duration::from_secs(1_000),
            },
            over: Arc::default(),
        }
    }

    fn call(&self) -> Call {
        let over = Arc::clone(&self.over);
        Call {
            session: self.session.clone(),
            token: Some(PeerToken {
                jwt: "fwd>us@1600".to_owned(),
                // Sooner than our own token, which does not count.
                expires: UNIX_EPOCH + Duration::from_secs(1_500),
            }),
            is_over: Arc::new(move || over.load(Ordering::Relaxed)),
        }
    }

    /// What a forwarder sends for target `target`, with its own segment id
    /// `via`; `own` is our segment's id in a refresh.
    fn request_of(target: &str, via: &str, own: Option<&str>) -> NetworkServiceRequest {
        let mut segments = vec![
            ("tapa", target, "tapa>fwd@1600"),
            ("fwd", via, "replaced by the header"),
        ];
        segments.extend(own.map(|own| ("us", own, "old")));
        let mut request = NetworkServiceRequest::default();
        request.mechanism_preferences.push(Mechanism {
            cls: "LOCAL".to_owned(),
            type_: "KERNEL".to_owned(),
            ..Mechanism::default()
        });
        let connection = request.connection.mut_or_insert_default();
        connection.id = via.to_owned();
        connection.network_service = "proxy.c.t.ns".to_owned();
        connection.payload = "ETHERNET".to_owned();
        connection
            .labels
            .insert("nodeName".to_owned(), "n".to_owned());
        let path = connection.path.mut_or_insert_default();
        path.index = 1;
        for (name, id, token) in segments {
            path.path_segments.push(PathSegment {
                name: name.to_owned(),
                id: id.to_owned(),
                token: token.to_owned(),
                ..PathSegment::default()
            });
        }
        request
    }

    fn send(&mut self, request: NetworkServiceRequest) -> Awaited<Connection> {
        let (reply, awaited) = reply(None);
        let job = Job::Request(request, self.call(), reply);
        self.desk.handle(job, self.now);
        awaited
    }

    fn send_close(&mut self, connection: Connection) -> Awaited<()> {
        let (reply, awaited) = reply(None);
        let job = Job::Close(connection, self.call(), reply);
        self.desk.handle(job, self.now);
        awaited
    }

    /// Lets IPAM give its oldest answer.
    fn ipam_answers(&mut self, answer: Result<Addresses, IpamError>) {
        let (_, give) = self.ipam.0.lock().owed.pop_front().unwrap();
        give(answer);
        while let Some(job) = self.queue.pop() {
            self.desk.handle(job, self.now);
        }
    }

    /// A whole successful Request.
    fn connect(&mut self, request: NetworkServiceRequest, n: u8) -> Connection {
        let mut awaited = self.send(request);
        self.ipam_answers(Ok(lease(n)));
        answered(&mut awaited).unwrap().unwrap()
    }

    fn monitor(&mut self) -> Outlet<Told> {
        let (publisher, outlet) = feed();
        let job = Job::Monitor(MonitorScopeSelector::default(), publisher);
        self.desk.handle(job, self.now);
        outlet
    }

    fn facts(&self) -> Vec<String> {
        let fact = |message| match message {
            NetMsg::Fact(event) => event.to_string(),
            other => format!("{other:?}"),
        };
        self.net.try_iter().map(fact).collect()
    }

    fn ipam_log(&self) -> Vec<String> {
        std::mem::take(&mut self.ipam.0.lock().log)
    }
}

/// The refresh that follows an answer.
fn refresh(answer: &Connection) -> NetworkServiceRequest {
    NetworkServiceRequest {
        connection: Some(answer.clone()).into(),
        ..NetworkServiceRequest::default()
    }
}

fn own_id(answer: &Connection) -> String {
    answer.path.path_segments[2].id.clone()
}

fn code(awaited: &mut Awaited<Connection>) -> Code {
    answered(awaited).unwrap().unwrap_err().code().unwrap()
}

fn kinds(outlet: &Outlet<Told>) -> Vec<(ConnectionEventType, usize)> {
    let kind = |event: ConnectionEvent| {
        let count = event.connections.len();
        (event.type_.enum_value().unwrap(), count)
    };
    events(outlet).0.into_iter().map(kind).collect()
}
