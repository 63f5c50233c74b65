//! The peers of the lab, each with its bad days.

use std::fmt;

use super::Topology;
use crate::fault::{Fault, Faults};

/// One of the peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    Agent,
    Nsmgr,
    Registry,
    Forwarder,
    Ipam,
    Nsp,
    /// By its name.
    Lb(String),
    /// By its name.
    Target(String),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lb(name) | Self::Target(name) => f.write_str(name),
            other => write!(f, "{other:?}"),
        }
    }
}

impl Topology {
    /// Does it to the peer; see the peer's [`Faults`] for what it means.
    pub fn inflict(&mut self, peer: &Peer, fault: &Fault) -> Result<(), String> {
        let done = self.with_peer(peer, |faults| faults.inflict(fault));
        done.map_err(|error| format!("{peer}, {fault}: {error}"))
    }

    /// The peer is well again.
    pub fn recover(&mut self, peer: &Peer) -> Result<(), String> {
        let done = self.with_peer(peer, |faults| faults.recover());
        done.map_err(|error| format!("{peer} recovers: {error}"))
    }

    fn with_peer(
        &mut self,
        peer: &Peer,
        act: impl FnOnce(&mut dyn Faults) -> Result<(), String>,
    ) -> Result<(), String> {
        match peer {
            Peer::Agent => act(&mut self.agent),
            Peer::Nsmgr => act(&mut self.nsmgr),
            Peer::Registry => act(&mut self.nsmgr.registry_process()),
            Peer::Forwarder => act(&mut self.nsmgr.forwarder_process()),
            Peer::Ipam => act(&mut self.ipam),
            Peer::Nsp => act(&mut self.nsp),
            Peer::Lb(name) => {
                let lb = self.lbs.get(name).ok_or("there is none")?;
                act(&mut self.nsmgr.lb_process(lb))
            }
            Peer::Target(name) => act(&mut self.nsmgr.target_process(&self.target(name)?)),
        }
    }
}
