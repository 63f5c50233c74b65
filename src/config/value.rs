//! Parsers of values. Each says what is wrong with a text and what it expected,
//! in the form that the error line of a setting ends with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use log::LevelFilter;

use crate::core::family::IpFamilies;
use crate::spiffe::workload::WorkloadAddress;
use crate::transport::client::Address;

/// `sun_path` of unix(7) less its NUL.
const SOCKET_PATH_MAX: usize = 107;
/// The longest name that DNS, and with it Kubernetes, knows.
const NAME_MAX: usize = 253;
/// IP's own limit on the length of a packet.
pub(super) const MTU_MAX: u32 = 65_535;

/// A host and a port, as a peer is dialled and named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// Name or literal address, an IPv6 one without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl std::fmt::Display for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') {
            write!(f, "[{host}]:{port}")
        } else {
            write!(f, "{host}:{port}")
        }
    }
}

impl From<HostPort> for Address {
    fn from(HostPort { host, port }: HostPort) -> Self {
        Self::Tcp { host, port }
    }
}

/// Parses a duration in Go's syntax, e.g. `1h15m30.5s`: Go's
/// `time.ParseDuration`, without negative durations, for which no setting has
/// a use.
///
/// # Errors
///
/// What is wrong with the text.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    duration_nanos(text)
        .map(Duration::from_nanos)
        .map_err(|wrong| format!("{wrong}; expected a duration such as 400ms, 1.5s or 1h30m"))
}

fn duration_nanos(text: &str) -> Result<u64, &'static str> {
    let (negative, mut rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if rest.is_empty() {
        return Err("not a duration");
    }
    if rest == "0" {
        return Ok(0);
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err("not a duration");
        }
        let end = after
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(after.len());
        let unit = unit_nanos(&after[..end])?;
        let part = scaled(whole, fraction, unit).ok_or("too long for a duration")?;
        total = total.checked_add(part).ok_or("too long for a duration")?;
        rest = &after[end..];
    }
    if i64::try_from(total).is_err() {
        return Err("too long for a duration");
    }
    if negative && total > 0 {
        return Err("negative");
    }
    Ok(total)
}

fn digits(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

fn unit_nanos(unit: &str) -> Result<u64, &'static str> {
    Ok(match unit {
        "ns" => 1,
        // Both the micro sign and the Greek letter, as in Go.
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "" => return Err("a duration without a unit"),
        _ => return Err("a duration with an unknown unit"),
    })
}

/// `whole.fraction` times `unit`, cut to whole nanoseconds; `None` when it
/// does not fit.
fn scaled(whole: &str, fraction: &str, unit: u64) -> Option<u64> {
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    // 18 digits are finer than a nanosecond of an hour.
    let kept = &fraction[..fraction.len().min(18)];
    let part: u128 = if kept.is_empty() {
        0
    } else {
        let scale = 10u128.pow(u32::try_from(kept.len()).ok()?);
        kept.parse::<u128>().ok()? * u128::from(unit) / scale
    };
    whole
        .checked_mul(unit)?
        .checked_add(u64::try_from(part).ok()?)
}

/// A duration of at least a millisecond, for whatever would spin or fail at
/// once otherwise.
pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    let duration = parse_duration(text)?;
    if duration < Duration::from_millis(1) {
        return Err("too short; expected a duration of at least 1ms".to_owned());
    }
    Ok(duration)
}

/// An integer as Go's `strconv.ParseInt(text, 0, …)` reads it: sign, base by
/// prefix (`0x`, `0o`, `0b`, `0`), and underscores between digits.
///
/// # Errors
///
/// When the text is no integer, or one that does not fit.
pub fn parse_int(text: &str) -> Result<i64, String> {
    int(text).ok_or_else(|| "not an integer".to_owned())
}

fn int(text: &str) -> Option<i64> {
    let (negative, body) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let lower = body.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    // An underscore stands between two digits, or after the prefix.
    let plain_decimal = radix == 10;
    if digits.is_empty()
        || digits.ends_with('_')
        || digits.contains("__")
        || (plain_decimal && digits.starts_with('_'))
        || digits.starts_with(['+', '-'])
    {
        return None;
    }
    let magnitude = i128::from(u64::from_str_radix(&digits.replace('_', ""), radix).ok()?);
    i64::try_from(if negative { -magnitude } else { magnitude }).ok()
}

/// A port, 1..=65535.
pub(super) fn port(text: &str) -> Result<u16, String> {
    const EXPECTED: &str = "expected a port from 1 to 65535";
    let number = parse_int(text).map_err(|wrong| format!("{wrong}; {EXPECTED}"))?;
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("no port; {EXPECTED}")),
    }
}

/// An MTU by itself; [`mtu_fits`] judges it together with the families.
pub(super) fn mtu(text: &str) -> Result<u32, String> {
    const EXPECTED: &str = "expected an integer up to 65535";
    let number = parse_int(text).map_err(|wrong| format!("{wrong}; {EXPECTED}"))?;
    match u32::try_from(number) {
        Ok(mtu) if mtu <= MTU_MAX => Ok(mtu),
        Ok(_) => Err(format!("too large; {EXPECTED}")),
        Err(_) => Err(format!("out of range; {EXPECTED}")),
    }
}

/// The smallest MTU that every link of the families must carry: RFC 791's 576
/// for IPv4 alone, RFC 8200's 1280 where IPv6 is used.
pub(super) fn mtu_fits(mtu: u32, families: IpFamilies) -> Result<(), String> {
    let (least, name) = match families {
        IpFamilies::V4 => (576, "ipv4"),
        IpFamilies::V6 => (1280, "ipv6"),
        IpFamilies::Dual => (1280, "dualstack"),
    };
    if mtu < least {
        return Err(format!(
            "too small for {name}; expected an integer from {least} to {MTU_MAX}"
        ));
    }
    Ok(())
}

/// `ipv4` or `ipv6` in any case; everything else means both, as in Meridio
/// (config.go), whose operator writes `dualstack`.
#[expect(
    clippy::unnecessary_wraps,
    reason = "the signature of all parsers of the table"
)]
pub(super) fn ip_families(text: &str) -> Result<IpFamilies, String> {
    Ok(match text.to_lowercase().as_str() {
        "ipv4" => IpFamilies::V4,
        "ipv6" => IpFamilies::V6,
        _ => IpFamilies::Dual,
    })
}

/// `DEBUG` and `TRACE` exactly; everything else is INFO, as in Meridio
/// (pkg/log/logger.go).
#[expect(
    clippy::unnecessary_wraps,
    reason = "the signature of all parsers of the table"
)]
pub(super) fn log_level(text: &str) -> Result<LevelFilter, String> {
    Ok(match text {
        "DEBUG" => LevelFilter::Debug,
        "TRACE" => LevelFilter::Trace,
        _ => LevelFilter::Info,
    })
}

/// A name that goes into registries, addresses and, for `NSM_NAME`, a path.
pub(super) fn name(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("empty; expected a name".to_owned());
    }
    optional_name(text)
}

/// A [`name`], or nothing.
pub(super) fn optional_name(text: &str) -> Result<String, String> {
    if text.len() > NAME_MAX {
        return Err(format!(
            "{} bytes long; expected a name of at most {NAME_MAX}",
            text.len()
        ));
    }
    if text.contains('/') || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("expected a name of printable ASCII without blanks and '/'".to_owned());
    }
    Ok(text.to_owned())
}

/// `host:port`, an IPv6 address in brackets.
pub(super) fn host_port(text: &str) -> Result<HostPort, String> {
    const EXPECTED: &str = "expected host:port, e.g. ipam-service:7777 or [2001:db8::1]:7777";
    let wrong = |what: &str| format!("{what}; {EXPECTED}");
    let (host, port_text) = text.rsplit_once(':').ok_or_else(|| wrong("no port"))?;
    let port = port(port_text).map_err(|_| wrong("wrong port"))?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner
            .strip_suffix(']')
            .filter(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok())
            .ok_or_else(|| wrong("wrong IPv6 address"))?,
        None => host,
    };
    let bare = text.starts_with('[') || !host.contains([':', '[', ']']);
    if host.is_empty() || !bare {
        return Err(wrong("wrong host"));
    }
    let host = optional_name(host).map_err(|_| wrong("wrong host"))?;
    if host.contains(['@', '?', '#', '%']) {
        return Err(wrong("wrong host"));
    }
    Ok(HostPort { host, port })
}

/// Where nsmgr listens: a URL with a unix path or a host and port.
pub(super) fn connect_to(text: &str) -> Result<Address, String> {
    const EXPECTED: &str = "expected unix:///path or tcp://host:port";
    if text.is_empty() {
        return Err(format!("empty; {EXPECTED}"));
    }
    if let Some(path) = text.strip_prefix("unix:") {
        return socket_path(path)
            .map(Address::Unix)
            .map_err(|wrong| format!("{wrong}; {EXPECTED}"));
    }
    if let Some(rest) = text.strip_prefix("tcp://") {
        return host_port(rest)
            .map(Address::from)
            .map_err(|_| format!("wrong host or port; {EXPECTED}"));
    }
    Err(format!("no such kind of address; {EXPECTED}"))
}

/// Where the Workload API listens, in the two forms of SPIFFE's Workload
/// Endpoint standard (section 4).
pub(super) fn workload(text: &str) -> Result<WorkloadAddress, String> {
    const EXPECTED: &str =
        "expected unix:///path or tcp://ip:port, e.g. unix:///run/spire/sockets/agent.sock";
    if text.is_empty() {
        return Err(format!("empty; {EXPECTED}"));
    }
    if let Some(path) = text.strip_prefix("unix:") {
        return socket_path(path)
            .map(WorkloadAddress::Unix)
            .map_err(|wrong| format!("{wrong}; {EXPECTED}"));
    }
    if let Some(rest) = text.strip_prefix("tcp://") {
        return SocketAddr::from_str(rest)
            .ok()
            .filter(|address| address.port() != 0)
            .map(WorkloadAddress::Tcp)
            .ok_or_else(|| format!("wrong IP address or port; {EXPECTED}"));
    }
    Err(format!("no such kind of address; {EXPECTED}"))
}

/// The path of a unix URL, whose host part is empty.
fn socket_path(after_scheme: &str) -> Result<PathBuf, String> {
    let path = match after_scheme.strip_prefix("//") {
        Some(path) if path.starts_with('/') => path,
        Some(_) => return Err("a unix URL with a host".to_owned()),
        None => after_scheme,
    };
    if !path.starts_with('/') || path.len() == 1 {
        return Err("no absolute path".to_owned());
    }
    if path.contains(['?', '#', '%', '\0']) {
        return Err("a path with '?', '#', '%' or NUL".to_owned());
    }
    if path.len() > SOCKET_PATH_MAX {
        return Err(format!(
            "a path of {} bytes where sockets have at most {SOCKET_PATH_MAX}",
            path.len()
        ));
    }
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_go_reads_them() {
        for (text, nanos) in [
            ("0", 0),
            ("-0", 0),
            ("+0s", 0),
            ("5s", 5_000_000_000),
            ("1h15m30.5s", 4_530_500_000_000),
            (".5s", 500_000_000),
            ("5.s", 5_000_000_000),
            ("1.0000000000000000000000001ns", 1),
            ("10us1\u{b5}s1\u{3bc}s", 12_000),
            ("0.3333333333333333333h", 1_200_000_000_000 - 1),
            ("9223372036854775807ns", 9_223_372_036_854_775_807),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_nanos(nanos)),
                "{text}"
            );
        }
        for text in [
            "",
            "5",
            "-",
            "+",
            ".",
            "s",
            ".s",
            "1d",
            "1h5",
            "1 s",
            " 1s",
            "1e3s",
            "-1s",
            "--1s",
            "9223372036854775808ns",
            "99999999999h",
            "1S",
            "\u{661}s",
        ] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn integers_as_go_reads_them() {
        for (text, number) in [
            ("1500", 1500),
            ("+7", 7),
            ("-1", -1),
            ("0", 0),
            ("0x5dc", 1500),
            ("0X5DC", 1500),
            ("0b101", 5),
            ("0o17", 15),
            ("017", 15),
            ("1_500", 1500),
            ("0x_5dc", 1500),
            ("0_17", 15),
        ] {
            assert_eq!(parse_int(text), Ok(number), "{text}");
        }
        for text in [
            "",
            " 1",
            "1 ",
            "1e3",
            "1.0",
            "0x",
            "08",
            "_1",
            "1_",
            "1__0",
            "--1",
            "0x-1",
            "+-1",
            "9223372036854775808",
            "abc",
        ] {
            assert!(parse_int(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_host_and_port_prints_as_it_is_written() {
        for text in ["ipam-service:7777", "[2001:db8::1]:1", "10.0.0.1:65535"] {
            assert_eq!(host_port(text).unwrap().to_string(), text);
        }
    }
}
