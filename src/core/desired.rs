//! Wanted kernel state.
