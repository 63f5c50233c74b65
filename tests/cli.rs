//! The command line, by running the binary. `UPDATE_GOLDEN=1` rewrites the
//! help text.

#![allow(clippy::unwrap_used, reason = "helpers of tests end by panicking too")]

use std::path::Path;
use std::process::{Command, Output};

const PROXY: &str = env!("CARGO_BIN_EXE_proxy");

/// Runs the binary with nothing in its environment.
fn run(args: &[&str]) -> Output {
    Command::new(PROXY).args(args).env_clear().output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn help_is_as_recorded() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/help.txt");
    let output = run(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &output.stdout).unwrap();
    }
    let expected = std::fs::read_to_string(&golden).unwrap();
    assert_eq!(text(&output.stdout), expected);
    for row in meridio_proxy::config::TABLE {
        assert!(expected.contains(row.variable), "{}", row.variable);
        assert!(
            expected.contains(&format!("--{} ", row.flag())),
            "{}",
            row.flag()
        );
    }
    for spelling in ["-help", "-h", "-help=true"] {
        assert_eq!(text(&run(&[spelling]).stdout), expected, "{spelling}");
    }
}

#[test]
fn version_is_one_line() {
    for args in [
        &["--version"][..],
        &["-version"],
        &["--version=1"],
        &["--help", "--version"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert_eq!(
            text(&output.stdout),
            format!("{}\n", meridio_proxy::cli::VERSION),
            "{args:?}"
        );
    }
}

#[test]
fn debug_prints_json_with_the_keys_of_meridio() {
    for spelling in ["--debug", "-debug", "-debug=true"] {
        let output = run(&[spelling, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{spelling}");
        assert!(output.stderr.is_empty(), "{output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["version"], "v0.0.1");
        assert_eq!(report["meridio-version"], meridio_proxy::cli::VERSION);
        for table in [
            &report["network-interfaces"],
            &report["rules"],
            &report["route"],
            &report["neighbors"],
            &report["system"]["cpu-info"],
        ] {
            assert!(table.is_array(), "{report}");
        }
        let host = &report["system"]["host-info"];
        assert!(host["bootTime"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(report["environment-variables"], serde_json::json!([]));
    }
}

#[test]
fn debug_shows_no_secrets() {
    let output = Command::new(PROXY)
        .arg("--debug")
        .env_clear()
        .envs([
            ("NSM_TRENCH", "red"),
            ("NSM_PASSWORD", "hunter2"),
            ("AWS_SECRET_ACCESS_KEY", "hunter3"),
        ])
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut shown: Vec<&str> = report["environment-variables"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| variable.as_str().unwrap())
        .collect();
    shown.sort_unstable();
    assert_eq!(shown, ["NSM_PASSWORD=***", "NSM_TRENCH=red"]);
    assert!(!text(&output.stdout).contains("hunter"));
}

#[test]
fn wrong_usage_is_status_2_on_standard_error() {
    for args in [
        &["--bogus"][..],
        &["-bogus"],
        &["debug"],
        &["--mtu"],
        &["--version=maybe"],
        &["--", "x"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn wrong_settings_are_status_1_a_line_each() {
    let output = run(&["--mtu", "575", "-dial-timeout=5", "--debug=false"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let lines: Vec<&str> = text(&output.stderr).lines().collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(
        lines[0].starts_with("SPIFFE_ENDPOINT_SOCKET: not set"),
        "{lines:?}"
    );
    assert!(
        lines[1].starts_with("NSM_DIAL_TIMEOUT=\"5\": "),
        "{lines:?}"
    );
    assert!(lines[2].starts_with("NSM_MTU=\"575\": "), "{lines:?}");

    let output = Command::new(PROXY)
        .env_clear()
        .env("SPIFFE_ENDPOINT_SOCKET", "unix:///nowhere/agent.sock")
        .env("NSM_MTU", "576")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        text(&output.stderr),
        "NSM_MTU=\"576\": too small for dualstack; expected an integer from 1280 to 65535\n"
    );
}

#[test]
fn under_the_other_name_it_is_the_probe() {
    let directory = std::env::temp_dir().join(format!("proxy-cli-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let probe = directory.join("grpc_health_probe");
    let _ = std::fs::remove_file(&probe);
    std::os::unix::fs::symlink(PROXY, &probe).unwrap();
    let output = Command::new(&probe).arg("-bogus=1").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("flag provided but not defined: -bogus"));
    std::fs::remove_dir_all(&directory).unwrap();
}
