//! The sysctls that the deployment sets for the data plane (Meridio's
//! `sysctl-init` container, pkg/controllers/conduit in its operator). We
//! cannot set them: /proc/sys is read-only in the pod. What is missing is said
//! once, at the start.

use std::fs;
use std::path::Path;

use crate::core::family::{Family, IpFamilies};

/// Family, path below /proc/sys/net, wanted value.
const WANTED: [(Family, &str, &str); 7] = [
    (Family::V4, "ipv4/conf/all/forwarding", "1"),
    (Family::V4, "ipv4/fib_multipath_hash_policy", "1"),
    (Family::V4, "ipv4/conf/all/rp_filter", "0"),
    (Family::V4, "ipv4/conf/default/rp_filter", "0"),
    (Family::V6, "ipv6/conf/all/forwarding", "1"),
    (Family::V6, "ipv6/fib_multipath_hash_policy", "1"),
    (Family::V6, "ipv6/conf/all/accept_dad", "0"),
];

/// The sysctls of `families` that differ from what the data plane needs, and
/// the command that sets them, as one text; `None` when all is well.
#[must_use]
pub fn missing(families: IpFamilies) -> Option<String> {
    missing_below(Path::new("/proc/sys/net"), families)
}

fn missing_below(root: &Path, families: IpFamilies) -> Option<String> {
    let (mut found, mut command) = (Vec::new(), "sysctl -w".to_owned());
    for (_, path, wanted) in WANTED.iter().filter(|(family, _, _)| families.has(*family)) {
        let name = format!("net.{}", path.replace('/', "."));
        match fs::read_to_string(root.join(path)) {
            Ok(value) if value.trim() == *wanted => continue,
            Ok(value) => found.push(format!("{name} is {}, needs {wanted}", value.trim())),
            Err(error) => found.push(format!("{name} cannot be read: {error}")),
        }
        command.push_str(&format!(" {name}={wanted}"));
    }
    let found = found.join("; ");
    (!found.is_empty())
        .then(|| format!("{found}. Set them in the pod's network namespace: {command}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_differ_are_named_at_once() {
        let root = std::env::temp_dir().join(format!("sysctl-test-{}", std::process::id()));
        for (_, path, wanted) in WANTED {
            let file = root.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, format!("{wanted}\n")).unwrap();
        }
        assert_eq!(missing_below(&root, IpFamilies::Dual), None);
        fs::write(root.join("ipv4/conf/all/rp_filter"), "2\n").unwrap();
        fs::remove_file(root.join("ipv6/conf/all/forwarding")).unwrap();
        let text = missing_below(&root, IpFamilies::Dual).unwrap();
        assert!(
            text.starts_with("net.ipv4.conf.all.rp_filter is 2, needs 0; "),
            "{text}"
        );
        assert!(
            text.ends_with(
                ": sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv6.conf.all.forwarding=1"
            ),
            "{text}"
        );
        assert!(
            text.contains("net.ipv6.conf.all.forwarding cannot be read"),
            "{text}"
        );
        assert!(
            !missing_below(&root, IpFamilies::V4)
                .unwrap()
                .contains("ipv6")
        );
        fs::remove_dir_all(root).unwrap();
    }
}
