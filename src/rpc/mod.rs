//! Everything the daemon needs of gRPC that is not one edge's business:
//! environments and channel options (`env`), method constants (`method`),
//! messages encoded once for many streams (`encoded`), unary calls that can be
//! stopped (`call`), streams as bounded channels (`pump`), ending a server
//! (`server`), and errors (`status`).
//!
//! All other code sees crossbeam channels and [`status::RpcError`] only. No
//! async runtime is involved: the few futures that grpcio hands out are driven
//! by its own completion-queue threads, inside this module.

pub mod call;
pub mod encoded;
pub mod env;
pub mod method;
pub mod pump;
pub mod server;
pub mod status;
