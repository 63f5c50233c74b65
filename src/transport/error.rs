//! Transport errors.

use std::fmt;

use crate::rpc::status::{Code, RpcError};

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

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deadline(text) => write!(f, "no connection in time: {text}"),
            Self::Stopped => f.write_str("the connection was closed by this side"),
        }
    }
}

impl std::error::Error for ConnectError {}

/// What a call comes to for which there is no connection, in gRPC's words.
impl From<ConnectError> for RpcError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Deadline(_) => Self::status(Code::UNAVAILABLE, error.to_string()),
            ConnectError::Stopped => Self::Cancelled,
        }
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ServerError {}
