//! What the deployment gives the container, and no more.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests end by panicking too"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crossbeam_channel::Receiver;
use meridio_lab::agent::Agent;
use meridio_lab::pki::Pki;
use meridio_lab::process::json_lines;
use meridio_proxy::sync::thread::ThreadHandle;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);

/// A root that is read-only but for `/tmp`, the identity of the image's user,
/// and one capability (Meridio's proxy template, securityContext). What was
/// built is seen in `/mnt`, wherever the checkout is.
const CONTAINER: &str = r#"
mount --bind "$1" /mnt
mount -t tmpfs -o mode=1777 none /tmp
mount --bind / /
mount -o remount,ro,bind /
ip link set lo up
caps=-all,+net_admin
exec setpriv --reuid 10005 --regid 10005 --clear-groups --no-new-privs \
    --inh-caps "$caps" --ambient-caps "$caps" --bounding-set "$caps" \
    sh -c 'touch /read-only 2>/dev/null && exit 9; exec /mnt/debug/proxy'
"#;

struct Container {
    child: Child,
    lines: Receiver<Value>,
    // INVARIANT: dropped after the child was killed, which ends its output.
    _reader: ThreadHandle,
}

impl Container {
    fn start(target: &Path, agent: &str) -> Self {
        let mut child = Command::new("unshare")
            .args(["--mount", "--net", "sh", "-e", "-c", CONTAINER, "container"])
            .arg(target)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("SPIFFE_ENDPOINT_SOCKET", agent)
            .env("NSM_LOG_LEVEL", "INFO")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (lines, reader) = json_lines(child.stdout.take().unwrap()).unwrap();
        Self {
            child,
            lines,
            _reader: reader,
        }
    }

    /// The next line that is about `what`.
    fn line(&self, what: &str) -> Value {
        loop {
            let line = self.lines.recv_timeout(LIMIT).expect(what);
            if line.to_string().contains(what) {
                return line;
            }
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_runs_as_an_ordinary_user_with_net_admin_alone() {
    let binary = Path::new(env!("CARGO_BIN_EXE_proxy"));
    let target = binary.ancestors().nth(2).expect("target/debug/proxy");
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let socket = directory.join(format!("image-{}.sock", std::process::id()));
    let pki = Pki::new("example.org");
    let _agent = Agent::start(&socket, &pki, &pki.id("proxy"), Duration::from_secs(3600));
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o777)).unwrap();
    let seen = Path::new("/mnt").join(socket.strip_prefix(target).unwrap());
    let mut container = Container::start(target, &format!("unix://{}", seen.display()));
    // bridge0 was made: the kernel took the one capability.
    container.line("bridge0");
    container.line("Proxy started");
    let health = container.line("NSMEndpoint");
    assert_eq!(health["extra_data"]["status"], "SERVING", "{health}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", container.child.id())).unwrap();
    let value = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap().split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(value("Uid:"), "10005");
    let net_admin = format!("{:016x}", 1u64 << 12);
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(value(set), net_admin, "{set}");
    }
    let pid = container.child.id().to_string();
    let sent = Command::new("kill").args(["-s", "TERM", &pid]).status();
    assert!(sent.unwrap().success());
    container.line("Proxy shutting done");
    assert_eq!(container.child.wait().unwrap().code(), Some(0));
}

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
