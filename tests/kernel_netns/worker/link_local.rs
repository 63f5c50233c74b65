//! The bridge's link-local address.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use super::*;

/// A running command, which ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// While it were tentative, the kernel would ask for no IPv6 neighbour.
#[test]
fn the_link_local_address_is_never_tentative() {
    enter_netns();
    // Every change of an address, from before the bridge exists.
    let mut command = Command::new("ip");
    command.args(["-o", "monitor", "address"]);
    let mut monitor = Running(command.stdout(Stdio::piped()).spawn().unwrap());
    eventually("watching", || {
        let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
        let pid = monitor.0.id().to_string();
        let there = sockets
            .lines()
            .any(|line| line.split_whitespace().nth(2) == Some(&pid));
        there.then_some(()).ok_or(sockets)
    });
    let daemon = Daemon::with_addresses();
    daemon.lb("a", "nsm-a", 7);
    veth("nsm-a");
    until_hops(&[7]);
    let text = ip("-d link show dev bridge0");
    assert!(text.contains("addrgenmode none"), "{text}");
    let local = || {
        let text = ip("-6 -o address show dev bridge0 scope link");
        (text.contains("fe80::11:22ff:fe33:4455/64") && text.lines().count() == 1)
            .then_some(())
            .ok_or(text)
    };
    local().unwrap();
    // The kernel takes it with the link; it comes back from us.
    ip("link set bridge0 down");
    eventually("its return", local);
    until_hops(&[7]);
    // The last event that is waited for.
    ip("address add 192.0.2.1/32 dev lo");
    let mut seen = Vec::new();
    for line in BufReader::new(monitor.0.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.contains("192.0.2.1") {
            break;
        }
        seen.push(line);
    }
    let of_bridge: Vec<&String> = (seen.iter())
        .filter(|line| line.contains("bridge0") && line.contains("inet6"))
        .collect();
    assert!(of_bridge.len() > 3, "{seen:?}");
    assert!(
        !of_bridge.iter().any(|line| line.contains("tentative")),
        "{of_bridge:?}"
    );
    daemon.stop();
}

#[test]
fn an_adopted_link_local_address_stays_alone() {
    enter_netns();
    ip("link add bridge0 type bridge");
    ip("link set bridge0 addrgenmode none");
    ip("link set bridge0 up");
    ip("address add fe80::5/64 dev bridge0 nodad");
    let daemon = Daemon::with_addresses();
    until_addresses(&["172.16.0.1/24", "fd00::1/64"]);
    let text = ip("-6 -o address show dev bridge0 scope link");
    assert!(
        text.contains("fe80::5/64") && text.lines().count() == 1,
        "{text}"
    );
    daemon.stop();
}
