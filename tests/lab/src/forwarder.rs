//! The kernel forwarder.
