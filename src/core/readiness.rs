//! From facts to what the probes are told.
