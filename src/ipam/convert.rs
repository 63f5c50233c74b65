//! IPAM's messages and ours.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use protobuf::MessageField;

use super::IpamOptions;
use crate::core::family::Family;
use crate::core::lease::IpamCall;
use crate::proto::ipam::{Child, IPFamily, Prefix, Subnet};
use crate::proto::nsp::{Conduit, Trench};

/// The request of `call`: the child's name in the subnet of the node (Meridio
/// v1.2.8, pkg/proxy/proxy.go:731-754).
pub(super) fn request(options: &IpamOptions, call: &IpamCall) -> Child {
    let trench = Trench {
        name: options.trench.clone(),
        ..Trench::default()
    };
    let conduit = Conduit {
        name: options.conduit.clone(),
        trench: MessageField::some(trench),
        ..Conduit::default()
    };
    let ip_family = match call.family {
        Family::V4 => IPFamily::IPV4,
        Family::V6 => IPFamily::IPV6,
    };
    let subnet = Subnet {
        conduit: MessageField::some(conduit),
        node: options.node.clone(),
        ipFamily: ip_family.into(),
        ..Subnet::default()
    };
    Child {
        name: call.child.to_string(),
        subnet: MessageField::some(subnet),
        ..Child::default()
    }
}

/// The address in IPAM's answer to `call`, which must be of the family asked
/// for.
///
/// # Errors
///
/// What is wrong, with the call and the answer.
pub(super) fn address(call: &IpamCall, answer: &Prefix) -> Result<IpNetwork, String> {
    let Prefix {
        address,
        prefixLength: length,
        special_fields: _,
    } = answer;
    let parsed = address
        .parse::<IpAddr>()
        .ok()
        .filter(|ip| Family::from(*ip) == call.family)
        .zip(u8::try_from(*length).ok())
        .and_then(|(ip, length)| IpNetwork::new(ip, length).ok());
    parsed.ok_or_else(|| {
        // The text is IPAM's: bounded, and escaped.
        let shown: String = address.chars().take(64).collect();
        format!("{call}: the answer {shown:?} with prefix length {length} is no such address")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::LeaseId;
    use crate::core::lease::{IpamChild, Verb};

    fn call(family: Family) -> IpamCall {
        IpamCall {
            number: 7,
            verb: Verb::Allocate,
            child: IpamChild::Src(LeaseId::new("target-1")),
            family,
        }
    }

    #[test]
    fn answers() {
        for (family, text, length, good) in [
            (Family::V4, "172.16.0.2", 24, true),
            (Family::V6, "fd00:0:0:1::3", 64, true),
            (Family::V4, "fd00::1", 24, false),
            (Family::V6, "172.16.0.2", 24, false),
            (Family::V4, "172.16.0.2", 33, false),
            (Family::V4, "172.16.0.2", -1, false),
            (Family::V4, "172.16.0.2", 280, false),
            (Family::V4, "172.16.0.2/24", 24, false),
            (Family::V4, "", 24, false),
            (Family::V4, "nonsense\n", 24, false),
        ] {
            let answer = Prefix {
                address: text.to_owned(),
                prefixLength: length,
                ..Prefix::default()
            };
            let result = address(&call(family), &answer);
            assert_eq!(result.is_ok(), good, "{text} {length}: {result:?}");
        }
    }

    #[test]
    fn a_hostile_answer_makes_a_short_plain_line() {
        let answer = Prefix {
            address: "\u{1b}\n".repeat(100_000),
            ..Prefix::default()
        };
        let text = address(&call(Family::V4), &answer).unwrap_err();
        assert!(text.len() < 1000 && !text.contains('\u{1b}') && !text.contains('\n'));
    }
}
