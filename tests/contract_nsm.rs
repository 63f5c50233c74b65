//! The mesh of LB connections over mTLS with the lab's nsmgr, which refuses
//! what the real one refuses, and with leases of the lab's IPAM. Interfaces
//! are not made: the lab's forwarder tells this test what it would make.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's way to fail"
)]

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use meridio_lab::datapath::{Datapath, End, LocalEndpoint};
use meridio_lab::ipam::{Ipam as LabIpam, IpamOptions as LabIpamOptions};
use meridio_lab::nsmgr::{Nsmgr, NsmgrOptions};
use meridio_lab::pki::Pki;
use meridio_proxy::core::event::Event;
use meridio_proxy::core::family::IpFamilies;
use meridio_proxy::core::ids::{EndpointName, PortKey};
use meridio_proxy::ipam::{Ipam, IpamOptions};
use meridio_proxy::kernel::{NetHandle, NetMsg};
use meridio_proxy::nsm::caller::NsmCaller;
use meridio_proxy::nsm::{ConnectionLog, LbMesh, LbOptions};
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};

const SERVICE: &str = "load-balancer.t1.ns";
const PROXY: &str = "proxy-x1";
/// No event takes as long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Tokens live so long: a refresh is due every two seconds.
const TOKENS: Duration = Duration::from_secs(10);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(4);
const HOUR: Duration = Duration::from_secs(3600);

/// What the forwarder would do.
#[derive(Debug, PartialEq, Eq)]
enum Pair {
    Connect(String),
    Disconnect,
}

struct Pairs(Sender<Pair>);

impl Datapath for Pairs {
    fn connect(
        &self,
        _id: &str,
        client: &End,
        _endpoint: &End,
        connection: &Connection,
    ) -> Result<(), String> {
        let file = |fd: &OwnedFd| {
            let status = File::from(fd.as_fd().try_clone_to_owned().unwrap()).metadata();
            let status = status.unwrap();
            (status.dev(), status.ino())
        };
        let own = std::fs::metadata("/proc/thread-self/ns/net").unwrap();
        assert_eq!(file(&client.netns), (own.dev(), own.ino()));
        assert_eq!(connection.context.MTU, 1400);
        self.0.send(Pair::Connect(client.alias.clone())).unwrap();
        Ok(())
    }

    fn disconnect(&self, _id: &str) {
        self.0.send(Pair::Disconnect).unwrap();
    }
}

struct Lb(String);

impl LocalEndpoint for Lb {
    fn name(&self) -> String {
        self.0.clone()
    }

    fn netns(&self) -> Arc<OwnedFd> {
        Arc::new(File::open("/proc/thread-self/ns/net").unwrap().into())
    }

    fn request(&self, mut connection: Connection) -> Result<Connection, String> {
        let mechanism = connection.mechanism.mut_or_insert_default();
        mechanism
            .parameters
            .insert("name".to_owned(), "nse0".to_owned());
        Ok(connection)
    }

    fn connected(&self, _: &Connection) {}

    fn close(&self, _: &Connection) {}
}

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("nsm-{}-{n}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Rig {
    threads: Threads,
    trust: Arc<Pki>,
    cell: SvidCell,
    nsmgr: Nsmgr,
    connector: Connector,
    lab_ipam: LabIpam,
    ipam: Ipam,
    net: NetHandle,
    facts: Receiver<NetMsg>,
    pairs: Receiver<Pair>,
    _directory: Directory,
}

impl Rig {
    fn new() -> Self {
        let threads = Threads::unsupervised();
        let rpc = Rpc::new();
        let trust = Arc::new(Pki::new("example.org"));
        let directory = Directory::new();
        let socket = directory.0.join("nsm.io.sock");
        let (pair_tx, pairs) = bounded(1024);
        let nsmgr = Nsmgr::start(NsmgrOptions {
            socket: socket.clone(),
            trust: Arc::clone(&trust),
            node: "node-a".to_owned(),
            datapath: Arc::new(Pairs(pair_tx)),
            token_lifetime: TOKENS,
        })
        .unwrap();
        let cell = trust.cell(&trust.id("proxy"), HOUR);
        let connect = |name, address, authority| {
            let options = ConnectorOptions {
                name,
                address,
                authority,
                dial_timeout: Duration::from_secs(5),
                backoff_max: Duration::from_millis(200),
            };
            Connector::start(&threads, &rpc, cell.clone(), options).unwrap()
        };
        let connector = connect("nsmgr", Address::Unix(socket), "localhost".to_owned());

        let lab_ipam = LabIpam::new(&threads, &LabIpamOptions::new("t1", "c1")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let ipam_cell = trust.cell(&trust.id("ipam"), HOUR);
        lab_ipam.serve(&threads, &rpc, ipam_cell, listener).unwrap();
        let tcp = Address::Tcp {
            host: address.ip().to_string(),
            port: address.port(),
        };
        let (fact_tx, facts) = bounded(1024);
        let net = NetHandle::new(fact_tx);
        let options = IpamOptions {
            trench: "t1".to_owned(),
            conduit: "c1".to_owned(),
            node: "node-a".to_owned(),
            families: IpFamilies::Dual,
            release_delay: Duration::from_millis(100),
            renew_interval: HOUR,
        };
        let ipam_connector = connect("ipam", tcp, address.to_string());
        let ipam = Ipam::start(&threads, ipam_connector, net.clone(), options).unwrap();
        Self {
            threads,
            trust,
            cell,
            nsmgr,
            connector,
            lab_ipam,
            ipam,
            net,
            facts,
            pairs,
            _directory: directory,
        }
    }

    fn caller(&self) -> NsmCaller {
        NsmCaller::new(self.connector.clone(), TOKENS)
    }

    fn mesh(&self) -> LbMesh {
        let options = LbOptions {
            name: PROXY.to_owned(),
            network_service: SERVICE.to_owned(),
            request_timeout: REQUEST_TIMEOUT,
            mtu: 1400,
            families: IpFamilies::Dual,
        };
        LbMesh::start(
            &self.threads,
            self.caller(),
            self.ipam.handle(),
            self.net.clone(),
            options,
        )
        .unwrap()
    }

    fn add(&self, lb: &str) {
        self.nsmgr
            .add_endpoint(SERVICE, Arc::new(Lb(lb.to_owned())));
    }

    /// The next fact about a port.
    fn fact(&self) -> Event {
        loop {
            match self.facts.recv_timeout(PATIENCE).unwrap() {
                NetMsg::Fact(Event::BridgePrefixes(_)) => {}
                NetMsg::Fact(event) => return event,
                NetMsg::Quiesce(_) => panic!("nobody quiesces"),
            }
        }
    }

    /// The next fact is that `lb` is connected, with its leases.
    #[track_caller]
    fn expect_up(&self, lb: &str) {
        match self.fact() {
            Event::PortExpected { key, peers, .. } => {
                assert_eq!(key, port(lb));
                let child = format!("{}-src", id(lb));
                let leases = self.lab_ipam.allocations();
                let ours = leases.iter().filter(|(key, _)| key.child == child);
                let leased: std::collections::BTreeSet<_> =
                    ours.map(|(_, network)| network.ip()).collect();
                assert_eq!((peers.len(), &peers), (2, &leased));
            }
            other => panic!("{other} instead of {lb} up"),
        }
    }

    #[track_caller]
    fn expect_pair(&self, lb: &str) {
        let pair = self.pairs.recv_timeout(PATIENCE).unwrap();
        assert_eq!(pair, Pair::Connect(format!("server-{}", id(lb))));
    }

    /// Nothing was refused, and nothing is left.
    #[track_caller]
    fn assert_clean(&self) {
        assert_eq!(self.nsmgr.refusals(), Vec::<String>::new());
        assert!(self.nsmgr.connections().is_empty());
        assert_eq!(self.nsmgr.crosses(), 0);
    }
}

fn soon() -> Instant {
    clock::now() + PATIENCE
}

fn id(lb: &str) -> String {
    format!("{PROXY}-{SERVICE}-{lb}")
}

fn port(lb: &str) -> PortKey {
    PortKey::Lb(EndpointName::new(lb))
}

#[test]
fn lbs_are_connected_refreshed_and_closed() {
    let rig = Rig::new();
    rig.add("lb-1");
    let log = ConnectionLog::start(&rig.threads, rig.caller(), PROXY.to_owned()).unwrap();
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    let first = rig.nsmgr.connections();
    // Longer than any token on the path lives.
    let until = clock::now() + TOKENS + Duration::from_secs(2);
    let mut refreshes = 0;
    while clock::now() < until {
        rig.expect_up("lb-1");
        rig.expect_pair("lb-1");
        refreshes += 1;
    }
    assert!((4..=10).contains(&refreshes), "{refreshes} in 12 s");
    let last = rig.nsmgr.connections();
    assert_eq!((first.len(), last.len()), (1, 1));
    assert_eq!(first[0].id, last[0].id);
    assert_eq!(first[0].mechanism, last[0].mechanism);

    assert!(mesh.stop(soon()).is_empty());
    assert_eq!(rig.fact(), Event::PortReleased { key: port("lb-1") });
    rig.lab_ipam
        .wait(soon(), |table, _| {
            !table.keys().any(|key| key.child.starts_with(&id("lb-1")))
        })
        .unwrap();
    drop(log);
    rig.assert_clean();
}

#[test]
fn lbs_come_and_go() {
    let rig = Rig::new();
    let mesh = rig.mesh();
    for lb in ["lb-1", "lb-2", "lb-3"] {
        rig.add(lb);
        loop {
            if let Event::PortExpected { key, .. } = rig.fact()
                && key == port(lb)
            {
                break;
            }
        }
    }
    assert_eq!(rig.nsmgr.crosses(), 3);
    rig.nsmgr.remove_endpoint("lb-2");
    loop {
        match rig.fact() {
            Event::PortReleased { key } => {
                assert_eq!(key, port("lb-2"));
                break;
            }
            // nsmgr ends the connection before our Close does.
            Event::PeerDown { key } => assert_eq!(key, port("lb-2")),
            Event::PortExpected { .. } => {}
            other => panic!("{other}"),
        }
    }
    assert!(mesh.stop(soon()).is_empty());
    assert!(rig.nsmgr.connections().is_empty());
    assert_eq!(rig.nsmgr.crosses(), 0);
}

#[test]
fn a_new_nsmgr_is_told_the_connection_and_traffic_goes_on() {
    let rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    rig.nsmgr.restart().unwrap();
    assert!(rig.nsmgr.connections().is_empty());
    // Nothing but refreshes: the pair is neither removed nor made anew.
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    assert_eq!(rig.nsmgr.connections().len(), 1);
    rig.nsmgr.drop_streams();
    rig.nsmgr.cut_connections();
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    assert!(mesh.stop(soon()).is_empty());
    assert_eq!(rig.pairs.recv_timeout(PATIENCE).unwrap(), Pair::Disconnect);
    rig.assert_clean();
}

#[test]
fn a_new_svid_interrupts_nothing() {
    let rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    for _ in 0..4 {
        rig.expect_up("lb-1");
        rig.expect_pair("lb-1");
        rig.trust.refill(&rig.cell, &rig.trust.id("proxy"), HOUR);
    }
    assert!(mesh.stop(soon()).is_empty());
    rig.assert_clean();
}

#[test]
fn an_lb_that_dies_is_down_and_connected_again_when_it_is_back() {
    let rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    rig.nsmgr.kill_endpoint("lb-1");
    // The next refresh fails, which nsmgr reports as DOWN.
    assert_eq!(rig.fact(), Event::PeerDown { key: port("lb-1") });
    rig.add("lb-1");
    rig.expect_up("lb-1");
    assert_eq!(rig.nsmgr.connections().len(), 1);
    assert!(mesh.stop(soon()).is_empty());
    assert!(rig.nsmgr.connections().is_empty());
    assert_eq!(rig.nsmgr.crosses(), 0);
}

#[test]
fn a_first_request_that_fails_leaves_nothing_and_is_repeated() {
    let rig = Rig::new();
    let refused = RpcError::status(Code::UNKNOWN, "all forwarders have failed");
    rig.nsmgr.fail_next_requests([refused]);
    rig.add("lb-1");
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    assert_eq!(rig.nsmgr.connections().len(), 1);
    assert!(mesh.stop(soon()).is_empty());
    rig.assert_clean();
}

#[test]
fn a_predecessors_connection_is_rebuilt_not_doubled() {
    let rig = Rig::new();
    rig.add("lb-1");
    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    rig.expect_pair("lb-1");
    // It ends without a Close, as if killed.
    rig.nsmgr.pause_calls(true);
    let begun = clock::now();
    assert!(mesh.stop(begun + Duration::from_secs(1)).is_empty());
    assert!(begun.elapsed() < Duration::from_millis(1200));
    assert_eq!(rig.fact(), Event::PortReleased { key: port("lb-1") });
    assert_eq!(rig.nsmgr.connections().len(), 1);
    rig.nsmgr.pause_calls(false);

    let mesh = rig.mesh();
    rig.expect_up("lb-1");
    // Its port is in no bridge here, so it is not taken over.
    assert_eq!(rig.pairs.recv_timeout(PATIENCE).unwrap(), Pair::Disconnect);
    rig.expect_pair("lb-1");
    assert_eq!((rig.nsmgr.connections().len(), rig.nsmgr.crosses()), (1, 1));
    assert!(mesh.stop(soon()).is_empty());
    rig.assert_clean();
}

#[test]
fn an_absent_nsmgr_is_waited_for_and_does_not_hold_up_the_stop() {
    let rig = Rig::new();
    rig.nsmgr.stop();
    let mesh = rig.mesh();
    rig.nsmgr.restart().unwrap();
    rig.add("lb-1");
    rig.expect_up("lb-1");
    rig.nsmgr.stop();
    let begun = clock::now();
    assert!(mesh.stop(begun + Duration::from_secs(1)).is_empty());
    assert!(begun.elapsed() < Duration::from_millis(1200));
    assert_eq!(rig.fact(), Event::PortReleased { key: port("lb-1") });
}
