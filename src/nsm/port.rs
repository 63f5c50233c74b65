//! What the kernel says of an interface that a connection is said to have.

use std::path::Path;

use crate::core::ids::IfName;

/// The bridge that ports of connections are in.
const BRIDGE: &str = "bridge0";
/// sysfs shows the network namespace that it was mounted in, which in a
/// container is the pod's.
const SYSFS: &str = "/sys/class/net";

/// Whether `ifname` is a port of the bridge and was made for the connection
/// `id`: forwarders give the client's end the alias `server-<id>`
/// (sdk-vpp pkg/tools/mechutils). Anything that cannot be read counts as no.
pub(super) fn is_in_place(ifname: &IfName, id: &str) -> bool {
    is_in_place_below(Path::new(SYSFS), ifname, id)
}

fn is_in_place_below(sysfs: &Path, ifname: &IfName, id: &str) -> bool {
    let link = sysfs.join(ifname.as_str());
    let alias = std::fs::read_to_string(link.join("ifalias")).unwrap_or_default();
    let master = std::fs::read_link(link.join("master")).unwrap_or_default();
    // The kernel keeps 255 bytes of an alias.
    let expected = format!("server-{id}");
    let kept = expected.get(..255).unwrap_or(&expected);
    alias.trim_end_matches('\n') == kept
        && master.file_name().and_then(|name| name.to_str()) == Some(BRIDGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn alias_and_bridge_must_both_fit() {
        let sysfs = std::env::temp_dir().join(format!("sysfs-{}", std::process::id()));
        let name = IfName::parse("load-balan-aB12").unwrap();
        let link = sysfs.join(name.as_str());
        std::fs::create_dir_all(&link).unwrap();
        let fits = || is_in_place_below(&sysfs, &name, "id-1");
        assert!(!fits(), "nothing can be read");
        std::fs::write(link.join("ifalias"), "server-id-1\n").unwrap();
        assert!(!fits(), "in no bridge");
        symlink("../bridge0", link.join("master")).unwrap();
        assert!(fits());
        assert!(!is_in_place_below(&sysfs, &name, "id-2"));
        std::fs::remove_file(link.join("master")).unwrap();
        symlink("../br1", link.join("master")).unwrap();
        assert!(!fits(), "in another bridge");
        std::fs::remove_dir_all(&sysfs).unwrap();
    }
}
