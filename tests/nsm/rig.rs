//! nsmgr, IPAM and what the mesh needs, each in this process.

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
use meridio_proxy::nsm::{LbMesh, LbOptions};
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};

pub const SERVICE: &str = "load-balancer.t1.ns";
pub const PROXY: &str = "proxy-x1";
/// No event takes as long.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Tokens live so long: a refresh is due every two seconds.
pub const TOKENS: Duration = Duration::from_secs(10);
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(4);
pub const HOUR: Duration = Duration::from_secs(3600);

/// What the forwarder would do.
#[derive(Debug, PartialEq, Eq)]
pub enum Pair {
    Connect(String),
    Disconnect,
}

pub struct Pairs(Sender<Pair>);

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

pub struct Lb(String);

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
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("nsm-{}-{n}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn socket(directory: &Directory) -> PathBuf {
    directory.path("nsm.io.sock")
}

fn to(name: &'static str, address: Address, authority: String) -> ConnectorOptions {
    ConnectorOptions {
        name,
        address,
        authority,
        dial_timeout: Duration::from_secs(5),
        backoff_max: Duration::from_millis(200),
    }
}

fn to_nsmgr(directory: &Directory) -> ConnectorOptions {
    let address = Address::Unix(socket(directory));
    to("nsmgr", address, "localhost".to_owned())
}

pub struct Rig {
    pub threads: Threads,
    rpc: Rpc,
    pub trust: Arc<Pki>,
    pub cell: SvidCell,
    pub nsmgr: Nsmgr,
    pub connector: Connector,
    pub lab_ipam: LabIpam,
    pub ipam: Ipam,
    pub net: NetHandle,
    pub facts: Receiver<NetMsg>,
    pub pairs: Receiver<Pair>,
    directory: Directory,
}

impl Rig {
    pub fn new() -> Self {
        let threads = Threads::unsupervised();
        let rpc = Rpc::new();
        let trust = Arc::new(Pki::new("example.org"));
        let directory = Directory::new();
        let (pair_tx, pairs) = bounded(1024);
        let nsmgr = Nsmgr::start(NsmgrOptions {
            socket: socket(&directory),
            trust: Arc::clone(&trust),
            node: "node-a".to_owned(),
            datapath: Arc::new(Pairs(pair_tx)),
            token_lifetime: TOKENS,
        })
        .unwrap();
        let cell = trust.cell(&trust.id("proxy"), HOUR);
        let connect = |options| Connector::start(&threads, &rpc, cell.clone(), options).unwrap();
        let connector = connect(to_nsmgr(&directory));

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
        let ipam_connector = connect(to("ipam", tcp, address.to_string()));
        let ipam = Ipam::start(&threads, ipam_connector, net.clone(), options).unwrap();
        Self {
            threads,
            rpc,
            trust,
            cell,
            nsmgr,
            connector,
            lab_ipam,
            ipam,
            net,
            facts,
            pairs,
            directory,
        }
    }

    pub fn caller(&self) -> NsmCaller {
        NsmCaller::new(self.connector.clone(), TOKENS)
    }

    pub fn mesh(&self) -> LbMesh {
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

    /// Ends a mesh as if its process was killed: without a connection no Close
    /// leaves. The next mesh gets a new one.
    pub fn kill(&mut self, mesh: LbMesh) {
        self.connector.close(soon());
        let limit = clock::now() + Duration::from_secs(1);
        assert!(mesh.stop(limit).is_empty(), "all threads end in time");
        let options = to_nsmgr(&self.directory);
        self.connector =
            Connector::start(&self.threads, &self.rpc, self.cell.clone(), options).unwrap();
    }

    pub fn add(&self, lb: &str) {
        self.nsmgr
            .add_endpoint(SERVICE, Arc::new(Lb(lb.to_owned())));
    }

    /// The next fact about a port.
    pub fn fact(&self) -> Event {
        loop {
            match self.facts.recv_timeout(PATIENCE).unwrap() {
                NetMsg::Fact(Event::BridgePrefixes(_)) => {}
                NetMsg::Fact(event) => return event,
                _ => panic!("facts only"),
            }
        }
    }

    /// The next fact is that `lb` is connected, with its leases.
    #[track_caller]
    pub fn expect_up(&self, lb: &str) {
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
    pub fn expect_pair(&self, lb: &str) {
        let pair = self.pairs.recv_timeout(PATIENCE).unwrap();
        assert_eq!(pair, Pair::Connect(format!("server-{}", id(lb))));
    }

    /// nsmgr soon has so many monitor and Find streams open: it forgets those
    /// that it is not told of any more (Nordix/Meridio#545).
    #[track_caller]
    pub fn expect_streams(&self, monitors: usize, finds: usize) {
        let (_stopper, stop) = stop_pair();
        let until = soon();
        while self.nsmgr.streams() != (monitors, finds) {
            assert!(clock::now() < until, "{:?}", self.nsmgr.streams());
            let _ = stop.wait(Duration::from_millis(20));
        }
    }

    /// Nothing was refused, and nothing is left.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.nsmgr.refusals(), Vec::<String>::new());
        assert!(self.nsmgr.connections().is_empty());
        assert_eq!(self.nsmgr.crosses(), 0);
    }
}

pub fn soon() -> Instant {
    clock::now() + PATIENCE
}

pub fn id(lb: &str) -> String {
    format!("{PROXY}-{SERVICE}-{lb}")
}

pub fn port(lb: &str) -> PortKey {
    PortKey::Lb(EndpointName::new(lb))
}

/// Moves this test's thread, and all that it starts from now on, into a
/// network namespace of their own.
pub fn enter_netns() {
    // SAFETY: unshare takes no pointers; it changes the calling thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    let error = std::io::Error::last_os_error();
    assert_eq!(result, 0, "no new network namespace ({error}); run as root");
    ip("link set lo up");
}

pub fn ip(arguments: &str) {
    let status = std::process::Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}
