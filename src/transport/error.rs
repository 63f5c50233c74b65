//! Transport errors.

/// Why no connection could be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectError {
    /// The deadline passed; the text says what the last attempt met.
    Deadline(String),
    /// The thread shall stop, or the connector was closed.
    Stopped,
}

/// Why a server could not be started.
#[derive(Debug)]
pub struct ServerError(pub String);
