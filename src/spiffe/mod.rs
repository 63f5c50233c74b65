//! Who this process is, and how a peer proves who it is: SPIFFE X.509-SVIDs.
//!
//! The `svid-watch` thread ([`workload`]) keeps [`SvidCell`] at the latest
//! identity; TLS handshakes and token signing read it. An [`Identity`] is
//! never changed: a rotation puts a new one into the cell, and a connection
//! keeps the one that it was made with, since NSM verifies tokens with the
//! certificate of the TLS session that carries them.

mod der;
pub mod error;
pub mod jwt;
pub mod svid;
pub mod verify;
pub mod workload;

use std::sync::Arc;

use crate::sync::watch::Watch;
pub use svid::{Bundles, SpiffeId, Svid, TrustDomain};
pub use verify::PeerIdentity;

/// One coherent state of what the Workload API said.
pub struct Identity {
    /// The process's own certificate chain and key.
    pub svid: Svid,
    /// The authorities of every trust domain that is accepted.
    pub bundles: Bundles,
    /// Counts the replacements, from 1.
    pub generation: u64,
}

/// The latest identity; `None` until the first one arrives.
pub type SvidCell = Watch<Option<Arc<Identity>>>;
