//! How the process starts to live and ends, by running the binary in a mount
//! namespace with a `/tmp` of its own. It waits for an identity that never
//! comes, which is the earliest state in which it has to stop in order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests end by panicking too"
)]

#[path = "shutdown/paused.rs"]
mod paused;
#[path = "shutdown/sockets.rs"]
mod sockets;

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crossbeam_channel::Receiver;
use meridio_lab::agent::Agent;
use meridio_lab::pki::Pki;
use meridio_lab::process::json_lines;
use meridio_lab::topology::{Topology, TopologyOptions};
use meridio_proxy::daemon::shutdown::STAGES;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::ThreadHandle;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);

/// The threads that gRPC's C core adds, as it names them.
const C_CORE: [&str; 5] = [
    "default-executo",
    "resolver-execut",
    "grpc_global_tim",
    "event_engine",
    "timer_manager",
];

struct Proxy {
    child: Child,
    lines: Receiver<Value>,
    // INVARIANT: dropped after the child was killed, which ends its output.
    _reader: ThreadHandle,
}

impl Proxy {
    /// Starts the binary after `prepare`, a shell command.
    fn start(prepare: &str) -> Self {
        Self::start_with("unix:///nowhere/agent.sock", prepare)
    }

    fn start_with(agent: &str, prepare: &str) -> Self {
        // With a /tmp of its own, in which a checkout that lies below /tmp is
        // seen all the same.
        let script = format!(
            "mount --bind \"$1\" /mnt && mount -t tmpfs none /tmp && mkdir -p \"$1\" && \
             mount --bind /mnt \"$1\" && {prepare} && exec \"$0\""
        );
        let binary = Path::new(env!("CARGO_BIN_EXE_proxy"));
        let target = binary.ancestors().nth(2).expect("target/debug/proxy");
        let mut child = Command::new("unshare")
            .args(["--mount", "--net", "sh", "-c", &script])
            .args([binary, target])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("SPIFFE_ENDPOINT_SOCKET", agent)
            .env("NSM_LOG_LEVEL", "INFO")
            .env("NSM_TYPO", "x")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (lines, reader) = json_lines(child.stdout.take().unwrap()).unwrap();
        Self {
            child,
            lines,
            _reader: reader,
        }
    }

    /// The next line with that message.
    fn line(&self, message: &str) -> Value {
        let deadline = clock::now() + LIMIT;
        loop {
            let line = self.lines.recv_deadline(deadline).expect(message);
            if line["message"] == message {
                return line;
            }
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(sent.unwrap().success(), "kill -s {name}");
    }

    /// Each thread that Linux knows of is in ARCHITECTURE.md, or gRPC's own.
    fn threads_are_in_the_table(&self) {
        let table = std::fs::read_to_string("ARCHITECTURE.md").unwrap();
        let rows: Vec<&str> = table
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .collect();
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        for task in tasks {
            // A thread may end while the directory is read.
            let Ok(name) = std::fs::read_to_string(task.unwrap().path().join("comm")) else {
                continue;
            };
            let name = name.trim();
            let known = rows.iter().any(|row| match row.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == *row,
            });
            assert!(known || name == "proxy" || C_CORE.contains(&name), "{name}");
        }
    }

    /// All lines until standard output ends, and the exit status.
    fn end(&mut self) -> (Vec<Value>, ExitStatus) {
        let mut rest = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(LIMIT) {
            rest.push(line);
        }
        (rest, self.child.wait().unwrap())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The stages of the stop that were done in time.
fn stages(lines: &[Value]) -> Vec<&str> {
    lines
        .iter()
        .filter(|line| line["message"] == "Stage of the stop done")
        .filter_map(|line| line["extra_data"]["stage"].as_str())
        .collect()
}

#[test]
fn each_signal_stops_in_the_order_of_the_stages() {
    for signal in ["TERM", "INT", "HUP", "QUIT"] {
        let mut proxy = Proxy::start("true");
        proxy.line("Waiting for the first SVID");
        proxy.signal(signal);
        let (lines, status) = proxy.end();
        assert_eq!(status.code(), Some(0), "{signal}: {lines:?}");
        let stages = stages(&lines);
        let expected: Vec<String> = STAGES.iter().map(|stage| stage.stage.to_string()).collect();
        assert_eq!(stages, expected, "{signal}");
        assert_eq!(lines.last().unwrap()["message"], "Proxy shutting done");
    }
}

#[test]
fn the_first_line_has_the_settings_and_signals_change_the_level() {
    let mut proxy = Proxy::start("true");
    let first = proxy.lines.recv_timeout(LIMIT).unwrap();
    assert_eq!(first["message"], "Configuration read");
    assert_eq!(first["severity"], "info");
    assert_eq!(first["service_id"], "Meridio-proxy");
    assert_eq!(first["extra_data"]["config"]["NSM_LOG_LEVEL"], "INFO");
    assert_eq!(first["extra_data"]["config"]["NSM_MTU"], "1500");
    let warning = proxy.lines.recv_timeout(LIMIT).unwrap();
    assert_eq!(warning["message"], "NSM_TYPO is no setting");
    assert_eq!(warning["severity"], "warning");
    proxy.line("Waiting for the first SVID");
    for (signal, level) in [("USR2", "TRACE"), ("USR1", "INFO")] {
        proxy.signal(signal);
        let line = proxy.line("Log level set");
        assert_eq!(line["extra_data"]["level"], level);
    }
    proxy.signal("TERM");
    assert_eq!(proxy.end().1.code(), Some(0));
}

/// Meridio's proxy has no handler when it is configured to TRACE, and either signal
/// kills it.
#[test]
fn with_trace_configured_the_signals_for_the_level_kill_nobody() {
    let mut proxy = Proxy::start("export NSM_LOG_LEVEL=TRACE");
    proxy.line("Waiting for the first SVID");
    for signal in ["USR1", "USR2"] {
        proxy.signal(signal);
        let line = proxy.line("Log level set");
        assert_eq!(line["extra_data"]["level"], "TRACE", "{signal}");
    }
    proxy.signal("TERM");
    assert_eq!(proxy.end().1.code(), Some(0));
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let mut proxy = Proxy::start("true");
    proxy.line("Waiting for the first SVID");
    // Both are pending when the process goes on.
    for signal in ["STOP", "TERM", "INT", "CONT"] {
        proxy.signal(signal);
    }
    let (lines, status) = proxy.end();
    assert_eq!(status.code(), Some(1), "{lines:?}");
}

#[test]
fn a_failed_start_is_status_1_with_a_critical_line() {
    let mut proxy = Proxy::start("touch /tmp/health.sock");
    let line = proxy.line("Proxy shutting down");
    assert_eq!(line["severity"], "critical");
    let error = line["extra_data"]["error"].as_str().unwrap();
    assert!(
        error.starts_with("starting the health server: ") && error.ends_with("is no socket"),
        "{error}"
    );
    assert_eq!(proxy.end().1.code(), Some(1));
}

/// With an identity but without any peer, everything is started: what has to
/// wait does so in its own thread. Only SPIRE, the kernel and the endpoint are
/// there, and the endpoint answers the daemon's own probe over mTLS.
#[test]
fn without_peers_the_daemon_is_up_and_stops_within_its_budget() {
    let directory = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let socket = directory.join(format!("agent-{}.sock", std::process::id()));
    let pki = Pki::new("example.org");
    let agent = Agent::start(&socket, &pki, &pki.id("proxy"), Duration::from_secs(3600));
    let mut proxy = Proxy::start_with(&agent.address(), "ip link set lo up");
    proxy.line("Proxy started");
    let health = proxy.line("Health changed");
    assert_eq!(health["extra_data"]["service"], "NSMEndpoint");
    assert_eq!(health["extra_data"]["status"], "SERVING");
    proxy.threads_are_in_the_table();
    let begun = clock::now();
    proxy.signal("TERM");
    let (lines, status) = proxy.end();
    let took = clock::now() - begun;
    assert_eq!(status.code(), Some(0), "{lines:?}");
    assert_eq!(stages(&lines).len(), STAGES.len(), "{lines:?}");
    assert!(took < Duration::from_secs(25), "{took:?}");
}

/// The seven of Meridio's init container, each with a value that is not wanted
/// and the one that is.
const SYSCTLS: [(&str, &str, &str); 7] = [
    ("net.ipv4.conf.all.forwarding", "0", "1"),
    ("net.ipv4.fib_multipath_hash_policy", "0", "1"),
    ("net.ipv4.conf.all.rp_filter", "2", "0"),
    ("net.ipv4.conf.default.rp_filter", "1", "0"),
    ("net.ipv6.conf.all.forwarding", "0", "1"),
    ("net.ipv6.fib_multipath_hash_policy", "0", "1"),
    ("net.ipv6.conf.all.accept_dad", "1", "0"),
];

/// The warnings about sysctls of a daemon that finds them with these values.
fn warned_of_sysctls(name: &str, value: impl Fn(&str, &str) -> String) -> Vec<String> {
    let directory = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let socket = directory.join(format!("agent-{name}-{}.sock", std::process::id()));
    let pki = Pki::new("example.org");
    let agent = Agent::start(&socket, &pki, &pki.id("proxy"), Duration::from_secs(3600));
    let set: Vec<String> = SYSCTLS
        .iter()
        .map(|(sysctl, wrong, right)| {
            let path = sysctl.replace('.', "/");
            format!("echo {} > /proc/sys/{path}", value(wrong, right))
        })
        .collect();
    let mut proxy = Proxy::start_with(&agent.address(), &set.join(" && "));
    let mut warnings = Vec::new();
    loop {
        let line = proxy.lines.recv_timeout(LIMIT).expect("Proxy started");
        let message = line["message"].as_str().unwrap();
        if message.contains("sysctl") {
            assert_eq!(line["severity"], "warning");
            warnings.push(message.to_owned());
        }
        if message == "Proxy started" {
            break;
        }
    }
    proxy.signal("TERM");
    assert_eq!(proxy.end().1.code(), Some(0));
    warnings
}

#[test]
fn all_sysctls_that_differ_are_in_one_warning_with_what_to_set() {
    let warnings = warned_of_sysctls("wrong", |wrong, _| wrong.to_owned());
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let mut command = "sysctl -w".to_owned();
    for (sysctl, wrong, right) in SYSCTLS {
        let differs = format!("{sysctl} is {wrong}, needs {right}");
        assert!(warnings[0].contains(&differs), "{sysctl}: {warnings:?}");
        command.push_str(&format!(" {sysctl}={right}"));
    }
    assert!(warnings[0].ends_with(&command), "{warnings:?}");
    let warnings = warned_of_sysctls("right", |_, right| right.to_owned());
    assert!(warnings.is_empty(), "{warnings:?}");
}

/// Kubernetes kills what has not ended after 30 s. Everything hangs here that can:
/// the peers took part, and are gone.
#[test]
fn with_every_peer_gone_the_stop_still_fits_into_its_budget() {
    let mut lab = Topology::start(TopologyOptions {
        lbs: 2,
        targets: 1,
        ..TopologyOptions::default()
    })
    .unwrap();
    lab.nsmgr.stop();
    lab.ipam.stop();
    lab.nsp.stop();
    lab.agent.stop();
    let since = lab.daemon().unwrap().line_count();
    let begun = clock::now();
    let daemon = lab.stop_daemon(Duration::from_secs(29)).unwrap();
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(25), "{took:?}");
    let status = daemon.wait_exit(Duration::ZERO).unwrap();
    assert_eq!(status.code(), Some(0), "{}", daemon.tail(30));
    let lines: Vec<Value> = daemon.lines()[since..]
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let last = lines.last().unwrap();
    assert_eq!(last["message"], "Proxy shutting done", "{last}");
    // A Close that the stop does not wait for is no trouble of its own.
    let closes: Vec<&Value> = lines
        .iter()
        .filter(|line| line["message"].as_str().unwrap().starts_with("Close "))
        .collect();
    assert_eq!(closes.len(), 2, "{closes:?}");
    assert!(
        closes.iter().all(|line| line["severity"] == "info"),
        "{closes:?}"
    );
}

#[test]
fn a_second_signal_does_not_wait_for_peers_that_are_gone() {
    let lab = Topology::start(TopologyOptions {
        lbs: 1,
        targets: 0,
        ..TopologyOptions::default()
    })
    .unwrap();
    lab.nsmgr.stop();
    let daemon = lab.daemon().unwrap();
    daemon.signal(libc::SIGTERM).unwrap();
    let begun = |line: &str| line.contains("Stage of the stop done");
    assert!(daemon.wait_line(0, begun, LIMIT).is_some());
    assert!(daemon.is_running(), "{}", daemon.tail(10));
    daemon.signal(libc::SIGINT).unwrap();
    let status = daemon.wait_exit(Duration::from_secs(1));
    let status = status.unwrap_or_else(|| panic!("it stays: {}", daemon.tail(10)));
    assert_eq!(status.code(), Some(1));
}

#[test]
fn without_the_capability_the_log_says_which_one_is_missing() {
    // At once, although there is no SPIRE yet.
    let mut proxy = Proxy::start("exec setpriv --bounding-set -net_admin \"$0\"");
    let line = proxy.line("Proxy shutting down");
    assert_eq!(line["severity"], "critical");
    let error = line["extra_data"]["error"].as_str().unwrap();
    assert!(error.contains("CAP_NET_ADMIN"), "{error}");
    assert_eq!(proxy.end().1.code(), Some(1));
}
