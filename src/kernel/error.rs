//! Kernel errors.

use std::fmt;
use std::io;

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
