//! What callers are told when something behind the endpoint fails.

use crate::ipam::IpamError;
use crate::rpc::status::{Code, RpcError};

/// IPAM's own code where it has one, as in NSM's chain.
#[must_use]
pub fn from_ipam(error: &IpamError) -> RpcError {
    let (code, text) = match error {
        IpamError::Rpc(error) => (error.code().unwrap_or(Code::UNKNOWN), error.to_string()),
        IpamError::Busy => (
            Code::RESOURCE_EXHAUSTED,
            "too many requests wait".to_owned(),
        ),
        IpamError::Deadline(last) => (
            Code::DEADLINE_EXCEEDED,
            format!("no answer in time: {last}"),
        ),
        IpamError::Unusable(answer) => (Code::UNKNOWN, format!("unusable answer: {answer}")),
        IpamError::Stopped => (Code::UNAVAILABLE, "this process is stopping".to_owned()),
    };
    RpcError::status(code, format!("IPAM: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes() {
        let not_found = RpcError::status(Code::NOT_FOUND, "no such conduit");
        for (error, code, text) in [
            (
                IpamError::Rpc(not_found),
                Code::NOT_FOUND,
                "IPAM: NOT_FOUND: no such conduit",
            ),
            (
                IpamError::Busy,
                Code::RESOURCE_EXHAUSTED,
                "IPAM: too many requests wait",
            ),
            (
                IpamError::Deadline("x".to_owned()),
                Code::DEADLINE_EXCEEDED,
                "IPAM: no answer in time: x",
            ),
            (
                IpamError::Stopped,
                Code::UNAVAILABLE,
                "IPAM: this process is stopping",
            ),
        ] {
            let told = RpcError::status(code, text);
            assert_eq!(from_ipam(&error), told);
        }
    }
}
