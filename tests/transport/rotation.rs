use std::sync::Arc;
use std::time::Duration;

use meridio_proxy::nsm::caller::NsmCaller;
use meridio_proxy::proto::registry::NetworkServiceQuery;
use meridio_proxy::rpc::method::{NS_FIND, NS_REGISTER};
use meridio_proxy::rpc::pump::Item;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::STACK_SMALL;

use crate::rig::{CLIENT_ID, HOUR, Rig, SERVER_ID, named, soon};

#[test]
fn no_call_fails_while_both_identities_rotate() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let (server_cell, client_cell) = (rig.server_cell(), rig.client_cell());
    let _server = rig.serve(server_cell.clone(), &path);
    let connector = rig.connect_unix(client_cell.clone(), &path);
    let caller = NsmCaller::new(connector.clone(), HOUR);
    let pki = rig.pki.clone();
    let cell = client_cell.clone();
    let rotate = rig
        .threads
        .spawn("rotate", STACK_SMALL, move |stop| {
            while !stop.wait(Duration::from_millis(3)) {
                pki.refill(&cell, CLIENT_ID, HOUR);
                pki.refill(&server_cell, SERVER_ID, HOUR);
            }
        })
        .unwrap();
    let mut call = 0;
    // On a busy machine the calls may be quicker than the rotations.
    while call < 500 || client_cell.get().unwrap().generation <= 10 {
        call += 1;
        let name = format!("{call}");
        let reply = caller
            .unary(
                &NS_REGISTER,
                &named(&name),
                &[],
                &Vec::new,
                soon(),
                &rig.stop,
            )
            .unwrap_or_else(|error| panic!("call {call}: {error}"));
        assert_eq!(reply.message.name, name);
    }
    drop(rotate);
}

#[test]
fn a_rotation_moves_new_calls_and_lets_old_ones_end() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let cell = rig.client_cell();
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(cell.clone(), &path);
    let old = rig.acquire(&connector);
    assert_eq!(old.identity().generation, 1);
    rig.pki.refill(&cell, CLIENT_ID, HOUR);
    let deadline = soon();
    let new = loop {
        let now = rig.acquire(&connector);
        if !Arc::ptr_eq(&now, &old) {
            break now;
        }
        assert!(clock::now() < deadline, "no new connection");
        std::thread::yield_now();
    };
    assert_eq!(new.identity().generation, 2);
    // Whoever holds the old one can go on.
    rig.echo(&old, "n", &[]).unwrap();
    rig.echo(&new, "n", &[]).unwrap();
    let closed = old.closed().clone();
    assert!(closed.try_recv().is_err_and(|e| e.is_empty()));
    drop(old);
    let ended = closed.recv_deadline(soon());
    assert_eq!(
        ended,
        Err(crossbeam_channel::RecvTimeoutError::Disconnected)
    );
    rig.echo(&new, "n", &[]).unwrap();
}

#[test]
fn a_stream_ends_with_the_connection_of_its_certificate() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let cell = rig.client_cell();
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(cell.clone(), &path);
    let caller = NsmCaller::new(connector, HOUR);
    let query = NetworkServiceQuery {
        network_service: Some(named("xxx")).into(),
        ..Default::default()
    };
    let stream = caller.stream(&NS_FIND, &query, soon(), &rig.stop).unwrap();
    for _ in 0..3 {
        let item = stream.items().recv_deadline(soon()).unwrap();
        assert!(matches!(item, Item::Message(_)), "{item:?}");
    }
    rig.pki.refill(&cell, CLIENT_ID, HOUR);
    let item = stream.items().recv_deadline(soon()).unwrap();
    assert!(matches!(item, Item::Ended(Err(_))), "{item:?}");
    caller.stream(&NS_FIND, &query, soon(), &rig.stop).unwrap();
}
