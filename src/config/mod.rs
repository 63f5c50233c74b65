//! Settings.

pub mod value;
