//! What a target is told about addresses and routes.
//!
//! The rules are those of Meridio's `setNSEIPContext` (pkg/proxy/proxy.go): a
//! first request gets everything; a context that already holds what IPAM says
//! is left alone, since the target keeps its VIPs and policy routes in it; one
//! that holds something else is corrected, VIPs kept.
//!
//! As there, a text that this proxy cannot use, such as a VIP of a family that
//! the trench does not have, is no reason to refuse the target: it would lose
//! its other VIPs, and with its next refresh its connection.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::family::{Family, IpFamilies};
use super::lease::{Addresses, Lease};

/// The part of a connection's IP context that the proxy reads and writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IpContext {
    /// The target's addresses: its leases, then its VIPs.
    pub src: Vec<String>,
    /// The addresses of the proxy's end of the link.
    pub dst: Vec<String>,
    /// The bridge's addresses, which are the target's gateways.
    pub gateways: Vec<String>,
    /// The target's source routes, one for each VIP.
    pub policies: Vec<Policy>,
}

/// A source route: packets `from` a VIP go to the next hops.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// The VIP.
    pub from: String,
    /// The next hop of each of its routes.
    pub next_hops: Vec<String>,
}

/// The context that answers `asked`.
#[must_use]
pub fn answer(asked: IpContext, addresses: &Addresses) -> IpContext {
    let src = texts(addresses, |lease| lease.src);
    let dst = texts(addresses, |lease| lease.dst);
    let gateways: Vec<String> = addresses.bridge.values().map(ToString::to_string).collect();

    if asked.src.is_empty() && asked.dst.is_empty() {
        return IpContext {
            src,
            dst,
            gateways,
            policies: asked.policies,
        };
    }
    let holds = |list: &[String], wanted: &[String]| wanted.iter().all(|text| list.contains(text));
    if holds(&asked.gateways, &gateways) && holds(&asked.src, &src) && holds(&asked.dst, &dst) {
        return asked;
    }
    let stale: Vec<IpNetwork> = asked
        .gateways
        .iter()
        .filter_map(|text| cidr(text))
        .collect();
    IpContext {
        src: replace(asked.src, src, &stale),
        dst: replace(asked.dst, dst, &stale),
        gateways,
        policies: redirect(asked.policies, addresses),
    }
}

/// What `context` holds for the target that this proxy has no use for: no
/// address with prefix length, or one of a family outside `families`.
pub fn unused(context: &IpContext, families: IpFamilies) -> impl Iterator<Item = &str> {
    let is_used = move |text: &str| cidr(text).is_some_and(|net| families.has(Family::from(net)));
    let texts = context.src.iter().chain(&context.dst).map(String::as_str);
    texts.filter(move |text| !is_used(text))
}

fn texts(addresses: &Addresses, side: impl Fn(&Lease) -> IpNetwork) -> Vec<String> {
    let leases = addresses.leases.values();
    leases.map(|lease| side(lease).to_string()).collect()
}

/// An address with prefix length, as Go's `net.ParseCIDR` reads it; the parser
/// of `ipnetwork` would also take a bare address, or a mask.
fn cidr(text: &str) -> Option<IpNetwork> {
    let (address, length) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    if !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    IpNetwork::new(address, length.parse().ok()?).ok()
}

/// Drops what is no address and what lies in a subnet of the gateways told
/// before, and adds the leases. VIPs lie outside of those subnets and stay.
fn replace(asked: Vec<String>, leases: Vec<String>, stale: &[IpNetwork]) -> Vec<String> {
    let stays = |text: &String| {
        !leases.contains(text)
            && cidr(text).is_some_and(|net| !stale.iter().any(|old| old.contains(net.ip())))
    };
    let kept: Vec<String> = asked.into_iter().filter(stays).collect();
    kept.into_iter().chain(leases).collect()
}

/// Points each policy at the gateway of its family. One whose `from` is no
/// address is not ours to judge and stays; one without a gateway of its family
/// gets an empty next hop, as in Meridio.
fn redirect(policies: Vec<Policy>, addresses: &Addresses) -> Vec<Policy> {
    let to_gateway = |mut policy: Policy| {
        if let Some(from) = cidr(&policy.from) {
            let gateway = addresses
                .bridge
                .get(Family::from(from))
                .map(|prefix| prefix.ip().to_string())
                .unwrap_or_default();
            policy.next_hops.fill(gateway);
        }
        policy
    };
    policies.into_iter().map(to_gateway).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::family::PerFamily;
    use super::*;

    fn net(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    fn addresses(v4: [&str; 3], v6: [&str; 3]) -> Addresses {
        let lease = |[src, dst, _]: [&str; 3]| {
            Some(Lease {
                src: net(src),
                dst: net(dst),
            })
        };
        Addresses {
            leases: PerFamily {
                v4: lease(v4),
                v6: lease(v6),
            },
            bridge: PerFamily {
                v4: Some(net(v4[2])),
                v6: Some(net(v6[2])),
            },
        }
    }

    /// The addresses of Meridio's own tests (pkg/proxy/proxy_test.go).
    fn upstream() -> Addresses {
        addresses(
            ["172.16.0.1/24", "172.16.0.2/24", "172.16.0.100/24"],
            ["fd00::1/64", "fd00::2/64", "fd00::100/64"],
        )
    }

    fn list(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn policy(from: &str, next_hop: &str) -> Policy {
        Policy {
            from: from.to_owned(),
            next_hops: list(&[next_hop]),
        }
    }

    fn with_vips(gateways: [&str; 2]) -> IpContext {
        IpContext {
            src: list(&["172.16.0.1/24", "fd00::1/64", "20.0.0.1/32", "2000::1/128"]),
            dst: list(&["172.16.0.2/24", "fd00::2/64"]),
            gateways: list(&gateways),
            policies: vec![
                policy("20.0.0.1/32", gateways[0].split('/').next().unwrap()),
                policy("2000::1/128", gateways[1].split('/').next().unwrap()),
            ],
        }
    }

    #[test]
    fn a_first_request_gets_everything() {
        let asked = IpContext {
            policies: vec![policy("20.0.0.1/32", "1.1.1.1")],
            ..IpContext::default()
        };
        let told = answer(asked.clone(), &upstream());
        assert_eq!(told.src, ["172.16.0.1/24", "fd00::1/64"]);
        assert_eq!(told.dst, ["172.16.0.2/24", "fd00::2/64"]);
        assert_eq!(told.gateways, ["172.16.0.100/24", "fd00::100/64"]);
        assert_eq!(told.policies, asked.policies);
    }

    #[test]
    fn a_refresh_is_left_alone() {
        let asked = with_vips(["172.16.0.100/24", "fd00::100/64"]);
        let told = answer(asked.clone(), &upstream());
        assert_eq!(told, asked);
    }

    #[test]
    fn new_addresses_replace_the_old_and_keep_the_vips() {
        let asked = with_vips(["172.16.0.10/24", "fd00::10/64"]);
        let new = addresses(
            ["172.16.0.10/24", "172.16.0.20/24", "172.16.0.100/24"],
            ["fd00::10/64", "fd00::20/64", "fd00::100/64"],
        );
        let told = answer(asked, &new);
        let expected_src = [
            "20.0.0.1/32",
            "2000::1/128",
            "172.16.0.10/24",
            "fd00::10/64",
        ];
        assert_eq!(told.src, expected_src);
        assert_eq!(told.dst, ["172.16.0.20/24", "fd00::20/64"]);
        assert_eq!(told.gateways, ["172.16.0.100/24", "fd00::100/64"]);
        assert_eq!(
            told.policies,
            [
                policy("20.0.0.1/32", "172.16.0.100"),
                policy("2000::1/128", "fd00::100")
            ]
        );
        let again = answer(told.clone(), &new);
        assert_eq!(again, told, "a correction is stable");
    }

    #[test]
    fn without_old_gateways_nothing_is_dropped_and_nothing_doubled() {
        let asked = IpContext {
            gateways: Vec::new(),
            ..with_vips(["172.16.0.10/24", "fd00::10/64"])
        };
        let told = answer(asked, &upstream());
        let expected = ["20.0.0.1/32", "2000::1/128", "172.16.0.1/24", "fd00::1/64"];
        assert_eq!(told.src, expected);
        assert_eq!(told.dst, ["172.16.0.2/24", "fd00::2/64"]);
    }

    #[test]
    fn a_policy_without_gateway_or_address() {
        let mut v4 = upstream();
        v4.bridge.v6 = None;
        v4.leases.v6 = None;
        let asked = IpContext {
            src: list(&["20.0.0.1/32"]),
            policies: vec![policy("2000::1/128", "fd00::9"), policy("", "x")],
            ..IpContext::default()
        };
        let told = answer(asked, &v4);
        assert_eq!(told.policies, [policy("2000::1/128", ""), policy("", "x")]);
    }

    /// Addresses of a trench without IPv6.
    fn only_v4() -> Addresses {
        let mut v4 = upstream();
        v4.bridge.v6 = None;
        v4.leases.v6 = None;
        v4
    }

    #[test]
    fn a_vip_of_no_used_family_is_passed_through() {
        let known = IpContext {
            src: list(&["172.16.0.1/24", "20.0.0.1/32", "2000::1/128"]),
            dst: list(&["172.16.0.2/24"]),
            gateways: list(&["172.16.0.100/24"]),
            policies: vec![policy("2000::1/128", "fd00::100")],
        };
        assert_eq!(answer(known.clone(), &only_v4()), known);
        let odd: Vec<&str> = unused(&known, IpFamilies::V4).collect();
        assert_eq!(odd, ["2000::1/128"]);
        assert_eq!(unused(&known, IpFamilies::Dual).count(), 0);

        // Also when the leases are corrected.
        let moved = IpContext {
            src: list(&["172.16.9.1/24", "20.0.0.1/32", "2000::1/128"]),
            gateways: list(&["172.16.9.100/24"]),
            ..known.clone()
        };
        let told = answer(moved, &only_v4());
        assert_eq!(told.src, ["20.0.0.1/32", "2000::1/128", "172.16.0.1/24"]);
        assert_eq!(told.policies, [policy("2000::1/128", "")]);
    }

    #[test]
    fn what_is_no_address_stays_until_the_leases_are_corrected() {
        for bad in [
            "",
            "x",
            "1.2.3.4",
            "1.2.3.4/33",
            "1.2.3.4/+8",
            "1.2.3.4/255.0.0.0",
            "1.2.3/24",
            "1.2.3.4/",
            "::1/129",
            "\u{0}",
        ] {
            let mut known = with_vips(["172.16.0.100/24", "fd00::100/64"]);
            known.src.push(bad.to_owned());
            known.gateways.push(bad.to_owned());
            assert_eq!(answer(known.clone(), &upstream()), known, "{bad:?}");
            assert_eq!(unused(&known, IpFamilies::Dual).collect::<Vec<_>>(), [bad]);

            known.dst = list(&["172.16.0.9/24", bad]);
            let told = answer(known, &upstream());
            assert!(!told.src.contains(&bad.to_owned()), "{bad:?}");
            assert_eq!(told.dst, ["172.16.0.2/24", "fd00::2/64"]);
            assert!(told.src.contains(&"20.0.0.1/32".to_owned()));
        }
    }

    #[test]
    fn a_trench_that_gave_up_a_family_drops_its_leases() {
        let mut v4 = upstream();
        v4.bridge.v6 = None;
        v4.leases.v6 = None;
        let asked = IpContext {
            src: list(&["172.16.0.1/24", "fd00::1/64", "20.0.0.1/32"]),
            dst: list(&["172.16.0.2/24", "fd00::2/64"]),
            gateways: list(&["172.16.0.10/24", "fd00::10/64"]),
            policies: Vec::new(),
        };
        let told = answer(asked, &v4);
        assert_eq!(told.src, ["20.0.0.1/32", "172.16.0.1/24"]);
        assert_eq!(told.dst, ["172.16.0.2/24"]);
    }

    proptest! {
        /// Whatever a target says, it is told its leases and gateways, keeps
        /// each VIP that is none of the old ones, and is told the same again.
        #[test]
        fn an_answer_is_complete_and_stable(
            src in prop::collection::vec(0u8..8, 0..6),
            dst in prop::collection::vec(0u8..8, 0..6),
            old in prop::collection::vec(0u8..4, 0..3),
        ) {
            let address = |n: &u8| format!("10.0.{}.{n}/24", n / 2);
            let vip = "20.0.0.1/32".to_owned();
            let asked = IpContext {
                src: src.iter().map(address).chain([vip.clone()]).collect(),
                dst: dst.iter().map(address).collect(),
                gateways: old.iter().map(|n| format!("10.0.{n}.99/24")).collect(),
                policies: vec![policy(&vip, "10.0.0.99")],
            };
            let now = addresses(["10.0.0.1/24", "10.0.0.2/24", "10.0.0.99/24"], V6);
            let told = answer(asked, &now);
            for wanted in [&vip, "10.0.0.1/24", "fd00::1/64"] {
                prop_assert_eq!(told.src.iter().filter(|text| *text == wanted).count(), 1);
            }
            prop_assert!(told.dst.contains(&"10.0.0.2/24".to_owned()));
            prop_assert!(told.gateways.contains(&"10.0.0.99/24".to_owned()));
            prop_assert_eq!(&answer(told.clone(), &now), &told);
        }
    }

    const V6: [&str; 3] = ["fd00::1/64", "fd00::2/64", "fd00::100/64"];
}
