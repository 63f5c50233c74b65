//! What a target is told about addresses and routes.
//!
//! The rules are those of Meridio's `setNSEIPContext` (pkg/proxy/proxy.go): a
//! first request gets everything; a context that already holds what IPAM says
//! is left alone, since the target keeps its VIPs and policy routes in it; one
//! that holds something else is corrected, VIPs kept.

use std::fmt;
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

/// Why a target's context cannot be used: which list, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContextError {
    /// The text is no address with prefix length.
    NoAddress {
        /// The list.
        list: &'static str,
        /// The text.
        text: String,
    },
    /// The deployment does not use the family of the address.
    Family {
        /// The list.
        list: &'static str,
        /// The address.
        address: IpNetwork,
    },
}

impl fmt::Display for ContextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAddress { list, text } => {
                write!(
                    f,
                    "{list} of the request holds {text:?}, which is no IP address with prefix length"
                )
            }
            Self::Family { list, address } => write!(
                f,
                "{list} of the request holds {address}, but this trench does not use {}",
                Family::from(*address)
            ),
        }
    }
}

impl std::error::Error for ContextError {}

/// Whether all that a context lists are addresses: worth knowing before any
/// are allocated for it.
///
/// # Errors
///
/// What is none.
pub fn check(asked: &IpContext) -> Result<(), ContextError> {
    parse("src_ip_addrs", &asked.src)?;
    parse("dst_ip_addrs", &asked.dst)?;
    parse("extra_prefixes", &asked.gateways)?;
    Ok(())
}

/// The context that answers `asked`.
///
/// # Errors
///
/// When `asked` holds something that is no address, or, outside the subnets
/// that it leaves behind, an address of a family that is not used.
pub fn answer(
    asked: IpContext,
    addresses: &Addresses,
    families: IpFamilies,
) -> Result<IpContext, ContextError> {
    let src = texts(addresses, |lease| lease.src);
    let dst = texts(addresses, |lease| lease.dst);
    let gateways: Vec<String> = addresses.bridge.values().map(ToString::to_string).collect();

    let parsed_src = parse("src_ip_addrs", &asked.src)?;
    let parsed_dst = parse("dst_ip_addrs", &asked.dst)?;
    let old_gateways = parse("extra_prefixes", &asked.gateways)?;

    if asked.src.is_empty() && asked.dst.is_empty() {
        return Ok(IpContext {
            src,
            dst,
            gateways,
            policies: asked.policies,
        });
    }
    let holds = |list: &[String], wanted: &[String]| wanted.iter().all(|text| list.contains(text));
    if holds(&asked.gateways, &gateways) && holds(&asked.src, &src) && holds(&asked.dst, &dst) {
        used(families, "src_ip_addrs", &parsed_src)?;
        used(families, "dst_ip_addrs", &parsed_dst)?;
        return Ok(asked);
    }
    Ok(IpContext {
        src: replace("src_ip_addrs", parsed_src, src, &old_gateways, families)?,
        dst: replace("dst_ip_addrs", parsed_dst, dst, &old_gateways, families)?,
        gateways,
        policies: redirect(asked.policies, addresses),
    })
}

fn texts(addresses: &Addresses, side: impl Fn(&Lease) -> IpNetwork) -> Vec<String> {
    let leases = addresses.leases.values();
    leases.map(|lease| side(lease).to_string()).collect()
}

/// An address and the peer's own spelling of it, which is what goes back.
type Spelled = (IpNetwork, String);

fn parse(list: &'static str, texts: &[String]) -> Result<Vec<Spelled>, ContextError> {
    let one = |text: &String| match text.parse() {
        Ok(address) => Ok((address, text.clone())),
        Err(_) => Err(ContextError::NoAddress {
            list,
            text: text.clone(),
        }),
    };
    texts.iter().map(one).collect()
}

fn used(families: IpFamilies, list: &'static str, kept: &[Spelled]) -> Result<(), ContextError> {
    let stranger = kept
        .iter()
        .map(|(address, _)| *address)
        .find(|address| !families.has(Family::from(*address)));
    match stranger {
        Some(address) => Err(ContextError::Family { list, address }),
        None => Ok(()),
    }
}

/// Drops what lies in a subnet of the gateways told before, and adds the
/// leases. VIPs lie outside of those subnets and stay.
fn replace(
    list: &'static str,
    asked: Vec<Spelled>,
    leases: Vec<String>,
    old_gateways: &[Spelled],
    families: IpFamilies,
) -> Result<Vec<String>, ContextError> {
    let stale = |ip: IpAddr| old_gateways.iter().any(|(old, _)| old.contains(ip));
    let kept: Vec<Spelled> = asked
        .into_iter()
        .filter(|(address, text)| !stale(address.ip()) && !leases.contains(text))
        .collect();
    used(families, list, &kept)?;
    let kept = kept.into_iter().map(|(_, text)| text);
    Ok(kept.chain(leases).collect())
}

/// Points each policy at the gateway of its family. One whose `from` is no
/// address is not ours to judge and stays; one without a gateway of its family
/// gets an empty next hop, as in Meridio.
fn redirect(policies: Vec<Policy>, addresses: &Addresses) -> Vec<Policy> {
    let to_gateway = |mut policy: Policy| {
        if let Ok(from) = policy.from.parse::<IpNetwork>() {
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
        let told = answer(asked.clone(), &upstream(), IpFamilies::Dual).unwrap();
        assert_eq!(told.src, ["172.16.0.1/24", "fd00::1/64"]);
        assert_eq!(told.dst, ["172.16.0.2/24", "fd00::2/64"]);
        assert_eq!(told.gateways, ["172.16.0.100/24", "fd00::100/64"]);
        assert_eq!(told.policies, asked.policies);
    }

    #[test]
    fn a_refresh_is_left_alone() {
        let asked = with_vips(["172.16.0.100/24", "fd00::100/64"]);
        let told = answer(asked.clone(), &upstream(), IpFamilies::Dual).unwrap();
        assert_eq!(told, asked);
    }

    #[test]
    fn new_addresses_replace_the_old_and_keep_the_vips() {
        let asked = with_vips(["172.16.0.10/24", "fd00::10/64"]);
        let new = addresses(
            ["172.16.0.10/24", "172.16.0.20/24", "172.16.0.100/24"],
            ["fd00::10/64", "fd00::20/64", "fd00::100/64"],
        );
        let told = answer(asked, &new, IpFamilies::Dual).unwrap();
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
        let again = answer(told.clone(), &new, IpFamilies::Dual).unwrap();
        assert_eq!(again, told, "a correction is stable");
    }

    #[test]
    fn without_old_gateways_nothing_is_dropped_and_nothing_doubled() {
        let asked = IpContext {
            gateways: Vec::new(),
            ..with_vips(["172.16.0.10/24", "fd00::10/64"])
        };
        let told = answer(asked, &upstream(), IpFamilies::Dual).unwrap();
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
        let told = answer(asked, &v4, IpFamilies::V4).unwrap();
        assert_eq!(told.policies, [policy("2000::1/128", ""), policy("", "x")]);
    }

    #[test]
    fn what_is_no_address_or_of_no_used_family_is_refused() {
        let mut v4 = upstream();
        v4.bridge.v6 = None;
        v4.leases.v6 = None;
        let refused = |asked: IpContext, families| answer(asked, &v4, families).unwrap_err();
        for bad in [
            "",
            "x",
            "1.2.3.4/33",
            "1.2.3/24",
            "1.2.3.4/",
            "::1/129",
            "\u{0}",
        ] {
            for asked in [
                IpContext {
                    src: list(&[bad]),
                    ..IpContext::default()
                },
                IpContext {
                    dst: list(&[bad]),
                    ..IpContext::default()
                },
                IpContext {
                    gateways: list(&[bad]),
                    ..IpContext::default()
                },
            ] {
                assert!(check(&asked).is_err());
                let error = refused(asked, IpFamilies::V4).to_string();
                assert!(error.contains("which is no IP address"), "{error}");
            }
        }
        let vip = IpContext {
            src: list(&["172.16.0.1/24", "2000::1/128"]),
            dst: list(&["172.16.0.2/24"]),
            gateways: list(&["172.16.0.100/24"]),
            ..IpContext::default()
        };
        assert_eq!(
            refused(vip, IpFamilies::V4).to_string(),
            "src_ip_addrs of the request holds 2000::1/128, but this trench does not use IPv6"
        );
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
        let told = answer(asked, &v4, IpFamilies::V4).unwrap();
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
            let told = answer(asked, &now, IpFamilies::Dual).unwrap();
            for wanted in [&vip, "10.0.0.1/24", "fd00::1/64"] {
                prop_assert_eq!(told.src.iter().filter(|text| *text == wanted).count(), 1);
            }
            prop_assert!(told.dst.contains(&"10.0.0.2/24".to_owned()));
            prop_assert!(told.gateways.contains(&"10.0.0.99/24".to_owned()));
            prop_assert_eq!(&answer(told.clone(), &now, IpFamilies::Dual).unwrap(), &told);
        }
    }

    const V6: [&str; 3] = ["fd00::1/64", "fd00::2/64", "fd00::100/64"];
}
