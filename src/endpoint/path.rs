//! The path of a connection: the segments of those who handle it, from the
//! target to this endpoint (NSM: sdk networkservice/common/updatepath,
//! updatetoken and trimpath).

use std::io;
use std::time::SystemTime;

use protobuf::MessageField;

use super::convert::{system_time, timestamp};
use super::random::{Random, uuid};
use crate::core::ids::{LeaseId, SegmentId};
use crate::proto::connection::{Connection, PathSegment};
use crate::rpc::status::{Code, RpcError};
use crate::spiffe::jwt::Token;

/// Segments of a path; real ones have up to eight.
const SEGMENTS_MAX: usize = 64;
/// Bytes of an id or name that we keep, log, and hand to IPAM.
const TEXT_MAX: usize = 512;

/// Where this endpoint stands in a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The index of its own segment.
    pub own: usize,
    /// The index that the caller sent, and gets back.
    pub caller: usize,
}

/// The token that came with a call, in its headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerToken {
    /// The token.
    pub jwt: String,
    /// When it expires, as the peer says.
    pub expires: SystemTime,
}

/// Moves the connection on to our own segment, which is added, taken over by
/// name, or renamed: a segment with our name keeps its id, which is how a
/// connection from before a restart is known again.
///
/// # Errors
///
/// UNKNOWN (as in NSM) when the path does not fit the connection,
/// INVALID_ARGUMENT when it is too long, INTERNAL when no id can be made.
pub fn enter(
    connection: &mut Connection,
    name: &str,
    random: &mut dyn Random,
) -> Result<Place, RpcError> {
    let asked_id = connection.id.clone();
    let path = connection.path.mut_or_insert_default();
    check_size(&path.path_segments)?;
    let mut fresh = || uuid(random).map_err(|error| no_id(&error));

    if path.path_segments.is_empty() {
        let id = if asked_id.is_empty() {
            fresh()?
        } else {
            asked_id
        };
        path.index = 0;
        path.path_segments.push(segment(name, &id));
        connection.id = id;
        return checked_id(connection, Place { own: 0, caller: 0 });
    }

    let count = path.path_segments.len();
    let caller = usize::try_from(path.index).unwrap_or(usize::MAX);
    let Some(current) = path.path_segments.get(caller) else {
        return Err(unknown(format!(
            "path index {caller} is beyond its {count} segments"
        )));
    };
    if current.name == name {
        connection.id.clone_from(&current.id);
        return checked_id(
            connection,
            Place {
                own: caller,
                caller,
            },
        );
    }
    if current.id != asked_id {
        return Err(unknown(format!(
            "connection id {asked_id:?} is not the id {:?} of path segment {caller}",
            current.id
        )));
    }
    let own = caller + 1;
    match path.path_segments.get_mut(own) {
        None => path.path_segments.push(segment(name, &fresh()?)),
        Some(next) if next.name == name => {}
        Some(next) => {
            name.clone_into(&mut next.name);
            next.id = fresh()?;
        }
    }
    path.index = path.index.saturating_add(1);
    let id = path.path_segments.get(own).map(|next| next.id.clone());
    connection.id = id.unwrap_or_default();
    checked_id(connection, Place { own, caller })
}

fn segment(name: &str, id: &str) -> PathSegment {
    PathSegment {
        name: name.to_owned(),
        id: id.to_owned(),
        ..PathSegment::default()
    }
}

fn check_size(segments: &[PathSegment]) -> Result<(), RpcError> {
    let count = segments.len();
    if count > SEGMENTS_MAX {
        let text = format!("the path has {count} segments, more than {SEGMENTS_MAX}");
        return Err(RpcError::status(Code::INVALID_ARGUMENT, text));
    }
    let long = |segment: &PathSegment| segment.id.len() > TEXT_MAX || segment.name.len() > TEXT_MAX;
    if let Some(index) = segments.iter().position(long) {
        let text = format!("id or name of path segment {index} is longer than {TEXT_MAX} bytes");
        return Err(RpcError::status(Code::INVALID_ARGUMENT, text));
    }
    Ok(())
}

fn checked_id(connection: &Connection, place: Place) -> Result<Place, RpcError> {
    if connection.id.is_empty() {
        return Err(unknown(format!("path segment {} has no id", place.own)));
    }
    if connection.id.len() > TEXT_MAX {
        let text = format!("the connection's id is longer than {TEXT_MAX} bytes");
        return Err(RpcError::status(Code::INVALID_ARGUMENT, text));
    }
    Ok(place)
}

fn unknown(text: String) -> RpcError {
    RpcError::status(Code::UNKNOWN, text)
}

fn no_id(error: &io::Error) -> RpcError {
    RpcError::status(Code::INTERNAL, format!("making an id: {error}"))
}

/// Our own segment's id.
#[must_use]
pub fn own_id(connection: &Connection) -> SegmentId {
    SegmentId::new(connection.id.clone())
}

/// The id of the path's first segment, the target's own.
///
/// # Errors
///
/// UNKNOWN when it is empty: all such targets would share one lease.
pub fn lease_id(connection: &Connection) -> Result<LeaseId, RpcError> {
    match connection.path.path_segments.first() {
        Some(first) if !first.id.is_empty() => Ok(LeaseId::new(first.id.clone())),
        _ => Err(unknown("the path's first segment has no id".to_owned())),
    }
}

/// Renews the tokens of the previous segment (the caller's, from its headers)
/// and of our own.
pub fn stamp(connection: &mut Connection, place: Place, caller: Option<&PeerToken>, own: &Token) {
    let segments = &mut connection.path.mut_or_insert_default().path_segments;
    let previous = place
        .own
        .checked_sub(1)
        .and_then(|index| segments.get_mut(index));
    if let (Some(previous), Some(token)) = (previous, caller) {
        previous.token.clone_from(&token.jwt);
        previous.expires = timestamp(token.expires);
    }
    if let Some(segment) = segments.get_mut(place.own) {
        segment.token.clone_from(&own.jwt);
        segment.expires = timestamp(own.expires);
    }
}

/// When the previous segment's token expires.
#[must_use]
pub fn previous_expires(connection: &Connection, place: Place) -> Option<SystemTime> {
    let index = place.own.checked_sub(1)?;
    system_time(&connection.path.path_segments.get(index)?.expires)
}

/// Cuts what is right of our own segment: we are the last.
pub fn trim(connection: &mut Connection, place: Place) {
    let path = connection.path.mut_or_insert_default();
    path.path_segments.truncate(place.own.saturating_add(1));
}

/// The connection as the caller sees it: its own id and index.
pub fn leave(connection: &mut Connection, place: Place) {
    let MessageField(Some(path)) = &mut connection.path else {
        return;
    };
    path.index = u32::try_from(place.caller).unwrap_or(u32::MAX);
    if let Some(caller) = path.path_segments.get(place.caller) {
        connection.id.clone_from(&caller.id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::super::random::tests::Counting;
    use super::*;
    use crate::proto::connection::Path;

    const FRESH: &str = "00010203-0405-4607-8809-0a0b0c0d0e0f";

    fn connection(id: &str, index: u32, segments: &[(&str, &str)]) -> Connection {
        let path_segments = segments
            .iter()
            .map(|(name, id)| segment(name, id))
            .collect();
        Connection {
            id: id.to_owned(),
            path: MessageField::some(Path {
                index,
                path_segments,
                ..Path::default()
            }),
            ..Connection::default()
        }
    }

    fn shape(connection: &Connection) -> Vec<(String, String)> {
        let segments = &connection.path.path_segments;
        segments
            .iter()
            .map(|s| (s.name.clone(), s.id.clone()))
            .collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect()
    }

    type Row<'a> = (
        (&'a str, u32, &'a [(&'a str, &'a str)]),
        (&'a str, usize, usize, &'a [(&'a str, &'a str)]),
    );

    #[test]
    fn entering() {
        let rows: &[Row<'_>] = &[
            // No path: one segment of our own, with the given id or a new one.
            (("x", 0, &[]), ("x", 0, 0, &[("us", "x")])),
            (("", 5, &[]), (FRESH, 0, 0, &[("us", FRESH)])),
            // The index is at our own segment: no move.
            (
                ("?", 1, &[("t", "a"), ("us", "b")]),
                ("b", 1, 1, &[("t", "a"), ("us", "b")]),
            ),
            // Appended, taken over, renamed.
            (
                ("a", 0, &[("t", "a")]),
                (FRESH, 1, 0, &[("t", "a"), ("us", FRESH)]),
            ),
            (
                ("a", 0, &[("t", "a"), ("us", "b")]),
                ("b", 1, 0, &[("t", "a"), ("us", "b")]),
            ),
            (
                ("a", 0, &[("t", "a"), ("old", "b"), ("c", "c")]),
                (FRESH, 1, 0, &[("t", "a"), ("us", FRESH), ("c", "c")]),
            ),
        ];
        for ((id, index, segments), (new_id, own, caller, expected)) in rows {
            let mut asked = connection(id, *index, segments);
            let place = enter(&mut asked, "us", &mut Counting::default()).unwrap();
            assert_eq!(
                place,
                Place {
                    own: *own,
                    caller: *caller
                },
                "{segments:?}"
            );
            assert_eq!(asked.id, *new_id);
            assert_eq!(usize::try_from(asked.path.index).unwrap(), *own);
            assert_eq!(shape(&asked), pairs(expected));
        }
    }

    #[test]
    fn refusals() {
        let long = "x".repeat(TEXT_MAX + 1);
        let many = vec![("t", "a"); SEGMENTS_MAX + 1];
        type Row<'a> = (&'a str, u32, &'a [(&'a str, &'a str)], Code, &'a str);
        let rows: &[Row<'_>] = &[
            ("a", 1, &[("t", "a")], Code::UNKNOWN, "beyond its 1"),
            ("a", u32::MAX, &[("t", "a")], Code::UNKNOWN, "beyond its 1"),
            ("b", 0, &[("t", "a")], Code::UNKNOWN, "is not the id"),
            ("", 0, &[("us", "")], Code::UNKNOWN, "has no id"),
            (
                "a",
                0,
                &[("t", "a"), ("us", "")],
                Code::UNKNOWN,
                "has no id",
            ),
            ("a", 0, &many, Code::INVALID_ARGUMENT, "65 segments"),
            (&long, 0, &[], Code::INVALID_ARGUMENT, "longer than"),
            (
                &long,
                0,
                &[("t", &long)],
                Code::INVALID_ARGUMENT,
                "longer than",
            ),
            (
                "a",
                0,
                &[("t", "a"), (&long, "b")],
                Code::INVALID_ARGUMENT,
                "segment 1",
            ),
        ];
        for (id, index, segments, code, text) in rows {
            let mut asked = connection(id, *index, segments);
            let error = enter(&mut asked, "us", &mut Counting::default()).unwrap_err();
            assert_eq!(error.code(), Some(*code), "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        for first in [
            connection("a", 0, &[]),
            connection("a", 0, &[("t", ""), ("us", "b")]),
        ] {
            assert!(lease_id(&first).is_err());
        }
        assert!(lease_id(&Connection::default()).is_err());
    }

    proptest! {
        /// Whatever a peer sends, we stand where the connection says, or it
        /// is refused.
        #[test]
        fn entering_anything(
            id in "[ab]?",
            index in prop_oneof![0u32..5, Just(u32::MAX)],
            segments in prop::collection::vec(("us|t|", "[ab]?"), 0..5),
        ) {
            let pairs: Vec<(&str, &str)> =
                segments.iter().map(|(name, id)| (name.as_str(), id.as_str())).collect();
            let mut asked = connection(&id, index, &pairs);
            if let Ok(place) = enter(&mut asked, "us", &mut Counting::default()) {
                let after = shape(&asked);
                let (name, own) = &after[place.own];
                prop_assert_eq!((name.as_str(), own), ("us", &asked.id));
                prop_assert_eq!(usize::try_from(asked.path.index).unwrap(), place.own);
                prop_assert!(place.own - place.caller <= 1);
                for (index, (before, after)) in pairs.iter().zip(&after).enumerate() {
                    let same = (before.0, before.1) == (after.0.as_str(), after.1.as_str());
                    prop_assert!(same || index == place.own, "only our own segment changes");
                }
                trim(&mut asked, place);
                leave(&mut asked, place);
                prop_assert_eq!(shape(&asked).len(), place.own + 1);
            }
        }
    }

    #[test]
    fn stamps_trims_and_leaves() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let mut asked = connection("b", 1, &[("t", "a"), ("f", "b"), ("us", "c"), ("x", "d")]);
        let place = enter(&mut asked, "us", &mut Counting::default()).unwrap();
        let own = Token {
            jwt: "own".to_owned(),
            expires: at(20),
        };
        stamp(&mut asked, place, None, &own);
        assert_eq!(
            previous_expires(&asked, place),
            None,
            "no header, nothing sent"
        );
        let caller = PeerToken {
            jwt: "theirs".to_owned(),
            expires: at(10),
        };
        stamp(&mut asked, place, Some(&caller), &own);
        trim(&mut asked, place);
        let tokens: Vec<&str> = asked
            .path
            .path_segments
            .iter()
            .map(|s| s.token.as_str())
            .collect();
        assert_eq!(tokens, ["", "theirs", "own"]);
        assert_eq!(previous_expires(&asked, place), Some(at(10)));
        assert_eq!(lease_id(&asked).unwrap(), LeaseId::new("a"));
        assert_eq!(own_id(&asked), SegmentId::new("c"));
        leave(&mut asked, place);
        assert_eq!((asked.id.as_str(), asked.path.index), ("b", 1));
    }
}
