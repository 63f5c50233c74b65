//! What the kernel says of an interface that a connection is said to have.

use log::warn;

use crate::core::ids::IfName;
use crate::core::observed::Observed;
use crate::kernel;

/// Bytes that the kernel keeps of an alias (IFALIASZ less the NUL).
const ALIAS_MAX: usize = 255;

/// Whether `ifname` is a port of the bridge and was made for the connection
/// `id`. Asked of the kernel by the calling thread itself, once in the life of
/// a session and before anything is changed: `net` answers nobody. What cannot
/// be read counts as no.
pub(super) fn is_in_place(ifname: &IfName, id: &str) -> bool {
    match kernel::observe() {
        Ok(observed) => fits(&observed, ifname, id),
        Err(error) => {
            warn!("cannot look at {ifname}, so its connection is rebuilt: {error}");
            false
        }
    }
}

/// Forwarders give the client's end the alias `server-<id>` (sdk-vpp
/// pkg/tools/mechutils).
fn fits(observed: &Observed, ifname: &IfName, id: &str) -> bool {
    let alias = format!("server-{id}");
    let kept = alias.get(..ALIAS_MAX).unwrap_or(&alias);
    let bridge = observed.bridge().map(|bridge| bridge.index);
    observed.named(ifname).is_some_and(|link| {
        bridge.is_some() && link.master == bridge && link.alias.as_deref() == Some(kept)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::IfIndex;
    use crate::core::observed::Link;
    use crate::core::op::BRIDGE;

    fn link(index: u32, name: &str, alias: Option<&str>, master: Option<u32>) -> Link {
        Link {
            index: IfIndex::new(index).unwrap(),
            name: IfName::parse(name).unwrap(),
            alias: alias.map(str::to_owned),
            master: master.and_then(IfIndex::new),
            up: true,
            carrier: true,
            is_bridge: name.starts_with("br"),
        }
    }

    #[test]
    fn alias_and_bridge_must_both_fit() {
        let name = IfName::parse("load-balan-aB12").unwrap();
        for (alias, master, expected) in [
            (Some("server-id-1"), Some(1), true),
            (Some("server-id-1"), Some(2), false),
            (Some("server-id-1"), None, false),
            (Some("server-id-2"), Some(1), false),
            (Some("client-id-1"), Some(1), false),
            (Some("id-1"), Some(1), false),
            (None, Some(1), false),
        ] {
            let mut observed = Observed::default();
            observed.insert_link(link(2, "br1", None, None));
            observed.insert_link(link(3, name.as_str(), alias, master));
            assert!(!fits(&observed, &name, "id-1"), "there is no bridge");
            observed.insert_link(link(1, BRIDGE, None, None));
            assert_eq!(
                fits(&observed, &name, "id-1"),
                expected,
                "{alias:?} in {master:?}"
            );
            let other = IfName::parse("other").unwrap();
            assert!(!fits(&observed, &other, "id-1"));
        }
    }

    #[test]
    fn a_long_alias_is_compared_as_the_kernel_keeps_it() {
        let id = "x".repeat(300);
        let kept = format!("server-{}", "x".repeat(ALIAS_MAX - 7));
        let mut observed = Observed::default();
        observed.insert_link(link(1, BRIDGE, None, None));
        observed.insert_link(link(2, "a", Some(&kept), Some(1)));
        assert!(fits(&observed, &IfName::parse("a").unwrap(), &id));
    }
}
