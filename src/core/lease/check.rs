//! Which answers of IPAM are addresses that the proxy can use.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::Lease;
use crate::core::family::Family;

/// Whether `address` can be the bridge's own of `family`: a host's address in
/// a subnet that has room for a connection.
///
/// # Errors
///
/// Why not, naming the address.
pub(super) fn bridge(family: Family, address: IpNetwork) -> Result<(), String> {
    let fault = if Family::from(address) != family {
        "is of the other family"
    } else if address.prefix() == 0 || address.prefix() > family.bits() - 2 {
        "has a prefix length that makes no subnet"
    } else if !is_host(address) {
        "is no host's address"
    } else {
        return Ok(());
    };
    Err(format!("bridge address {address} ({family}) {fault}"))
}

/// Why a lease does not fit the bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Misfit {
    /// It is of another subnet. The bridge's address may be the one that is
    /// out of date: IPAM was set up anew.
    OtherSubnet(String),
    /// It has an address that somebody else of this node has: IPAM does not
    /// know of that any more.
    Taken(String),
    /// It is wrong in itself.
    Wrong(String),
}

/// Whether both ends of `lease` are addresses of their own in the subnet of
/// the bridge's `bridge`.
///
/// # Errors
///
/// Why not, naming the addresses.
pub(super) fn lease(family: Family, bridge: IpNetwork, lease: &Lease) -> Result<(), Misfit> {
    for (end, address) in [("src", lease.src), ("dst", lease.dst)] {
        let fault = |text: &str| format!("{end} address {address} ({family}) {text}");
        if Family::from(address) != family {
            return Err(Misfit::Wrong(fault("is of the other family")));
        }
        if address.prefix() != bridge.prefix() || !bridge.contains(address.ip()) {
            return Err(Misfit::OtherSubnet(fault(&format!(
                "is not in the subnet of the bridge, {bridge}"
            ))));
        }
        if !is_host(address) {
            return Err(Misfit::Wrong(fault("is no host's address")));
        }
        if address.ip() == bridge.ip() {
            return Err(Misfit::Taken(fault("is the bridge's own")));
        }
    }
    if lease.src.ip() == lease.dst.ip() {
        return Err(Misfit::Wrong(format!(
            "src and dst address are the same, {} ({family})",
            lease.src
        )));
    }
    Ok(())
}

/// A unicast address that a host may have: not the subnet's own, and for IPv4
/// not its broadcast address.
fn is_host(address: IpNetwork) -> bool {
    let ip = address.ip();
    let special = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
    let reserved = match ip {
        IpAddr::V4(v4) => v4.is_broadcast() || address.broadcast() == ip,
        IpAddr::V6(_) => false,
    };
    !special && !reserved && address.network() != ip
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    #[test]
    fn bridge_addresses() {
        for (family, text, good) in [
            (Family::V4, "172.16.0.1/24", true),
            (Family::V4, "172.16.0.1/30", true),
            (Family::V4, "172.16.0.1/31", false),
            (Family::V4, "172.16.0.1/32", false),
            (Family::V4, "172.16.0.1/0", false),
            (Family::V4, "172.16.0.0/24", false),
            (Family::V4, "172.16.0.255/24", false),
            (Family::V4, "127.0.0.1/24", false),
            (Family::V4, "224.0.0.5/24", false),
            (Family::V4, "0.0.0.0/24", false),
            (Family::V4, "fd00::1/64", false),
            (Family::V6, "fd00::1/64", true),
            (Family::V6, "fd00::ffff:ffff:ffff:ffff/64", true),
            (Family::V6, "fd00::/64", false),
            (Family::V6, "::1/64", false),
            (Family::V6, "ff02::1/64", false),
            (Family::V6, "fd00::1/127", false),
            (Family::V6, "172.16.0.1/24", false),
        ] {
            assert_eq!(bridge(family, net(text)).is_ok(), good, "{family} {text}");
        }
    }

    #[test]
    fn leases() {
        let own = net("172.16.0.1/24");
        let check = |src: &str, dst: &str| {
            lease(
                Family::V4,
                own,
                &Lease {
                    src: net(src),
                    dst: net(dst),
                },
            )
        };
        assert_eq!(check("172.16.0.2/24", "172.16.0.3/24"), Ok(()));
        for (src, dst) in [
            ("172.16.1.2/24", "172.16.0.3/24"),
            ("172.16.0.2/24", "172.16.0.3/25"),
            ("172.16.0.2/32", "172.16.0.3/24"),
        ] {
            assert!(
                matches!(check(src, dst), Err(Misfit::OtherSubnet(_))),
                "{src} {dst}"
            );
        }
        for (src, dst) in [
            ("172.16.0.1/24", "172.16.0.2/24"),
            ("172.16.0.2/24", "172.16.0.1/24"),
        ] {
            assert!(
                matches!(check(src, dst), Err(Misfit::Taken(_))),
                "{src} {dst}"
            );
        }
        for (src, dst) in [
            ("172.16.0.2/24", "172.16.0.2/24"),
            ("172.16.0.0/24", "172.16.0.2/24"),
            ("172.16.0.2/24", "172.16.0.255/24"),
            ("fd00::2/64", "172.16.0.2/24"),
        ] {
            assert!(
                matches!(check(src, dst), Err(Misfit::Wrong(_))),
                "{src} {dst}"
            );
        }
    }
}
