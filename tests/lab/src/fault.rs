//! What can go wrong with a peer, under the same names for all of them. How
//! each peer understands a fault is said at its [`Faults`].

use std::fmt;
use std::time::{Duration, Instant};

use grpcio::RpcStatus;
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::sync::clock;
use parking_lot::{Condvar, Mutex};

/// What a peer does.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Accepts connections and calls, and answers nothing, as a stopped
    /// process (SIGSTOP) does.
    Pause,
    /// Ends without a word; nobody listens any more.
    Kill,
    /// Ends and is there again, with what it keeps on disk.
    Restart,
    /// Answers each call that much later.
    Late(Duration),
    /// Answers each call with an error, and ends its streams with it.
    Refuse(RpcStatus),
    /// Ends its streams, or the connections that calls come on.
    DropStreams,
    /// Loses its state and goes on serving.
    Forget,
}

impl Fault {
    /// Ends when the peer recovers; the others are over at once.
    #[must_use]
    pub fn lasts(&self) -> bool {
        matches!(
            self,
            Self::Pause | Self::Kill | Self::Late(_) | Self::Refuse(_)
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Late(delay) => write!(f, "Late({delay:?})"),
            Self::Refuse(status) => write!(f, "Refuse({:?})", status.code()),
            other => write!(f, "{other:?}"),
        }
    }
}

/// A peer that can have a bad day.
pub trait Faults {
    /// Does it to the peer.
    ///
    /// # Errors
    ///
    /// When a peer of this kind cannot have this fault, or it did not work.
    fn inflict(&mut self, fault: &Fault) -> Result<(), String>;

    /// The peer is well again, whatever was inflicted on it.
    ///
    /// # Errors
    ///
    /// When it cannot be brought back.
    fn recover(&mut self) -> Result<(), String>;
}

/// What calls meet before they are served, where the peer runs each call on a
/// thread of its own.
#[derive(Default)]
pub struct Trouble {
    fault: Mutex<Option<Fault>>,
    changed: Condvar,
}

impl Trouble {
    /// From now on, also for calls that wait already.
    pub fn set(&self, fault: Option<Fault>) {
        *self.fault.lock() = fault;
        self.changed.notify_all();
    }

    /// Lets a call through, at once or later.
    ///
    /// # Errors
    ///
    /// What the call is to be answered with.
    pub fn admit(&self, deadline: Instant) -> Result<(), RpcError> {
        let arrived = clock::now();
        let mut fault = self.fault.lock();
        loop {
            let until = match &*fault {
                Some(Fault::Pause) => deadline,
                Some(Fault::Late(delay)) if clock::now() < arrived + *delay => {
                    deadline.min(arrived + *delay)
                }
                other => return refusal(other.as_ref()),
            };
            let late = self.changed.wait_until(&mut fault, until).timed_out();
            if late && clock::now() >= deadline {
                return Err(RpcError::status(
                    Code::DEADLINE_EXCEEDED,
                    "held back by the test",
                ));
            }
        }
    }

    /// Lets a stream be opened; it is not made to wait.
    ///
    /// # Errors
    ///
    /// What it is to be ended with.
    pub fn admit_stream(&self) -> Result<(), RpcError> {
        refusal(self.fault.lock().as_ref())
    }
}

fn refusal(fault: Option<&Fault>) -> Result<(), RpcError> {
    match fault {
        Some(Fault::Kill) => Err(RpcError::status(Code::UNAVAILABLE, "killed by the test")),
        Some(Fault::Refuse(status)) => Err(RpcError::status(status.code(), status.message())),
        _ => Ok(()),
    }
}

/// The status that a dropped stream ends with.
pub(crate) fn dropped() -> RpcStatus {
    RpcStatus::with_message(Code::UNAVAILABLE, "streams dropped by the test".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_meet_what_was_set() {
        let trouble = Trouble::default();
        let soon = || clock::now() + Duration::from_millis(30);
        let status = RpcStatus::with_message(Code::INTERNAL, "ill".to_owned());
        trouble.admit(soon()).unwrap();
        trouble.set(Some(Fault::Pause));
        let late = trouble.admit(soon()).unwrap_err();
        assert_eq!(late.code(), Some(Code::DEADLINE_EXCEEDED));
        trouble.set(Some(Fault::Refuse(status)));
        let refused = trouble.admit(soon()).unwrap_err();
        assert_eq!(refused.code(), Some(Code::INTERNAL));
        assert!(trouble.admit_stream().is_err());
        trouble.set(Some(Fault::Late(Duration::from_millis(5))));
        let begun = clock::now();
        trouble.admit(soon()).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(5));
        trouble.set(None);
        trouble.admit_stream().unwrap();
    }
}
