//! The registry of network services and endpoints.
