//! One error type for every RPC.

use std::fmt;

pub use grpcio::RpcStatusCode as Code;

/// Why an RPC, or a stream, ended without what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RpcError {
    /// The peer, or gRPC on its behalf, answered with a status.
    Status {
        /// The status code.
        code: Code,
        /// The peer's text; may be empty.
        message: String,
    },
    /// The call was given up because the thread shall stop, or its guard was
    /// dropped.
    Cancelled,
    /// The peer's message is none: what the decoder says.
    Undecodable(String),
    /// gRPC refused to start or to carry on the call: the operation and the
    /// text of the library.
    Library(String),
}

impl RpcError {
    /// A status made by ourselves, in the words a peer would use.
    #[must_use]
    pub fn status(code: Code, message: impl Into<String>) -> Self {
        Self::Status {
            code,
            message: message.into(),
        }
    }

    /// The status code, if a status was received.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Status { code, .. } => Some(*code),
            Self::Cancelled => Some(Code::CANCELLED),
            Self::Undecodable(_) | Self::Library(_) => None,
        }
    }

    /// Whether the connection, not the call, is what failed.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.code() == Some(Code::UNAVAILABLE)
    }
}

impl From<grpcio::Error> for RpcError {
    fn from(error: grpcio::Error) -> Self {
        match error {
            grpcio::Error::RpcFailure(status) => Self::Status {
                code: status.code(),
                message: status.message().to_owned(),
            },
            grpcio::Error::Codec(error) => Self::Undecodable(error.to_string()),
            other => Self::Library(other.to_string()),
        }
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // grpcio prints the number and the name; the name is enough.
            Self::Status { code, message } => {
                write!(f, "{}: {message}", code_name(*code))
            }
            Self::Cancelled => f.write_str("cancelled by this side"),
            Self::Undecodable(why) => write!(f, "the peer's message cannot be decoded: {why}"),
            Self::Library(text) => write!(f, "gRPC library: {text}"),
        }
    }
}

impl std::error::Error for RpcError {}

/// The name of a status code as gRPC's documents spell it.
#[must_use]
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::OK => "OK",
        Code::CANCELLED => "CANCELLED",
        Code::UNKNOWN => "UNKNOWN",
        Code::INVALID_ARGUMENT => "INVALID_ARGUMENT",
        Code::DEADLINE_EXCEEDED => "DEADLINE_EXCEEDED",
        Code::NOT_FOUND => "NOT_FOUND",
        Code::ALREADY_EXISTS => "ALREADY_EXISTS",
        Code::PERMISSION_DENIED => "PERMISSION_DENIED",
        Code::RESOURCE_EXHAUSTED => "RESOURCE_EXHAUSTED",
        Code::FAILED_PRECONDITION => "FAILED_PRECONDITION",
        Code::ABORTED => "ABORTED",
        Code::OUT_OF_RANGE => "OUT_OF_RANGE",
        Code::UNIMPLEMENTED => "UNIMPLEMENTED",
        Code::INTERNAL => "INTERNAL",
        Code::UNAVAILABLE => "UNAVAILABLE",
        Code::DATA_LOSS => "DATA_LOSS",
        Code::UNAUTHENTICATED => "UNAUTHENTICATED",
        _ => "unassigned status code",
    }
}
