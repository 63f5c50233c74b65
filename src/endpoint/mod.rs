//! The endpoint that targets connect to.
