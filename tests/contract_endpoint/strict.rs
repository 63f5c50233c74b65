//! The endpoint against the lab's nsmgr, registry and forwarder, which refuse
//! what NSM's refuse and receive the descriptors.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use meridio_lab::datapath::{Datapath, End};
use meridio_lab::nsmgr::{Nsmgr, NsmgrOptions, TargetRequest};
use meridio_lab::pki::Pki;
use meridio_proxy::core::event::Event;
use meridio_proxy::core::family::IpFamilies;
use meridio_proxy::endpoint::{Endpoint, EndpointOptions};
use meridio_proxy::kernel::{NetHandle, NetMsg};
use meridio_proxy::nsm::caller::NsmCaller;
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::proto::connectioncontext::{IPContext, PolicyRoute, Route};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::transport::client::Connector;
use parking_lot::Mutex;

use super::world::{Directory, HOUR, Ipam, SERVICE, connect, soon};

/// The pairs of interfaces that would exist.
#[derive(Default)]
struct Pairs(Mutex<BTreeMap<String, (End, End)>>);

impl Datapath for Pairs {
    fn connect(&self, id: &str, near: &End, far: &End, _: &Connection) -> Result<(), String> {
        let pair = (near.clone(), far.clone());
        self.0.lock().insert(id.to_owned(), pair);
        Ok(())
    }

    fn disconnect(&self, id: &str) {
        self.0.lock().remove(id);
    }
}

struct Mesh {
    endpoint: Option<Endpoint>,
    nsmgr: Nsmgr,
    connector: Connector,
    pairs: Arc<Pairs>,
    ipam: Ipam,
    facts: Receiver<NetMsg>,
    rpc: Rpc,
    pki: Arc<Pki>,
    threads: Threads,
    directory: Directory,
}

fn netns() -> OwnedFd {
    std::fs::File::open("/proc/self/ns/net").unwrap().into()
}

fn inode(fd: &OwnedFd) -> u64 {
    std::fs::File::from(fd.try_clone().unwrap())
        .metadata()
        .unwrap()
        .ino()
}

impl Mesh {
    fn new() -> Self {
        let directory = Directory::new();
        let (threads, rpc) = (Threads::unsupervised(), Rpc::new());
        let pki = Arc::new(Pki::new("td"));
        let socket = directory.0.join("nsm.sock");
        let pairs = Arc::<Pairs>::default();
        let nsmgr = Nsmgr::start(NsmgrOptions {
            socket: socket.clone(),
            trust: Arc::clone(&pki),
            node: "node-a".to_owned(),
            datapath: pairs.clone(),
            token_lifetime: HOUR,
        });
        let cell = pki.cell(&pki.id("proxy"), HOUR);
        let mut mesh = Self {
            endpoint: None,
            nsmgr: nsmgr.unwrap(),
            connector: connect(&threads, &rpc, cell, "nsmgr", socket),
            pairs,
            ipam: Ipam::default(),
            facts: bounded(0).1,
            rpc,
            pki,
            threads,
            directory,
        };
        mesh.start();
        mesh
    }

    /// A process with a memory of nothing, under the same name.
    fn start(&mut self) {
        let (tx, facts) = bounded(1000);
        self.facts = facts;
        let cell = self.pki.cell(&self.pki.id("proxy"), HOUR);
        let endpoint = Endpoint::start_with(
            &self.threads,
            &self.rpc,
            cell,
            NsmCaller::new(self.connector.clone(), HOUR),
            Box::new(self.ipam.clone()),
            NetHandle::new(tx),
            EndpointOptions {
                name: "us".to_owned(),
                service_name: SERVICE.to_owned(),
                node: "node-a".to_owned(),
                mtu: 1400,
                token_lifetime: HOUR,
                families: IpFamilies::V4,
                directory: self.directory.0.clone(),
            },
        );
        self.endpoint = Some(endpoint.unwrap());
    }

    fn wait_registered(&self) {
        self.nsmgr.wait_registered(SERVICE, "us", soon()).unwrap();
    }

    fn connect(&self, id: &str, ip_context: IPContext) -> Connection {
        self.try_connect(id, ip_context).unwrap()
    }

    fn try_connect(&self, id: &str, ip_context: IPContext) -> Result<Connection, String> {
        let request = TargetRequest {
            id: id.to_owned(),
            name: format!("target-{id}"),
            service: SERVICE.to_owned(),
            netns: Arc::new(netns()),
            ifname: "nsm-0".to_owned(),
            labels: HashMap::from([("nodeName".to_owned(), "node-a".to_owned())]),
            ip_context,
        };
        self.nsmgr.connect_target(request)
    }

    /// The port that `net` was told of.
    fn port(&self) -> String {
        match self.fact() {
            Event::PortExpected { ifname, .. } => ifname.to_string(),
            other => panic!("{other}"),
        }
    }

    fn fact(&self) -> Event {
        match self.facts.recv_deadline(soon()).unwrap() {
            NetMsg::Fact(event) => event,
            other => panic!("not from the endpoint: {other:?}"),
        }
    }

    fn assert_no_refusals(&self) {
        assert_eq!(self.nsmgr.refusals(), Vec::<String>::new());
    }
}

fn own_segment(answer: &Connection) -> String {
    let last = answer.path.path_segments.last().unwrap();
    assert_eq!(last.name, "us");
    last.id.clone()
}

#[test]
fn a_target_lives_and_nothing_is_refused() {
    let mesh = Mesh::new();
    mesh.wait_registered();
    let first = mesh.connect("t1", IPContext::default());
    assert_eq!(first.path.path_segments.len(), 4);
    let ip = first.context.ip_context.clone().unwrap();
    assert_eq!(ip.src_ip_addrs, ["172.16.0.2/24"]);
    assert_eq!(first.context.MTU, 1400);
    let port = mesh.port();
    {
        let pairs = mesh.pairs.0.lock();
        let (_, far) = pairs.values().next().unwrap();
        assert_eq!((far.alias.as_str(), &far.ifname), ("client-t1", &port));
        assert_eq!(
            inode(&far.netns),
            inode(&netns()),
            "the namespace came by descriptor"
        );
    }

    let mut with_vip = ip;
    with_vip.src_ip_addrs.push("20.0.0.1/32".to_owned());
    with_vip.policies.push(PolicyRoute {
        from: "20.0.0.1/32".to_owned(),
        routes: vec![Route {
            prefix: "0.0.0.0/0".to_owned(),
            nextHop: "172.16.0.1".to_owned(),
            ..Route::default()
        }],
        ..PolicyRoute::default()
    });
    let second = mesh.connect("t1", with_vip.clone());
    assert_eq!(second.context.ip_context.as_ref(), Some(&with_vip));
    assert_eq!(mesh.port(), port);
    let third = mesh.connect("t1", IPContext::default());
    assert_eq!(third.context, second.context);
    assert_eq!(mesh.port(), port);

    let events: Vec<_> = mesh.nsmgr.target_events().try_iter().collect();
    assert!(events.is_empty(), "it went down: {events:?}");

    mesh.nsmgr.close_target("t1").unwrap();
    assert!(matches!(mesh.fact(), Event::PortReleased { .. }));
    assert!(mesh.pairs.0.lock().is_empty());
    assert_eq!(*mesh.ipam.released.lock(), ["t1"]);
    mesh.assert_no_refusals();
}

#[test]
fn the_registration_never_lapses() {
    let mesh = Mesh::new();
    mesh.nsmgr.set_expire_period(Duration::from_secs(3));
    mesh.wait_registered();
    let (_running, pause) = bounded::<()>(0);
    // The first attempt's deadline is longer than what it is granted, and so
    // it lapses at once (as in NSM); the next one knows.
    let _ = pause.recv_timeout(Duration::from_secs(1));
    let until = clock::now() + Duration::from_secs(6);
    while clock::now() < until {
        assert_eq!(mesh.nsmgr.registered(SERVICE), ["us"]);
        let _ = pause.recv_timeout(Duration::from_millis(50));
    }
    mesh.assert_no_refusals();
}

#[test]
fn a_restarted_nsmgr_is_registered_with_at_once() {
    let mesh = Mesh::new();
    mesh.wait_registered();
    let before = mesh.connect("t1", IPContext::default());
    mesh.port();
    mesh.nsmgr.restart().unwrap();
    let begun = clock::now();
    mesh.wait_registered();
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    let after = mesh.connect("t1", IPContext::default());
    let ip = |answer: &Connection| answer.context.ip_context.clone();
    assert_eq!(ip(&after), ip(&before));
}

#[test]
fn a_restarted_endpoint_takes_its_connections_over() {
    let mut mesh = Mesh::new();
    mesh.wait_registered();
    let before = mesh.connect("t1", IPContext::default());
    mesh.port();
    let endpoint = mesh.endpoint.take().unwrap();
    assert!(
        endpoint
            .stop(clock::now() + Duration::from_secs(2))
            .is_empty()
    );
    let event = mesh.nsmgr.target_events().recv_deadline(soon()).unwrap();
    assert_eq!(event.id, "t1");
    mesh.start();
    mesh.wait_registered();
    // As a target does: until it works; the old entry is still there at first.
    let by = soon();
    let after = loop {
        match mesh.try_connect("t1", IPContext::default()) {
            Ok(answer) => break answer,
            Err(error) => assert!(clock::now() < by, "{error}"),
        }
    };
    assert_eq!(own_segment(&after), own_segment(&before));
    assert_eq!(after.context.ip_context, before.context.ip_context);
    mesh.port();
}

#[test]
fn leaves_the_registry() {
    let mut mesh = Mesh::new();
    mesh.wait_registered();
    let mut endpoint = mesh.endpoint.take().unwrap();
    let begun = clock::now();
    assert!(
        endpoint
            .unregister(begun + Duration::from_secs(3))
            .is_empty()
    );
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    assert!(mesh.nsmgr.registered(SERVICE).is_empty());
    assert!(
        endpoint
            .stop(clock::now() + Duration::from_secs(2))
            .is_empty()
    );
    mesh.assert_no_refusals();
}

#[test]
fn a_silent_nsmgr_does_not_hold_up_the_end() {
    let mut mesh = Mesh::new();
    mesh.wait_registered();
    mesh.nsmgr.pause_calls(true);
    let mut endpoint = mesh.endpoint.take().unwrap();
    let begun = clock::now();
    assert!(
        endpoint
            .unregister(begun + Duration::from_secs(1))
            .is_empty()
    );
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        endpoint
            .stop(clock::now() + Duration::from_secs(2))
            .is_empty()
    );
}
