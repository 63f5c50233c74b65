//! SPIFFE mTLS with descriptor passing, under gRPC.
//!
//! The daemon dials and accepts the sockets itself, does TLS with the
//! `openssl` crate, and hands gRPC one end of an anonymous socket pair; a
//! relay moves bytes between the two. gRPC's own TLS checks host names, cannot
//! attach descriptors and hides the peer's certificate, which the NSM token
//! needs; this way, too, its HTTP/2 code never sees a byte of a peer that was
//! not verified.
//!
//! ```text
//! client: Connector -- dialer (conn-<name>): dial, tls, then a link ---+
//! server: TlsServer -- accept (tls-accept): listener, tls, a link -----+
//!                                                                      v
//!         relay (tls-<name>, relay-in): link = tls session <-> gRPC's socket pair
//! ```
//!
//! `link` has the rules by which a connection ends: what one side wrote before
//! it went still reaches the other. `fd_socket` sends descriptors beneath TLS,
//! `frames` sees the peer's first SETTINGS and its GOAWAY.

mod accept;
mod allowance;
mod buffer;
pub mod client;
mod complaints;
pub mod descriptors;
mod dial;
mod dialer;
pub mod error;
mod fd_socket;
mod frames;
mod link;
mod listener;
mod relay;
pub mod server;
mod tls;
