//! Putting the daemon together.
