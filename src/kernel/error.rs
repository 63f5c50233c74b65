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
            | KernelOp::Unreachable { .. }
            | KernelOp::ReplaceRoute { .. }
            | KernelOp::AddRule { .. } => false,
        };
        if fulfilled { Ok(()) } else { Err(self) }
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
