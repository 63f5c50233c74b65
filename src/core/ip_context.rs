//! What a target is told about addresses and routes.
