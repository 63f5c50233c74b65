//! gRPC environments (poll threads) and the channel options that undo the
//! defaults of the C core which do not fit this daemon.

use std::ffi::CString;
use std::sync::Arc;
use std::time::Duration;

use grpcio::{ChannelBuilder, EnvBuilder, Environment, ResourceQuota, ServerBuilder};

/// Metadata that an answer may have. The C core's own soft limit of 8 KiB rejects
/// at random above it, while NSM carries its path with all tokens as JSON in
/// one header; grpc-go allows 16 MiB.
const METADATA_MAX: i32 = 1024 * 1024;
/// Largest answer taken from a peer: grpc-go's default.
const MESSAGE_MAX: i32 = 4 * 1024 * 1024;
/// Memory that all calls of one server together may use for buffers. Where it
/// runs out the C core ends calls and connections of whichever peer, so what
/// one connection can use must stay well below: [`UNFINISHED_MAX`], and
/// [`STREAMS_MAX`] times [`REQUEST_METADATA_MAX`].
const SERVER_MEMORY: usize = 64 * 1024 * 1024;
/// Largest message to our servers. A Request with ten hops has some 20 KiB, and
/// 200 bytes more for each VIP: room for 5 000.
pub const REQUEST_MAX: usize = 1024 * 1024;
/// Bytes of messages that one connection may have begun and not ended.
pub const UNFINISHED_MAX: usize = 4 * REQUEST_MAX;
/// Metadata of a call to our servers: NSM's token has some 1 KiB.
const REQUEST_METADATA_MAX: i32 = 64 * 1024;
/// Calls that a server asks for in advance; with the default of 1 024 a
/// shutdown can take seconds (tikv/grpc-rs#674). A call keeps its slot until its
/// request is complete, so one connection must not be able to take them all:
/// more than [`STREAMS_MAX`].
const REQUEST_SLOTS: usize = 320;
/// Of these, what connections together may hold for long; the rest is left for
/// calls that come whole at once.
pub const SLOTS_HELD_MAX: usize = REQUEST_SLOTS - 32;
/// Streams that one connection to our servers may have open.
pub const STREAMS_MAX: usize = 256;

/// The two gRPC environments: one poll thread each, so that a burst of answers
/// to our own calls never delays a peer's request, nor the other way round.
#[derive(Clone)]
pub struct Rpc {
    client: Arc<Environment>,
    server: Arc<Environment>,
}

impl Rpc {
    /// Starts the two poll threads, `grpc-client-0` and `grpc-server-0`.
    #[must_use]
    pub fn new() -> Self {
        let env = |prefix: &str| {
            Arc::new(
                EnvBuilder::new()
                    .cq_count(1)
                    .name_prefix(prefix.to_owned())
                    .build(),
            )
        };
        Self {
            client: env("grpc-client"),
            server: env("grpc-server"),
        }
    }

    /// The environment of channels.
    #[must_use]
    pub fn client(&self) -> &Arc<Environment> {
        &self.client
    }

    /// A channel builder with the daemon's options; the caller adds the
    /// authority and connects.
    #[must_use]
    pub fn channel(&self, reconnect_backoff_max: Duration) -> ChannelBuilder {
        let backoff = i32::try_from(reconnect_backoff_max.as_millis()).unwrap_or(i32::MAX);
        common(ChannelBuilder::new(Arc::clone(&self.client)))
            .initial_reconnect_backoff(Duration::from_secs(1).min(reconnect_backoff_max))
            .max_reconnect_backoff(reconnect_backoff_max)
            .raw_cfg_int(key("grpc.min_reconnect_backoff_ms"), backoff.min(1000))
            .raw_cfg_int(key("grpc.dns_min_time_between_resolutions_ms"), 1000)
            .raw_cfg_int(key("grpc.enable_http_proxy"), 0)
    }

    /// A server builder with the daemon's options; the caller registers its
    /// services and adds listening ports or connections.
    #[must_use]
    pub fn server(&self) -> ServerBuilder {
        let args = common(ChannelBuilder::new(Arc::clone(&self.server)))
            .max_concurrent_stream(int(STREAMS_MAX))
            .max_receive_message_len(int(REQUEST_MAX))
            .raw_cfg_int(key("grpc.max_metadata_size"), REQUEST_METADATA_MAX)
            .raw_cfg_int(key("grpc.absolute_max_metadata_size"), REQUEST_METADATA_MAX)
            // Or a stream's window grows with what a peer sends.
            .raw_cfg_int(key("grpc.http2.bdp_probe"), 0)
            .set_resource_quota(ResourceQuota::new(None).resize_memory(SERVER_MEMORY))
            .build_args();
        ServerBuilder::new(Arc::clone(&self.server))
            .channel_args(args)
            .requests_slot_per_cq(REQUEST_SLOTS)
    }
}

impl Default for Rpc {
    fn default() -> Self {
        Self::new()
    }
}

fn common(builder: ChannelBuilder) -> ChannelBuilder {
    builder
        .max_receive_message_len(MESSAGE_MAX)
        .raw_cfg_int(key("grpc.max_metadata_size"), METADATA_MAX)
        .raw_cfg_int(key("grpc.absolute_max_metadata_size"), METADATA_MAX)
}

fn int(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn key(name: &str) -> CString {
    // Only constants without NUL come here; an empty key would be ignored.
    CString::new(name).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::proto::health::HealthCheckRequest;
    use crate::rpc::call::Options;
    use crate::rpc::method::HEALTH_WATCH;
    use crate::rpc::pump;
    use crate::sync::clock;

    /// Client preface and frame header (RFC 9113, 3.4 and 4.1).
    const PREFACE: usize = 24;
    const HEADER: usize = 9;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;

    /// The types of the whole frames behind the preface.
    fn frames(bytes: &[u8]) -> Vec<u8> {
        let mut rest = bytes.get(PREFACE..).unwrap_or_default();
        let mut types = Vec::new();
        while let Some([a, b, c, kind]) = rest.first_chunk() {
            let length = u32::from_be_bytes([0, *a, *b, *c]);
            types.push(*kind);
            let whole = HEADER + usize::try_from(length).unwrap();
            rest = rest.get(whole..).unwrap_or_default();
        }
        types
    }

    /// grpc-go's servers end a connection that is pinged more often than every
    /// five minutes (google.golang.org/grpc/keepalive, `EnforcementPolicy`), so
    /// gRPC must not ping at all: a stream that is silent for seconds would show
    /// every interval that anybody sets.
    #[test]
    fn an_idle_connection_is_not_pinged() {
        let path = std::env::temp_dir().join(format!("pings-{}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let channel = Rpc::new()
            .channel(Duration::from_secs(1))
            .connect(&format!("unix:{}", path.display()));
        let (request, options) = (HealthCheckRequest::new(), Options::default());
        let _stream = pump::open(&channel, &HEALTH_WATCH, &request, &options).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let _ = std::fs::remove_file(&path);
        // Empty SETTINGS, and the acknowledgement of the client's.
        peer.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).unwrap();
        peer.write_all(&[0, 0, 0, SETTINGS, 1, 0, 0, 0, 0]).unwrap();
        let until = clock::now() + Duration::from_millis(2500);
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        while let Some(left) = until.checked_duration_since(clock::now()) {
            let left = left.max(Duration::from_millis(1));
            peer.set_read_timeout(Some(left)).unwrap();
            match peer.read(&mut buffer) {
                Ok(count) => {
                    assert!(count > 0, "the client has gone");
                    bytes.extend_from_slice(&buffer[..count]);
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
            }
        }
        let types = frames(&bytes);
        assert!(types.contains(&SETTINGS), "{types:?}");
        assert!(!types.contains(&PING), "{types:?}");
    }
}
