//! Settings: every default, every kind of wrong value, and the order of flags,
//! environment and defaults.

#![allow(clippy::unwrap_used, reason = "helpers of tests end by panicking too")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use log::LevelFilter;
use meridio_proxy::config::{Config, ConfigErrors, Origin, TABLE};
use meridio_proxy::core::family::IpFamilies;
use meridio_proxy::spiffe::workload::WorkloadAddress;
use meridio_proxy::transport::client::Address;

const SPIFFE: (&str, &str) = (
    "SPIFFE_ENDPOINT_SOCKET",
    "unix:///run/spire/sockets/agent.sock",
);

/// Loads with `environment` besides the one setting that has no default.
fn load(environment: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
    let given = environment
        .iter()
        .chain([&SPIFFE])
        .rev()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Config::load(&BTreeMap::new(), given)
}

fn error(name: &str, value: &str) -> String {
    let errors = load(&[(name, value)])
        .map(|config| config.to_string())
        .unwrap_err();
    assert_eq!(errors.lines().len(), 1, "{errors}");
    errors.lines()[0].clone()
}

#[test]
fn defaults_are_those_of_meridio() {
    let config = load(&[]).unwrap();
    assert_eq!(config.name, "proxy");
    assert_eq!(config.service_name, "proxy");
    assert_eq!(
        config.connect_to,
        Address::Unix(PathBuf::from("/var/lib/networkservicemesh/nsm.io.sock"))
    );
    assert_eq!(config.dial_timeout, Duration::from_secs(5));
    assert_eq!(config.request_timeout, Duration::from_secs(15));
    assert_eq!(config.max_token_lifetime, Duration::from_secs(24 * 3600));
    assert_eq!(config.ipam_service.to_string(), "ipam-service:7777");
    assert_eq!(config.host, "");
    assert_eq!(config.network_service_name, "load-balancer");
    assert_eq!(config.namespace, "default");
    assert_eq!(config.trench, "default");
    assert_eq!(config.conduit, "load-balancer");
    assert_eq!(config.nsp_service_name, "nsp-service");
    assert_eq!(config.nsp_service_port, 7778);
    assert_eq!(config.ip_family, IpFamilies::Dual);
    assert_eq!(config.log_level, LevelFilter::Debug);
    assert_eq!(config.mtu, 1500);
    assert_eq!(config.grpc_keepalive_time, Duration::from_secs(30));
    assert_eq!(config.grpc_probe_rpc_timeout, Duration::from_secs(1));
    assert_eq!(config.grpc_max_backoff, Duration::from_secs(5));
    assert_eq!(config.ip_release_delay, Duration::from_secs(20));
    assert_eq!(config.bridge_ip_renew_interval, Duration::from_secs(300));
    assert_eq!(
        config.spiffe_endpoint_socket,
        WorkloadAddress::Unix(PathBuf::from("/run/spire/sockets/agent.sock"))
    );
    assert_eq!(
        config.nsp_service().to_string(),
        "nsp-service-default.default:7778"
    );
    assert_eq!(config.nsmgr_authority(), "localhost");
    assert!(config.warnings().is_empty());
    assert_eq!(
        config.to_string(),
        "SPIFFE_ENDPOINT_SOCKET=\"unix:///run/spire/sockets/agent.sock\" (22 defaults)"
    );
}

#[test]
fn the_table_has_each_name_of_meridio_once() {
    let names: BTreeSet<&str> = TABLE.iter().map(|row| row.variable).collect();
    let expected: BTreeSet<&str> = "NSM_NAME NSM_SERVICE_NAME NSM_CONNECT_TO NSM_DIAL_TIMEOUT \
        NSM_REQUEST_TIMEOUT NSM_MAX_TOKEN_LIFETIME NSM_IPAM_SERVICE NSM_HOST \
        NSM_NETWORK_SERVICE_NAME NSM_NAMESPACE NSM_TRENCH NSM_CONDUIT NSM_NSP_SERVICE_NAME \
        NSM_NSP_SERVICE_PORT NSM_IP_FAMILY NSM_LOG_LEVEL NSM_MTU NSM_GRPC_KEEPALIVE_TIME \
        NSM_GRPC_PROBE_RPC_TIMEOUT NSM_GRPC_MAX_BACKOFF NSM_IP_RELEASE_DELAY \
        NSM_BRIDGE_IP_RENEW_INTERVAL SPIFFE_ENDPOINT_SOCKET"
        .split_whitespace()
        .collect();
    assert_eq!(names, expected);
    assert_eq!(TABLE.len(), expected.len());
    let fallbacks: BTreeSet<&str> = TABLE.iter().filter_map(|row| row.fallback).collect();
    let expected: BTreeSet<&str> = "IP_FAMILY GRPC_KEEPALIVE_TIME GRPC_PROBE_RPC_TIMEOUT \
        GRPC_MAX_BACKOFF IP_RELEASE_DELAY BRIDGE_IP_RENEW_INTERVAL"
        .split_whitespace()
        .collect();
    assert_eq!(fallbacks, expected);
    let flags: Vec<String> = TABLE.iter().map(meridio_proxy::config::Row::flag).collect();
    assert!(flags.contains(&"ip-family".to_owned()) && flags.contains(&"mtu".to_owned()));
    assert!(flags.contains(&"spiffe-endpoint-socket".to_owned()));
}

#[test]
fn values_are_taken_over() {
    let config = load(&[
        ("NSM_NAME", "proxy-load-balancer-x7f2q"),
        ("NSM_SERVICE_NAME", "proxy.load-balancer.trench-a.red"),
        ("NSM_CONNECT_TO", "tcp://[2001:db8::1]:5001"),
        ("NSM_DIAL_TIMEOUT", "1m1.5s"),
        ("NSM_IPAM_SERVICE", "x-ipam-service-trench-a:0x1e61"),
        ("NSM_HOST", "worker-1.example.com"),
        ("NSM_NAMESPACE", "red"),
        ("NSM_TRENCH", "trench-a"),
        ("NSM_NSP_SERVICE_NAME", "x-nsp-service"),
        ("NSM_NSP_SERVICE_PORT", "7_779"),
        ("NSM_IP_FAMILY", "IPv4"),
        ("NSM_LOG_LEVEL", "TRACE"),
        ("NSM_MTU", "576"),
        ("NSM_GRPC_KEEPALIVE_TIME", "1s"),
        ("NSM_IP_RELEASE_DELAY", "0"),
        ("SPIFFE_ENDPOINT_SOCKET", "tcp://127.0.0.1:8081"),
    ])
    .unwrap();
    assert_eq!(config.nsmgr_authority(), "[2001:db8::1]:5001");
    assert_eq!(config.dial_timeout, Duration::from_millis(61_500));
    assert_eq!(config.ipam_service.port, 7777);
    assert_eq!(
        config.nsp_service().to_string(),
        "x-nsp-service-trench-a.red:7779"
    );
    assert_eq!(config.ip_family, IpFamilies::V4);
    assert_eq!(config.log_level, LevelFilter::Trace);
    assert_eq!(config.mtu, 576);
    // What grpc-go does with a shorter one.
    assert_eq!(config.grpc_keepalive_time, Duration::from_secs(10));
    assert_eq!(config.ip_release_delay, Duration::ZERO);
    assert_eq!(
        config.spiffe_endpoint_socket,
        WorkloadAddress::Tcp("127.0.0.1:8081".parse().unwrap())
    );
}

#[test]
fn set_to_nothing_is_set() {
    let config = load(&[
        ("NSM_IP_FAMILY", ""),
        ("NSM_LOG_LEVEL", ""),
        ("NSM_HOST", ""),
    ])
    .unwrap();
    assert_eq!(config.ip_family, IpFamilies::Dual);
    assert_eq!(config.log_level, LevelFilter::Info);
    assert!(config.warnings().is_empty());
    let may_be_empty = ["NSM_HOST", "NSM_IP_FAMILY", "NSM_LOG_LEVEL"];
    for row in TABLE {
        if !may_be_empty.contains(&row.variable) {
            let line = error(row.variable, "");
            assert!(
                line.starts_with(&format!("{}=\"\": ", row.variable)),
                "{line}"
            );
        }
    }
}

#[test]
fn words_are_read_as_meridio_reads_them() {
    for (text, families, warned) in [
        ("ipv4", IpFamilies::V4, false),
        ("IPV6", IpFamilies::V6, false),
        ("Dualstack", IpFamilies::Dual, false),
        ("ipv5", IpFamilies::Dual, true),
    ] {
        let config = load(&[("NSM_IP_FAMILY", text)]).unwrap();
        assert_eq!(config.ip_family, families, "{text}");
        assert_eq!(!config.warnings().is_empty(), warned, "{text}");
    }
    for (text, level, warned) in [
        ("DEBUG", LevelFilter::Debug, false),
        ("INFO", LevelFilter::Info, false),
        ("debug", LevelFilter::Info, true),
    ] {
        let config = load(&[("NSM_LOG_LEVEL", text)]).unwrap();
        assert_eq!(config.log_level, level, "{text}");
        assert_eq!(!config.warnings().is_empty(), warned, "{text}");
    }
}

/// Variable, value, what is wrong with it.
const WRONG: &str = "
NSM_MTU | 575 | too small for dualstack; expected an integer from 1280 to 65535
NSM_MTU | 65536 | too large; expected an integer up to 65535
NSM_MTU | -1 | out of range; expected an integer up to 65535
NSM_MTU | 1e3 | not an integer; expected an integer up to 65535
NSM_NSP_SERVICE_PORT | 0 | no port; expected a port from 1 to 65535
NSM_NSP_SERVICE_PORT | 65536 | no port; expected a port from 1 to 65535
NSM_NSP_SERVICE_PORT | http | not an integer; expected a port from 1 to 65535
NSM_DIAL_TIMEOUT | 5 | a duration without a unit; expected a duration such as 400ms, 1.5s or 1h30m
NSM_DIAL_TIMEOUT | 1d | a duration with an unknown unit; expected a duration such as 400ms, 1.5s or 1h30m
NSM_DIAL_TIMEOUT | -1s | negative; expected a duration such as 400ms, 1.5s or 1h30m
NSM_DIAL_TIMEOUT | 0 | too short; expected a duration of at least 1ms
NSM_REQUEST_TIMEOUT | 0s | too short; expected a duration of at least 1ms
NSM_MAX_TOKEN_LIFETIME | 1ns | too short; expected a duration of at least 1ms
NSM_GRPC_PROBE_RPC_TIMEOUT | 0 | too short; expected a duration of at least 1ms
NSM_GRPC_MAX_BACKOFF | 0 | too short; expected a duration of at least 1ms
NSM_BRIDGE_IP_RENEW_INTERVAL | 0 | too short; expected a duration of at least 1ms
NSM_IP_RELEASE_DELAY | 9223372036854775808ns | too long for a duration; expected a duration such as 400ms, 1.5s or 1h30m
NSM_GRPC_KEEPALIVE_TIME | x | not a duration; expected a duration such as 400ms, 1.5s or 1h30m
NSM_CONNECT_TO | http://x | no such kind of address; expected unix:///path or tcp://host:port
NSM_CONNECT_TO | tcp:// | wrong host or port; expected unix:///path or tcp://host:port
NSM_CONNECT_TO | unix: | no absolute path; expected unix:///path or tcp://host:port
NSM_CONNECT_TO | unix://nsm.sock | a unix URL with a host; expected unix:///path or tcp://host:port
NSM_CONNECT_TO | unix:nsm.sock | no absolute path; expected unix:///path or tcp://host:port
NSM_CONNECT_TO | unix:///a?b | a path with '?', '#', '%' or NUL; expected unix:///path or tcp://host:port
NSM_IPAM_SERVICE | ipam-service | no port; expected host:port, e.g. ipam-service:7777 or [2001:db8::1]:7777
NSM_IPAM_SERVICE | :7777 | wrong host; expected host:port, e.g. ipam-service:7777 or [2001:db8::1]:7777
NSM_IPAM_SERVICE | 2001:db8::1:7777 | wrong host; expected host:port, e.g. ipam-service:7777 or [2001:db8::1]:7777
NSM_IPAM_SERVICE | [::g]:7777 | wrong IPv6 address; expected host:port, e.g. ipam-service:7777 or [2001:db8::1]:7777
NSM_IPAM_SERVICE | dns:///ipam:7777 | wrong host; expected host:port, e.g. ipam-service:7777 or [2001:db8::1]:7777
NSM_IPAM_SERVICE | ipam:0 | wrong port; expected host:port, e.g. ipam-service:7777 or [2001:db8::1]:7777
NSM_NAME | a/b | expected a name of printable ASCII without blanks and '/'
NSM_TRENCH | a b | expected a name of printable ASCII without blanks and '/'
SPIFFE_ENDPOINT_SOCKET | tcp://localhost:1 | wrong IP address or port; expected unix:///path or tcp://ip:port, e.g. unix:///run/spire/sockets/agent.sock
SPIFFE_ENDPOINT_SOCKET | /run/x | no such kind of address; expected unix:///path or tcp://ip:port, e.g. unix:///run/spire/sockets/agent.sock
";

#[test]
fn every_kind_of_wrong_value_has_its_line() {
    let rows: Vec<Vec<&str>> = WRONG
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| line.split(" | ").collect())
        .collect();
    assert_eq!(rows.len(), 34);
    for row in rows {
        let (name, value, wrong) = (row[0], row[1], row[2]);
        assert_eq!(
            error(name, value),
            format!("{name}={value:?}: {wrong}"),
            "{name}"
        );
    }
}

#[test]
fn long_and_strange_values_are_refused() {
    let path = format!("unix:///{}", "x".repeat(200));
    for (name, value, wrong) in [
        ("NSM_CONNECT_TO", path.as_str(), "a path of 201 bytes"),
        ("NSM_NAME", &"n".repeat(300), "300 bytes long"),
        ("NSM_NAME", "a\u{1b}[0m", "printable ASCII"),
        ("NSM_TRENCH", "t\u{e4}", "printable ASCII"),
        ("NSM_DIAL_TIMEOUT", "1\u{661}s", "unknown unit"),
        ("NSM_MTU", " 1500", "not an integer"),
    ] {
        let line = error(name, value);
        assert!(line.starts_with(name) && line.contains(wrong), "{line}");
        assert!(line.bytes().all(|byte| byte >= b' '), "{line:?}");
    }
}

#[test]
fn the_mtu_depends_on_the_families() {
    for (family, least) in [("ipv4", 576), ("ipv6", 1280), ("dualstack", 1280)] {
        let mtu =
            |mtu: u32| load(&[("NSM_IP_FAMILY", family), ("NSM_MTU", &mtu.to_string())]).map(drop);
        assert_eq!(mtu(least), Ok(()), "{family}");
        assert_eq!(mtu(65_535), Ok(()), "{family}");
        let errors = mtu(least - 1).unwrap_err();
        assert_eq!(
            errors.to_string(),
            format!(
                "NSM_MTU=\"{}\": too small for {family}; expected an integer from {least} to 65535",
                least - 1
            )
        );
    }
}

#[test]
fn all_errors_are_reported_in_one_run() {
    let errors = Config::load(
        &BTreeMap::new(),
        [
            ("NSM_MTU", OsString::from("576")),
            ("NSM_DIAL_TIMEOUT", OsString::from("y")),
            ("NSM_NAME", OsString::from_vec(vec![b'a', 0xff])),
        ]
        .map(|(name, value)| (OsString::from(name), value)),
    )
    .map(drop)
    .unwrap_err();
    let mut names: Vec<&str> = errors
        .lines()
        .iter()
        .filter_map(|line| line.split(['=', ':']).next())
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "NSM_DIAL_TIMEOUT",
            "NSM_MTU",
            "NSM_NAME",
            "SPIFFE_ENDPOINT_SOCKET"
        ]
    );
    assert!(errors.to_string().contains("not UTF-8"), "{errors}");
    assert!(
        errors.to_string().contains("too small for dualstack"),
        "{errors}"
    );
}

#[test]
fn a_flag_wins_over_the_environment_and_it_over_the_default() {
    let flags = BTreeMap::from([("NSM_MTU", OsString::from("1400"))]);
    let environment = [("NSM_MTU", "1300"), ("NSM_TRENCH", "a"), SPIFFE]
        .map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let config = Config::load(&flags, environment).unwrap();
    assert_eq!(config.mtu, 1400);
    assert_eq!(config.origin("NSM_MTU"), Some(Origin::Flag));
    assert_eq!(config.origin("NSM_TRENCH"), Some(Origin::Environment));
    assert_eq!(config.origin("NSM_CONDUIT"), Some(Origin::Default));
    assert_eq!(config.to_json()["NSM_MTU"], "1400");
}

#[test]
fn six_variables_are_read_without_their_prefix_too() {
    for row in TABLE.iter().filter(|row| row.fallback.is_some()) {
        let fallback = row.fallback.unwrap();
        let (one, other) = match row.variable {
            "NSM_IP_FAMILY" => ("ipv4", "ipv6"),
            _ => ("11s", "12s"),
        };
        let config = load(&[(fallback, one)]).unwrap();
        assert_eq!(config.to_json()[row.variable], one);
        let config = load(&[(fallback, one), (row.variable, other)]).unwrap();
        assert_eq!(config.to_json()[row.variable], other);
    }
    // The others are not.
    assert_eq!(load(&[("MTU", "1400")]).unwrap().mtu, 1500);
}

#[test]
fn unknown_variables_are_warned_about() {
    let long = format!("NSM_{}", "X".repeat(10_000));
    let config = load(&[
        ("NSM_CONECT_TO", "x"),
        ("NSM_SOMETHING_ELSE", "x"),
        ("NSM_FOO", "x"),
        ("NSM_NTU", "x"),
        ("NSM_SPIFFE_ENDPOINT_SOKET", "x"),
        ("NSX_MTU", "x"),
        (long.as_str(), "x"),
    ])
    .unwrap();
    let warnings = config.warnings();
    assert_eq!(warnings.len(), 6, "{warnings:?}");
    assert!(
        warnings.contains(&"NSM_CONECT_TO is no setting; did you mean NSM_CONNECT_TO?".to_owned())
    );
    let misnamed = "NSM_SPIFFE_ENDPOINT_SOKET is no setting; did you mean SPIFFE_ENDPOINT_SOCKET?";
    assert!(warnings.contains(&misnamed.to_owned()), "{warnings:?}");
    let short = "NSM_NTU is no setting; did you mean NSM_MTU?";
    assert!(warnings.contains(&short.to_owned()), "{warnings:?}");
    for name in ["NSM_SOMETHING_ELSE", "NSM_FOO"] {
        let alone = format!("{name} is no setting");
        assert!(warnings.contains(&alone), "{warnings:?}");
    }
}

#[test]
fn a_huge_value_is_cut_in_the_error() {
    let line = error("NSM_MTU", &"9".repeat(1 << 20));
    assert!(line.len() < 300, "{}", line.len());
}
