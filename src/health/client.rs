//! `grpc_health_probe`: the binary under that name asks a health server once,
//! with the flags of the tool of that name that Meridio's deployment runs as
//! its exec probes (grpc-ecosystem/grpc-health-probe v0.4.61, main.go). The image
//! thus needs no second program. It speaks plaintext: the flags for TLS are
//! understood and refused.
//!
//! Runs on the main thread of its own short process.

use std::ffi::OsString;
use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use grpcio::{Channel, Client, CompressionAlgorithms};

use crate::config::value::parse_duration;
use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse};
use crate::rpc::call::{self, Options};
use crate::rpc::env::Rpc;
use crate::rpc::method::HEALTH_CHECK;
use crate::rpc::status::{Code, RpcError};
use crate::sync::clock;
use crate::sync::stop::stop_pair;

/// The name under which the binary is a probe.
pub const NAME: &str = "grpc_health_probe";

/// Flags that are true or absent; a value comes behind `=` only.
const SWITCHES: [&str; 9] = [
    "alts",
    "gzip",
    "h",
    "help",
    "spiffe",
    "tls",
    "tls-no-verify",
    "v",
    "version",
];

/// Printed where the flags are wrong.
const USAGE: &str = "Usage:
  -addr string            host:port or unix:///path to connect to (required)
  -connect-timeout value  bound of the connection (default 1s)
  -gzip                   compress the request
  -rpc-header value       'name: value' to send; may be repeated
  -rpc-timeout value      bound of the call (default 1s)
  -service string         service to ask for (default: the server as a whole)
  -user-agent string      beginning of the user agent (default grpc_health_probe)
  -v                      say what is done
  -version                print the version
Not supported, since the health socket speaks plaintext: -alts, -spiffe, -tls,
-tls-ca-cert, -tls-client-cert, -tls-client-key, -tls-no-verify, -tls-server-name.";

/// What the probe was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    address: String,
    service: String,
    connect_timeout: Duration,
    rpc_timeout: Duration,
    user_agent: String,
    headers: Vec<(String, String)>,
    gzip: bool,
    verbose: bool,
    version: bool,
}

/// Why a probe did not find SERVING; the exit status tells them apart, with
/// the numbers of the original tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeError {
    /// Wrong flags.
    Usage(String),
    /// The flags are to be explained, which the original tool fails with, too.
    Help,
    /// No connection within the time for it.
    Connect(String),
    /// The call failed.
    Rpc(String),
    /// The answer was another one.
    Unhealthy(String),
}

impl ProbeError {
    /// The exit status.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Help => 1,
            Self::Connect(_) => 2,
            Self::Rpc(_) => 3,
            Self::Unhealthy(_) => 4,
        }
    }
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(text) => write!(f, "error: {text}\n{USAGE}"),
            Self::Help => f.write_str(USAGE),
            Self::Connect(text) => write!(f, "timeout: failed to connect service {text}"),
            Self::Rpc(text) => write!(f, "error: health rpc failed: {text}"),
            Self::Unhealthy(status) => write!(f, "service unhealthy (responded with \"{status}\")"),
        }
    }
}

impl std::error::Error for ProbeError {}

impl Probe {
    /// Reads the flags as Go's package flag does: `-flag=value` or `-flag
    /// value`, with one dash or two, up to the first word that is no flag.
    ///
    /// # Errors
    ///
    /// [`ProbeError::Usage`] for an unknown flag or one that cannot be had, a
    /// value that does not parse, or no `-addr`.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, ProbeError> {
        let mut probe = Self {
            address: String::new(),
            service: String::new(),
            connect_timeout: Duration::from_secs(1),
            rpc_timeout: Duration::from_secs(1),
            user_agent: NAME.to_owned(),
            headers: Vec::new(),
            gzip: false,
            verbose: false,
            version: false,
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let arg = text(arg)?;
            let flag = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'));
            let Some(flag) = flag.filter(|flag| !flag.is_empty()) else {
                break;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None if SWITCHES.contains(&flag) => (flag.to_owned(), "true".to_owned()),
                None => {
                    let value = args.next().ok_or_else(|| {
                        ProbeError::Usage(format!("flag needs an argument: -{flag}"))
                    })?;
                    (flag.to_owned(), text(value)?)
                }
            };
            probe.set(&name, value)?;
        }
        if probe.address.is_empty() && !probe.version {
            return Err(ProbeError::Usage("-addr not specified".to_owned()));
        }
        Ok(probe)
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), ProbeError> {
        match name {
            "addr" => self.address = value,
            "service" => self.service = value,
            "user-agent" => self.user_agent = value,
            "connect-timeout" => self.connect_timeout = timeout(name, &value)?,
            "rpc-timeout" => self.rpc_timeout = timeout(name, &value)?,
            "rpc-header" => self.headers.push(header(&value)?),
            "gzip" => self.gzip = switch(name, &value)?,
            "v" => self.verbose = switch(name, &value)?,
            "version" => self.version = switch(name, &value)?,
            "h" | "help" => return Err(ProbeError::Help),
            "alts" | "spiffe" | "tls" | "tls-no-verify" if switch(name, &value)? => {
                return Err(unsupported(name));
            }
            "tls-ca-cert" | "tls-client-cert" | "tls-client-key" | "tls-server-name"
                if !value.is_empty() =>
            {
                return Err(unsupported(name));
            }
            "alts" | "spiffe" | "tls" | "tls-no-verify" | "tls-ca-cert" | "tls-client-cert"
            | "tls-client-key" | "tls-server-name" => {}
            _ => {
                return Err(ProbeError::Usage(format!(
                    "flag provided but not defined: -{name}"
                )));
            }
        }
        Ok(())
    }

    /// Whether only the version is asked for.
    #[must_use]
    pub fn is_for_version(&self) -> bool {
        self.version
    }

    /// Connects, asks once, and says what the server answered.
    ///
    /// # Errors
    ///
    /// [`ProbeError`], unless the answer is SERVING.
    pub fn run(&self) -> Result<(), ProbeError> {
        let rpc = Rpc::new();
        let Self {
            address,
            connect_timeout,
            rpc_timeout,
            ..
        } = self;
        self.say(format_args!(
            "addr={address} conn_timeout={connect_timeout:?} rpc_timeout={rpc_timeout:?}"
        ));
        let begun = clock::now();
        let channel = self.connect(&rpc)?;
        self.say(format_args!(
            "connection established (took {:?})",
            begun.elapsed()
        ));
        let begun = clock::now();
        let request = HealthCheckRequest {
            service: self.service.clone(),
            ..Default::default()
        };
        let (_stopper, stop) = stop_pair();
        let options = Options {
            headers: self.headers.clone(),
            ..Options::with_timeout(self.rpc_timeout)
        };
        match call::unary(&channel, &HEALTH_CHECK, &request, &options, &stop) {
            Ok(reply) => {
                self.say(format_args!("answered (took {:?})", begun.elapsed()));
                judge(&reply.message)
            }
            Err(error) => Err(ProbeError::Rpc(self.explain(&error))),
        }
    }

    fn connect(&self, rpc: &Rpc) -> Result<Channel, ProbeError> {
        let compression = if self.gzip {
            CompressionAlgorithms::GRPC_COMPRESS_GZIP
        } else {
            CompressionAlgorithms::GRPC_COMPRESS_NONE
        };
        let channel = rpc
            .channel(self.connect_timeout)
            .primary_user_agent(&self.user_agent)
            .default_compression_algorithm(compression)
            .connect(&self.address);
        let (tx, connected) = bounded(1);
        let deadline = self.connect_timeout;
        let waiting = channel.clone();
        Client::new(channel.clone()).spawn(async move {
            let _ = tx.try_send(waiting.wait_for_connected(deadline).await);
        });
        let limit: Instant = clock::now() + self.connect_timeout + Duration::from_millis(100);
        if matches!(connected.recv_deadline(limit), Ok(true)) {
            return Ok(channel);
        }
        Err(ProbeError::Connect(format!(
            "{:?} within {:?}",
            self.address, self.connect_timeout
        )))
    }

    /// With `-v`, on standard error as the original tool.
    fn say(&self, what: fmt::Arguments<'_>) {
        if self.verbose {
            // Nobody can be told that nobody can be told.
            let _ = writeln!(std::io::stderr(), "{what}");
        }
    }

    fn explain(&self, error: &RpcError) -> String {
        match error.code() {
            Some(Code::UNIMPLEMENTED) => {
                "this server does not implement the grpc health protocol (grpc.health.v1.Health)"
                    .to_owned()
            }
            Some(Code::DEADLINE_EXCEEDED) => {
                format!(
                    "timeout: health rpc did not complete within {:?}",
                    self.rpc_timeout
                )
            }
            _ => format!("service {:?}: {error}", self.service),
        }
    }
}

fn judge(answer: &HealthCheckResponse) -> Result<(), ProbeError> {
    match answer.status.enum_value() {
        Ok(ServingStatus::SERVING) => Ok(()),
        Ok(other) => Err(ProbeError::Unhealthy(format!("{other:?}"))),
        Err(number) => Err(ProbeError::Unhealthy(number.to_string())),
    }
}

fn text(arg: OsString) -> Result<String, ProbeError> {
    arg.into_string()
        .map_err(|arg| ProbeError::Usage(format!("argument {arg:?} is not UTF-8")))
}

/// Go's strconv.ParseBool.
fn switch(name: &str, value: &str) -> Result<bool, ProbeError> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(ProbeError::Usage(format!(
            "invalid boolean value {value:?} for -{name}"
        ))),
    }
}

fn unsupported(name: &str) -> ProbeError {
    ProbeError::Usage(format!(
        "-{name} is not supported: this probe speaks plaintext"
    ))
}

/// A header `name: value`, whose name travels in lower case.
fn header(text: &str) -> Result<(String, String), ProbeError> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c);
    text.split_once(':')
        .filter(|(name, _)| !name.is_empty() && name.chars().all(is_name))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim_start().to_owned()))
        .filter(|(_, value)| value.chars().all(|c| c == ' ' || c.is_ascii_graphic()))
        .ok_or_else(|| {
            ProbeError::Usage(format!(
                "invalid value {text:?} for flag -rpc-header: expected 'name: value'"
            ))
        })
}

fn timeout(name: &str, value: &str) -> Result<Duration, ProbeError> {
    parse_duration(value)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| {
            ProbeError::Usage(format!(
                "invalid value {value:?} for flag -{name}: expected a positive duration such as 400ms"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Probe, ProbeError> {
        Probe::parse(args.iter().map(OsString::from))
    }

    #[test]
    fn reads_the_flags_of_the_deployment() {
        let probe = parse(&[
            "-addr=unix:///tmp/health.sock",
            "-service=Readiness",
            "-connect-timeout=400ms",
            "-rpc-timeout",
            "250ms",
        ])
        .unwrap();
        assert_eq!(probe.address, "unix:///tmp/health.sock");
        assert_eq!(probe.service, "Readiness");
        assert_eq!(probe.connect_timeout, Duration::from_millis(400));
        assert_eq!(probe.rpc_timeout, Duration::from_millis(250));
        assert_eq!(
            parse(&["--addr", "127.0.0.1:1", "-service="])
                .unwrap()
                .service,
            ""
        );
    }

    #[test]
    fn flags_that_are_true_take_no_word_and_a_stray_word_ends_the_flags() {
        let probe = parse(&[
            "-v",
            "-gzip",
            "-tls=false",
            "-tls-ca-cert=",
            "-rpc-header=X-A:  b: c",
            "--rpc-header",
            "x-d:",
            "-addr=x",
            "stray",
            "-bogus",
        ])
        .unwrap();
        assert!(probe.verbose && probe.gzip && !probe.version);
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(probe.headers, [header("x-a", "b: c"), header("x-d", "")]);
        assert!(parse(&["-version"]).unwrap().is_for_version());
        assert!(!parse(&["-version=false", "-addr=x"]).unwrap().version);
    }

    #[test]
    fn what_needs_tls_is_refused_by_name() {
        for flag in [
            "-tls",
            "-tls-no-verify=true",
            "-tls-ca-cert=/ca.pem",
            "-tls-client-cert=/cert.pem",
            "-tls-client-key=/key.pem",
            "-tls-server-name=a",
            "-alts",
            "-spiffe",
        ] {
            let error = parse(&["-addr=x", flag]).unwrap_err();
            assert_eq!(error.exit_status(), 1, "{flag}");
            let name = flag.split('=').next().unwrap();
            let text = error.to_string();
            let begin = format!("error: {name} is not supported");
            assert!(text.starts_with(&begin), "{text}");
        }
    }

    #[test]
    fn refuses_wrong_flags() {
        for bad in [
            &[][..],
            &["-service=x"],
            &["-addr"],
            &["addr=x", "-addr=y"],
            &["--", "-addr=y"],
            &["-addr=x", "-bogus=1"],
            &["-addr=x", "-h"],
            &["-addr=x", "-v=maybe"],
            &["-addr=x", "-rpc-header=foo"],
            &["-addr=x", "-rpc-header", "a b: c"],
            &["-addr=x", "-rpc-header", "a: b\n"],
            &["-addr=x", "-rpc-header", ": b"],
            &["-addr=x", "-rpc-timeout=5"],
            &["-addr=x", "-rpc-timeout=0"],
            &["-addr=x", "-connect-timeout=-1s"],
        ] {
            let error = parse(bad).unwrap_err();
            assert_eq!(error.exit_status(), 1, "{bad:?}: {error}");
        }
    }
}
