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

/// `config` with `args`, and the exit status.
fn config(args: &[&str], environment: &[(&str, &str)]) -> (Output, Option<i32>) {
    let output = Command::new(PROXY)
        .args(args)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let status = output.status.code();
    (output, status)
}

const ENVIRONMENT: [(&str, &str); 5] = [
    ("SPIFFE_ENDPOINT_SOCKET", "unix:///run/a.sock"),
    ("NSM_MTU", "0x5dc"),
    ("IP_FAMILY", "IPv6"),
    ("NSM_GRPC_KEEPALIVE_TIME", "1s"),
    ("NSM_CONECT_TO", "x"),
];

#[test]
fn config_prints_what_is_in_force_and_where_it_comes_from() {
    let args = ["config", "-trench", "red", "--max-token-lifetime=90s"];
    let (output, status) = config(&args, &ENVIRONMENT);
    assert_eq!(status, Some(0));
    let table: Vec<Vec<&str>> = text(&output.stdout)
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(table.len(), meridio_proxy::config::TABLE.len());
    for row in [
        &["NSM_TRENCH", "red", "flag", "--trench"][..],
        &[
            "NSM_MAX_TOKEN_LIFETIME",
            "1m30s",
            "flag",
            "--max-token-lifetime",
        ],
        &["NSM_MTU", "1500", "environment", "NSM_MTU"],
        &["NSM_IP_FAMILY", "ipv6", "environment", "IP_FAMILY"],
        &["NSM_HOST", "\"\"", "default"],
    ] {
        assert!(table.contains(&row.to_vec()), "{row:?} in {table:?}");
    }
    assert_eq!(
        text(&output.stderr),
        "warning: NSM_CONECT_TO is no setting; did you mean NSM_CONNECT_TO?\n\
         warning: NSM_GRPC_KEEPALIVE_TIME is too short; 10s is used\n"
    );
}

#[test]
fn config_speaks_json_too() {
    let (output, status) = config(&["--mtu=1400", "config", "--json"], &ENVIRONMENT);
    assert_eq!(status, Some(0));
    assert!(output.stderr.is_empty(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let settings = report["settings"].as_array().unwrap();
    let find = |variable| settings.iter().find(|row| row["variable"] == variable);
    for (variable, value, source, by) in [
        ("NSM_MTU", "1400", "flag", serde_json::json!("--mtu")),
        ("NSM_IP_FAMILY", "ipv6", "environment", "IP_FAMILY".into()),
        ("NSM_NAME", "proxy", "default", serde_json::Value::Null),
        (
            "NSM_GRPC_KEEPALIVE_TIME",
            "10s",
            "environment",
            "NSM_GRPC_KEEPALIVE_TIME".into(),
        ),
    ] {
        let row = find(variable).unwrap();
        assert_eq!(row["value"], value, "{row}");
        assert_eq!(row["source"], source, "{row}");
        assert_eq!(row["by"], by, "{row}");
    }
    assert_eq!(report["warnings"].as_array().unwrap().len(), 2, "{report}");
}

#[test]
fn config_reports_all_errors_with_status_1() {
    let wrong = [("NSM_MTU", "3"), ("NSM_SPIFFE_ENDPOINT_SOCKET", "x")];
    for args in [&["config"][..], &["config", "--json"]] {
        let (output, status) = config(args, &wrong);
        assert_eq!(status, Some(1));
        let lines: Vec<&str> = text(&output.stderr).lines().collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].starts_with("warning: NSM_SPIFFE_ENDPOINT_SOCKET is no setting"));
        assert!(lines[1].starts_with("SPIFFE_ENDPOINT_SOCKET: not set"));
        assert!(lines[2].starts_with("NSM_MTU=\"3\": too small"));
        if args.len() == 1 {
            assert!(output.stdout.is_empty());
        } else {
            let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(report["errors"][1], lines[2]);
            assert_eq!(report["warnings"].as_array().unwrap().len(), 1);
        }
    }
}

#[test]
fn no_secret_is_repeated() {
    let socket = SPIFFE_WITH_SECRET;
    for (args, environment) in [
        (
            ["config", "--json"],
            [("NSM_TRENCH", "password=hunter2"), socket],
        ),
        (
            ["config", "--name=token=hunter2"],
            [("NSM_CONNECT_TO", "tcp://u:hunter2@nsmgr:1"), socket],
        ),
    ] {
        let (output, _) = config(&args, &environment);
        let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
        assert!(said.contains("***"), "{said}");
        assert!(!said.contains("hunter"), "{said}");
    }
}

const SPIFFE_WITH_SECRET: (&str, &str) =
    ("SPIFFE_ENDPOINT_SOCKET", "unix:///run/secret=hunter2.sock");

/// A table of the settings for a reader. `UPDATE_GOLDEN=1` rewrites it.
#[test]
fn the_page_on_configuration_is_current() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let before = std::fs::read_to_string(&page).unwrap();
    let begin =
        "<!-- generated from src/config/table.rs: UPDATE_GOLDEN=1 cargo test --test cli -->\n";
    let (head, rest) = before.split_once(begin).unwrap();
    let (_, tail) = rest.split_once("<!-- end -->").unwrap();
    let mut table = String::from(
        "\n| variable | flag | form | default | what it is |\n|---|---|---|---|---|\n",
    );
    for row in meridio_proxy::config::TABLE {
        let fallback = row.fallback.map(|name| format!(" or `{name}`"));
        let default = match row.default {
            None => "required".to_owned(),
            Some("") => "empty".to_owned(),
            Some(default) => format!("`{default}`"),
        };
        table.push_str(&format!(
            "| `{}`{} | `--{}` | {} | {default} | {} |\n",
            row.variable,
            fallback.unwrap_or_default(),
            row.flag(),
            row.form,
            row.help.trim()
        ));
    }
    let after = format!("{head}{begin}{table}\n<!-- end -->{tail}");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&page, &after).unwrap();
    } else {
        assert_eq!(before, after, "UPDATE_GOLDEN=1 cargo test --test cli");
    }
}

#[test]
fn wrong_usage_is_status_2_on_standard_error() {
    for args in [
        &["--bogus"][..],
        &["-bogus"],
        &["debug"],
        &["config", "x"],
        &["--json"],
        &["--mtu"],
        &["--version=maybe"],
        &["--", "x"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        let said = text(&output.stderr);
        assert!(said.starts_with("error: "), "{args:?}: {said}");
        // What could be meant by a flag is another flag, and no verb.
        assert!(!said.contains("use '--"), "{args:?}: {said}");
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
