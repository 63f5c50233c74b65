//! Kernel errors.

use std::fmt;
use std::io;

use crate::core::op::KernelOp;

/// Why the kernel could not be asked, or the kernel side not be started.
#[derive(Debug)]
pub struct KernelError(pub String);

impl KernelError {
    /// What was attempted, and what the system said.
    #[must_use]
    pub fn io(doing: &str, error: &io::Error) -> Self {
        Self(format!("{doing}: {error}"))
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for KernelError {}

/// Why an operation was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpError {
    /// The kernel refused it.
    Refused {
        /// Its error number.
        errno: i32,
        /// Its explanation, where it gave one (extended acknowledgement).
        text: Option<String>,
    },
    /// It is not known whether it was done: the answer was lost.
    Unknown(String),
}

impl OpError {
    /// Success where the refusal says that the wish is fulfilled already.
    ///
    /// # Errors
    ///
    /// The refusal itself where it does not.
    pub fn unless_fulfilled(self, op: &KernelOp) -> Result<(), Self> {
        let Self::Refused { errno, .. } = &self else {
            return Err(self);
        };
        let fulfilled = match op {
            KernelOp::CreateBridge { .. } | KernelOp::AddAddress { .. } => *errno == libc::EEXIST,
            KernelOp::RemoveAddress { .. } => [libc::EADDRNOTAVAIL, libc::ENODEV].contains(errno),
            KernelOp::Detach { .. } => *errno == libc::ENODEV,
            KernelOp::ForgetNeighbour { .. } => [libc::ENOENT, libc::ENODEV].contains(errno),
            KernelOp::DeleteRoute { .. } | KernelOp::DeleteRule(_) => {
                [libc::ENOENT, libc::ESRCH].contains(errno)
            }
            KernelOp::BridgeUp { .. }
            | KernelOp::NoOwnLinkLocal { .. }
            | KernelOp::Attach { .. }
            | KernelOp::AskNeighbour { .. }
            | KernelOp::Blackhole { .. }
            | KernelOp::ReplaceRoute { .. }
            | KernelOp::AddRule { .. } => false,
        };
        if fulfilled { Ok(()) } else { Err(self) }
    }
}

impl OpError {
    /// Whether it says no more than that a port's interface has just gone, of
    /// which an event tells as well: a connection's interface goes with each
    /// reselect.
    #[must_use]
    pub fn is_a_gone_port(&self, op: &KernelOp) -> bool {
        let gone = matches!(self, Self::Refused { errno, .. } if *errno == libc::ENODEV);
        gone && matches!(op, KernelOp::Attach { .. })
    }
}

impl fmt::Display for OpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { errno, text } => {
                write!(f, "{}", io::Error::from_raw_os_error(*errno))?;
                match text {
                    Some(text) => write!(f, ", kernel says {text:?}"),
                    None => Ok(()),
                }
            }
            Self::Unknown(why) => write!(f, "outcome unknown: {why}"),
        }
    }
}

impl std::error::Error for OpError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::ids::{IfIndex, IfName};

    #[test]
    fn only_a_port_that_has_gone_is_no_news() {
        let bridge = IfIndex::new(2).unwrap();
        let port = IfName::parse("nsm-a").unwrap();
        let refused = |errno| OpError::Refused { errno, text: None };
        let attach = KernelOp::Attach { port, bridge };
        assert!(refused(libc::ENODEV).is_a_gone_port(&attach));
        assert!(!refused(libc::EBUSY).is_a_gone_port(&attach));
        assert!(!OpError::Unknown(String::new()).is_a_gone_port(&attach));
        let up = KernelOp::BridgeUp { bridge };
        assert!(!refused(libc::ENODEV).is_a_gone_port(&up));
    }
}
