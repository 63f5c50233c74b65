//! Values written back as text that their parsers read.

use std::time::Duration;

use log::LevelFilter;

use super::value::HostPort;
use crate::core::family::IpFamilies;
use crate::spiffe::workload::WorkloadAddress;
use crate::transport::client::Address;

/// A type of settings.
pub(super) trait Written {
    /// What a value looks like.
    const FORM: &'static str;

    /// The value as it could be written.
    fn written(&self) -> String;
}

impl Written for String {
    const FORM: &'static str = "name";

    fn written(&self) -> String {
        self.clone()
    }
}

impl Written for u16 {
    const FORM: &'static str = "port";

    fn written(&self) -> String {
        self.to_string()
    }
}

impl Written for u32 {
    const FORM: &'static str = "integer";

    fn written(&self) -> String {
        self.to_string()
    }
}

impl Written for HostPort {
    const FORM: &'static str = "host:port";

    fn written(&self) -> String {
        self.to_string()
    }
}

impl Written for Address {
    const FORM: &'static str = "URL";

    fn written(&self) -> String {
        match self {
            Self::Unix(path) => format!("unix://{}", path.display()),
            Self::Tcp { host, port } => {
                let (host, port) = (host.clone(), *port);
                format!("tcp://{}", HostPort { host, port })
            }
        }
    }
}

impl Written for WorkloadAddress {
    const FORM: &'static str = "URL";

    fn written(&self) -> String {
        match self {
            Self::Unix(path) => format!("unix://{}", path.display()),
            Self::Tcp(address) => format!("tcp://{address}"),
        }
    }
}

impl Written for IpFamilies {
    const FORM: &'static str = "word";

    fn written(&self) -> String {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
            Self::Dual => "dualstack",
        }
        .to_owned()
    }
}

impl Written for LevelFilter {
    const FORM: &'static str = "word";

    fn written(&self) -> String {
        self.as_str().to_owned()
    }
}

impl Written for Duration {
    const FORM: &'static str = "duration";

    /// Hours, minutes and seconds, those that are 0 left out; below a second
    /// the largest unit that needs no fraction.
    fn written(&self) -> String {
        let (seconds, nanos) = (self.as_secs(), self.subsec_nanos());
        if seconds == 0 {
            return match nanos {
                0 => "0s".to_owned(),
                _ if nanos % 1_000_000 == 0 => format!("{}ms", nanos / 1_000_000),
                _ if nanos % 1_000 == 0 => format!("{}us", nanos / 1_000),
                _ => format!("{nanos}ns"),
            };
        }
        let mut text = String::new();
        for (count, unit) in [(seconds / 3600, "h"), (seconds / 60 % 60, "m")] {
            if count > 0 {
                text.push_str(&format!("{count}{unit}"));
            }
        }
        if seconds % 60 > 0 || nanos > 0 {
            let fraction = format!(".{nanos:09}");
            let fraction = fraction.trim_end_matches('0').trim_end_matches('.');
            text.push_str(&format!("{}{fraction}s", seconds % 60));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::value::parse_duration;
    use super::*;

    #[test]
    fn durations_are_written_as_they_are_read() {
        for text in [
            "0s",
            "1ns",
            "1001ns",
            "12us",
            "400ms",
            "1s",
            "1.5s",
            "1m",
            "1m0.000000001s",
            "1h",
            "24h",
            "1h0m30s",
            "1h15m30.25s",
            "5m",
        ] {
            let duration = parse_duration(text).unwrap();
            let written = duration.written();
            assert_eq!(parse_duration(&written), Ok(duration), "{text}");
            assert_eq!(written, text.replace("h0m", "h"));
        }
    }
}
