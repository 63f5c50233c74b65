//! The few concurrency pieces that every thread of the daemon uses: how a
//! thread is named, started, told to stop and joined; the latest-value cell;
//! waiting for descriptors; the clock.

pub mod clock;
pub mod poll;
pub mod stop;
pub mod thread;
pub mod watch;
