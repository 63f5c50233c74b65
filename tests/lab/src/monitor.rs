//! Connection monitor streams.
