//! The per-node proxy between Meridio's load balancers and targets on Network
//! Service Mesh: a synchronous daemon of a few named threads.
//!
//! ```text
//!          EDGES (I/O, one thread each)                 OWNER           KERNEL
//!  nsmgr registry --> lb-watch --starts/stops--> lb:N --+
//!  nsmgr monitor  ----------------------------> lb:N    | Event
//!  nsmgr request  <---------------------------- lb:N   -+------> net --ops--> rtnetlink
//!  targets --> grpc --job--> nse ----------------------+          ^
//!  NSP     --> vip-watch ------------------------------+          | dump, events
//!  IPAM    <--> ipam ----------------------------------+   link-monitor
//!  SPIRE   --> svid-watch --> SvidCell (read by TLS and token code)
//!  signals --> signals --> main: start order, stop order, exit code
//! ```
//!
//! Facts flow from left to right and nothing flows back from `net` to a
//! producer. ARCHITECTURE.md has the map, the invariants and the thread table.

pub mod cli;
pub mod config;
pub mod core;
pub mod daemon;
pub mod endpoint;
pub mod error;
pub mod health;
pub mod ipam;
pub mod kernel;
pub mod logging;
pub mod nsm;
pub mod nsp;
pub mod rpc;
pub mod spiffe;
pub mod sync;
pub mod transport;

/// Messages of the wire descriptions in `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
