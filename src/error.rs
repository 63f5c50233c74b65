//! Error chains.
