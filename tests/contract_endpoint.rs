//! The endpoint over real mTLS, against a registry that checks what it is sent
//! and a forwarder that calls as NSM's do. IPAM and `net` are stand-ins.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's way to fail"
)]

#[path = "contract_endpoint/forwarder.rs"]
mod forwarder;
#[path = "contract_endpoint/strict.rs"]
mod strict;
#[path = "contract_endpoint/world.rs"]
mod world;

use crossbeam_channel::bounded;
use futures_util::{FutureExt, SinkExt};
use grpcio::WriteFlags;
use meridio_proxy::core::event::Event;
use meridio_proxy::ipam::IpamError;
use meridio_proxy::proto::connection::ConnectionEventType;
use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::proto::registry::NetworkServiceEndpointResponse;
use meridio_proxy::rpc::call::{self};
use meridio_proxy::rpc::method;
use meridio_proxy::rpc::pump::Item;
use meridio_proxy::rpc::status::Code;
use meridio_proxy::spiffe::jwt::{self};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::Ordering;
use std::time::Duration;

use forwarder::{Forwarder, event};
use world::{Asked, HOUR, Ipam, SERVICE, World, soon};

#[test]
fn registers_the_service_then_the_endpoint_and_leaves_once() {
    let mut world = World::new(|_| {});
    let Asked::Service(service) = world.asked() else {
        panic!("the service comes first");
    };
    assert_eq!(
        (service.name.as_str(), service.payload.as_str()),
        (SERVICE, "ETHERNET")
    );
    let Asked::Endpoint(nse, path) = world.asked() else {
        panic!("then the endpoint");
    };
    assert_eq!(path, r#"{"Index":0,"PathSegments":[]}"#);
    assert_eq!(nse.name, "us");
    let socket = world.socket().to_owned();
    let meta = std::fs::metadata(&socket).unwrap();
    assert_eq!(nse.url, format!("inode://{}/{}", meta.dev(), meta.ino()));
    assert_eq!(meta.permissions().mode() & 0o777, 0o777);
    assert_eq!(
        nse.network_service_labels[SERVICE].labels["nodeName"],
        "node-a"
    );
    assert!(matches!(world.asked(), Asked::Watch(name) if name == "us"));

    let mut endpoint = world.endpoint.take().unwrap();
    assert!(
        endpoint
            .unregister(clock::now() + Duration::from_secs(3))
            .is_empty()
    );
    assert!(matches!(world.asked(), Asked::Unregister(nse) if nse.name == "us"));
    world.registry.watches.lock().clear();
    assert!(
        endpoint
            .stop(clock::now() + Duration::from_secs(3))
            .is_empty()
    );
    assert!(world.asked.is_empty(), "nothing after the Unregister");
    assert!(
        !socket.parent().unwrap().exists(),
        "the socket goes with its directory"
    );
}

#[test]
fn nothing_is_registered_before_the_bridge_has_its_addresses() {
    for comes in [true, false] {
        let ipam = Ipam::default();
        *ipam.unaddressed.lock() = Some(stop_pair());
        let mut world = World::with_ipam(ipam, |_| {});
        let early = world.asked.recv_timeout(Duration::from_millis(500));
        assert!(early.is_err(), "{early:?}");
        if comes {
            world.ipam.unaddressed.lock().take();
            world.registered();
        } else {
            // A stop meanwhile has nothing to take back, and waits for nothing.
            let mut endpoint = world.endpoint.take().unwrap();
            let begun = clock::now();
            let late = endpoint.unregister(begun + Duration::from_secs(3));
            assert!(late.is_empty() && begun.elapsed() < Duration::from_secs(1));
            assert!(world.asked.is_empty());
        }
    }
}

#[test]
fn a_denied_service_that_is_there_does_not_stop_the_endpoint() {
    let world = World::new(|registry| {
        registry.deny_service.store(true, Ordering::Relaxed);
    });
    for _ in 0..2 {
        assert!(
            matches!(world.asked(), Asked::Service(_)),
            "tried again, nothing else"
        );
    }
    let Asked::Service(service) = world.asked() else {
        panic!("no endpoint without its service");
    };
    world.registry.services.lock().push(service);
    assert_eq!(world.registered().name, "us");
}

#[test]
fn registers_anew_after_restarts() {
    let mut world = World::new(|_| {});
    world.registered();
    while !matches!(world.asked(), Asked::Watch(_)) {}
    // The registry's restart only ends the watch.
    world.registry.watches.lock().clear();
    assert!(
        matches!(world.asked(), Asked::Service(_)),
        "it may have forgotten both"
    );
    world.registered();
    while !matches!(world.asked(), Asked::Watch(_)) {}
    // nsmgr's restart ends the connection.
    world.nsmgr.take().unwrap().stop(clock::now());
    world.registry.watches.lock().clear();
    world.start_nsmgr();
    world.registered();
}

#[test]
fn an_entry_that_was_removed_is_registered_anew() {
    let world = World::new(|_| {});
    world.registered();
    while !matches!(world.asked(), Asked::Watch(_)) {}
    for name in ["another", "us"] {
        let mut event = NetworkServiceEndpointResponse {
            deleted: true,
            ..NetworkServiceEndpointResponse::default()
        };
        name.clone_into(&mut event.network_service_endpoint.mut_or_insert_default().name);
        let mut watches = world.registry.watches.lock();
        // Polled once, it is on its way.
        let _ = watches[0]
            .send((event, WriteFlags::default()))
            .now_or_never();
        drop(watches);
        let again = world.asked.recv_timeout(Duration::from_secs(1));
        let is_anew = matches!(&again, Ok(Asked::Endpoint(nse, _)) if nse.name == "us");
        assert_eq!(is_anew, name == "us", "{name}: {again:?}");
    }
}

#[test]
fn a_target_connects_refreshes_and_closes() {
    use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER, UPDATE};
    let world = World::new(|_| {});
    let forwarder = world.forwarder();
    let before = forwarder.monitor("t1");
    assert_eq!(event(&before), (INITIAL_STATE_TRANSFER, 0));
    let answer = forwarder.request(&forwarder.first_request("t1")).unwrap();
    assert_eq!((answer.id.as_str(), answer.path.index), ("fwd-t1", 1));
    assert_eq!(answer.context.ip_context.src_ip_addrs, ["172.16.0.2/24"]);
    let own = &answer.path.path_segments[2];
    assert_eq!(
        jwt::claims(&own.token).unwrap().aud,
        Some(vec![world.pki.id("fwd")])
    );
    let Event::PortExpected { ifname, peers, .. } = world.fact() else {
        panic!("no port");
    };
    assert_eq!(ifname.as_str(), answer.mechanism.parameters["name"]);
    assert_eq!(peers, BTreeSet::from(["172.16.0.2".parse().unwrap()]));
    assert_eq!(event(&before), (UPDATE, 1));

    // As the real one does: anew for each Request, then a monitor stream.
    let again = world.forwarder();
    let refresh = NetworkServiceRequest {
        connection: Some(answer.clone()).into(),
        ..NetworkServiceRequest::default()
    };
    let mut refresh = refresh;
    let segments = &mut refresh.connection.mut_or_insert_default().path;
    segments.mut_or_insert_default().path_segments[0].token = again.target_token().jwt;
    let second = again.request(&refresh).unwrap();
    assert_eq!(second.context, answer.context);
    assert_eq!(second.mechanism, answer.mechanism);
    let after = again.monitor("t1");
    assert_eq!(event(&after), (INITIAL_STATE_TRANSFER, 1));
    assert!(matches!(world.fact(), Event::PortExpected { .. }));

    for _ in 0..2 {
        again.close(&second).unwrap();
    }
    assert_eq!(event(&before), (UPDATE, 1));
    assert_eq!(event(&before), (DELETE, 1));
    assert_eq!(event(&after), (DELETE, 1));
    assert!(matches!(world.fact(), Event::PortReleased { .. }));
    assert_eq!(*world.ipam.released.lock(), ["t1"]);
}

#[test]
fn a_token_of_another_key_is_refused() {
    let world = World::new(|_| {});
    let forwarder = world.forwarder();
    let stranger = world.pki.cell(&world.pki.id("fwd"), HOUR);
    let request = forwarder.first_request("t1");
    let error = forwarder.request_as(&stranger, &request).unwrap_err();
    assert_eq!(error.code(), Some(Code::PERMISSION_DENIED), "{error}");
    assert!(error.to_string().contains("prev_token_signed"), "{error}");
    let mut foreign = request.clone();
    let path = foreign
        .connection
        .mut_or_insert_default()
        .path
        .mut_or_insert_default();
    path.path_segments[0].token = "rubbish".to_owned();
    let error = forwarder.request(&foreign).unwrap_err();
    assert!(error.to_string().contains("tokens_valid"), "{error}");
    forwarder.request(&request).unwrap();
}

#[test]
fn health() {
    let world = World::new(|_| {});
    let forwarder = world.forwarder();
    for service in [
        "",
        "networkservice.NetworkService",
        "connection.MonitorConnection",
    ] {
        assert_eq!(forwarder.health(service).unwrap(), ServingStatus::SERVING);
    }
    assert_eq!(
        forwarder.health("x").unwrap_err().code(),
        Some(Code::NOT_FOUND)
    );
    for (service, expected) in [
        ("", ServingStatus::SERVING),
        ("x", ServingStatus::SERVICE_UNKNOWN),
    ] {
        let pump = forwarder.watch_health(service);
        let item = pump.items().recv_deadline(soon()).unwrap();
        let Item::Message(response) = item else {
            panic!("{item:?}");
        };
        assert_eq!(response.status.enum_value(), Ok(expected));
        assert!(pump.items().is_empty(), "the stream stays open");
    }
}

#[test]
fn the_end_answers_what_waits_and_ends_streams_in_order() {
    let mut world = World::new(|_| {});
    let forwarder = world.forwarder();
    let pump = forwarder.monitor("t2");
    let _ = event(&pump);
    forwarder.request(&forwarder.first_request("t1")).unwrap();
    world.ipam.silent.store(true, Ordering::Relaxed);
    let (tx, rx) = bounded(1);
    let options = forwarder.options(&forwarder.cell);
    let connection = forwarder
        .connector
        .acquire(soon(), &forwarder.stop)
        .unwrap();
    let request = forwarder.first_request("t2");
    let channel = connection.channel();
    let guard = call::start(
        channel,
        &method::REQUEST,
        &request,
        &options,
        move |result| {
            let _ = tx.send(result.map(|reply| reply.message));
        },
    );
    // A Close of the unknown is answered at once: that of the same connection
    // would wait, so another one says that the Request has arrived.
    forwarder
        .close(&forwarder.first_request("t3").connection)
        .unwrap();
    assert_eq!(world.ipam.withheld.lock().len(), 1);
    let begun = clock::now();
    let endpoint = world.endpoint.take().unwrap();
    assert!(endpoint.stop(begun + Duration::from_secs(5)).is_empty());
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    let error = rx.recv_deadline(soon()).unwrap().unwrap_err();
    assert_eq!(error.code(), Some(Code::UNAVAILABLE), "{error}");
    guard.detach();
    let ended = pump.items().recv_deadline(soon()).unwrap();
    assert!(matches!(ended, Item::Ended(Ok(()))), "{ended:?}");
    assert!(
        world.ipam.released.lock().is_empty(),
        "leases of targets stay"
    );
}

#[test]
fn requests_are_bounded_and_a_close_is_never_refused() {
    let world = World::new(|_| {});
    world.ipam.silent.store(true, Ordering::Relaxed);
    // A connection carries 256 streams at a time.
    let forwarders: Vec<Forwarder> = (0..5).map(|_| world.forwarder()).collect();
    let (tx, rx) = bounded(2000);
    let mut guards = Vec::new();
    for (n, forwarder) in forwarders.iter().enumerate() {
        let options = forwarder.options(&forwarder.cell);
        let connection = forwarder
            .connector
            .acquire(soon(), &forwarder.stop)
            .unwrap();
        let request = forwarder.first_request(&format!("t{n}"));
        for _ in 0..220 {
            let tx = tx.clone();
            let channel = connection.channel();
            guards.push(call::start(
                channel,
                &method::REQUEST,
                &request,
                &options,
                move |result| {
                    let _ = tx.send(result.map(|reply| reply.message));
                },
            ));
        }
    }
    for _ in 0..1100 - 1024 {
        let error = rx.recv_deadline(soon()).unwrap().unwrap_err();
        assert_eq!(error.code(), Some(Code::RESOURCE_EXHAUSTED), "{error}");
    }
    let other = world.forwarder();
    other.close(&other.first_request("t").connection).unwrap();
    assert!(rx.is_empty(), "the others wait");
    for answer in std::mem::take(&mut *world.ipam.withheld.lock()) {
        answer(Err(IpamError::Stopped));
    }
    for _ in 0..1024 {
        let error = rx.recv_deadline(soon()).unwrap().unwrap_err();
        assert_eq!(error.code(), Some(Code::UNAVAILABLE), "{error}");
    }
    world.ipam.silent.store(false, Ordering::Relaxed);
    other.request(&other.first_request("t")).unwrap();
}

#[test]
fn many_targets_with_a_stream_each() {
    let world = World::new(|_| {});
    let forwarder = world.forwarder();
    let mut pumps = Vec::new();
    for n in 0..60 {
        let target = format!("t{n}");
        forwarder
            .request(&forwarder.first_request(&target))
            .unwrap();
        let pump = forwarder.monitor(&target);
        assert_eq!(
            event(&pump),
            (ConnectionEventType::INITIAL_STATE_TRANSFER, 1)
        );
        pumps.push(pump);
    }
    let names: BTreeSet<String> = (0..60)
        .map(|_| match world.fact() {
            Event::PortExpected { ifname, .. } => ifname.to_string(),
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(names.len(), 60, "each interface has a name of its own");
    assert!(
        pumps.iter().all(|pump| pump.items().is_empty()),
        "each hears of its own only"
    );
}

/// All targets of a node come at once after a restart, each over a connection
/// of its own, as forwarders make them.
#[test]
fn a_node_full_of_targets_at_once() {
    const TARGETS: usize = 120;
    // The peers are in this process, too.
    meridio_proxy::transport::descriptors::raise_limit();
    let world = World::new(|_| {});
    let forwarders: Vec<Forwarder> = (0..TARGETS).map(|_| world.forwarder()).collect();
    let (tx, rx) = bounded(TARGETS);
    let mut guards = Vec::new();
    for (n, forwarder) in forwarders.iter().enumerate() {
        let connection = forwarder
            .connector
            .acquire(soon(), &forwarder.stop)
            .unwrap();
        let tx = tx.clone();
        guards.push(call::start(
            connection.channel(),
            &method::REQUEST,
            &forwarder.first_request(&format!("t{n}")),
            &forwarder.options(&forwarder.cell),
            move |result| {
                let _ = tx.send(result.map(|reply| reply.message));
            },
        ));
    }
    let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..TARGETS {
        let answer = rx.recv_deadline(soon()).unwrap().unwrap();
        names.insert(answer.mechanism.parameters["name"].clone());
        addresses.insert(answer.context.ip_context.src_ip_addrs.clone());
    }
    assert_eq!((names.len(), addresses.len()), (TARGETS, TARGETS));
    for (n, forwarder) in forwarders.iter().enumerate() {
        let pump = forwarder.monitor(&format!("t{n}"));
        assert_eq!(
            event(&pump),
            (ConnectionEventType::INITIAL_STATE_TRANSFER, 1)
        );
    }
}
