//! What many connections leave behind. Alone in its process, since it counts
//! the process's descriptors and threads.
#![allow(missing_docs, dead_code, clippy::unwrap_used, clippy::panic)]

#[path = "transport/rig.rs"]
mod rig;

use std::fs::{self, File};
use std::time::Duration;

use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::transport::client::Connector;

use rig::{CLIENT_ID, HOUR, Rig, soon};

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The transport's threads; gRPC starts and ends some as it likes.
fn threads() -> usize {
    fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .filter(|name| {
            ["conn-", "tls-", "relay-in"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .count()
}

/// Waits until a count is as wanted: nothing tells of the closing of a
/// descriptor that gRPC holds, and Linux lists a thread a moment longer than
/// joining it takes.
fn becomes(what: &str, count: impl Fn() -> usize, wanted: impl Fn(usize) -> bool) {
    let (_stopper, pause) = stop_pair();
    let deadline = soon();
    while !wanted(count()) {
        let late = clock::now() >= deadline || pause.wait(Duration::from_millis(10));
        assert!(!late, "{} {what}", count());
    }
}

#[test]
fn connections_leave_nothing_behind() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let cell = rig.client_cell();
    let server = rig.serve(rig.server_cell(), &path);
    let use_it = |connector: &Connector| {
        let connection = rig.acquire(connector);
        connection.attach(File::open("/proc/version").unwrap().into());
        rig.echo(&connection, "attach:/proc/version", &[]).unwrap();
    };
    let lasting = rig.connect_unix(cell.clone(), &path);
    use_it(&lasting);
    for _ in 0..5 {
        use_it(&rig.connect_unix(rig.client_cell(), &path));
    }
    let before = descriptors();
    // Two for each dialled connection, two for the server.
    becomes("threads", threads, |now| now == 4);

    for _ in 0..20 {
        let connectors: Vec<Connector> = (0..10)
            .map(|_| rig.connect_unix(rig.client_cell(), &path))
            .collect();
        connectors.iter().for_each(use_it);
        // None for an accepted one.
        becomes("threads", threads, |now| now == 4 + 2 * connectors.len());
    }
    for _ in 0..50 {
        rig.pki.refill(&cell, CLIENT_ID, HOUR);
        use_it(&lasting);
    }
    // gRPC keeps a few of its own.
    becomes("descriptors", descriptors, |now| now <= before + 2);
    becomes("threads", threads, |now| now == 4);
    use_it(&lasting);
    server.stop(soon());
    lasting.close(soon());
    becomes("threads", threads, |now| now == 0);
}
