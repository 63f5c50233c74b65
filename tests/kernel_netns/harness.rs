//! What the tests share.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use meridio_proxy::core::ids::IfName;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;
use serde_json::Value;

pub const MAC: [u8; 6] = [0x02, 0x11, 0x22, 0x33, 0x44, 0x55];
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks until `condition` holds; what it returns otherwise is shown when the
/// patience ends.
pub fn eventually<T: std::fmt::Debug>(what: &str, mut condition: impl FnMut() -> Result<(), T>) {
    let (_stopper, stop) = stop_pair();
    let deadline = clock::now() + PATIENCE;
    while let Err(seen) = condition() {
        assert!(clock::now() < deadline, "not {what}: {seen:?}");
        let _ = stop.wait(Duration::from_millis(2));
    }
}

/// Moves the test's thread, and all that it starts, to a new namespace.
pub fn enter_netns() {
    // SAFETY: unshare takes no pointers; it changes the calling thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        result,
        0,
        "no new network namespace ({}); run as root or through scripts/netns-run.sh",
        std::io::Error::last_os_error()
    );
    ip("link set lo up");
}

pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("iproute2 is installed");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub fn json(arguments: &str) -> Vec<Value> {
    let text = ip(&format!("-j {arguments}"));
    if text.trim().is_empty() {
        return Vec::new();
    }
    serde_json::from_str(&text).unwrap()
}

/// Two connected interfaces; the first stands for NSM's.
pub fn veth(name: &str) {
    ip(&format!("link add {name} up type veth peer name {name}-p"));
    ip(&format!("link set {name}-p up"));
}

pub fn name(text: &str) -> IfName {
    IfName::parse(text).unwrap()
}

pub fn addresses<const N: usize>(texts: [&str; N]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// The bridge's global addresses, as `ip` shows them.
pub fn bridge_addresses() -> BTreeSet<String> {
    json("address show dev bridge0 scope global")
        .iter()
        .flat_map(|link| link["addr_info"].as_array().cloned().unwrap_or_default())
        .filter(|info| info["local"].is_string())
        .map(|info| format!("{}/{}", info["local"].as_str().unwrap(), info["prefixlen"]))
        .collect()
}

/// The table's routes as text, one a line, hops in order.
pub fn table(family: &str) -> String {
    let output = Command::new("ip")
        .args([family, "route", "show", "table", "1"])
        .output()
        .unwrap();
    // A table that never had a route does not exist.
    String::from_utf8(output.stdout)
        .unwrap()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// `priority source protocol` of the rules to table 1.
pub fn rules(family: &str) -> Vec<String> {
    json(&format!("{family} -N -d rule show"))
        .iter()
        .filter(|rule| rule["table"] == "1")
        .map(|rule| {
            format!(
                "{} {}{} {}",
                rule["priority"],
                rule["src"].as_str().unwrap(),
                rule["srclen"]
                    .as_u64()
                    .map(|length| format!("/{length}"))
                    .unwrap_or_default(),
                rule["protocol"].as_str().unwrap_or_default()
            )
        })
        .collect()
}

pub fn is_port(link: &str) -> bool {
    json(&format!("link show dev {link}"))[0]["master"] == "bridge0"
}

/// A running `ip monitor`, which ends with the test.
pub struct Monitor(Child);

impl Monitor {
    /// Sees every change of an `object` from now on.
    pub fn start(object: &str) -> Self {
        let mut command = Command::new("ip");
        command.args(["-o", "monitor", object]);
        let monitor = Self(command.stdout(Stdio::piped()).spawn().unwrap());
        // The links are dumped on the socket that watches, and what it is told
        // meanwhile is skipped; the one after it is opened when that is over
        // (iproute2 ip/ipmonitor.c).
        let folder = format!("/proc/{}/fd", monitor.0.id());
        eventually("watching", || {
            let fds = std::fs::read_dir(&folder).unwrap();
            let sockets = fds
                .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
                .filter(|to| to.to_string_lossy().starts_with("socket:"))
                .count();
            (sockets == 2).then_some(()).ok_or(sockets)
        });
        monitor
    }

    /// What was seen before the change whose line has `marker`.
    pub fn until(&mut self, marker: &str) -> Vec<String> {
        BufReader::new(self.0.stdout.take().unwrap())
            .lines()
            .map(Result::unwrap)
            .take_while(|line| !line.contains(marker))
            .collect()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
