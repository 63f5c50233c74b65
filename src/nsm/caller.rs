//! Calls to nsmgr with the envelope that it demands: a token signed with the
//! key of the TLS session, and descriptors on that same connection.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, bounded, select};
use grpcio::Method;
use log::debug;

use crate::rpc::call::{self, Options, Reply};
use crate::rpc::pump::{self, Pump};
use crate::rpc::status::{Code, RpcError};
use crate::spiffe::jwt;
use crate::sync::clock;
use crate::sync::stop::Stop;
use crate::transport::client::{Connection, Connector};

/// A peer that stops may cancel its calls before it says that it takes no more;
/// this much later it has.
const GOAWAY_LAG: Duration = Duration::from_millis(100);
/// A call that is given up has ended here before the next may begin; gRPC's
/// thread does that at once.
const CANCEL_LAG: Duration = Duration::from_millis(100);

/// Where the answer to a call arrives.
pub(super) type Answer<Resp> = Receiver<Outcome<Resp>>;
type Outcome<Resp> = Result<Reply<Resp>, RpcError>;
/// Method, message, headers, and what makes the descriptors that go with it.
pub(super) type Call<'a, Req, Resp> = (
    &'a Method<Req, Resp>,
    &'a Req,
    &'a [(String, String)],
    &'a dyn Fn() -> Vec<OwnedFd>,
);

/// Makes calls to nsmgr.
#[derive(Clone)]
pub struct NsmCaller {
    connector: Connector,
    token_lifetime: Duration,
}

impl NsmCaller {
    /// `token_lifetime` is `NSM_MAX_TOKEN_LIFETIME`.
    #[must_use]
    pub fn new(connector: Connector, token_lifetime: Duration) -> Self {
        Self {
            connector,
            token_lifetime,
        }
    }

    /// A unary call that ends by `deadline`: waits for a connection, attaches
    /// what `descriptors` returns, adds the token headers and `headers`. When
    /// the connection ends under the call, makes it again on the next one
    /// (NSM's calls are idempotent).
    ///
    /// # Errors
    ///
    /// The peer's status; UNAVAILABLE when no connection could be had.
    pub fn unary<Req, Resp>(
        &self,
        method: &Method<Req, Resp>,
        request: &Req,
        headers: &[(String, String)],
        descriptors: &dyn Fn() -> Vec<OwnedFd>,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Reply<Resp>, RpcError>
    where
        Resp: Send + Unpin + 'static,
    {
        let mut wait = |answer: &Answer<Resp>| {
            select! {
                recv(answer) -> answer => answer.ok(),
                recv(stop.receiver()) -> _ => None,
            }
        };
        let call = (method, request, headers, descriptors);
        self.unary_with(call, deadline, stop, &mut wait)
    }

    /// [`NsmCaller::unary`] whose answer is waited for by `wait`: `None` gives
    /// the call up. `stop` only ends the wait for a connection.
    ///
    /// # Errors
    ///
    /// As [`NsmCaller::unary`].
    pub(super) fn unary_with<Req, Resp>(
        &self,
        (method, request, headers, descriptors): Call<'_, Req, Resp>,
        deadline: Instant,
        stop: &Stop,
        wait: &mut dyn FnMut(&Answer<Resp>) -> Option<Outcome<Resp>>,
    ) -> Result<Reply<Resp>, RpcError>
    where
        Resp: Send + Unpin + 'static,
    {
        loop {
            let connection = self.connect(deadline, stop)?;
            let mut options = self.options(&connection)?;
            options.headers.extend_from_slice(headers);
            options.timeout = deadline.saturating_duration_since(clock::now());
            for descriptor in descriptors() {
                connection.attach(descriptor);
            }
            let (tx, answer) = bounded(1);
            let running = call::start(
                connection.channel(),
                method,
                request,
                &options,
                move |result| {
                    let _ = tx.try_send(result);
                },
            );
            let Some(result) = wait(&answer) else {
                drop(running);
                let _ = answer.recv_timeout(CANCEL_LAG);
                return Err(RpcError::Cancelled);
            };
            match result {
                Err(error) if is_loss(&error) && connection.ends_within(GOAWAY_LAG) => {
                    debug!("{}: {error}; again on the next connection", method.name);
                }
                result => return result,
            }
        }
    }

    /// Opens a stream; waits for a connection until `deadline`. The stream
    /// ends with UNAVAILABLE when its connection does, at the latest when the
    /// SVID is rotated.
    ///
    /// # Errors
    ///
    /// UNAVAILABLE when no connection could be had.
    pub fn stream<Req, Resp>(
        &self,
        method: &Method<Req, Resp>,
        request: &Req,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Pump<Resp>, RpcError>
    where
        Resp: Send + 'static,
    {
        let connection = self.connect(deadline, stop)?;
        let options = self.options(&connection)?;
        pump::open(connection.channel(), method, request, &options)
    }

    fn connect(&self, deadline: Instant, stop: &Stop) -> Result<Arc<Connection>, RpcError> {
        Ok(self.connector.acquire(deadline, stop)?)
    }

    /// The token headers for a call on `connection` (sdk, `pkg/tools/token`).
    fn options(&self, connection: &Connection) -> Result<Options, RpcError> {
        let token = jwt::sign(
            &connection.identity().svid,
            connection.peer(),
            self.token_lifetime,
            clock::wall(),
        )
        .map_err(|error| RpcError::Library(format!("no NSM token: {error}")))?;
        Ok(Options {
            headers: vec![
                (TOKEN.to_owned(), token.jwt),
                (EXPIRES.to_owned(), rfc3339_nano(token.expires)),
            ],
            ..Options::default()
        })
    }
}

/// Whether this is what a call meets that its connection, or a peer that is
/// stopping, has dropped.
fn is_loss(error: &RpcError) -> bool {
    matches!(
        error,
        RpcError::Status {
            code: Code::UNAVAILABLE | Code::CANCELLED,
            ..
        }
    )
}

/// The token's header.
const TOKEN: &str = "nsm-client-token";
/// The header with its expiry.
const EXPIRES: &str = "nsm-client-token-expires";

/// A time in UTC as Go's layout `time.RFC3339Nano` writes it: nanoseconds
/// without trailing zeros.
#[must_use]
pub fn rfc3339_nano(at: SystemTime) -> String {
    // Times before 1970 do not occur: they come from certificates and clocks.
    let since = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if since.subsec_nanos() > 0 {
        let fraction = format!("{:09}", since.subsec_nanos());
        text.push('.');
        text.push_str(fraction.trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// Year, month and day of a day since 1970-01-01, in the proleptic Gregorian
/// calendar, counted in 400-year cycles from 0000-03-01.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (cycle, day_of_cycle) = (days / 146_097, days % 146_097);
    let year_of_cycle =
        (day_of_cycle - day_of_cycle / 1460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year =
        day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = cycle * 400 + year_of_cycle + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_times_as_go_does() {
        for (seconds, nanos, text) in [
            (0, 0, "1970-01-01T00:00:00Z"),
            (951_782_399, 0, "2000-02-28T23:59:59Z"),
            (951_782_400, 0, "2000-02-29T00:00:00Z"),
            (951_868_800, 0, "2000-03-01T00:00:00Z"),
            (1_709_164_800, 0, "2024-02-29T00:00:00Z"),
            (1_735_689_599, 0, "2024-12-31T23:59:59Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00Z"),
            (1_787_393_472, 123_456_789, "2026-08-22T10:11:12.123456789Z"),
            (1_787_393_472, 120_000_000, "2026-08-22T10:11:12.12Z"),
            (1_787_393_472, 1, "2026-08-22T10:11:12.000000001Z"),
        ] {
            let at = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos);
            assert_eq!(rfc3339_nano(at), text);
        }
    }
}
