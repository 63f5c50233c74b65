//! The NSP client.
