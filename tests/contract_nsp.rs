//! The VIP watch against the lab's NSP, over mTLS on loopback.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use ipnetwork::IpNetwork;
use meridio_lab::nsp::Nsp;
use meridio_lab::pki::Pki;
use meridio_proxy::core::event::Event;
use meridio_proxy::kernel::{NetHandle, NetMsg};
use meridio_proxy::nsp;
use meridio_proxy::proto::nsp::{Conduit, Stream, Target, Trench};
use meridio_proxy::rpc::call::{self, Options};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::pump::{self, Item};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::sync::thread::{Joined, ThreadHandle, Threads};
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};
use protobuf::MessageField;

const TRENCH: &str = "trench-a";

/// One VIP watch with its NSP.
struct Bench {
    watch: ThreadHandle,
    connector: Connector,
    lab: Nsp,
    net: Receiver<NetMsg>,
    address: SocketAddr,
    rpc: Rpc,
    pki: Pki,
}

impl Bench {
    fn new() -> Self {
        let threads = Threads::unsupervised();
        let rpc = Rpc::new();
        let pki = Pki::new("example.org");
        // Bound to learn a free port, which is bound again by `serve`.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let options = ConnectorOptions {
            name: "nsp",
            address: Address::Tcp {
                host: "127.0.0.1".to_owned(),
                port: address.port(),
            },
            authority: address.to_string(),
            dial_timeout: secs(5),
            backoff_max: secs(1),
        };
        let own = pki.cell(&pki.id("proxy"), secs(3600));
        let connector = Connector::start(&threads, &rpc, own, options).unwrap();
        let (net_tx, net) = bounded(64);
        let net_handle = NetHandle::new(net_tx);
        Self {
            watch: nsp::start(&threads, connector.clone(), net_handle, TRENCH).unwrap(),
            connector,
            lab: Nsp::new(TRENCH),
            net,
            address,
            rpc,
            pki,
        }
    }

    fn serving(vips: &[&str]) -> Self {
        let bench = Self::new();
        bench.lab.set_vips(vips.iter().copied());
        bench.serve();
        bench
    }

    fn serve(&self) {
        let listener = TcpListener::bind(self.address).unwrap();
        let cell = self.pki.cell(&self.pki.id("nsp"), secs(3600));
        self.lab
            .serve(&Threads::unsupervised(), &self.rpc, cell, listener)
            .unwrap();
    }

    /// The next set that `net` is told.
    fn told(&self) -> BTreeSet<IpNetwork> {
        match self.net.recv_timeout(secs(20)).unwrap() {
            NetMsg::Fact(Event::Vips(vips)) => vips,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.watch.join_within(secs(2));
        self.connector.close(soon(2));
        self.lab.stop();
    }
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn soon(n: u64) -> Instant {
    clock::now() + secs(n)
}

fn set(texts: &[&str]) -> BTreeSet<IpNetwork> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn each_list_is_the_full_set() {
    let bench = Bench::serving(&["20.0.0.1/32", "2000::1/128", "40.0.0.7/24"]);
    assert_eq!(
        bench.told(),
        set(&["20.0.0.1/32", "2000::1/128", "40.0.0.0/24"])
    );
    let asked = bench.lab.wait_vip_watches(1, soon(5)).unwrap();
    assert_eq!(asked[0].trench.name, TRENCH);
    assert_eq!(
        (asked[0].name.as_str(), asked[0].address.as_str()),
        ("", "")
    );

    // The same set, however it is written, is not told again.
    bench.lab.repeat_vips();
    bench
        .lab
        .set_vips(["2000::1/128", "40.0.0.0/24", "20.0.0.1/32", "20.0.0.1/32"]);
    bench.lab.set_vips(["20.0.0.2/32"]);
    assert_eq!(bench.told(), set(&["20.0.0.2/32"]));
    bench.lab.set_vips([]);
    assert_eq!(bench.told(), set(&[]));
}

#[test]
fn bad_vips_are_refused_and_the_others_apply() {
    let bench = Bench::serving(&[
        "0.0.0.0/0",
        "::/0",
        "20.0.0.1",
        "nonsense",
        "",
        "20.0.0.1/32",
    ]);
    assert_eq!(bench.told(), set(&["20.0.0.1/32"]));
}

#[test]
fn a_stream_that_ends_is_opened_again_and_removes_nothing() {
    let bench = Bench::serving(&["20.0.0.1/32"]);
    assert_eq!(bench.told(), set(&["20.0.0.1/32"]));
    for round in 0..2 {
        let begun = clock::now();
        if round == 0 {
            bench.lab.drop_streams();
        } else {
            bench.lab.close_streams();
        }
        bench.lab.wait_vip_watches(2 + round, soon(5)).unwrap();
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(500), "{took:?}");
    }
    bench.lab.set_vips(["20.0.0.2/32"]);
    assert_eq!(bench.told(), set(&["20.0.0.2/32"]), "nothing in between");
}

#[test]
fn a_restart_of_nsp_removes_nothing() {
    let bench = Bench::serving(&["20.0.0.1/32"]);
    assert_eq!(bench.told(), set(&["20.0.0.1/32"]));
    bench.lab.stop();
    bench.lab.set_vips(["20.0.0.1/32", "20.0.0.3/32"]);
    bench.serve();
    assert_eq!(bench.told(), set(&["20.0.0.1/32", "20.0.0.3/32"]));
}

#[test]
fn an_empty_list_after_a_reconnect_is_held_back() {
    let bench = Bench::serving(&["20.0.0.1/32"]);
    assert_eq!(bench.told(), set(&["20.0.0.1/32"]));

    // NSP reads its configuration in time: nothing was removed.
    bench.lab.begin_empty(true);
    bench.lab.drop_streams();
    bench.lab.wait_vip_watches(2, soon(5)).unwrap();
    bench.lab.set_vips(["20.0.0.1/32", "20.0.0.2/32"]);
    assert_eq!(bench.told(), set(&["20.0.0.1/32", "20.0.0.2/32"]));

    // It stays empty: then it is meant.
    bench.lab.drop_streams();
    bench.lab.wait_vip_watches(3, soon(5)).unwrap();
    let begun = clock::now();
    assert_eq!(bench.told(), set(&[]));
    let took = begun.elapsed();
    assert!(
        took > Duration::from_millis(4500) && took < secs(8),
        "{took:?}"
    );
}

#[test]
fn the_thread_stops_at_once() {
    // While NSP is away, and while a stream is open.
    let mut away = Bench::new();
    let mut open = Bench::serving(&["20.0.0.1/32"]);
    open.told();
    for bench in [&mut away, &mut open] {
        let begun = clock::now();
        assert_eq!(bench.watch.join_within(secs(5)), Joined::Yes);
        assert!(begun.elapsed() < Duration::from_millis(500));
    }
}

#[test]
fn the_lab_registers_targets() {
    let bench = Bench::serving(&[]);
    let (_stopper, stop) = stop_pair();
    let connection = bench.connector.acquire(soon(10), &stop).unwrap();
    let target = |ip: &str| Target {
        ips: vec![ip.to_owned()],
        stream: MessageField::some(Stream {
            name: "stream-1".to_owned(),
            conduit: MessageField::some(Conduit {
                name: "load-balancer".to_owned(),
                trench: MessageField::some(Trench {
                    name: TRENCH.to_owned(),
                    ..Trench::default()
                }),
                ..Conduit::default()
            }),
            ..Stream::default()
        }),
        ..Target::default()
    };
    let mut all = target("");
    all.ips.clear();
    let channel = connection.channel();
    let watch = pump::open(channel, &method::TARGET_WATCH, &all, &Options::default()).unwrap();
    let next = || match watch.items().recv_timeout(secs(5)).unwrap() {
        Item::Message(list) => list.targets.len(),
        Item::Ended(end) => panic!("{end:?}"),
    };
    assert_eq!(next(), 0);
    let options = Options::with_timeout(secs(5));
    for (count, ip) in [(1, "172.16.0.2"), (2, "172.16.0.4"), (2, "172.16.0.4")] {
        let request = target(ip);
        call::unary(channel, &method::TARGET_REGISTER, &request, &options, &stop).unwrap();
        assert_eq!(next(), count);
    }
    let gone = target("172.16.0.2");
    call::unary(channel, &method::TARGET_UNREGISTER, &gone, &options, &stop).unwrap();
    assert_eq!(next(), 1);
    assert_eq!(
        bench.lab.wait_targets(1, soon(5)).unwrap()[0].ips,
        ["172.16.0.4"]
    );
    let refused = call::unary(channel, &method::TARGET_REGISTER, &all, &options, &stop);
    assert!(refused.is_err());
}
