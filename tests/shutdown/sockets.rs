//! Sockets of the settings at whose paths something else is.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use meridio_lab::agent::Agent;
use meridio_lab::pki::Pki;

use super::Proxy;

/// A directory of this test's own, removed at the end, with a directory and a
/// socket that nobody listens to.
struct Paths(PathBuf);

impl Paths {
    fn new(test: &str) -> Self {
        let name = format!("{test}-{}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(path.join("directory")).unwrap();
        drop(UnixListener::bind(path.join("stale.sock")).unwrap());
        Self(path)
    }

    fn of(&self, name: &str) -> String {
        format!("unix://{}", self.0.join(name).display())
    }
}

impl Drop for Paths {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The warning about a peer that cannot be reached at `path`; then the daemon
/// stops as it does at any other time.
fn warns_and_stops(mut proxy: Proxy, path: &str) {
    let path = path.trim_start_matches("unix://");
    loop {
        let line = proxy.lines.recv_timeout(super::LIMIT).expect(path);
        let message = line["message"].as_str().unwrap();
        if line["severity"] == "warning" && message.contains(path) {
            assert!(message.contains("Connection refused"), "{line}");
            break;
        }
    }
    proxy.signal("TERM");
    let (lines, status) = proxy.end();
    assert_eq!(status.code(), Some(0), "{lines:?}");
}

/// Whoever listens there may still come, as at a path where nothing is.
#[test]
fn an_agent_s_socket_that_is_a_directory_or_stale_is_waited_for() {
    let paths = Paths::new("agent");
    for name in ["directory", "stale.sock"] {
        let address = paths.of(name);
        warns_and_stops(Proxy::start_with(&address, "true"), &address);
    }
}

#[test]
fn nsmgr_s_socket_that_is_a_directory_or_stale_is_waited_for() {
    let paths = Paths::new("nsmgr");
    let pki = Pki::new("example.org");
    let socket = paths.0.join("agent.sock");
    let agent = Agent::start(&socket, &pki, &pki.id("proxy"), Duration::from_secs(3600));
    for name in ["directory", "stale.sock"] {
        let address = paths.of(name);
        let prepare = format!("ip link set lo up && export NSM_CONNECT_TO={address}");
        warns_and_stops(Proxy::start_with(&agent.address(), &prepare), &address);
    }
}

#[test]
fn a_path_that_no_socket_can_have_is_status_1_with_a_line() {
    let long = format!("unix:///{}", "x".repeat(107));
    for variable in ["SPIFFE_ENDPOINT_SOCKET", "NSM_CONNECT_TO"] {
        // Ended, and in a namespace of its own, should it start after all.
        let output = Command::new("unshare")
            .args(["--net", "timeout", "5", env!("CARGO_BIN_EXE_proxy")])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("SPIFFE_ENDPOINT_SOCKET", "unix:///nowhere/agent.sock")
            .env(variable, &long)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{variable}");
        assert!(output.stdout.is_empty());
        let said = String::from_utf8(output.stderr).unwrap();
        let expected = "a path of 108 bytes where sockets have at most 107";
        assert!(
            said.starts_with(&format!("{variable}=")) && said.contains(expected),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

/// Its own health socket is taken over from a predecessor, and from nobody else.
#[test]
fn the_health_socket_is_taken_from_a_dead_process_only() {
    let mut proxy = Proxy::start("mkdir /tmp/health.sock");
    let line = proxy.line("Proxy shutting down");
    assert_eq!(line["severity"], "critical");
    let error = line["extra_data"]["error"].as_str().unwrap();
    assert!(error.ends_with("is no socket"), "{error}");
    assert_eq!(proxy.end().1.code(), Some(1));

    let paths = Paths::new("health");
    let stale = paths.0.join("stale.sock");
    let mut proxy = Proxy::start(&format!("mv {} /tmp/health.sock", stale.display()));
    proxy.line("Health server listens");
    proxy.line("Waiting for the first SVID");
    proxy.signal("TERM");
    assert_eq!(proxy.end().1.code(), Some(0));
}
