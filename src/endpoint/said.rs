//! What the registration's failures leave in the log.

use crate::nsm::trouble::Troubles;
use crate::rpc::status::{Code, RpcError};

/// What is done, as the log says it.
pub(super) const SERVICE: &str = "registering the network service";
pub(super) const ENDPOINT: &str = "registering the endpoint";
pub(super) const UNREGISTER: &str = "unregistering the endpoint";

/// What was logged of failures, so that neither retries nor the next rotation
/// of an SVID repeat it.
#[derive(Debug, Default)]
pub(super) struct Said {
    failed: Troubles,
    denied: Troubles,
    /// The network service is another proxy's, and the same as ours.
    is_shared: bool,
}

impl Said {
    /// Whether the failure is worth a warning. That the network service may
    /// not be registered is none while another proxy's does for ours.
    pub(super) fn failed(&mut self, what: &'static str, error: &RpcError) -> bool {
        let is_denied = error.code() == Some(Code::PERMISSION_DENIED);
        if is_denied && what == SERVICE && self.is_shared {
            return false;
        }
        let troubles = if is_denied {
            &mut self.denied
        } else {
            &mut self.failed
        };
        troubles.is_new(what, &error.to_string())
    }

    /// Whether a failure was warned of before.
    pub(super) fn succeeded(&mut self, what: &'static str) -> bool {
        if what == SERVICE {
            self.is_shared = false;
        }
        let failed = self.failed.over(&[what]).is_some();
        self.denied.over(&[what]).is_some() || failed
    }

    /// Notes whether the registry has the same network service; whether that
    /// is news.
    pub(super) fn shared(&mut self, same: bool) -> bool {
        if !same {
            self.is_shared = false;
            return false;
        }
        let _ = (self.failed.over(&[SERVICE]), self.denied.over(&[SERVICE]));
        !std::mem::replace(&mut self.is_shared, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_said_once() {
        let mut said = Said::default();
        let away = |text: &str| RpcError::status(Code::UNAVAILABLE, text);
        let denied = RpcError::status(Code::PERMISSION_DENIED, "not the owner");
        for first in [true, false] {
            assert_eq!(said.failed(ENDPOINT, &away("Stream removed")), first);
            assert_eq!(said.failed(ENDPOINT, &denied), first, "another cause");
            assert!(!said.failed(ENDPOINT, &away("GOAWAY")), "the text varies");
        }
        assert!(said.failed(UNREGISTER, &denied));
        assert!(said.succeeded(ENDPOINT));
        assert!(!said.succeeded(ENDPOINT));
        assert!(said.failed(ENDPOINT, &denied), "a new one");
    }

    #[test]
    fn a_service_of_another_proxy_is_said_once() {
        let mut said = Said::default();
        let denied = RpcError::status(Code::PERMISSION_DENIED, "not the owner");
        for first in [true, false] {
            // Each rotation of an SVID registers anew.
            assert_eq!(said.failed(SERVICE, &denied), first);
            assert_eq!(said.shared(true), first);
        }
        assert!(!said.failed(SERVICE, &denied));
        assert!(!said.shared(false), "it is gone");
        assert!(said.failed(SERVICE, &denied), "which is trouble");
        assert!(said.shared(true), "and back");
        assert!(!said.succeeded(SERVICE), "nothing was wrong any more");
        assert!(said.failed(SERVICE, &denied));
    }
}
