//! Other pods: network namespaces beside the test's own.

use std::fs::File;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::harness::{enter_netns, ip, json};

/// A network namespace beside the test's own.
pub struct Pod(File);

fn own_namespace() -> File {
    File::open("/proc/thread-self/ns/net").unwrap()
}

fn go_to(namespace: &File) {
    // SAFETY: setns takes no pointers; the descriptor is open.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

impl Pod {
    pub fn new() -> Self {
        let home = own_namespace();
        enter_netns();
        let pod = Self(own_namespace());
        go_to(&home);
        pod
    }

    /// With the calling thread in the pod.
    pub fn inside<T>(&self, f: impl FnOnce() -> T) -> T {
        let home = own_namespace();
        go_to(&self.0);
        let result = f();
        go_to(&home);
        result
    }

    /// A new link to the bridge, with a hardware address and addresses whose
    /// last number is `last`, if any.
    pub fn connect(&self, port: &str, mac: &str, last: Option<u8>) {
        let fd = self.0.as_raw_fd();
        let pid = std::process::id();
        ip(&format!(
            "link add {port} type veth peer name nsm0 address {mac} netns /proc/{pid}/fd/{fd}"
        ));
        self.inside(|| {
            if let Some(last) = last {
                ip(&format!("address add 172.16.0.{last}/24 dev nsm0"));
                ip(&format!("address add fd00::{last}/64 dev nsm0 nodad"));
            }
            ip("link set nsm0 up");
        });
        ip(&format!("link set {port} up"));
    }

    pub fn socket(&self, address: &str) -> UdpSocket {
        let address: IpAddr = address.parse().unwrap();
        let socket = self.inside(|| UdpSocket::bind((address, 7000)).unwrap());
        socket
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        socket
    }

    /// What the pod's cache holds of an address.
    pub fn neighbour(&self, address: &str) -> Option<String> {
        let found = self.inside(|| json(&format!("neigh show to {address} dev nsm0")));
        let mac = found.first()?["lladdr"].as_str()?;
        Some(mac.to_owned())
    }
}
