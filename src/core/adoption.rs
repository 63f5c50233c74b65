//! A predecessor's next hops of one family, after a restart.
//!
//! Until an LB is known they are left as they are. From then on those that no
//! LB has told yet stay beside the told ones: a route that shrank to the first
//! LB and grew again would move flows away and back.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// So long hops stay that nobody tells. All LBs come with the registry's first
/// list, and their sessions ask nsmgr at the same time: the others follow the
/// first within a second, or after two pauses of two seconds where nsmgr could
/// not be asked. Not longer: the flows of an LB that died while nobody watched
/// are lost until then.
const SETTLING: Duration = Duration::from_secs(5);

/// What a predecessor's next hops are to us; driven by `dataplane`.
#[derive(Debug)]
pub(super) enum Adoption {
    /// No LB is known yet: they are all left alone.
    Whole {
        /// Addresses that LBs have told meanwhile.
        told: BTreeSet<IpAddr>,
    },
    /// Some LB is known; these were told by none.
    Partly {
        /// They stay.
        hops: BTreeSet<IpAddr>,
        /// Until then.
        until: Instant,
    },
    /// Every hop is known to us.
    Over,
}

impl Default for Adoption {
    fn default() -> Self {
        Self::Whole {
            told: BTreeSet::new(),
        }
    }
}

impl Adoption {
    /// An LB has told its address: what shall be of it is known from now on.
    pub(super) fn told(&mut self, address: IpAddr) {
        match self {
            Self::Whole { told } => {
                told.insert(address);
            }
            Self::Partly { hops, .. } => {
                hops.remove(&address);
            }
            Self::Over => {}
        }
    }

    /// Whether the route is a predecessor's alone.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self, Self::Whole { .. })
    }

    /// The first LB is known: of the hops that are `there` those untold stay
    /// for the settling time.
    pub(super) fn begin(&mut self, there: &BTreeSet<IpAddr>, now: Instant) {
        if let Self::Whole { told } = self {
            *self = Self::Partly {
                hops: there.difference(told).copied().collect(),
                until: now + SETTLING,
            };
        }
    }

    /// The hops that stay beside the told ones. What is no longer `there` does
    /// not come back: the kernel knows why it took a hop away.
    pub(super) fn hops(&mut self, there: &BTreeSet<IpAddr>, now: Instant) -> BTreeSet<IpAddr> {
        if let Self::Partly { hops, until } = self {
            hops.retain(|hop| there.contains(hop));
            if *until > now && !hops.is_empty() {
                return hops.clone();
            }
            *self = Self::Over;
        }
        BTreeSet::new()
    }

    /// When hops that nobody told go.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Partly { until, .. } => Some(*until),
            Self::Whole { .. } | Self::Over => None,
        }
    }
}
