//! What the deployment expects of the image; what it gives the daemon, and no
//! more, is tried in tests/privileges.rs.

#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::path::Path;

/// The user, the capability on the file, the directory and the command are
/// Meridio's (build/proxy/Dockerfile).
#[test]
fn the_image_is_made_as_its_promise_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("Dockerfile")).unwrap();
    for line in [
        "USER 10005:10005",
        "WORKDIR /home/meridio",
        "CMD [\"./proxy\"]",
    ] {
        assert!(text.lines().any(|is| is == line), "{line}");
    }
    // Whatever more it may use is permitted beside it.
    assert!(text.contains("setcap cap_net_admin") && text.contains("+p /home/meridio/proxy"));
    assert!(text.contains("/bin/grpc_health_probe"));
}
