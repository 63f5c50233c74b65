//! What happens to jobs, with readable tokens and a scripted IPAM.

use std::collections::VecDeque;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use crossbeam_channel::{Receiver, bounded};
use parking_lot::Mutex;

use super::super::authorize::tests::Plain;
use super::super::feed::tests::drain;
use super::super::feed::{Outlet, feed};
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
    owed: VecDeque<(String, Answer)>,
}

#[derive(Clone, Default)]
struct Ipam(Arc<Mutex<Script>>);

impl Leases for Ipam {
    fn acquire(&self, id: LeaseId, _deadline: Instant, answer: Answer) {
        let mut script = self.0.lock();
        script.log.push(format!("acquire {id}"));
        script.owed.push_back((id.to_string(), answer));
    }

    fn release_later(&self, id: LeaseId) {
        self.0.lock().log.push(format!("release {id}"));
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
                expires: UNIX_EPOCH + Duration::from_secs(1_600),
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

    fn monitor(&mut self) -> Outlet<ConnectionEvent> {
        let (publisher, outlet) = feed();
        let job = Job::Monitor(MonitorScopeSelector::default(), publisher);
        self.desk.handle(job, self.now);
        outlet
    }

    fn facts(&self) -> Vec<String> {
        let fact = |message| match message {
            NetMsg::Fact(event) => event.to_string(),
            NetMsg::Quiesce(_) => "quiesce".to_owned(),
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

fn kinds(outlet: &Outlet<ConnectionEvent>) -> Vec<(ConnectionEventType, usize)> {
    let kind = |event: ConnectionEvent| {
        let count = event.connections.len();
        (event.type_.enum_value().unwrap(), count)
    };
    drain(outlet).0.into_iter().map(kind).collect()
}

#[test]
fn a_first_request_is_answered_completely() {
    let mut bench = Bench::new();
    let outlet = bench.monitor();
    let mut request = Bench::request_of("t1", "f1", Some("other"));
    request
        .connection
        .mut_or_insert_default()
        .path
        .mut_or_insert_default()
        .path_segments[2]
        .name = "somebody".to_owned();
    let asked = request.connection.clone().unwrap();
    let mut awaited = bench.send(request);
    assert!(answered(&mut awaited).is_none() && bench.facts().is_empty());
    bench.ipam_answers(Ok(lease(2)));
    let answer = answered(&mut awaited).unwrap().unwrap();

    assert_eq!((answer.id.as_str(), answer.path.index), ("f1", 1));
    assert_eq!(answer.state.enum_value(), Ok(State::UP));
    assert_eq!(answer.labels, asked.labels);
    assert_eq!(
        (&answer.payload, &answer.network_service),
        (&asked.payload, &asked.network_service)
    );
    let segments = &answer.path.path_segments;
    assert_eq!(segments.len(), 3);
    assert_eq!(
        segments[0], asked.path.path_segments[0],
        "the target's segment is untouched"
    );
    assert_eq!(segments[1].token, "fwd>us@1600");
    assert_eq!(segments[1].expires.seconds, 1_600);
    assert_eq!(
        (segments[2].name.as_str(), segments[2].token.as_str()),
        ("us", "us>fwd@1600")
    );
    assert!(segments[2].expires.seconds > 1_000 && segments[2].id != "other");

    let mechanism = &answer.mechanism;
    let ifname = &mechanism.parameters["name"];
    assert!(
        ifname.starts_with("proxy.c.t.-") && ifname.len() == 15,
        "{ifname}"
    );
    assert_eq!(
        segments[2].metrics["server_interface"],
        format!("KERNEL/{ifname}")
    );
    let netns = std::fs::metadata("/proc/self/ns/net").unwrap();
    let url = format!("inode://{}/{}", netns.dev(), netns.ino());
    assert_eq!(mechanism.parameters["inodeURL"], url);
    let attached = std::mem::take(&mut *bench.session.attached.lock());
    let passed = std::fs::File::from(attached.into_iter().next().unwrap())
        .metadata()
        .unwrap();
    assert_eq!((passed.dev(), passed.ino()), (netns.dev(), netns.ino()));

    assert_eq!(answer.context.MTU, 1400);
    let ip = &answer.context.ip_context;
    assert_eq!(ip.src_ip_addrs, ["172.16.0.2/24"]);
    assert_eq!(ip.dst_ip_addrs, ["172.16.0.102/24"]);
    assert_eq!(ip.extra_prefixes, ["172.16.0.1/24"]);

    let own = own_id(&answer);
    let fact = format!("target connection {own} is up on {ifname}, peers 172.16.0.2");
    assert_eq!(bench.facts(), [fact]);
    assert_eq!(bench.ipam_log(), ["acquire t1"]);
    let events = drain(&outlet).0;
    assert!(
        events[0].connections.is_empty(),
        "the present first, even if it is nothing"
    );
    let told = &events[1].connections[&own];
    assert_eq!((told.id.as_str(), told.path.index), (own.as_str(), 2));
}

#[test]
fn a_refresh_keeps_everything_but_tokens() {
    let mut bench = Bench::new();
    let first = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let mut with_vip = refresh(&first);
    let context = with_vip
        .connection
        .mut_or_insert_default()
        .context
        .mut_or_insert_default();
    context.MTU = 0;
    context
        .ip_context
        .mut_or_insert_default()
        .src_ip_addrs
        .push("20.0.0.1/32".to_owned());
    context
        .extra_context
        .insert("kept".to_owned(), "1".to_owned());
    let second = bench.connect(with_vip, 2);
    assert_eq!(own_id(&second), own_id(&first));
    assert_eq!(second.mechanism, first.mechanism);
    assert_eq!(second.context.MTU, 1400);
    assert_eq!(
        second.context.ip_context.src_ip_addrs,
        ["172.16.0.2/24", "20.0.0.1/32"]
    );
    assert_eq!(second.context.extra_context["kept"], "1");
    assert_eq!(
        bench.session.attached.lock().len(),
        2,
        "the namespace goes with each answer"
    );
    assert_eq!(bench.ipam_log(), ["acquire t1", "acquire t1"]);
    let third = bench.connect(refresh(&second), 2);
    assert_eq!(third.context, second.context);
    assert_eq!(bench.desk.targets.len(), 1);
}

#[test]
fn a_connection_from_before_a_restart_keeps_its_id_interface_and_addresses() {
    let mut before = Bench::new();
    let answer = before.connect(Bench::request_of("t1", "f1", None), 2);
    let mut after = Bench::new();
    let again = after.connect(refresh(&answer), 2);
    assert_eq!(again.path.path_segments[2].id, own_id(&answer));
    assert_eq!(again.mechanism, answer.mechanism);
    assert_eq!(again.context, answer.context);
    assert_eq!(after.facts(), before.facts());
}

#[test]
fn order_within_a_connection_parallel_between_connections() {
    let mut bench = Bench::new();
    let first = bench.connect(Bench::request_of("t1", "f1", Some("own-1")), 2);
    let mut slow = bench.send(refresh(&first));
    let mut close = bench.send_close(first.clone());
    let mut again = bench.send(refresh(&first));
    let mut other = bench.send(Bench::request_of("t2", "f2", None));
    assert_eq!(bench.ipam_log(), ["acquire t1", "acquire t1", "acquire t2"]);
    assert!(
        answered(&mut close).is_none(),
        "it waits for the Request before it"
    );
    bench.ipam_answers(Ok(lease(2)));
    assert!(answered(&mut slow).unwrap().is_ok());
    assert!(answered(&mut close).unwrap().is_ok());
    assert!(answered(&mut again).is_none());
    assert_eq!(bench.ipam_log(), ["release t1", "acquire t1"]);
    bench.ipam_answers(Ok(lease(3)));
    assert!(answered(&mut other).unwrap().is_ok());
    bench.ipam_answers(Ok(lease(2)));
    assert!(answered(&mut again).unwrap().is_ok());
}

#[test]
fn ipam_failing_refuses_a_first_request_and_leaves_an_old_connection() {
    let mut bench = Bench::new();
    let mut first = bench.send(Bench::request_of("t1", "f1", None));
    let error = RpcError::status(Code::NOT_FOUND, "no conduit");
    bench.ipam_answers(Err(IpamError::Rpc(error)));
    assert_eq!(code(&mut first), Code::NOT_FOUND);
    assert!(bench.desk.targets.is_empty() && bench.facts().is_empty());

    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = (bench.facts(), bench.ipam_log());
    let outlet = bench.monitor();
    let mut again = bench.send(refresh(&up));
    bench.ipam_answers(Err(IpamError::Deadline("no route".to_owned())));
    assert_eq!(code(&mut again), Code::DEADLINE_EXCEEDED);
    assert!(bench.facts().is_empty());
    assert_eq!(bench.ipam_log(), ["acquire t1"], "nothing is released");
    assert_eq!(
        kinds(&outlet),
        [(ConnectionEventType::INITIAL_STATE_TRANSFER, 1)]
    );
}

#[test]
fn a_full_queue_of_ipam_is_waited_for() {
    let mut bench = Bench::new();
    let begun = bench.now.mono;
    let mut awaited = bench.send(Bench::request_of("t1", "f1", None));
    bench.ipam_answers(Err(IpamError::Busy));
    assert!(answered(&mut awaited).is_none());
    let again = bench.desk.next_deadline().unwrap();
    assert!(again > begun && again < begun + Duration::from_secs(1));
    assert_eq!(bench.ipam_log(), ["acquire t1"]);
    bench.now.mono = again;
    bench.desk.tick(bench.now);
    assert_eq!(bench.ipam_log(), ["acquire t1"]);
    assert_eq!(bench.desk.next_deadline(), None);
    bench.now.mono = begun + IPAM_TIMEOUT;
    bench.ipam_answers(Err(IpamError::Busy));
    assert_eq!(code(&mut awaited), Code::RESOURCE_EXHAUSTED, "not for ever");
    assert_eq!(bench.desk.next_deadline(), None);
}

#[test]
fn an_answer_that_nobody_waits_for_establishes_nothing() {
    let mut bench = Bench::new();
    let mut awaited = bench.send(Bench::request_of("t1", "f1", None));
    bench.over.store(true, Ordering::Relaxed);
    bench.ipam_answers(Ok(lease(2)));
    assert_eq!(code(&mut awaited), Code::DEADLINE_EXCEEDED);
    assert!(bench.desk.targets.is_empty() && bench.facts().is_empty());
}

#[test]
fn closing_twice_and_what_was_never_there() {
    let mut bench = Bench::new();
    let outlet = bench.monitor();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = bench.facts();
    for _ in 0..2 {
        let mut close = bench.send_close(up.clone());
        assert_eq!(answered(&mut close), Some(Ok(())));
    }
    assert_eq!(
        answered(&mut bench.send_close(Connection::default())),
        Some(Ok(()))
    );
    let own = own_id(&up);
    assert_eq!(
        bench.facts(),
        [format!("target connection {own} is closed")]
    );
    assert_eq!(bench.ipam_log(), ["acquire t1", "release t1"]);
    use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER, UPDATE};
    assert_eq!(
        kinds(&outlet),
        [(INITIAL_STATE_TRANSFER, 0), (UPDATE, 1), (DELETE, 1)]
    );
    assert!(bench.desk.targets.is_empty());
}

#[test]
fn an_unauthorised_call_leaves_the_connection() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = bench.facts();
    let good = Arc::clone(&bench.session);
    bench.session = Arc::new(Plain::new("us", "stranger"));
    let mut close = bench.send_close(up.clone());
    let error = answered(&mut close).unwrap().unwrap_err();
    assert_eq!(error.code(), Some(Code::PERMISSION_DENIED));
    let mut reselect = refresh(&up);
    reselect.connection.mut_or_insert_default().state = State::RESELECT_REQUESTED.into();
    assert_eq!(code(&mut bench.send(reselect)), Code::PERMISSION_DENIED);
    assert!(bench.facts().is_empty());
    bench.session = good;
    assert_eq!(answered(&mut bench.send_close(up)), Some(Ok(())));
}

#[test]
fn reselect_is_close_then_request_with_the_same_addresses() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = (bench.facts(), bench.ipam_log());
    let outlet = bench.monitor();
    for known in [true, false] {
        let mut request = refresh(&up);
        request.mechanism_preferences = Bench::request_of("", "", None).mechanism_preferences;
        let connection = request.connection.mut_or_insert_default();
        connection.state = State::RESELECT_REQUESTED.into();
        connection.mechanism = None.into();
        let answer = bench.connect(request, 2);
        assert_eq!(answer.state.enum_value(), Ok(State::UP));
        assert_eq!(own_id(&answer), own_id(&up));
        assert_eq!(answer.context, up.context);
        let facts = bench.facts();
        assert_eq!(facts.len(), if known { 2 } else { 1 }, "{facts:?}");
        assert_eq!(facts[0].contains("is closed"), known);
        assert_eq!(bench.ipam_log(), ["acquire t1"], "no release comes between");
        assert_ne!(
            answer.mechanism.parameters["name"],
            up.mechanism.parameters["name"]
        );
        // Once more for a connection that this process does not know.
        bench = Bench::new();
    }
    use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER, UPDATE};
    assert_eq!(
        kinds(&outlet),
        [(INITIAL_STATE_TRANSFER, 1), (DELETE, 1), (UPDATE, 1)]
    );
}

#[test]
fn a_reselect_that_fails_pays_the_lease_back() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let mut request = refresh(&up);
    request.connection.mut_or_insert_default().state = State::RESELECT_REQUESTED.into();
    let mut awaited = bench.send(request);
    bench.ipam_answers(Err(IpamError::Stopped));
    assert_eq!(code(&mut awaited), Code::UNAVAILABLE);
    assert_eq!(bench.ipam_log(), ["acquire t1", "acquire t1", "release t1"]);
    assert!(bench.desk.targets.is_empty());
}

#[test]
fn two_connections_of_one_target_share_its_lease() {
    let mut bench = Bench::new();
    let old = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let new = bench.connect(Bench::request_of("t1", "f2", None), 2);
    assert_ne!(own_id(&old), own_id(&new));
    assert_ne!(
        old.mechanism.parameters["name"],
        new.mechanism.parameters["name"]
    );
    let _ = bench.ipam_log();
    answered(&mut bench.send_close(old)).unwrap().unwrap();
    assert!(
        bench.ipam_log().is_empty(),
        "the other one lives on these addresses"
    );
    answered(&mut bench.send_close(new)).unwrap().unwrap();
    assert_eq!(bench.ipam_log(), ["release t1"]);
}

#[test]
fn a_connection_that_is_not_refreshed_is_closed() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = bench.facts();
    let expiry = bench.now.mono + Duration::from_secs(600);
    assert_eq!(bench.desk.next_deadline(), Some(expiry));
    bench.now.mono = expiry;
    // A refresh is under way when the time comes: it counts.
    let mut late = bench.send(refresh(&up));
    bench.desk.tick(bench.now);
    assert_eq!(bench.desk.next_deadline(), None, "told once");
    bench.ipam_answers(Ok(lease(2)));
    assert!(answered(&mut late).unwrap().is_ok());
    let expiry = expiry + Duration::from_secs(600);
    assert_eq!(bench.desk.next_deadline(), Some(expiry));
    let _ = (bench.facts(), bench.ipam_log());
    bench.now.mono = expiry;
    bench.desk.tick(bench.now);
    assert_eq!(
        bench.facts(),
        [format!("target connection {} is closed", own_id(&up))]
    );
    assert_eq!(bench.ipam_log(), ["release t1"]);
    assert!(bench.desk.targets.is_empty());
}

#[test]
fn hostile_requests_are_refused_and_change_nothing() {
    type Change = fn(&mut NetworkServiceRequest);
    fn connection(request: &mut NetworkServiceRequest) -> &mut Connection {
        request.connection.mut_or_insert_default()
    }
    let rows: [(&str, Code, Change); 13] = [
        ("no connection", Code::PERMISSION_DENIED, |r| {
            r.connection = None.into();
        }),
        ("no path", Code::PERMISSION_DENIED, |r| {
            connection(r).path = None.into();
        }),
        ("no segments", Code::PERMISSION_DENIED, |r| {
            connection(r)
                .path
                .mut_or_insert_default()
                .path_segments
                .clear();
        }),
        ("index out of range", Code::UNKNOWN, |r| {
            connection(r).path.mut_or_insert_default().index = 7;
        }),
        ("no id of the target", Code::UNKNOWN, |r| {
            connection(r).path.mut_or_insert_default().path_segments[0]
                .id
                .clear();
        }),
        ("rubbish for a token", Code::PERMISSION_DENIED, |r| {
            "x".clone_into(&mut connection(r).path.mut_or_insert_default().path_segments[0].token);
        }),
        ("hostile interface", Code::UNKNOWN, |r| {
            let parameters = &mut r.mechanism_preferences[0].parameters;
            parameters.insert("name".to_owned(), "../../x".to_owned());
        }),
        ("the bridge", Code::UNKNOWN, |r| {
            let parameters = &mut r.mechanism_preferences[0].parameters;
            parameters.insert("name".to_owned(), "bridge0".to_owned());
        }),
        ("interface of another", Code::ALREADY_EXISTS, |r| {
            let mut mechanism = r.mechanism_preferences.remove(0);
            let name = "proxy.c.t.-take".to_owned();
            mechanism.parameters.insert("name".to_owned(), name);
            connection(r).mechanism = Some(mechanism).into();
        }),
        ("no mechanism", Code::UNKNOWN, |r| {
            r.mechanism_preferences.clear();
        }),
        ("oversized", Code::INVALID_ARGUMENT, |r| {
            connection(r).payload = "x".repeat(3 * 1024 * 1024);
        }),
        ("garbage for an address", Code::INVALID_ARGUMENT, |r| {
            let context = connection(r).context.mut_or_insert_default();
            let ip = context.ip_context.mut_or_insert_default();
            ip.src_ip_addrs.push("é".repeat(100_000));
        }),
        ("address of no used family", Code::INVALID_ARGUMENT, |r| {
            let context = connection(r).context.mut_or_insert_default();
            let ip = context.ip_context.mut_or_insert_default();
            ip.src_ip_addrs.push("2000::1/128".to_owned());
        }),
    ];
    let mut bench = Bench::new();
    let mut taken = Bench::request_of("t0", "f0", None);
    let name = "proxy.c.t.-take".to_owned();
    taken.mechanism_preferences[0]
        .parameters
        .insert("name".to_owned(), name);
    bench.connect(taken, 9);
    let _ = bench.facts();
    for (what, expected, change) in rows {
        let mut request = Bench::request_of("t1", "f1", None);
        change(&mut request);
        let mut awaited = bench.send(request);
        if !bench.ipam.0.lock().owed.is_empty() {
            bench.ipam_answers(Ok(lease(2)));
        }
        let error = answered(&mut awaited).unwrap().unwrap_err();
        assert_eq!(error.code(), Some(expected), "{what}: {error}");
        assert!(error.to_string().len() < 2 * ERROR_MAX, "{what}");
        assert!(bench.facts().is_empty(), "{what}");
        assert_eq!(bench.desk.targets.len(), 1, "{what}");
    }
    // Without a token in the headers the path's own counts, and its expiry is
    // missing here.
    let (reply, mut awaited) = reply(None);
    let mut request = Bench::request_of("t1", "f1", None);
    connection(&mut request)
        .path
        .mut_or_insert_default()
        .path_segments[1]
        .token = "fwd>us@1600".to_owned();
    let call = Call {
        token: None,
        ..bench.call()
    };
    bench
        .desk
        .handle(Job::Request(request, call, reply), bench.now);
    assert_eq!(code(&mut awaited), Code::UNKNOWN);
}

#[test]
fn a_preferred_name_is_taken_if_it_is_free() {
    let mut bench = Bench::new();
    let mut names = Vec::new();
    for target in ["t1", "t2"] {
        let mut request = Bench::request_of(target, target, None);
        let parameters = &mut request.mechanism_preferences[0].parameters;
        parameters.insert("name".to_owned(), "nsm-0".to_owned());
        let answer = bench.connect(request, 2);
        names.push(answer.mechanism.parameters["name"].clone());
    }
    assert_eq!(names[0], "nsm-0");
    assert!(names[1].starts_with("proxy.c.t.-"), "{names:?}");
}

#[test]
fn what_this_process_does_not_know_is_echoed() {
    let mut bench = Bench::new();
    let mut request = Bench::request_of("t1", "f1", None);
    let connection = request.connection.mut_or_insert_default();
    let unknown = connection.special_fields.mut_unknown_fields();
    unknown.add_length_delimited(99, vec![1, 2]);
    let path = connection.path.mut_or_insert_default();
    let segment = &mut path.path_segments[0];
    segment
        .special_fields
        .mut_unknown_fields()
        .add_varint(77, 5);
    let answer = bench.connect(request, 2);
    assert!(answer.special_fields.unknown_fields().get(99).is_some());
    let segment = &answer.path.path_segments[0];
    assert!(segment.special_fields.unknown_fields().get(77).is_some());
}

#[test]
fn a_link_without_interface() {
    let mut bench = Bench::new();
    let mut request = Bench::request_of("t1", "f1", None);
    request.mechanism_preferences[0].type_ = "NOOP".to_owned();
    let answer = bench.connect(request, 2);
    assert!(answer.mechanism.parameters.is_empty());
    assert!(bench.session.attached.lock().is_empty());
    answered(&mut bench.send_close(answer)).unwrap().unwrap();
    assert!(bench.facts().is_empty(), "no port was brought");
    assert_eq!(bench.ipam_log(), ["acquire t1", "release t1"]);
}

#[test]
fn what_is_unanswered_at_the_end_is_unavailable() {
    let mut bench = Bench::new();
    let up = bench.connect(Bench::request_of("t1", "f1", None), 2);
    let _ = (bench.facts(), bench.ipam_log());
    let mut waits = bench.send(refresh(&up));
    let mut behind = bench.send(refresh(&up));
    let (queued, mut late) = reply(None);
    bench
        .queue
        .push(Job::Request(refresh(&up), bench.call(), queued));
    let outlet = bench.monitor();
    bench.queue.close();
    let (after, mut too_late) = reply(None);
    bench
        .queue
        .push(Job::Request(refresh(&up), bench.call(), after));
    let ipam = bench.ipam.clone();
    let net = bench.net.clone();
    drop(bench);
    for awaited in [&mut waits, &mut behind, &mut late, &mut too_late] {
        assert_eq!(code(awaited), Code::UNAVAILABLE);
    }
    assert!(drain(&outlet).1);
    assert_eq!(ipam.0.lock().log, ["acquire t1"], "leases stay");
    assert!(net.try_iter().next().is_none(), "ports stay");
}
