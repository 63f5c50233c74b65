//! `grpc_health_probe`: the binary under that name asks a health server once,
//! with the flags of the tool of that name that Meridio's deployment runs as
//! its exec probes. The image thus needs no second program.
//!
//! Runs on the main thread of its own short process.

use std::ffi::OsString;
use std::fmt;
use std::time::Duration;

use crossbeam_channel::bounded;
use grpcio::Client;

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

/// What the probe was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    address: String,
    service: String,
    connect_timeout: Duration,
    rpc_timeout: Duration,
    user_agent: String,
}

/// Why a probe did not find SERVING; the exit status tells them apart, with
/// the numbers of the original tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeError {
    /// Wrong flags.
    Usage(String),
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
            Self::Usage(_) => 1,
            Self::Connect(_) => 2,
            Self::Rpc(_) => 3,
            Self::Unhealthy(_) => 4,
        }
    }
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(text) => write!(f, "error: {text}"),
            Self::Connect(text) => write!(f, "failed to connect service {text}"),
            Self::Rpc(text) => write!(f, "error: health rpc failed: {text}"),
            Self::Unhealthy(status) => write!(f, "service unhealthy (responded with \"{status}\")"),
        }
    }
}

impl std::error::Error for ProbeError {}

impl Probe {
    /// Reads the flags, `-flag=value` or `-flag value`, with one dash or two.
    ///
    /// # Errors
    ///
    /// [`ProbeError::Usage`] for an unknown flag, a value that does not parse,
    /// or no `-addr`.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, ProbeError> {
        let mut probe = Self {
            address: String::new(),
            service: String::new(),
            connect_timeout: Duration::from_secs(1),
            rpc_timeout: Duration::from_secs(1),
            user_agent: NAME.to_owned(),
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let arg = text(arg)?;
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                return Err(ProbeError::Usage(format!("unexpected argument {arg:?}")));
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None => {
                    let value = args.next().ok_or_else(|| {
                        ProbeError::Usage(format!("flag needs an argument: -{flag}"))
                    })?;
                    (flag.to_owned(), text(value)?)
                }
            };
            probe.set(&name, value)?;
        }
        if probe.address.is_empty() {
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
            _ => {
                return Err(ProbeError::Usage(format!(
                    "flag provided but not defined: -{name}"
                )));
            }
        }
        Ok(())
    }

    /// Connects, asks once, and says what the server answered.
    ///
    /// # Errors
    ///
    /// [`ProbeError`], unless the answer is SERVING.
    pub fn run(&self) -> Result<(), ProbeError> {
        let rpc = Rpc::new();
        let channel = rpc
            .channel(self.connect_timeout)
            .primary_user_agent(&self.user_agent)
            .connect(&self.address);
        let (tx, connected) = bounded(1);
        let deadline = self.connect_timeout;
        let waiting = channel.clone();
        Client::new(channel.clone()).spawn(async move {
            let _ = tx.try_send(waiting.wait_for_connected(deadline).await);
        });
        let limit = clock::now() + self.connect_timeout + Duration::from_millis(100);
        if !matches!(connected.recv_deadline(limit), Ok(true)) {
            return Err(ProbeError::Connect(format!(
                "{:?} within {:?}",
                self.address, self.connect_timeout
            )));
        }
        let request = HealthCheckRequest {
            service: self.service.clone(),
            ..Default::default()
        };
        let (_stopper, stop) = stop_pair();
        let options = Options::with_timeout(self.rpc_timeout);
        match call::unary(&channel, &HEALTH_CHECK, &request, &options, &stop) {
            Ok(reply) => judge(&reply.message),
            Err(error) => Err(ProbeError::Rpc(self.explain(&error))),
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
    fn refuses_wrong_flags() {
        for bad in [
            &[][..],
            &["-service=x"],
            &["-addr"],
            &["addr=x"],
            &["-addr=x", "-bogus=1"],
            &["-addr=x", "-rpc-timeout=5"],
            &["-addr=x", "-rpc-timeout=0"],
            &["-addr=x", "-connect-timeout=-1s"],
        ] {
            let error = parse(bad).unwrap_err();
            assert_eq!(error.exit_status(), 1, "{bad:?}: {error}");
        }
    }
}
