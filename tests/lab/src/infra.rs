//! The pod's primary network: where IPAM and NSP are, and where no packet of a
//! VIP may ever come out.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};

use ipnetwork::IpNetwork;

use crate::link::{Route, Rtnl, any};
use crate::netns::Netns;
use crate::nft;

/// IPAM's and NSP's ports, as deployed.
pub const IPAM_PORT: u16 = 7777;
pub const NSP_PORT: u16 = 7778;

/// The namespace at the other end of the pod's `eth0`.
pub struct Infra {
    netns: Netns,
}

impl Infra {
    /// Makes the namespace, and the pod's with `eth0`, a default route and the
    /// sysctls that Meridio's operator sets (v1.2.8, `pkg/controllers/common`).
    pub fn new() -> io::Result<(Self, Netns)> {
        let netns = Netns::new("infra")?;
        let pod = Netns::new("pod")?;
        pod.route_packets()?;
        // As in a real pod: "all" alone is 0, which is not enough.
        pod.sysctl("net.ipv6.conf.default.accept_dad", "1")?;
        let (outer, inner) = (Rtnl::open(&netns)?, Rtnl::open(&pod)?);
        outer.add_veth("pod", "eth0", &pod)?;
        let (far, near) = (outer.link("pod")?.index, inner.link("eth0")?.index);
        for (theirs, ours) in [
            ("10.97.0.1/24", "10.97.0.2/24"),
            ("fd97::1/64", "fd97::2/64"),
        ] {
            outer.add_address(far, parse(theirs))?;
            inner.add_address(near, parse(ours))?;
        }
        outer.set_up(far, true)?;
        inner.set_up(near, true)?;
        for gateway in ["10.97.0.1/24", "fd97::1/64"].map(|text| parse(text).ip()) {
            inner.replace_route(&Route::via(any(gateway), gateway, near))?;
        }
        nft::apply(
            &netns,
            "table inet lab {
                counter leaked { }
                chain prerouting {
                    type filter hook prerouting priority raw; policy accept;
                    iifname \"pod\" ip saddr != 10.97.0.2 counter name leaked
                    iifname \"pod\" ip6 saddr != { fd97::2, fe80::/10, :: } counter name leaked
                }
            }",
        )?;
        // What targets send from VIPs, before and after the kernel has looked for
        // a route.
        nft::apply(
            &pod,
            "table inet lab {
                counter vip6_in { }
                counter vip6_routed { }
                chain prerouting {
                    type filter hook prerouting priority raw; policy accept;
                    iifname \"bridge0\" ip6 saddr != { fd00::/64, fe80::/10, :: } counter name vip6_in
                }
                chain forward {
                    type filter hook forward priority filter; policy accept;
                    iifname \"bridge0\" ip6 saddr != { fd00::/64, fe80::/10, :: } counter name vip6_routed
                }
            }",
        )?;
        Ok((Self { netns }, pod))
    }

    /// The address of the services.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        parse("10.97.0.1/24").ip()
    }

    /// A listener there.
    pub fn listen(&self, port: u16) -> io::Result<TcpListener> {
        let any = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
        self.netns.try_run(|| TcpListener::bind(any))
    }

    /// Packets that left the pod by `eth0` with a source that is not its own.
    pub fn leaked(&self) -> io::Result<u64> {
        let counters = nft::counters(&self.netns)?;
        Ok(counters.get("leaked").copied().unwrap_or_default())
    }
}

fn parse(text: &str) -> IpNetwork {
    text.parse().expect("an address of the lab's own")
}
