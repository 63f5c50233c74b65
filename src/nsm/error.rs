//! Why an answer of nsmgr cannot be used.

use std::fmt;

use crate::core::family::Family;

/// What is wrong with a connection that nsmgr sent. The texts are the peer's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unusable {
    /// The connection's id is another than that of the Request.
    Id(String),
    /// The path does not begin with this client and this connection.
    Path(String),
    /// It goes to another endpoint than the one that was asked for.
    Endpoint(String),
    /// The mechanism is no kernel interface, or its name is none: what it is.
    Mechanism(String),
    /// An address cannot be read.
    Address(String),
    /// An address is no neighbour of the port's: outside of the node's subnet,
    /// of a family that is not used, or the port's or the bridge's own.
    ForeignAddress(String),
    /// The peer has this many addresses.
    TooMany(usize),
    /// The peer has no address of this family.
    NoAddress(Family),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "the connection's id is {:?}", start(id)),
            Self::Path(what) => write!(f, "the path {}", start(what)),
            Self::Endpoint(name) => {
                write!(f, "it is connected to endpoint {:?}", start(name))
            }
            Self::Mechanism(what) => write!(f, "the mechanism {}", start(what)),
            Self::Address(text) => write!(f, "{:?} is no address", start(text)),
            Self::ForeignAddress(text) => write!(
                f,
                "the peer's address {} is no neighbour in the node's subnet",
                start(text)
            ),
            Self::TooMany(count) => write!(f, "the peer has {count} addresses"),
            Self::NoAddress(family) => write!(f, "the peer has no {family} address"),
        }
    }
}

impl std::error::Error for Unusable {}

/// A peer's text for a log line: no more than its start.
pub(super) fn start(text: &str) -> &str {
    const BYTES: usize = 200;
    let mut end = text.len().min(BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(start("short"), "short");
        let long = format!("{}é{}", "x".repeat(199), "y".repeat(1_000_000));
        assert_eq!(start(&long), "x".repeat(199));
        assert!(Unusable::Id(long).to_string().len() < 300);
    }
}
