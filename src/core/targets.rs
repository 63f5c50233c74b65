//! The connections of targets.
