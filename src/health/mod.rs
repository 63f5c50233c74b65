//! What the probes are told.

pub mod client;

/// The conditions that readiness is made of, with their names on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SubService {
    /// `IPAMCli`: the connection to IPAM is up.
    IpamCli,
    /// `NSPCli`: the connection to NSP is up.
    NspCli,
    /// `NSMEndpoint`: the own endpoint answers over mTLS.
    NsmEndpoint,
    /// `Egress`: at least one LB is connected.
    Egress,
}

/// The shared state of the probes; clones refer to the same.
#[derive(Clone, Default)]
pub struct HealthCell {}

impl HealthCell {
    /// All sub-services NOT_SERVING.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a sub-service, with the reason that the log and the status show.
    pub fn set(&self, _service: SubService, _serving: bool, _reason: &str) {
        todo!()
    }

    /// From now on Readiness and Liveness are NOT_SERVING.
    pub fn stopping(&self) {
        todo!()
    }
}
