//! The NSP service.
