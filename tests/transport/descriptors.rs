use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use meridio_proxy::transport::client::ConnectorState;

use crate::rig::{HOUR, Rig};
use crate::tap::{Passed, Tap, Way, file};

fn expected(way: Way, path: &str) -> Passed {
    let (device, inode) = file(path);
    // Each rides alone, on a byte of its own.
    Passed {
        way,
        device,
        inode,
        together: 1,
    }
}

#[test]
fn descriptors_arrive_before_the_call_they_belong_to() {
    let rig = Rig::new();
    let (front, back) = (rig.path("front.sock"), rig.path("back.sock"));
    let _server = rig.serve(rig.server_cell(), &back);
    let tap = Tap::start(&rig.threads, &front, &back);
    let connector = rig.connect_unix(rig.client_cell(), &front);
    let connection = rig.acquire(&connector);
    assert!(tap.passed.is_empty(), "nothing was attached yet");

    // O_PATH, as NSM sends its own namespace.
    let netns = "/proc/self/ns/net";
    let path_only = || {
        File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(netns)
            .unwrap()
    };
    for round in 0..100 {
        connection.attach(path_only().into());
        connection.attach(File::open("/proc/version").unwrap().into());
        rig.echo(&connection, &format!("{round}"), &[]).unwrap();
        // The answer is here, so what went with the call has passed.
        let passed: Vec<Passed> = tap.passed.try_iter().collect();
        assert_eq!(
            passed,
            [
                expected(Way::ToServer, netns),
                expected(Way::ToServer, "/proc/version")
            ]
        );
    }
}

#[test]
fn more_descriptors_than_one_write_takes() {
    let rig = Rig::new();
    let (front, back) = (rig.path("front.sock"), rig.path("back.sock"));
    let _server = rig.serve(rig.server_cell(), &back);
    let tap = Tap::start(&rig.threads, &front, &back);
    let connector = rig.connect_unix(rig.client_cell(), &front);
    let connection = rig.acquire(&connector);
    for _ in 0..150 {
        connection.attach(File::open("/proc/version").unwrap().into());
    }
    for _ in 0..3 {
        rig.echo(&connection, "n", &[]).unwrap();
    }
    let passed: Vec<Passed> = tap.passed.try_iter().collect();
    assert_eq!(passed.len(), 150);
    let each = expected(Way::ToServer, "/proc/version");
    assert!(passed.iter().all(|one| *one == each));
}

#[test]
fn a_server_attaches_to_its_answer_and_a_client_drops_it() {
    let rig = Rig::new();
    let (front, back) = (rig.path("front.sock"), rig.path("back.sock"));
    let _server = rig.serve(rig.server_cell(), &back);
    let tap = Tap::start(&rig.threads, &front, &back);
    let connector = rig.connect_unix(rig.client_cell(), &front);
    let connection = rig.acquire(&connector);
    rig.echo(&connection, "attach:/proc/version", &[]).unwrap();
    let passed: Vec<Passed> = tap.passed.try_iter().collect();
    assert_eq!(passed, vec![expected(Way::ToClient, "/proc/version"); 2]);
}

/// What the daemon itself reads descriptors off leaves none open: the tap has
/// taken them out above, here they reach the client.
#[test]
fn received_descriptors_do_not_leak() {
    let rig = Rig::new();
    let path = rig.path("s.sock");
    let marker = rig.path("marker");
    File::create(&marker).unwrap();
    let _server = rig.serve(rig.server_cell(), &path);
    let connector = rig.connect_unix(rig.client_cell(), &path);
    let connection = rig.acquire(&connector);
    let name = format!("attach:{}", marker.display());
    for _ in 0..20 {
        rig.echo(&connection, &name, &[]).unwrap();
    }
    // The answer of a later call shows that all earlier bytes were read.
    rig.echo(&connection, "n", &[]).unwrap();
    let open = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(Result::ok)
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target == marker))
        .count();
    assert_eq!(open, 0);
}

#[test]
fn a_peer_that_is_not_verified_gets_no_descriptor() {
    let rig = Rig::new();
    let stranger = meridio_lab::pki::Pki::new("td");
    let (front, back) = (rig.path("front.sock"), rig.path("back.sock"));
    let _server = rig.serve(stranger.cell("spiffe://td/ns/server", HOUR), &back);
    let tap = Tap::start(&rig.threads, &front, &back);
    let connector = rig.connect_unix(rig.client_cell(), &front);
    // There is no connection to attach to before the peer is verified.
    let refusal = rig.refusal(&connector);
    assert!(refusal.contains("certificate chain"), "{refusal}");
    assert!(!matches!(connector.state().get(), ConnectorState::Ready));
    assert!(tap.passed.is_empty());
}

#[test]
fn on_tcp_descriptors_are_dropped() {
    let rig = Rig::new();
    let (_server, address) = rig.serve_tcp(rig.server_cell());
    let connector = rig.connect(rig.client_cell(), address);
    let connection = rig.acquire(&connector);
    let marker = rig.path("marker");
    for _ in 0..300 {
        connection.attach(File::create(&marker).unwrap().into());
    }
    rig.echo(&connection, "n", &[]).unwrap();
    let open = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(Result::ok)
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target == marker))
        .count();
    assert_eq!(open, 0);
}
