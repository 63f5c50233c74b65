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

fn count(directory: &str) -> usize {
    fs::read_dir(directory).unwrap().count()
}

/// Waits until the count has fallen to `limit`: the other ends of what was
/// closed go a moment later.
fn falls_to(directory: &str, limit: usize) {
    // Nothing tells of the closing of a descriptor that gRPC holds.
    let (_stopper, pause) = stop_pair();
    let deadline = soon();
    while count(directory) > limit {
        let late = clock::now() >= deadline || pause.wait(Duration::from_millis(10));
        assert!(!late, "{} in {directory}, not {limit}", count(directory));
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
    // gRPC starts threads of its own as it goes; after a first round it has.
    for _ in 0..5 {
        use_it(&rig.connect_unix(rig.client_cell(), &path));
    }
    let descriptors = count("/proc/self/fd");
    let threads = count("/proc/self/task");

    for _ in 0..20 {
        let connectors: Vec<Connector> = (0..10)
            .map(|_| rig.connect_unix(rig.client_cell(), &path))
            .collect();
        connectors.iter().for_each(use_it);
        // Two threads for each dialled connection, none for an accepted one;
        // gRPC may have started one more for itself.
        assert!(count("/proc/self/task") <= threads + 2 * connectors.len() + 2);
    }
    for _ in 0..50 {
        rig.pki.refill(&cell, CLIENT_ID, HOUR);
        use_it(&lasting);
    }
    falls_to("/proc/self/fd", descriptors + 2);
    falls_to("/proc/self/task", threads + 2);
    use_it(&lasting);
    server.stop(soon());
}
