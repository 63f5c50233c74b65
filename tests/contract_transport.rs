//! mTLS with descriptor passing: both roles against each other and against
//! hostile peers, rotation, reconnection, and bounded ends.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "transport/lines.rs"]
mod lines;
#[path = "transport/rig.rs"]
mod rig;
#[path = "transport/tap.rs"]
mod tap;

#[path = "transport/answers.rs"]
mod answers;
#[path = "transport/calls.rs"]
mod calls;
#[path = "transport/descriptors.rs"]
mod descriptors;
#[path = "transport/dialling.rs"]
mod dialling;
#[path = "transport/endings.rs"]
mod endings;
#[path = "transport/greedy.rs"]
mod greedy;
#[path = "transport/hostile.rs"]
mod hostile;
#[path = "transport/rotation.rs"]
mod rotation;
