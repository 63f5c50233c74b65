//! Putting the daemon together.

pub mod shutdown;
