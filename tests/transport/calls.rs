use meridio_proxy::proto::registry::{NetworkServiceQuery, NetworkServiceResponse};
use meridio_proxy::rpc::call::Options;
use meridio_proxy::rpc::method::NS_FIND;
use meridio_proxy::rpc::pump::{self, Item, Pump, StreamError};
use meridio_proxy::transport::client::{Address, Connection, Connector};

use crate::rig::{CLIENT_ID, Rig, SERVER_ID, named, soon};

pub fn open(connection: &Connection, count: usize) -> Pump<NetworkServiceResponse> {
    let query = NetworkServiceQuery {
        network_service: Some(named(&"x".repeat(count))).into(),
        ..Default::default()
    };
    pump::open(connection.channel(), &NS_FIND, &query, &Options::default()).unwrap()
}

fn find(connection: &Connection, count: usize) {
    let stream = open(connection, count);
    for _ in 0..count {
        let item = stream.items().recv_deadline(soon()).unwrap();
        assert!(matches!(item, Item::Message(_)), "{item:?}");
    }
}

fn exercise(rig: &Rig, connector: &Connector) {
    let connection = rig.acquire(connector);
    assert_eq!(connection.peer().id.as_str(), SERVER_ID);
    assert_eq!(connection.identity().svid.id.as_str(), CLIENT_ID);
    for size in [0, 1, 16_000, 17_000, 100_000] {
        let name = "n".repeat(size);
        let reply = rig.echo(&connection, &name, &[]).unwrap();
        assert_eq!(reply.message.name, name);
        assert_eq!(reply.message.payload, CLIENT_ID);
    }
    find(&connection, 20);
    // The same connection all the time.
    assert!(std::sync::Arc::ptr_eq(&connection, &rig.acquire(connector)));
}

#[test]
fn unary_and_streams_over_unix() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    exercise(&rig, &connector);
    connector.close(soon());
    server.stop(soon());
}

#[test]
fn unary_and_streams_over_tcp() {
    let rig = Rig::new();
    let (server, address) = rig.serve_tcp(rig.server_cell());
    let connector = rig.connect(rig.client_cell(), address.clone());
    exercise(&rig, &connector);
    // A name is resolved; IPv6 loopback may come first and refuse.
    let Address::Tcp { port, .. } = address else {
        panic!("{address}");
    };
    let by_name = rig.connect(
        rig.client_cell(),
        Address::Tcp {
            host: "localhost".to_owned(),
            port,
        },
    );
    exercise(&rig, &by_name);
    server.stop(soon());
}

#[test]
fn large_metadata_passes_both_ways() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    // The C core's own limit rejects at random, and not before SETTINGS were
    // acknowledged, so one call would prove nothing.
    for round in 0..50 {
        let value = format!("{round}{}", "v".repeat(30_000));
        let headers = [("x-back".to_owned(), value.clone())];
        let reply = rig.echo(&connection, "n", &headers).unwrap();
        let (_, back) = reply
            .headers
            .iter()
            .find(|(name, _)| *name == "x-back")
            .unwrap();
        assert!(back == value.as_bytes(), "round {round}");
    }
}

#[test]
fn many_callers_share_a_connection() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    std::thread::scope(|scope| {
        for caller in 0..8 {
            let (rig, connector) = (&rig, &connector);
            scope.spawn(move || {
                for call in 0..25 {
                    let name = format!("{caller}-{call}-{}", "n".repeat(20_000));
                    let connection = rig.acquire(connector);
                    let reply = rig.echo(&connection, &name, &[]).unwrap();
                    assert_eq!(reply.message.name, name);
                }
            });
        }
    });
}

#[test]
fn one_server_serves_many_connections() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let connectors: Vec<Connector> = (0..20)
        .map(|_| rig.connect_unix(rig.client_cell(), &path))
        .collect();
    for connector in &connectors {
        let connection = rig.acquire(connector);
        assert_eq!(
            rig.echo(&connection, "n", &[]).unwrap().message.payload,
            CLIENT_ID
        );
    }
}

#[test]
fn a_dropped_stream_is_cancelled_at_the_server() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    let changed = rig.open.subscribe();
    let streams: Vec<_> = (0..5).map(|_| open(&connection, 1)).collect();
    while rig.open.get() < 5 {
        changed.recv_deadline(soon()).unwrap();
    }
    drop(streams);
    while rig.open.get() > 0 {
        changed.recv_deadline(soon()).unwrap();
    }
    // The connection lives on.
    rig.echo(&connection, "n", &[]).unwrap();
}

#[test]
fn a_reader_that_falls_behind_loses_its_stream() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    let stream = open(&connection, 200);
    let changed = rig.open.subscribe();
    // Given up without anybody having read.
    while stream.items().len() < 65 || rig.open.get() > 0 {
        changed.recv_deadline(soon()).unwrap();
    }
    let items: Vec<_> = stream.items().iter().collect();
    assert_eq!(items.len(), 65);
    assert!(matches!(
        items.last(),
        Some(Item::Ended(Err(StreamError::Lagged)))
    ));
    rig.echo(&connection, "n", &[]).unwrap();
}
