//! The daemon carries traffic with what the deployment gives it and no more: a
//! user of its own with NET_ADMIN alone, as Meridio's image runs it now, and root
//! with NET_ADMIN and DAC_OVERRIDE, as it ran in 2022. Both on a root that is
//! read-only, where only /tmp can be written.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests end by panicking too"
)]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use meridio_lab::process::Daemon;
use meridio_lab::topology::{LIMIT, Topology, TopologyOptions};
use meridio_lab::traffic::Pace;
use meridio_lab::workdir::WorkDir;

/// The image's user.
const USER: u32 = 10_005;
/// linux/capability.h: `CAP_DAC_OVERRIDE`, `CAP_NET_ADMIN`.
const DAC_OVERRIDE: u32 = 1 << 1;
const NET_ADMIN: u32 = 1 << 12;

/// What the pod's sandbox does before it starts the container's program: `$0`,
/// behind the arguments of setpriv.
const SANDBOX: &str = "set -e
chmod 1777 /tmp
mount -o remount,bind,ro /
if touch /var/tmp/written 2>/dev/null; then echo the root can be written; exit 1; fi
exec setpriv \"$@\" \"$0\"";

/// The value of `security.capability` (linux/capability.h, revision 2) that
/// permits NET_ADMIN and makes nothing effective, as the image's setcap does.
fn permit_net_admin(file: &Path) -> io::Result<()> {
    const REVISION_2: u32 = 0x0200_0000;
    let words = [REVISION_2, NET_ADMIN, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let path = CString::new(file.as_os_str().as_bytes())?;
    let name = c"security.capability";
    // SAFETY: both strings end with a zero byte, the value is as long as told,
    // and all three outlive the call.
    let set = unsafe {
        libc::setxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A copy of the daemon that the user may run, not below /tmp.
fn copy(dir: &WorkDir) -> PathBuf {
    let file = dir.path().join("daemon");
    fs::copy(env!("CARGO_BIN_EXE_proxy"), &file).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    file
}

/// The peers, ready for a daemon that is started by `setpriv` with these
/// arguments.
fn lab(file: &Path, setpriv: &[&str]) -> Topology {
    let script = ["-c", SANDBOX].map(str::to_owned);
    let mut args: Vec<String> = script.into();
    args.push(file.display().to_string());
    args.extend(setpriv.iter().map(|&argument| argument.to_owned()));
    let lab = Topology::peers(TopologyOptions {
        program: Some((PathBuf::from("/bin/sh"), args)),
        ..TopologyOptions::default()
    })
    .unwrap();
    // As SPIRE's agent makes its own.
    fs::set_permissions(lab.agent.path(), fs::Permissions::from_mode(0o777)).unwrap();
    lab
}

/// A number of /proc/PID/status or of one of its threads.
fn status(process: &str, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let value = line.and_then(|line| line.split_whitespace().next());
    value.expect(key).to_owned()
}

fn capabilities(process: &str, set: &str) -> u32 {
    u32::from_str_radix(&status(process, set), 16).unwrap()
}

/// The thread that changes the kernel's state.
fn net_thread(daemon: &Daemon) -> String {
    let pid = daemon.pid();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut names = tasks.map(|task| {
        let id = task.unwrap().file_name().into_string().unwrap();
        format!("{pid}/task/{id}")
    });
    names
        .find(|task| {
            fs::read_to_string(format!("/proc/{task}/comm")).is_ok_and(|name| name.trim() == "net")
        })
        .expect("a thread net")
}

/// Brings everything up, sends traffic while load balancers and targets come,
/// restarts, and stops.
fn carries_traffic(lab: &mut Topology, user: u32, permitted: u32) {
    lab.start_daemon().unwrap();
    lab.add_lb().unwrap();
    lab.add_lb().unwrap();
    lab.wait_ready().unwrap();
    let daemon = lab.daemon().unwrap();
    let pid = daemon.pid().to_string();
    assert_eq!(status(&pid, "Uid:"), user.to_string());
    let net = net_thread(daemon);
    assert_eq!(capabilities(&net, "CapPrm:"), permitted);
    assert_eq!(capabilities(&net, "CapBnd:"), permitted);
    assert_eq!(capabilities(&net, "CapEff:") & NET_ADMIN, NET_ADMIN);
    lab.add_target().unwrap();
    let pace = Pace {
        interval: Duration::from_millis(25),
        limit: Duration::from_secs(60),
    };
    let traffic = lab.steady(&pace, 25).unwrap();
    lab.add_target().unwrap();
    lab.kill_daemon().unwrap();
    lab.start_daemon().unwrap();
    lab.wait_ready().unwrap();
    lab.add_lb().unwrap();
    assert!(
        traffic.all_answered_since(traffic.mark(), LIMIT),
        "{}",
        traffic.step(traffic.mark())
    );
    drop(traffic);
    assert_eq!(lab.nsmgr.refusals(), Vec::<String>::new());
    assert_eq!(lab.infra.leaked().unwrap(), 0);
    let daemon = lab.stop_daemon(Duration::from_secs(28)).unwrap();
    let status = daemon.wait_exit(Duration::ZERO).unwrap();
    assert_eq!(status.code(), Some(0), "{}", daemon.tail(20));
    let troubles: Vec<String> = daemon
        .lines()
        .into_iter()
        // That addresses are not announced without NET_RAW is information.
        .filter(|line| !line.contains("\"severity\":\"debug\""))
        .filter(|line| !line.contains("\"severity\":\"info\""))
        .filter(|line| line.contains("ermission denied") || line.contains("not permitted"))
        .collect();
    assert!(troubles.is_empty(), "{troubles:?}");
}

/// Why this kernel does not let a test become the image's user and give a file
/// a capability; in a user namespace that maps root alone it cannot.
fn no_own_user(file: &Path) -> Result<(), String> {
    let user = USER.to_string();
    let switched = Command::new("setpriv")
        .args(["--reuid", &user, "--regid", &user, "--clear-groups", "true"])
        .output()
        .map_err(|error| format!("setpriv: {error}"))?;
    if !switched.status.success() {
        let why = String::from_utf8_lossy(&switched.stderr).into_owned();
        return Err(format!("no process becomes user {USER}: {}", why.trim()));
    }
    permit_net_admin(file).map_err(|error| format!("no file gets cap_net_admin+p: {error}"))
}

#[test]
fn as_the_images_user_with_net_admin_alone() {
    let dir = WorkDir::new().unwrap();
    let file = copy(&dir);
    let user = USER.to_string();
    let bounded = "--bounding-set=-all,+net_admin";
    let (mut lab, user) = match no_own_user(&file) {
        Ok(()) => {
            let own = ["--reuid", &user, "--regid", &user, "--clear-groups"];
            let none = ["--inh-caps=-all", bounded];
            (lab(&file, &[&own[..], &none[..]].concat()), USER)
        }
        Err(why) => {
            eprintln!(
                "this kernel refuses what the image does ({why}); instead the daemon runs as \
                 user 0 without root's privileges (securebit noroot), with the ambient \
                 capability cap_net_admin"
            );
            let ambient = [
                "--securebits=+noroot",
                "--inh-caps=-all,+net_admin",
                "--ambient-caps=-all,+net_admin",
                bounded,
            ];
            (lab(&file, &ambient), 0)
        }
    };
    carries_traffic(&mut lab, user, NET_ADMIN);
}

#[test]
fn as_root_with_net_admin_and_dac_override() {
    let dir = WorkDir::new().unwrap();
    let file = copy(&dir);
    let root = [
        "--bounding-set=-all,+net_admin,+dac_override",
        "--inh-caps=-all",
    ];
    let mut lab = lab(&file, &root);
    carries_traffic(&mut lab, 0, NET_ADMIN | DAC_OVERRIDE);
}
