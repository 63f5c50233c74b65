//! The decisions, as machines without I/O.
//!
//! Rules of this folder, checked by `tests/architecture.rs`: it names no crate
//! but std and ipnetwork, reads no clock (methods take `now`), starts no
//! thread, holds no channel, and does not log: the worker that drives a
//! machine logs what the machine returns. Collections are ordered, so that the
//! same inputs always give the same outputs.

mod adoption;
pub mod announce;
pub mod dataplane;
pub mod desired;
pub mod event;
pub mod family;
pub mod ids;
pub mod ip_context;
pub mod lb_session;
pub mod lease;
pub mod mesh;
pub mod observed;
pub mod op;
pub mod plan;
pub mod readiness;
pub mod registration;
pub mod retry;
mod rule_tree;
pub mod rules;
pub mod targets;
pub mod vips;
