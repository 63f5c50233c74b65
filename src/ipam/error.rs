//! IPAM errors.

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
