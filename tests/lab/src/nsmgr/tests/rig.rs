//! An nsmgr with one LB, a client, and doubles of what lies outside.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::sync::atomic::{AtomicU32, Ordering};

use super::endpoint::Proxy;
use super::*;
use crate::client::{NsmClient, Session};
use crate::datapath::End;
use crate::forwarder::{mechanism, netns_url};
use crate::tls::file_id;
use meridio_proxy::proto::connection::{
    Connection, ConnectionEvent, MonitorScopeSelector, Path, PathSegment,
};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::proto::registry::{NetworkServiceEndpoint, NetworkServiceEndpointQuery};
use meridio_proxy::rpc::pump::{Item, Pump};

pub const LB_SERVICE: &str = "load-balancer.t1";
pub const PROXY_SERVICE: &str = "proxy.c1.t1.ns";
pub const LIMIT: Duration = Duration::from_secs(5);

pub fn soon() -> std::time::Instant {
    clock::now() + LIMIT
}

pub struct Rig {
    pub nsmgr: Nsmgr,
    pub client: NsmClient,
    pub lb: Arc<FakeLb>,
    pub datapath: Arc<Recorder>,
    /// Stands for the clients' namespace: any file has an inode.
    pub netns: Arc<OwnedFd>,
    pub pki: Arc<Pki>,
    pub directory: PathBuf,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.nsmgr.stop();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

pub fn file(path: &std::path::Path) -> Arc<OwnedFd> {
    Arc::new(File::create(path).unwrap().into())
}

impl Rig {
    pub fn new() -> Self {
        Self::with_lifetime(Duration::from_secs(600))
    }

    pub fn with_lifetime(token_lifetime: Duration) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("lab-{}-{n}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let pki = Arc::new(Pki::new("td"));
        let datapath = Arc::new(Recorder::default());
        let nsmgr = Nsmgr::start(NsmgrOptions {
            socket: directory.join("nsm.sock"),
            trust: Arc::clone(&pki),
            node: "node-a".to_owned(),
            datapath: Arc::<Recorder>::clone(&datapath),
            token_lifetime,
        })
        .unwrap();
        let lb = Arc::new(FakeLb {
            netns: file(&directory.join("netns-lb")),
            log: Mutex::default(),
        });
        nsmgr.add_endpoint(LB_SERVICE, Arc::<FakeLb>::clone(&lb));
        let hop = Hop::new(
            &pki,
            "ns/default/sa/meridio-proxy",
            "client",
            token_lifetime,
        );
        Self {
            client: NsmClient::new(hop, Rpc::new()),
            netns: file(&directory.join("netns-client")),
            nsmgr,
            lb,
            datapath,
            pki,
            directory,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("nsm.sock")
    }

    pub fn session(&self) -> Session {
        self.client.dial(&self.socket()).unwrap()
    }

    pub fn proxy(&self) -> Proxy {
        Proxy::start(self)
    }

    pub fn new_connection(&self, id: &str, endpoint: &str) -> Connection {
        Connection {
            id: id.to_owned(),
            network_service: LB_SERVICE.to_owned(),
            network_service_endpoint_name: endpoint.to_owned(),
            payload: "ETHERNET".to_owned(),
            path: Some(Path {
                path_segments: vec![segment("client", id)],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    pub fn preferences(&self) -> Vec<meridio_proxy::proto::connection::Mechanism> {
        vec![mechanism(
            "load-balan-aZ09",
            &netns_url(&self.netns).unwrap(),
        )]
    }

    pub fn request(
        &self,
        session: &Session,
        connection: Connection,
    ) -> Result<Connection, RpcError> {
        self.request_within(session, connection, LIMIT)
    }

    pub fn request_within(
        &self,
        session: &Session,
        connection: Connection,
        limit: Duration,
    ) -> Result<Connection, RpcError> {
        let request = NetworkServiceRequest {
            connection: Some(connection).into(),
            mechanism_preferences: self.preferences(),
            ..Default::default()
        };
        session.request(&request, &[&self.netns], limit)
    }

    pub fn selector(&self, id: &str) -> MonitorScopeSelector {
        MonitorScopeSelector {
            path_segments: vec![segment("client", id)],
            ..Default::default()
        }
    }

    pub fn target(&self, id: &str) -> TargetRequest {
        TargetRequest {
            id: id.to_owned(),
            name: "target".to_owned(),
            service: PROXY_SERVICE.to_owned(),
            netns: Arc::clone(&self.netns),
            ifname: "nsm-0".to_owned(),
            labels: [("nodeName".to_owned(), "node-a".to_owned())].into(),
            ip_context: Default::default(),
        }
    }

    pub fn assert_no_refusals(&self) {
        assert_eq!(self.nsmgr.refusals(), Vec::<String>::new());
    }
}

fn segment(name: &str, id: &str) -> PathSegment {
    PathSegment {
        name: name.to_owned(),
        id: id.to_owned(),
        ..Default::default()
    }
}

pub fn find(service: &str, watch: bool) -> NetworkServiceEndpointQuery {
    let filter = NetworkServiceEndpoint {
        network_service_names: vec![service.to_owned()],
        ..Default::default()
    };
    NetworkServiceEndpointQuery {
        network_service_endpoint: Some(filter).into(),
        watch,
        ..Default::default()
    }
}

fn message<T: std::fmt::Debug>(pump: &Pump<T>) -> T {
    match pump.items().recv_timeout(LIMIT).unwrap() {
        Item::Message(message) => message,
        Item::Ended(how) => panic!("the stream ended: {how:?}"),
    }
}

pub fn find_event(
    pump: &Pump<meridio_proxy::proto::registry::NetworkServiceEndpointResponse>,
) -> (NetworkServiceEndpoint, bool) {
    let event = message(pump);
    (event.network_service_endpoint.unwrap(), event.deleted)
}

/// The next event, which tells of exactly one connection.
pub fn event(pump: &Pump<ConnectionEvent>) -> (ConnectionEventType, Connection) {
    let event = message(pump);
    assert_eq!(event.connections.len(), 1);
    let (id, connection) = event.connections.into_iter().next().unwrap();
    assert_eq!(id, connection.id);
    (event.type_.unwrap(), connection)
}

/// Waits for an end with UNAVAILABLE.
pub fn ended(pump: &Pump<ConnectionEvent>) {
    match pump.items().recv_timeout(LIMIT).unwrap() {
        Item::Ended(Err(error)) => assert!(error.to_string().contains("UNAVAILABLE"), "{error}"),
        other => panic!("{other:?}"),
    }
}

pub struct FakeLb {
    netns: Arc<OwnedFd>,
    log: Mutex<Vec<&'static str>>,
}

impl FakeLb {
    pub fn log(&self) -> Vec<&'static str> {
        self.log.lock().clone()
    }
}

impl LocalEndpoint for FakeLb {
    fn name(&self) -> String {
        "lb-1".to_owned()
    }

    fn netns(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.netns)
    }

    fn request(&self, mut connection: Connection) -> Result<Connection, String> {
        self.log.lock().push("request");
        assert_eq!(connection.path.index, 3);
        let parameters = &mut connection.mechanism.mut_or_insert_default().parameters;
        parameters.insert("name".to_owned(), "proxy-aaaa".to_owned());
        connection.context.mut_or_insert_default().MTU = 1500;
        Ok(connection)
    }

    fn connected(&self, _: &Connection) {
        self.log.lock().push("connected");
    }

    fn close(&self, _: &Connection) {
        self.log.lock().push("close");
    }
}

/// A data path that only remembers.
#[derive(Default)]
pub struct Recorder {
    pairs: Mutex<BTreeMap<String, (End, End)>>,
    log: Mutex<Vec<&'static str>>,
    failing: std::sync::atomic::AtomicBool,
}

impl Recorder {
    pub fn log(&self) -> Vec<&'static str> {
        self.log.lock().clone()
    }

    pub fn fail(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    /// The one pair there is has these aliases and namespaces.
    pub fn assert_pair(&self, near: &str, far: &str, near_ns: &OwnedFd, far_ns: &OwnedFd) {
        let inode = |fd: &OwnedFd| file_id(fd.try_clone().unwrap()).unwrap().0;
        let pairs = self.pairs.lock();
        assert_eq!(pairs.len(), 1);
        let (client, endpoint) = pairs.values().next().unwrap();
        assert_eq!(
            (client.alias.as_str(), endpoint.alias.as_str()),
            (near, far)
        );
        assert_eq!(inode(&client.netns), inode(near_ns));
        assert_eq!(inode(&endpoint.netns), inode(far_ns));
    }
}

impl Datapath for Recorder {
    fn connect(
        &self,
        id: &str,
        client: &End,
        endpoint: &End,
        _: &Connection,
    ) -> Result<(), String> {
        if self.failing.load(Ordering::Relaxed) {
            return Err("scripted".to_owned());
        }
        self.log.lock().push("connect");
        let pair = (client.clone(), endpoint.clone());
        self.pairs.lock().insert(id.to_owned(), pair);
        Ok(())
    }

    fn disconnect(&self, id: &str) {
        if self.pairs.lock().remove(id).is_some() {
            self.log.lock().push("disconnect");
        }
    }
}
