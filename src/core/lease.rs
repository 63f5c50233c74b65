//! The life of IPAM leases.

use ipnetwork::IpNetwork;

use super::family::PerFamily;

/// The two addresses of a connection in one family, each with the node's
/// prefix length. The remote peer owns `src`, the proxy's port `dst`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Child `<id>-src`.
    pub src: IpNetwork,
    /// Child `<id>-dst`.
    pub dst: IpNetwork,
}

/// What a connection gets: its leases, and the bridge's addresses, which are
/// the gateways of targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The leases of each configured family.
    pub leases: PerFamily<Option<Lease>>,
    /// The bridge's address of each configured family.
    pub bridge: PerFamily<Option<IpNetwork>>,
}
