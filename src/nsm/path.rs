//! The path of a connection: segments in the order client, nsmgr, forwarder,
//! endpoint, each with its own expiry.

use std::time::{Duration, Instant, SystemTime};

use protobuf::well_known_types::timestamp::Timestamp;

use super::error::start;
use crate::proto::connection::{Connection, Path, PathSegment};
use crate::sync::clock::Now;

/// No life is taken to be longer, so that no sum of times overflows.
const LIFE_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// The path of a first Request: only this client's segment.
pub(super) fn first(client: &str, id: &str) -> Path {
    Path {
        index: 0,
        path_segments: vec![PathSegment {
            name: client.to_owned(),
            id: id.to_owned(),
            ..PathSegment::default()
        }],
        ..Path::default()
    }
}

/// Whether a connection that a monitor shows is the one with this id: nsmgr
/// lists it under its own id, with index 1. Foreign ones, and the same id deep
/// in somebody else's path, are not.
pub(super) fn belongs_to(connection: &Connection, id: &str) -> bool {
    let path = &connection.path;
    path.index <= 1 && path.path_segments.first().is_some_and(|own| own.id == id)
}

/// The id of nsmgr's segment; empty if there is none.
pub(super) fn nsmgr_id(connection: &Connection) -> &str {
    let nsmgr = connection.path.path_segments.get(1);
    nsmgr.map_or("", |nsmgr| nsmgr.id.as_str())
}

/// The path for a log line: who is on it, and by which id each knows it.
pub(super) fn text(connection: &Connection) -> String {
    let segments = connection.path.path_segments.iter();
    let texts: Vec<String> = segments
        .map(|segment| format!("{}/{}", start(&segment.name), start(&segment.id)))
        .collect();
    texts.join(" ")
}

/// Whether nsmgr can find the connection by its path: it knows it by the
/// second segment.
pub(super) fn is_known_to_nsmgr(path: &Path, client: &str, id: &str) -> bool {
    match path.path_segments.as_slice() {
        [own, nsmgr, ..] => own.name == client && own.id == id && !nsmgr.id.is_empty(),
        _ => false,
    }
}

/// What is left of each segment's life at `now`.
pub(super) fn lives(path: &Path, now: SystemTime) -> Vec<Option<Duration>> {
    path.path_segments
        .iter()
        .map(|segment| segment.expires.as_ref().and_then(|at| left(at, now)))
        .collect()
}

/// The time from `now` to `at`: zero when it is past, `None` when `at` is no
/// time.
fn left(at: &Timestamp, now: SystemTime) -> Option<Duration> {
    let at = time(at)?;
    let left = at.duration_since(now).unwrap_or(Duration::ZERO);
    Some(left.min(LIFE_MAX))
}

/// A timestamp as a time; `None` before 1970 or beyond what can be counted.
pub(super) fn time(at: &Timestamp) -> Option<SystemTime> {
    let seconds = u64::try_from(at.seconds).ok()?;
    let nanos = u32::try_from(at.nanos)
        .ok()
        .filter(|n| *n < 1_000_000_000)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

/// The moment that corresponds to `at`, which may be past.
pub(super) fn monotonic(at: SystemTime, now: &Now) -> Instant {
    match at.duration_since(now.wall) {
        Ok(left) => now.mono + left.min(LIFE_MAX),
        Err(past) => now.mono.checked_sub(past.duration()).unwrap_or(now.mono),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64, nanos: i32) -> Timestamp {
        Timestamp {
            seconds,
            nanos,
            ..Timestamp::default()
        }
    }

    #[test]
    fn lives_are_told_past_or_unknown() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        for (expires, expected) in [
            (Some(at(1060, 5)), Some(Duration::new(60, 5))),
            (Some(at(1000, 0)), Some(Duration::ZERO)),
            (Some(at(3, 0)), Some(Duration::ZERO)),
            (Some(at(i64::MAX, 0)), Some(LIFE_MAX)),
            (Some(at(-1, 0)), None),
            (Some(at(i64::MIN, 0)), None),
            (Some(at(1060, -1)), None),
            (Some(at(1060, 1_000_000_000)), None),
            (None, None),
        ] {
            let mut path = first("proxy", "id");
            path.path_segments[0].expires = expires.clone().into();
            assert_eq!(lives(&path, now), [expected], "{expires:?}");
        }
    }

    #[test]
    fn monitored_connections_are_matched_by_their_first_segment() {
        let mut connection = Connection {
            id: "nsmgr's own".to_owned(),
            path: Some(first("proxy", "id")).into(),
            ..Connection::default()
        };
        assert!(belongs_to(&connection, "id"));
        assert!(!belongs_to(&connection, "nsmgr's own"));
        connection.path.mut_or_insert_default().index = 1;
        assert!(belongs_to(&connection, "id"));
        connection.path.mut_or_insert_default().index = 2;
        assert!(!belongs_to(&connection, "id"));
        connection.path = None.into();
        assert!(!belongs_to(&connection, "id") && !belongs_to(&connection, ""));
    }

    #[test]
    fn nsmgr_needs_its_segment() {
        let mut path = first("proxy", "id");
        assert!(!is_known_to_nsmgr(&path, "proxy", "id"));
        path.path_segments.push(PathSegment::default());
        assert!(!is_known_to_nsmgr(&path, "proxy", "id"));
        path.path_segments[1].id = "x".to_owned();
        assert!(is_known_to_nsmgr(&path, "proxy", "id"));
        assert!(!is_known_to_nsmgr(&path, "other", "id"));
        assert!(!is_known_to_nsmgr(&path, "proxy", "other"));
    }
}
