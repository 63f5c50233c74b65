//! Every operation, and the worker, on the real kernel: each test in a network
//! namespace of its own. Fails where that is denied.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, which fail that way"
)]

mod announce;
mod harness;
mod operations;
mod pod;
mod report;
mod rule_tree;
mod worker;
