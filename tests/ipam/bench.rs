//! One IPAM client with its lab server on loopback.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use meridio_lab::ipam::{Call, Ipam as Lab, IpamOptions as LabOptions};
use meridio_lab::pki::Pki;
use meridio_proxy::core::event::Event;
use meridio_proxy::core::family::{Family, IpFamilies, PerFamily};
use meridio_proxy::core::ids::LeaseId;
use meridio_proxy::core::lease::{Addresses, Lease, Verb};
use meridio_proxy::ipam::{Ipam, IpamError, IpamHandle, IpamOptions};
use meridio_proxy::kernel::{NetHandle, NetMsg};
use meridio_proxy::proto::ipam::{Child, IPFamily, Subnet};
use meridio_proxy::proto::nsp::{Conduit, Trench};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};
use protobuf::MessageField;

type Outcome = Result<Addresses, IpamError>;

pub struct Bench {
    ipam: Option<Ipam>,
    connector: Connector,
    pub lab: Lab,
    net: Receiver<NetMsg>,
    address: SocketAddr,
    rpc: Rpc,
    pki: Pki,
    own: SvidCell,
}

impl Bench {
    /// Everything running, both families.
    pub fn start() -> Self {
        Self::with(|_| {})
    }

    /// Everything running, with changed options.
    pub fn with(change: impl FnOnce(&mut IpamOptions)) -> Self {
        let lab = LabOptions::new("trench-a", "load-balancer");
        Self::new(&lab, true, change)
    }

    /// The client alone; [`Bench::serve`] starts the server.
    pub fn away() -> Self {
        let lab = LabOptions::new("trench-a", "load-balancer");
        Self::new(&lab, false, |_| {})
    }

    pub fn new(lab: &LabOptions, is_serving: bool, change: impl FnOnce(&mut IpamOptions)) -> Self {
        let threads = Threads::unsupervised();
        let rpc = Rpc::new();
        let pki = Pki::new("example.org");
        let lab = Lab::new(&threads, lab).unwrap();
        // Bound to learn a free port, which is bound again by `serve`.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let own = pki.cell(&pki.id("proxy"), secs(3600));
        let connector = Connector::start(
            &threads,
            &rpc,
            own.clone(),
            ConnectorOptions {
                name: "ipam",
                address: Address::Tcp {
                    host: "127.0.0.1".to_owned(),
                    port: address.port(),
                },
                authority: address.to_string(),
                dial_timeout: secs(5),
                backoff_max: secs(1),
            },
        )
        .unwrap();
        let mut options = IpamOptions {
            trench: "trench-a".to_owned(),
            conduit: "load-balancer".to_owned(),
            node: "worker-1".to_owned(),
            families: IpFamilies::Dual,
            release_delay: secs(20),
            renew_interval: secs(300),
        };
        change(&mut options);
        let (net_tx, net) = bounded(64);
        let net_handle = NetHandle::new(net_tx);
        let mut bench = Self {
            ipam: None,
            connector: connector.clone(),
            lab,
            net,
            address,
            rpc,
            pki,
            own,
        };
        if is_serving {
            bench.serve();
        }
        bench.ipam = Some(Ipam::start(&threads, connector, net_handle, options).unwrap());
        bench
    }

    /// (Re)starts the server where the client looks for it.
    pub fn serve(&self) {
        let listener = TcpListener::bind(self.address).unwrap();
        let cell = self.pki.cell(&self.pki.id("ipam"), secs(3600));
        let threads = Threads::unsupervised();
        self.lab.serve(&threads, &self.rpc, cell, listener).unwrap();
    }

    /// Gives the client a new certificate.
    pub fn rotate(&self) {
        self.pki
            .refill(&self.own, &self.pki.id("proxy"), secs(3600));
    }

    pub fn ipam(&self) -> IpamHandle {
        self.ipam.as_ref().unwrap().handle()
    }

    /// Stops the client; the threads that did not end.
    pub fn stop(&mut self, limit: Duration) -> Vec<String> {
        self.ipam.take().unwrap().stop(clock::now() + limit)
    }

    /// Acquires, with the deadline that many seconds away.
    pub fn ask(&self, id: &str, patience: Duration) -> Receiver<Outcome> {
        let (tx, rx) = bounded(1);
        let answer = Box::new(move |result| tx.send(result).unwrap());
        let deadline = clock::now() + patience;
        self.ipam().acquire(LeaseId::new(id), deadline, answer);
        rx
    }

    /// Acquires and waits.
    pub fn acquire(&self, id: &str) -> Outcome {
        let answer = self.ask(id, secs(10));
        answer.recv_timeout(secs(12)).unwrap()
    }

    /// The next bridge addresses that `net` is told.
    pub fn bridge(&self) -> PerFamily<Option<ipnetwork::IpNetwork>> {
        match self.net.recv_timeout(secs(20)).unwrap() {
            NetMsg::Fact(Event::BridgePrefixes(prefixes)) => prefixes,
            other => panic!("{other:?}"),
        }
    }

    /// What IPAM holds for a connection.
    pub fn held(&self, id: &str) -> PerFamily<Option<Lease>> {
        let table = self.lab.allocations();
        PerFamily::from_fn(|family| {
            let find = |end: &str| {
                let name = format!("{id}-{end}");
                let found = table
                    .iter()
                    .find(|(key, _)| key.family == family && key.child == name);
                found.map(|(_, address)| *address)
            };
            Some(Lease {
                src: find("src")?,
                dst: find("dst")?,
            })
        })
    }

    /// A child of any node, as others than the proxy ask for it.
    pub fn child(&self, node: &str, name: &str, family: Family) -> Child {
        let trench = Trench {
            name: "trench-a".to_owned(),
            ..Trench::default()
        };
        let conduit = Conduit {
            name: "load-balancer".to_owned(),
            trench: MessageField::some(trench),
            ..Conduit::default()
        };
        let ip_family = match family {
            Family::V4 => IPFamily::IPV4,
            Family::V6 => IPFamily::IPV6,
        };
        Child {
            name: name.to_owned(),
            subnet: MessageField::some(Subnet {
                conduit: MessageField::some(conduit),
                node: node.to_owned(),
                ipFamily: ip_family.into(),
                ..Subnet::default()
            }),
            ..Child::default()
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(ipam) = self.ipam.take() {
            let _ = ipam.stop(clock::now() + Duration::from_millis(200));
        }
        self.connector.close(soon(2));
        self.lab.stop();
    }
}

pub fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub fn soon(n: u64) -> Instant {
    clock::now() + secs(n)
}

pub fn lease_id(id: &str) -> LeaseId {
    LeaseId::new(id)
}

/// How many Allocates of a child arrived.
pub fn allocates(calls: &[Call], child: &str) -> usize {
    calls
        .iter()
        .filter(|call| call.verb == Verb::Allocate && call.child.name == child)
        .count()
}
