//! IPAM errors.

use std::fmt;

use crate::core::lease::AcquireError;
use crate::rpc::status::RpcError;

/// Why no addresses could be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IpamError {
    /// The queue of the `ipam` thread is full.
    Busy,
    /// The caller's deadline passed; what the last attempt met.
    Deadline(String),
    /// IPAM answered with an error.
    Rpc(RpcError),
    /// IPAM answered with something that is no usable address: the child and
    /// the answer.
    Unusable(String),
    /// The daemon is stopping.
    Stopped,
}

impl From<AcquireError<RpcError>> for IpamError {
    fn from(error: AcquireError<RpcError>) -> Self {
        match error {
            AcquireError::Deadline(why) => Self::Deadline(why),
            AcquireError::Refused(error) => Self::Rpc(error),
            AcquireError::Unusable(text) => Self::Unusable(text),
        }
    }
}

impl fmt::Display for IpamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => f.write_str("too many requests wait for IPAM"),
            Self::Deadline(why) => write!(f, "no addresses of IPAM in time: {why}"),
            Self::Rpc(error) => write!(f, "IPAM refused: {error}"),
            Self::Unusable(text) => write!(f, "IPAM gave no usable addresses: {text}"),
            Self::Stopped => f.write_str("no addresses: the daemon is stopping"),
        }
    }
}

impl std::error::Error for IpamError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Rpc(error) => Some(error),
            Self::Busy | Self::Deadline(_) | Self::Unusable(_) | Self::Stopped => None,
        }
    }
}
