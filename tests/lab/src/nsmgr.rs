//! The network service manager with its registry.
