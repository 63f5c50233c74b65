//! The daemon's surroundings, with a shell in the daemon's place.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use meridio_lab::netns::Netns;
use meridio_lab::process::{Daemon, DaemonOptions};
use meridio_lab::workdir::WorkDir;

const LIMIT: Duration = Duration::from_secs(10);

fn shell(dir: &Path, script: &str) -> Daemon {
    Daemon::start(&DaemonOptions {
        binary: PathBuf::from("/bin/sh"),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: BTreeMap::from([("NSM_NAME".to_owned(), "proxy-1".to_owned())]),
        netns: Netns::new("pod").unwrap(),
        hosts: vec![("10.0.0.9".parse().unwrap(), "nsp.example".to_owned())],
        log: None,
        descriptors: None,
        dir: dir.to_owned(),
    })
    .unwrap()
}

#[test]
fn it_sees_its_pod_and_nothing_else() {
    let dir = WorkDir::new().unwrap();
    let daemon = shell(
        dir.path(),
        "echo name=$NSM_NAME home=$HOME; read line </etc/hosts; grep nsp.example /etc/hosts; \
         echo x >/tmp/written; ls -d /tmp/*; ls /sys/class/net; exit 3",
    );
    let status = daemon.wait_exit(LIMIT).unwrap();
    assert_eq!(status.code(), Some(3));
    let log = daemon.wait_line(0, |line| line == "lo", LIMIT);
    let lines = daemon.lines();
    assert!(log.is_some(), "{lines:?}");
    assert_eq!(lines[0], "name=proxy-1 home=");
    assert_eq!(lines[1], "10.0.0.9 nsp.example");
    assert_eq!(lines[2], "/tmp/written");
    assert_eq!(lines.len(), 4, "only the loopback interface: {lines:?}");
    assert!(dir.path().join("tmp/written").is_file());
    assert!(!Path::new("/tmp/written").exists());
    assert!(!daemon.is_running());
}

#[test]
fn signals_reach_it_and_it_ends_with_its_handle() {
    let dir = WorkDir::new().unwrap();
    let script = "trap 'kill $!; echo told; exit 7' TERM; sleep 60 & echo ready; wait";
    let daemon = shell(dir.path(), script);
    let line = daemon.wait_line(0, |line| line == "ready", LIMIT);
    assert!(line.is_some(), "{:?}", daemon.lines());
    assert!(daemon.wait_exit(Duration::from_millis(50)).is_none());
    assert_eq!(daemon.terminate(LIMIT).unwrap().code(), Some(7));
    // The last lines may be read after the end is known.
    assert!(daemon.wait_line(0, |line| line == "told", LIMIT).is_some());

    let daemon = shell(dir.path(), "echo ready; exec sleep 600");
    assert!(daemon.wait_line(0, |line| line == "ready", LIMIT).is_some());
    daemon.kill().unwrap();
    let pid = daemon.pid();
    drop(daemon);
    assert!(!Path::new("/proc").join(pid.to_string()).exists());
}

#[test]
fn a_missing_binary_is_an_error() {
    let dir = WorkDir::new().unwrap();
    let options = DaemonOptions {
        binary: PathBuf::from("/nowhere/proxy"),
        args: Vec::new(),
        env: BTreeMap::new(),
        netns: Netns::new("pod").unwrap(),
        hosts: Vec::new(),
        log: None,
        descriptors: None,
        dir: dir.path().to_owned(),
    };
    let error = Daemon::start(&options).err().unwrap();
    assert!(error.to_string().contains("/nowhere/proxy"), "{error}");
}
