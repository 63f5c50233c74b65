//! The daemon under test as a process of its own.
