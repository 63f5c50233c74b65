//! What the kernel says of an interface that a connection is said to have.

use log::warn;

use crate::core::ids::IfName;
use crate::core::observed::Link;
use crate::core::op::BRIDGE;
use crate::kernel::{KernelError, link_named};

/// Bytes that the kernel keeps of an alias (IFALIASZ less the NUL).
const ALIAS_MAX: usize = 255;

/// Whether `ifname` is a port of the bridge and was made for the connection
/// `id`. Asked of the kernel by the calling thread itself, once in the life of
/// a session and before anything is changed: `net` answers nobody. What cannot
/// be read counts as no.
pub(super) fn is_in_place(ifname: &IfName, id: &str) -> bool {
    match look(ifname) {
        Ok((bridge, port)) => fits(bridge.as_ref(), port.as_ref(), id),
        Err(error) => {
            warn!("cannot look at {ifname}, so its connection is rebuilt: {error}");
            false
        }
    }
}

/// The bridge and the port, as far as they are there.
fn look(ifname: &IfName) -> Result<(Option<Link>, Option<Link>), KernelError> {
    let bridge = match IfName::parse(BRIDGE) {
        Ok(name) => link_named(&name)?,
        Err(_) => None,
    };
    Ok((bridge, link_named(ifname)?))
}

/// Forwarders give the client's end the alias `server-<id>` (sdk-vpp
/// pkg/tools/mechutils).
fn fits(bridge: Option<&Link>, port: Option<&Link>, id: &str) -> bool {
    let alias = format!("server-{id}");
    let kept = alias.get(..ALIAS_MAX).unwrap_or(&alias);
    bridge.is_some_and(|bridge| {
        bridge.is_bridge
            && port.is_some_and(|port| {
                port.master == Some(bridge.index) && port.alias.as_deref() == Some(kept)
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::IfIndex;

    fn link(index: u32, name: &str, alias: Option<&str>, master: Option<u32>) -> Link {
        Link {
            index: IfIndex::new(index).unwrap(),
            name: IfName::parse(name).unwrap(),
            alias: alias.map(str::to_owned),
            master: master.and_then(IfIndex::new),
            up: true,
            carrier: true,
            is_bridge: name == BRIDGE,
        }
    }

    #[test]
    fn alias_and_bridge_must_both_fit() {
        let bridge = link(1, BRIDGE, None, None);
        let mut other = bridge.clone();
        other.is_bridge = false;
        for (alias, master, expected) in [
            (Some("server-id-1"), Some(1), true),
            (Some("server-id-1"), Some(2), false),
            (Some("server-id-1"), None, false),
            (Some("server-id-2"), Some(1), false),
            (Some("client-id-1"), Some(1), false),
            (Some("id-1"), Some(1), false),
            (None, Some(1), false),
        ] {
            let port = link(3, "load-balan-aB12", alias, master);
            let fits = |bridge, port| fits(bridge, port, "id-1");
            assert_eq!(
                fits(Some(&bridge), Some(&port)),
                expected,
                "{alias:?} in {master:?}"
            );
            assert!(!fits(None, Some(&port)), "there is no bridge");
            assert!(!fits(Some(&other), Some(&port)), "it is none");
            assert!(!fits(Some(&bridge), None), "there is no port");
        }
    }

    #[test]
    fn a_long_alias_is_compared_as_the_kernel_keeps_it() {
        let id = "x".repeat(300);
        let kept = format!("server-{}", "x".repeat(ALIAS_MAX - 7));
        let bridge = link(1, BRIDGE, None, None);
        let port = link(2, "a", Some(&kept), Some(1));
        assert!(fits(Some(&bridge), Some(&port), &id));
    }
}
