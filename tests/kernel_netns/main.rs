//! Every operation, and the worker, on the real kernel: each test in a network
//! namespace of its own. Fails where that is denied.

mod harness;
mod operations;
mod worker;
