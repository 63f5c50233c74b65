//! How a hop changes the path of a call: `updatepath`, `updatetoken` and
//! `trimpath` of the NSM SDK for connections (networkservice/common/updatepath,
//! updatetoken), and the registry's path header (registry/common/updatepath,
//! grpcmetadata).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use meridio_proxy::proto::connection::{Connection, PathSegment};
use meridio_proxy::spiffe::jwt::Token;
use protobuf::well_known_types::timestamp::Timestamp;
use serde_json::{Value, json};

pub use self::time::{format_rfc3339, parse_rfc3339};

mod time;

/// A random UUID (version 4).
pub fn new_id() -> String {
    let mut b = [0u8; 16];
    openssl::rand::rand_bytes(&mut b).expect("random bytes");
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// Enters the hop `name`: finds or makes its segment, moves the index to it and
/// makes its id the connection's. Fails as the SDK does.
pub fn enter(connection: &mut Connection, name: &str) -> Result<(), String> {
    let id = connection.id.clone();
    let path = connection.path.mut_or_insert_default();
    if path.path_segments.is_empty() {
        let id = if id.is_empty() { new_id() } else { id };
        path.index = 0;
        path.path_segments.push(segment(name, &id));
        connection.id = id;
        return Ok(());
    }
    let index = path.index as usize;
    let count = path.path_segments.len();
    let Some(current) = path.path_segments.get(index) else {
        return Err(format!(
            "Path.Index+1=={} should be less or equal len(Path.PathSegments)=={count}",
            index + 1
        ));
    };
    if current.name == name {
        connection.id = current.id.clone();
        return Ok(());
    }
    if current.id != id {
        return Err(format!(
            "Current PathSegment.Id=={:?} should be equal Connection.Id=={id:?}",
            current.id
        ));
    }
    match path.path_segments.get_mut(index + 1) {
        None => path.path_segments.push(segment(name, &new_id())),
        Some(next) if next.name != name => {
            name.clone_into(&mut next.name);
            next.id = new_id();
        }
        Some(_) => {}
    }
    path.index += 1;
    connection.id = path.path_segments[index + 1].id.clone();
    Ok(())
}

/// Gives the connection back to the hop before: its id and its index.
pub fn leave(connection: &mut Connection) {
    let path = connection.path.mut_or_insert_default();
    path.index = path.index.saturating_sub(1);
    if let Some(previous) = path.path_segments.get(path.index as usize) {
        connection.id = previous.id.clone();
    }
}

/// Puts the caller's token into its segment, if there is one, and `own` into
/// this hop's.
pub fn update_tokens(
    connection: &mut Connection,
    caller: Option<&Token>,
    own: &Token,
) -> Result<(), String> {
    let path = connection.path.mut_or_insert_default();
    let index = path.index as usize;
    if let (Some(caller), Some(before)) = (caller, index.checked_sub(1)) {
        stamp(&mut path.path_segments[before], caller);
    }
    match path.path_segments.get_mut(index) {
        Some(segment) => {
            stamp(segment, own);
            Ok(())
        }
        None => Err(format!("no path segment {index}")),
    }
}

fn stamp(segment: &mut PathSegment, token: &Token) {
    token.jwt.clone_into(&mut segment.token);
    segment.expires = Some(timestamp(token.expires)).into();
}

/// Cuts what lies to the right of this hop.
pub fn trim(connection: &mut Connection) {
    let path = connection.path.mut_or_insert_default();
    path.path_segments.truncate(path.index as usize + 1);
}

/// The tokens of the segments up to and including this hop's.
pub fn tokens(connection: &Connection) -> Vec<String> {
    let count = connection.path.index as usize + 1;
    let segments = connection.path.path_segments.iter().take(count);
    segments.map(|segment| segment.token.clone()).collect()
}

/// The id of the first segment: the client's own.
pub fn client_id(connection: &Connection) -> String {
    let first = connection.path.path_segments.first();
    first.map(|segment| segment.id.clone()).unwrap_or_default()
}

/// When the earliest token of the path expires; `None` when a segment lacks
/// the time.
pub fn earliest_expiry(connection: &Connection) -> Option<SystemTime> {
    let segments = &connection.path.path_segments;
    segments
        .iter()
        .map(|segment| segment.expires.as_ref().map(system_time))
        .min()
        .flatten()
}

fn segment(name: &str, id: &str) -> PathSegment {
    PathSegment {
        name: name.to_owned(),
        id: id.to_owned(),
        ..Default::default()
    }
}

/// A point in time as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since.as_secs() as i64,
        nanos: since.subsec_nanos() as i32,
        ..Default::default()
    }
}

/// A point in time from protobuf; what lies before 1970 becomes 1970.
pub fn system_time(at: &Timestamp) -> SystemTime {
    let seconds = u64::try_from(at.seconds).unwrap_or(0).min(1 << 36);
    let nanos = u32::try_from(at.nanos).unwrap_or(0).min(999_999_999);
    UNIX_EPOCH + Duration::new(seconds, nanos)
}

/// The registry's path, which travels as JSON in the header `path`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RegistryPath {
    pub index: usize,
    pub tokens: Vec<String>,
}

impl RegistryPath {
    /// Reads the header; keys as Go's decoder takes them, in any case.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = |what: &str| format!("path header {text:?}: {what}");
        let value: Value = serde_json::from_str(text).map_err(|e| bad(&e.to_string()))?;
        let object = value.as_object().ok_or_else(|| bad("no object"))?;
        let field = |name: &str| {
            let found = object
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value)
        };
        let index = match field("Index") {
            None => 0,
            Some(value) => value.as_u64().ok_or_else(|| bad("Index is no number"))? as usize,
        };
        let segments = match field("PathSegments") {
            None | Some(Value::Null) => Vec::new(),
            Some(value) => value.as_array().ok_or_else(|| bad("PathSegments"))?.clone(),
        };
        let tokens = segments
            .iter()
            .map(|segment| {
                let token = segment.get("token").and_then(Value::as_str);
                token
                    .map(ToOwned::to_owned)
                    .ok_or_else(|| bad("segment without token"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { index, tokens })
    }

    /// The header's value.
    pub fn to_json(&self) -> String {
        let segments: Vec<_> = self
            .tokens
            .iter()
            .map(|token| json!({ "token": token }))
            .collect();
        json!({ "Index": self.index, "PathSegments": segments }).to_string()
    }

    /// Enters a hop that was called with the token `caller` and adds `own`.
    pub fn enter(&mut self, caller: &str, own: &str) -> Result<(), String> {
        if self.tokens.is_empty() {
            self.tokens = vec![caller.to_owned(), own.to_owned()];
            self.index = 1;
            return Ok(());
        }
        if self.index >= self.tokens.len() {
            return Err(format!(
                "Path.Index+1=={} should be less or equal len(Path.PathSegments)=={}",
                self.index + 1,
                self.tokens.len()
            ));
        }
        caller.clone_into(&mut self.tokens[self.index]);
        self.index += 1;
        match self.tokens.get_mut(self.index) {
            Some(token) => own.clone_into(token),
            None => self.tokens.push(own.to_owned()),
        }
        Ok(())
    }

    /// The tokens up to and including this hop's.
    pub fn so_far(&self) -> Vec<String> {
        self.tokens.iter().take(self.index + 1).cloned().collect()
    }
}

#[cfg(test)]
mod tests;
